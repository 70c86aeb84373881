import asyncio
import contextlib

import pytest

from nsm.connections import Connections
from nsm.errors import UnavailableError
from nsm.events import Events, selects
from nsm.identity.spiffe import SpiffeId
from nsm.model import Connection, EventType, Path, Segment, Selector, State

ALICE, MALLORY = SpiffeId.parse("spiffe://td/alice"), SpiffeId.parse("spiffe://td/mallory")


def conn(id_: str, service: str = "svc", **more) -> Connection:
    segments = (Segment("nsc", "n0"), Segment("me", id_))
    return Connection(id=id_, service=service, path=Path(segments, 1), **more)


async def hold(connections, made, previous):
    async with connections.turn(made.id) as held:
        held.made, held.previous = made, previous


async def test_the_initial_transfer_comes_even_when_it_is_empty():
    events = Events(Connections())
    async with contextlib.aclosing(events.watch(Selector(), ALICE)) as seen:
        first = await anext(seen)
    assert (first.type, first.connections) == (EventType.INITIAL_STATE_TRANSFER, {})
    assert len(events) == 0


async def test_a_caller_sees_its_own_connections_and_nothing_of_others():
    connections = Connections()
    await hold(connections, conn("a"), ALICE)
    await hold(connections, conn("m"), MALLORY)
    events = Events(connections)
    async with contextlib.aclosing(events.watch(Selector(), ALICE)) as seen:
        assert set((await anext(seen)).connections) == {"a"}
        events.publish(EventType.UPDATE, conn("m"), MALLORY)
        events.publish(EventType.UPDATE, conn("a", state=State.DOWN), ALICE)
        event = await anext(seen)
        assert event.connections["a"].state == State.DOWN
        assert set(event.connections) == {"a"}


async def test_an_observer_sees_all():
    connections = Connections()
    await hold(connections, conn("m"), MALLORY)
    events = Events(connections, observer=lambda who: who == ALICE)
    async with contextlib.aclosing(events.watch(Selector(), ALICE)) as seen:
        assert set((await anext(seen)).connections) == {"m"}


async def test_a_slow_watcher_gets_the_newest_state_of_each_and_no_more():
    events = Events(Connections())
    async with contextlib.aclosing(events.watch(Selector(), ALICE)) as seen:
        await anext(seen)
        for n in range(1000):
            events.publish(EventType.UPDATE, conn("a", labels={"n": str(n)}), ALICE)
        events.publish(EventType.DELETE, conn("b"), ALICE)
        update, delete = await anext(seen), await anext(seen)
        assert update.connections["a"].labels == {"n": "999"}
        assert delete.type == EventType.DELETE


async def test_stopping_ends_streams_with_an_error_that_is_not_cancelled():
    events = Events(Connections())
    seen = events.watch(Selector(), ALICE)
    await anext(seen)
    waiting = asyncio.create_task(anext(seen))
    await asyncio.sleep(0)
    events.stop()
    with pytest.raises(UnavailableError, match="its wires stay"):
        await waiting


@pytest.mark.parametrize(
    ("selector", "selected"),
    [
        (Selector(), True),
        (Selector(services=("svc",)), True),
        (Selector(services=("other",)), False),
        (Selector((Segment("nsc", ""),)), True),
        (Selector((Segment("", "c"),)), True),
        (Selector((Segment("nsc", "n0"), Segment("me", ""))), True),
        (Selector((Segment("nsc", "n1"),)), False),
        (Selector((Segment("me", ""), Segment("nsc", ""))), False),
        (Selector((Segment("nsc", ""),), ("other",)), False),
        (Selector((Segment("", ""),) * 3), False),
    ],
)
def test_what_a_selector_selects(selector, selected):
    assert selects(selector, conn("c")) is selected

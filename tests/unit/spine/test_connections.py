import asyncio

import pytest

from nsm.connections import MAX_WAITING, Connections
from nsm.errors import AbortedError, ExhaustedError
from nsm.model import Connection


async def test_operations_on_one_connection_take_turns_in_the_order_they_came():
    connections, order = Connections(), []

    async def operate(n):
        async with connections.turn("c"):
            await asyncio.sleep(0)
            order.append(n)

    await asyncio.gather(*(operate(n) for n in range(8)))
    assert order == list(range(8))
    assert len(connections) == 0


async def test_other_connections_do_not_wait():
    connections = Connections()
    async with connections.turn("a"), asyncio.timeout(1), connections.turn("b"):
        assert len(connections) == 2


async def test_what_was_never_established_is_forgotten_and_what_was_is_kept():
    connections = Connections()
    async with connections.turn("a") as held:
        held.made = Connection(id="a")
    with pytest.raises(ZeroDivisionError):
        async with connections.turn("b"):
            raise ZeroDivisionError
    assert [held.id for held in connections.established()] == ["a"]
    assert len(connections) == 1


async def test_a_close_cuts_a_request_short_and_says_who_did():
    connections = Connections()
    under_way = asyncio.Event()

    async def request():
        async with connections.turn("c") as held:
            with connections.interruptible(held):
                under_way.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await under_way.wait()
    connections.interrupt("c", "spiffe://td/nsc")
    with pytest.raises(AbortedError, match="closed by spiffe://td/nsc while it was being made"):
        await task
    assert task.cancelling() == 0
    assert len(connections) == 0


async def test_a_real_cancellation_stays_one_even_when_interrupted_too():
    connections = Connections()
    under_way = asyncio.Event()

    async def request():
        async with connections.turn("c") as held:
            with connections.interruptible(held):
                under_way.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await under_way.wait()
    connections.interrupt("c", "somebody")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_interrupting_what_does_not_run_does_nothing():
    connections = Connections()
    connections.interrupt("nobody", "x")
    async with connections.turn("c"):
        connections.interrupt("c", "x")
        await asyncio.sleep(0)


async def test_waiting_operations_are_bounded():
    connections = Connections()
    async with connections.turn("c"):
        waiting = []

        async def wait():
            async with connections.turn("c"):
                pass

        waiting = [asyncio.create_task(wait()) for _ in range(MAX_WAITING - 1)]
        await asyncio.sleep(0)
        with pytest.raises(ExhaustedError, match="wait for one another"):
            await wait()
    await asyncio.gather(*waiting)


async def test_connections_are_bounded():
    connections = Connections(limit=1)
    async with connections.turn("a") as held:
        held.made = Connection(id="a")
    with pytest.raises(ExhaustedError, match="connection b would be the 2th here"):
        async with connections.turn("b"):
            pass

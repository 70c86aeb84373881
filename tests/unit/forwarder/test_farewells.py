"""What an endpoint could not be told is told later, once, and never to a wire made anew."""

import asyncio
import time
from dataclasses import replace

import pytest

from forwarder.crossing import Crossing
from forwarder.farewells import Farewells
from nsm.connections import Connections
from nsm.errors import DeniedError, UnavailableError
from nsm.model import SECOND, Connection, Mechanism, Path, Segment
from tests.support.wait import until

AWAY = UnavailableError("cannot connect to tcp://10.0.0.2:5001")
MEMORY = Crossing("gate", "IP", "tcp://10.0.0.2:5001", Mechanism(), None)


def conn(seconds: float = 600) -> Connection:
    ends = time.time_ns() + int(seconds * SECOND)
    return Connection(id="c1", path=Path((Segment("nsc", "c0", "t", ends),), 0))


class NextHop:
    """Refuses with what it is given, and then takes what comes."""

    def __init__(self, *refusals: Exception) -> None:
        self.refusals = list(refusals)
        self.told: list[str] = []

    async def close_far(self, conn: Connection, memory: Crossing) -> None:
        """Note it, or refuse."""
        if self.refusals:
            raise self.refusals.pop(0)
        self.told.append(conn.id)


@pytest.fixture
async def saying():
    """Begin a task that says farewells to a next hop."""
    tasks = []

    def begin(hop: NextHop, connections: Connections[Crossing] | None = None) -> Farewells:
        farewells = Farewells(hop)
        held = Connections() if connections is None else connections  # an empty one is false
        tasks.append(asyncio.create_task(farewells.follow(held)))
        return farewells

    yield begin
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_it_is_said_again_until_it_is_heard(saying):
    hop = NextHop(AWAY, TimeoutError())
    farewells = saying(hop)
    assert farewells.owe(conn(), MEMORY, AWAY)
    await until(lambda: hop.told, "the farewell", bar=2.5)
    await until(lambda: not farewells, "nothing more to say", bar=0.1)
    assert hop.told == ["c1"]


async def test_a_wire_that_was_asked_for_anew_hears_no_farewell(saying):
    hop, connections = NextHop(), Connections[Crossing]()
    farewells = saying(hop, connections)
    async with connections.turn("c1") as held:
        assert farewells.owe(conn(), MEMORY, AWAY)
        held.made, held.memory = conn(), MEMORY
    await until(lambda: not farewells, "it to be dropped", bar=1)
    assert not hop.told


async def test_the_wire_before_is_told_though_another_of_its_connection_stands(saying):
    hop, connections = NextHop(), Connections[Crossing]()
    farewells = saying(hop, connections)
    async with connections.turn("c1") as held:
        held.made, held.memory = conn(), replace(MEMORY, leg="0badcafe")
    assert farewells.owe(conn(), MEMORY, AWAY)
    await until(lambda: hop.told, "the farewell", bar=1)


async def test_who_refuses_is_not_asked_twice_and_who_cannot_be_told_is_not_owed(saying):
    hop = NextHop(DeniedError("no"))
    farewells = saying(hop)
    assert farewells.owe(conn(), MEMORY, AWAY)
    await until(lambda: not farewells, "nothing more to say", bar=1)
    assert not hop.told
    assert not farewells.owe(conn(), MEMORY, DeniedError("no"))
    assert not farewells.owe(conn(), None, AWAY)
    assert not farewells.owe(conn(), replace(MEMORY, url="unix:///proc/self/fd/9"), AWAY)
    assert not farewells.owe(conn(-1), MEMORY, AWAY), "its lease there has ended"

"""What a manager's next life finds: its wires, who was registered, damage, a full disk."""

import asyncio
import contextlib
import os
import sqlite3
import subprocess
import time
from dataclasses import replace

import pytest
import structlog

from nsm.connections import Held
from nsm.errors import PreconditionError
from nsm.hop import Hop
from nsm.identity.spiffe import SpiffeId
from nsm.model import (
    SECOND,
    Connection,
    Endpoint,
    Event,
    EventType,
    Found,
    Path,
    Segment,
    State,
)
from nsm.registration import RegistrationPath
from nsmgr import adoption, registry
from nsmgr.registry import Locals, NodeRegistry
from nsmgr.route import Next
from nsmgr.store import SCHEMA, Carried, Registered, open_store
from tests.support.wait import until

CONN = Connection(
    id="c1",
    service="vpn",
    endpoint="gate",
    path=Path((Segment("nsc", "c0", "t", 5), Segment("m", "c1", "u", 6), Segment("f", "c2")), 1),
)
APP = SpiffeId.parse("spiffe://td/app")
CARRIED = Carried("c1", APP, str(APP), CONN, "f", 1_900_000_000 * SECOND)
REGISTERED = Registered(
    Endpoint("gate", ("vpn",), {"vpn": {"a": "b"}}, "tcp://10.0.0.1:5001", 17),
    RegistrationPath(("t", "u"), 1),
    ("spiffe://td/gate", "spiffe://td/m"),
    18,
    16,
    4711,
)


async def test_what_is_kept_comes_back_as_it_was_and_what_is_over_does_not(tmp_path):
    path = str(tmp_path / "m.sqlite")
    async with open_store(path) as (store, left):
        assert not left.connections
        assert not left.registrations
        for number in range(50):
            store.carries(replace(CARRIED, id=f"c{number}"))
            store.registers(
                replace(REGISTERED, endpoint=replace(REGISTERED.endpoint, name=f"g{number}"))
            )
        store.carries(replace(CARRIED, forwarder="g"))
        store.lost("c7")
        store.registers(REGISTERED)
        store.unregistered("g7")
    async with open_store(path) as (_, left):
        carried = {one.id: one for one in left.connections}
        registered = {one.endpoint.name: one for one in left.registrations}
        assert len(carried) == 49
        assert carried["c1"] == replace(CARRIED, forwarder="g")
        assert len(registered) == 50
        assert registered["gate"] == REGISTERED
    assert os.stat(path).st_mode & 0o777 == 0o600


async def test_without_a_file_nothing_is_kept():
    async with open_store("") as (store, left):
        store.carries(CARRIED)
        await store.flushed()
        assert not left.connections


async def test_a_damaged_file_is_said_so_and_done_without(tmp_path):
    path = tmp_path / "m.sqlite"
    path.write_bytes(b"not a database at all, by no means" * 100)
    before = path.read_bytes()
    with structlog.testing.capture_logs() as logs:
        async with open_store(str(path)) as (store, left):
            store.registers(REGISTERED)
            assert not left.registrations
    assert path.read_bytes() == before
    assert "is damaged: file is not a database" in logs[0]["why"]


@pytest.mark.parametrize(
    ("damage", "whose"),
    [
        ("UPDATE connections SET connection = x'ff'", "the connection 'c1'"),
        ("UPDATE registrations SET endpoint = x'ff'", "the endpoint 'gate'"),
        ("UPDATE registrations SET path = '{'", "store"),
        ("UPDATE registrations SET ids = '['", "the endpoint 'gate'"),
    ],
)
async def test_what_cannot_be_read_is_damage(tmp_path, damage, whose):
    path = str(tmp_path / "m.sqlite")
    async with open_store(path) as (store, _):
        store.carries(CARRIED)
        store.registers(REGISTERED)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(damage)
        connection.commit()
    with structlog.testing.capture_logs() as logs:
        async with open_store(path) as (_, left):
            assert not left.connections
    assert whose in logs[0]["why"]


async def test_another_manager_s_file_and_a_newer_one_s_are_refused(tmp_path):
    path = str(tmp_path / "m.sqlite")
    async with open_store(path):
        with pytest.raises(
            PreconditionError, match=r"manager's store .* in use by another process"
        ):
            async with open_store(path):
                pass
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(PreconditionError, match=f"has schema {SCHEMA + 1}"):
        async with open_store(path):
            pass


class World:
    """A manager's next life, whose forwarder says what it is told to."""

    def __init__(self):
        self.told = asyncio.Queue()
        self.followed = []
        self.tasks = []
        self.locals = Locals()
        self.hop = Hop(
            "m", None, lifetime=600 * SECOND, spawn=self.spawn, monitor=self.monitor, moves=True
        )

    def spawn(self, work, name):
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def monitor(self, url, selector):
        self.followed.append(url)
        while True:
            yield await self.told.get()

    def register(self, name):
        until_ = time.time_ns() + 60 * SECOND
        self.locals.put(Endpoint(name, ("forwarder",), expires=until_), f"unix:///{name}", None)

    async def end(self):
        self.hop.stop()
        self.locals.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_a_wire_of_an_earlier_life_is_held_told_and_followed_once_its_forwarder_is_back(
    tmp_path,
):
    path = str(tmp_path / "m.sqlite")
    async with open_store(path) as (store, _):
        keeper = adoption.Keeper(store)
        keeper.begin("c1")
        keeper.keep(Held("c1", CONN, APP, str(APP), Next("f", "unix:///proc/self/fd/9")), 0)
        keeper.keep(Held("c2", CONN, APP, str(APP), None), 0)
        keeper.keep(Held("c3", replace(CONN, id="c3"), APP, str(APP), Next("f", "x")), 0)
        keeper.drop("c3")
    async with open_store(path) as (_, left):
        world = World()
        (held,) = adoption.adopt(left.connections, world.hop)
        assert (held.previous, held.origin, held.memory) == (APP, str(APP), Next("f", ""))
        assert held.made.segments == CONN.segments
        assert held.made.state == State.REFRESH_REQUESTED, "nobody would ask for it again"
        # its lease is over, but whoever refreshes could not meanwhile
        assert world.hop.leases.ends("c1") > time.time_ns() + 20 * SECOND
        following = world.spawn(adoption.follow_again([held], world.hop, world.locals), "return")
        world.register("another")
        world.register("f")
        await until(lambda: world.followed == ["unix:///f"], "it is followed", bar=0.1)
        await until(following.done, "nobody else is waited for", bar=0.1)
        assert held.memory.url == "unix:///f"
        world.told.put_nowait(Event(EventType.INITIAL_STATE_TRANSFER, {}))
        await until(lambda: held.made.state == State.DOWN, "it ended meanwhile", bar=0.1)
        await world.end()


async def test_one_that_was_asked_for_sooner_is_left_as_it_is(tmp_path):
    world = World()
    (held,) = adoption.adopt([CARRIED], world.hop)
    held.memory = Next("f", "unix:///newer")
    following = world.spawn(adoption.follow_again([held], world.hop, world.locals), "return")
    await until(following.done, "there is nothing to wait for", bar=0.1)
    assert not world.followed
    await world.end()


OURS = "tcp://10.0.0.1:5001"


class Domain:
    """A registry that knows some endpoints, by the URLs of their managers."""

    def __init__(self, **known):
        self.known = known
        self.told = []

    async def find_endpoints(self, query, watch, caller):
        if url := self.known.get(query.name):
            yield Found(Endpoint(query.name, url=url))

    async def unregister_endpoint(self, asked, by):
        self.told.append((asked.name, asked.url, by.owner, by.path))
        self.known.pop(asked.name, None)


@pytest.fixture
def dead():
    """The number of a process that is no more; nobody else gets it meanwhile."""
    with subprocess.Popen(["/bin/true"]) as process:
        process.wait()
    return process.pid


async def test_who_died_while_no_manager_ran_is_unregistered_and_nobody_else(
    tmp_path, monkeypatch, dead
):
    monkeypatch.setattr(registry, "LOOK_EVERY", 0.005)
    later = time.time_ns() + 60 * SECOND
    gone, lives, back, away, over, carrier = (
        replace(
            REGISTERED,
            endpoint=replace(REGISTERED.endpoint, name=name, services=(service,)),
            until=until_,
            pid=pid,
        )
        for name, service, until_, pid in (
            ("gone", "vpn", later, dead),
            ("lives", "vpn", later, os.getpid()),
            ("back", "vpn", later, dead),
            ("elsewhere", "vpn", later, dead),
            ("over", "vpn", time.time_ns(), 0),
            ("carrier", "forwarder", later, dead),
        )
    )
    left = (gone, lives, back, away, over, carrier)
    path = str(tmp_path / "m.sqlite")
    async with open_store(path) as (store, _):
        for one in left:
            store.registers(one)
    domain = Domain(gone=OURS, lives=OURS, back=OURS, over=OURS, carrier=OURS)
    domain.known["elsewhere"] = "tcp://10.0.0.2:5001"
    async with open_store(path) as (store, found), asyncio.TaskGroup() as group:
        locals_, ends = Locals(), {}

        def spawn(work, name):
            ends[name] = group.create_task(work)
            return ends[name]

        node = NodeRegistry(domain, locals_, {}, spawn=spawn, kept=store)
        node.expect(found.registrations, None)
        following = group.create_task(node.follow("forwarder"))
        locals_.put(replace(back.endpoint, expires=later), "unix:///back", None)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not domain.told, "it does not know its own URL yet"
        node.public_url = OURS
        await until(lambda: len(ends) == 3, "three ends", bar=0.5, record=False)
        await until(lambda: all(one.done() for one in ends.values()), "they are told", bar=0.1)
        following.cancel()
    assert sorted(one[:3] for one in domain.told) == [
        ("gone", OURS, "spiffe://td/gate"),
        ("over", OURS, "spiffe://td/gate"),
    ]
    assert domain.told[0][3] == REGISTERED.path
    locals_.close()
    async with open_store(path) as (_, found):
        names = {one.endpoint.name for one in found.registrations}
        assert names == {"lives", "back", "carrier"}

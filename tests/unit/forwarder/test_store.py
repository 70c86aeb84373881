"""What a forwarder's next life finds: rows, damage, a full disk, somebody else's file."""

import asyncio
import contextlib
import os
import sqlite3
from dataclasses import replace
from ipaddress import ip_address

import pytest
import structlog

from forwarder import adoption
from forwarder.route import Crossing
from forwarder.store import KEPT, SCHEMA, Lease, Space, load, open_store
from nsm import store as stores
from nsm.connections import Held
from nsm.errors import PreconditionError
from nsm.hop import Hop
from nsm.identity.spiffe import SpiffeId
from nsm.kernel.state import Interface, Namespace, RemoteWire, VxlanTunnel
from nsm.model import SECOND, Connection, Mechanism, Path, Segment, Selector
from tests.support.wait import until

CONN = Connection(
    id="c1",
    service="vpn",
    endpoint="gate",
    path=Path((Segment("nsc", "c0", "t", 5), Segment("f", "c1", "u", 6)), 1),
)
LEASE = Lease(
    id="c1",
    previous=SpiffeId.parse("spiffe://td/nsmgr"),
    origin="spiffe://td/app",
    connection=CONN,
    next_url="tcp://10.0.0.2:5001",
    endpoint="gate",
    payload="ETHERNET",
    outgoing=Mechanism("REMOTE", "VXLAN", {"vni": "42"}),
    chosen=True,
    spaces=(Space("src", 5, 4026531840, "nsm-1"),),
    ends=1_900_000_000 * SECOND,
)


async def kept(path, *leases):
    async with open_store(str(path)) as (store, _):
        for lease in leases:
            store.keep(lease)


async def test_a_lease_comes_back_as_it_was_and_a_dropped_one_does_not(tmp_path):
    path = tmp_path / "f.sqlite"
    async with open_store(str(path)) as (store, found):
        assert not found
        for number in range(50):
            store.keep(replace(LEASE, id=f"c{number}"))
        store.keep(replace(LEASE, id="c7", payload="IP"))
        store.drop("c8")
    assert store.transactions <= 3, "changes are not written together"
    async with open_store(str(path)) as (_, found):
        assert len(found) == 49
        by_id = {one.id: one for one in found}
    assert by_id["c1"] == LEASE
    assert by_id["c7"].payload == "IP"
    assert os.stat(path).st_mode & 0o777 == 0o600


async def test_nodes_that_answered_are_known_to_the_next_life(tmp_path):
    path, one, two = str(tmp_path / "f.sqlite"), ("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")
    async with open_store(path) as (store, _):
        assert not store.answered
        store.answers(one)
        store.answers(two)
        store.answers(one)
        store.keep(LEASE)
    async with open_store(path) as (store, leases):
        assert store.answered == {one, two}
        assert leases == [LEASE]
        store.left(one)
    async with open_store(path) as (store, _):
        assert store.answered == {two}


async def test_it_is_read_while_its_forwarder_runs_and_another_forwarder_is_refused(tmp_path):
    path = tmp_path / "f.sqlite"
    async with open_store(str(path)) as (store, _):
        store.keep(LEASE)
        await store.flushed()
        with stores.looked_into(str(path), KEPT) as connection:
            assert load(connection) == [LEASE]
        with pytest.raises(PreconditionError, match="in use by another forwarder"):
            async with open_store(str(path)):
                pass
        store.drop("c1")
        await store.flushed()
        with stores.looked_into(str(path), KEPT) as connection:
            assert load(connection) == []


async def test_without_a_file_nothing_is_kept():
    async with open_store("") as (store, found):
        store.keep(LEASE)
        await store.flushed()
        assert not found
        assert store.transactions == 0


async def test_a_damaged_file_is_said_so_left_alone_and_done_without(tmp_path):
    path = tmp_path / "f.sqlite"
    path.write_bytes(b"not a database at all, by no means" * 100)
    before = path.read_bytes()
    with structlog.testing.capture_logs() as logs:
        async with open_store(str(path)) as (store, found):
            store.keep(LEASE)
            assert not found
    assert path.read_bytes() == before
    assert "is damaged: file is not a database" in logs[0]["why"]
    assert "move it away" in logs[0]["why"]


async def test_a_lease_that_cannot_be_read_is_damage(tmp_path):
    path = tmp_path / "f.sqlite"
    await kept(path, LEASE)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE leases SET connection = x'ff'")
        connection.commit()
    with structlog.testing.capture_logs() as logs:
        async with open_store(str(path)) as (_, found):
            assert not found
    assert "the lease of 'c1' cannot be read" in logs[0]["why"]


async def test_a_file_of_a_newer_version_is_refused_with_a_sentence(tmp_path):
    path = tmp_path / "f.sqlite"
    await kept(path, LEASE)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    with pytest.raises(PreconditionError, match=f"has schema {SCHEMA + 1}.*knows up to {SCHEMA}"):
        await kept(path, LEASE)


async def test_a_disk_that_is_full_is_said_once_and_what_waits_is_written_when_it_is_not(tmp_path):
    path = tmp_path / "f.sqlite"
    async with open_store(str(path)) as (store, _):
        store.keep(LEASE)
        await store.flushed()
        (pages,) = store._connection.execute("PRAGMA page_count").fetchone()
        store._connection.execute(f"PRAGMA max_page_count = {pages}")  # SQLITE_FULL beyond
        with structlog.testing.capture_logs() as logs:
            for number in range(200):
                store.keep(replace(LEASE, id=f"d{number}"))
            await until(lambda: store.trouble, "the store's trouble", bar=0.5, record=False)
            store.drop("d7")
            store._connection.execute("PRAGMA max_page_count = 1000000")
            store._write()
            await until(lambda: not store.trouble, "its end", bar=0.5, record=False)
            await store.flushed()
    assert [one["log_level"] for one in logs] == ["error", "warning"]
    assert "full" in logs[0]["why"]
    async with open_store(str(path)) as (_, found):
        assert {one.id for one in found} == {"c1"} | {f"d{n}" for n in range(200)} - {"d7"}


class Route:
    """Writes down what is taken down."""

    def __init__(self):
        self.withdrawn = []

    async def withdraw(self, conn, memory, caller):
        self.withdrawn.append((conn, memory))


async def test_what_is_written_of_a_wire_holds_it_again_in_the_next_life(tmp_path):
    path = tmp_path / "f.sqlite"
    space, own = Namespace(77, 5, 4026531840, "app"), Namespace(1, -1)
    tunnel = VxlanTunnel(42, ip_address("10.0.0.1"), ip_address("10.0.0.2"), own)
    wire = RemoteWire("c1", "src", Interface(space, "nsm-1"), tunnel, False)
    memory = Crossing("gate", "ETHERNET", "tcp://10.0.0.2:5001", LEASE.outgoing, wire, True)
    async with open_store(str(path)) as (store, _):
        keeper = adoption.Keeper(store)
        keeper.keep(Held("c1", CONN, LEASE.previous, LEASE.origin, memory), LEASE.ends)
        local = replace(memory, url="unix:///proc/self/fd/9")
        keeper.keep(Held("c2", CONN, LEASE.previous, LEASE.origin, local), 0)
        keeper.keep(Held("c3", CONN, LEASE.previous, LEASE.origin, None), 0)
    async with open_store(str(path)) as (_, leases):
        first, second = leases
        assert first == LEASE
        assert second.next_url == ""
        followed = []

        async def monitor(url: str, selector: Selector):
            followed.append(url)
            for nothing in ():
                yield nothing

        def spawn(coro, name):
            return tasks.setdefault(name, asyncio.create_task(coro))

        tasks, route = {}, Route()
        hop = Hop("f", route, lifetime=600 * SECOND, spawn=spawn, monitor=monitor)
        one, two = adoption.adopt(leases, hop)
        assert one.made == CONN
        assert (one.previous, one.origin) == (LEASE.previous, LEASE.origin)
        assert one.memory.namespaces[0].nsid == 5
        assert hop.leases.ends("c1") == LEASE.ends
        assert hop.watches.follows("c1")
        assert not hop.watches.follows("c2")
        # its lease is over, but whoever refreshes could not meanwhile
        await until(lambda: followed == ["tcp://10.0.0.2:5001"], "its next hop is asked")
        assert hop.leases.ends("c2") > 0
        assert "c2" in hop.leases
        hop._changed("c1", None)  # nobody knows how it is, which is no end
        hop.leases.until("c1", 1)
        await until(lambda: route.withdrawn, "its end", bar=0.2, record=False)
        ((conn, said),) = route.withdrawn
        assert (conn.id, conn.segments) == ("c1", CONN.segments)
        assert (said.url, said.endpoint, said.outgoing) == (
            "tcp://10.0.0.2:5001", "gate", LEASE.outgoing,
        )  # fmt: skip
        assert two.id in hop.connections
        hop.stop()
        for task in tasks.values():
            task.cancel()


async def test_what_was_being_made_is_known_to_the_next_life_until_it_is_made_or_given_up(tmp_path):
    path = tmp_path / "f.sqlite"
    async with open_store(str(path)) as (store, _):
        for name in ("c1", "c2", "c3"):
            store.begin(name)
        await store.flushed()
        store.keep(LEASE)
        store.drop("c2")
    async with open_store(str(path)) as (store, found):
        assert store.begun == {"c3"}
        assert found == [LEASE]
    async with open_store(str(path)) as (store, _):
        assert not store.begun


async def test_what_cannot_be_written_at_all_keeps_nobody_from_ending(tmp_path):
    path = tmp_path / "f.sqlite"
    with structlog.testing.capture_logs() as logs:
        async with asyncio.timeout(5), open_store(str(path)) as (store, _):
            store.keep(replace(LEASE, id="c2", ends=1 << 64))  # more than a column holds
            await store.flushed()
            store.keep(LEASE)
    assert [one["of"] for one in logs if one["log_level"] == "error"] == [["c2"]]
    async with open_store(str(path)) as (_, leases):
        assert leases == [LEASE]

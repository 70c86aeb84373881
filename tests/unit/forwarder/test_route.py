"""The forwarder's route where something fails: what is closed, what is kept, what is said."""

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from forwarder.deaths import Deaths
from forwarder.discovery import Offer
from forwarder.recovery import Recovery
from forwarder.route import ForwarderRoute
from forwarder.sockets import Sockets
from nsm.errors import DeadlineError, NotFoundError, UnavailableError
from nsm.hop import Hop
from nsm.kernel.owner import Mark
from nsm.kernel.state import Namespace
from nsm.model import SECOND, Connection, Endpoint, Mechanism, Path, Request, Segment
from nsm.rpc.calls import Answer
from tests.support.callers import Mesh
from tests.support.wait import until

ASKED = Connection(id="c0", service="vpn", path=Path((Segment("nsc", "c0"),)))
WANTED = (Mechanism("LOCAL", "KERNEL", {"name": "nsm-1", "inodeURL": "inode://4/78"}),)
ANSWER = Mechanism("LOCAL", "KERNEL", {"name": "n1", "inodeURL": "inode://4/77"})


class Kernel:
    """Counts wires; hangs when the test says so."""

    own = Namespace(1, -1)

    def __init__(self):
        self.wires = set()
        self.hang = False
        self.looking = None

    async def namespace(self, *, fd=None, name=""):
        return Namespace(os.fstat(fd).st_ino, 5)

    async def ensure(self, wire, undo, *, fds=None):
        if self.hang:
            await asyncio.Event().wait()
        undo.add("remove", self.remove, wire.connection)
        self.wires.add(wire.connection)

    async def remove(self, connection):
        self.wires.discard(connection)
        return 1

    async def remove_found(self, found):
        assert not found

    async def find(self):
        found = [SimpleNamespace(mark=Mark(one, "src")) for one in self.wires]
        if self.looking:
            await self.looking.wait()
        return found


class Endpoints:
    """Endpoints by name; those in `dead` answer nothing, those not in `listed` are unknown."""

    def __init__(self):
        self.listed = {"e-a": "unix:/a", "e-b": "unix:/b"}
        self.dead = set()
        self.log = []

    async def offers(self, conn, fds):
        if conn.endpoint and conn.endpoint not in self.listed:
            raise NotFoundError(f"network service endpoint {conn.endpoint} not found")
        if not self.listed:
            raise NotFoundError("network service endpoint candidates not found")
        names = [conn.endpoint] if conn.endpoint else list(self.listed)
        return [Offer(Endpoint(n, ("vpn",), url=self.listed[n]), "ETHERNET") for n in names]

    async def request(self, url, asked, *, fds, **how):
        self._reach("request", url)
        conn = asked.connection
        fds.adopt("inode://4/77", os.open("/proc/self/ns/net", os.O_PATH))
        first = conn.segments[0]
        own = Segment("nse", f"id at {url}", first.token, first.expires)
        path = Path((*conn.segments[: conn.index + 1], own), conn.index)
        return Answer(replace(conn, path=path, mechanism=ANSWER), None)

    async def close(self, url, conn, **how):
        self._reach("close", url)

    def _reach(self, what, url):
        self.log.append((what, url))
        if url in self.dead:
            raise UnavailableError(f"cannot connect to {url}")


class Files:
    """A client that sends its namespace with each call."""

    async def claim(self, url, patience=2.0):
        return os.open("/proc/self/ns/net", os.O_PATH)

    def send(self, fd):
        return ""


class Forwarder:
    """One life of a forwarder beside a kernel and endpoints that outlive it."""

    def __init__(self, callers, kernel, mesh):
        self.callers, self.kernel, self.mesh = callers, kernel, mesh
        self.tasks = []
        route = ForwarderRoute(mesh, mesh, kernel, None, Sockets(), Recovery(kernel), 0.75)
        self.hop = Hop("fwd", route, lifetime=600 * SECOND, spawn=self.spawn)

    def spawn(self, work, name):
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def request(self, conn=ASKED, within=3.0):
        until_when = asyncio.get_running_loop().time() + within
        call = replace(self.callers.call("nsc", deadline=until_when), fds=Files())
        return await self.hop.request(Request(conn, WANTED), call)


@pytest.fixture
async def lives():
    made, callers, kernel, mesh = [], Mesh(), Kernel(), Endpoints()

    def live():
        made.append(Forwarder(callers, kernel, mesh))
        return made[-1]

    yield live
    for one in made:
        one.hop.stop()
        await asyncio.gather(*one.tasks)


async def test_a_refresh_that_fails_after_a_restart_closes_nothing(lives):
    made = await lives().request()
    second = lives()
    second.mesh.log.clear()
    second.kernel.hang = True
    with pytest.raises(DeadlineError):
        await second.request(made, within=0.1)
    assert second.mesh.log == [("request", "unix:/a")]
    assert len(second.kernel.wires) == 1


async def test_a_client_may_move_from_an_endpoint_that_is_dead(lives):
    forwarder = lives()
    made = await forwarder.request(replace(ASKED, endpoint="e-a"))
    forwarder.mesh.dead.add("unix:/a")
    del forwarder.mesh.listed["e-a"]
    moved = await forwarder.request(replace(made, endpoint="e-b"))
    assert moved.endpoint == "e-b"
    assert forwarder.mesh.log[-2:] == [("request", "unix:/b"), ("close", "unix:/a")]


async def test_an_endpoint_that_is_dead_and_no_longer_registered_is_not_found(lives):
    forwarder = lives()
    made = await forwarder.request()
    forwarder.mesh.dead.add("unix:/a")
    del forwarder.mesh.listed["e-a"]
    with pytest.raises(NotFoundError, match=r"e-a not found; e-a: cannot connect to unix:/a"):
        await forwarder.request(made)


async def test_an_endpoint_that_is_gone_and_irreplaceable_may_come_back(lives):
    forwarder = lives()
    made = await forwarder.request()
    forwarder.mesh.dead.add("unix:/a")
    forwarder.mesh.listed.clear()
    with pytest.raises(UnavailableError, match=r"e-a not found, nor is any other; e-a: cannot"):
        await forwarder.request(made)
    assert len(forwarder.kernel.wires) == 1


async def test_a_wire_made_while_lost_events_are_made_up_for_is_left_alone(lives):
    forwarder = lives()
    kernel, hop = forwarder.kernel, forwarder.hop
    first = await forwarder.request()
    kernel.looking = asyncio.Event()
    comparing = asyncio.create_task(Deaths(hop, kernel, forwarder.spawn)._compare())
    await asyncio.sleep(0)  # it has looked
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    second = await forwarder.request(other)
    kernel.looking.set()
    await comparing
    assert not forwarder.tasks
    kernel.wires.discard(first.segments[1].id)  # now one has really gone
    await Deaths(hop, kernel, forwarder.spawn)._compare()
    await until(lambda: len(hop.connections) == 1, "the end of a lost wire", bar=0.1)
    assert hop.connections.established()[0].id == second.segments[1].id


async def test_a_wire_of_before_that_is_refreshed_late_is_not_swept(lives, monkeypatch):
    monkeypatch.setattr("forwarder.recovery.SPARE", 0.0)
    forwarder = lives()
    made = await forwarder.request()
    id_ = made.segments[1].id
    late = lives()
    recovery = Recovery(late.kernel)
    assert await recovery.look() == 1
    async with late.hop.connections.turn(id_):  # a refresh is under way
        sweeping = asyncio.create_task(recovery.forget(0.0, late.hop.connections))
        held = late.hop.connections.get(id_)
        await until(lambda: held.waiting == 2, "the sweep to wait for its turn", bar=0.1)
        held.made = made
    await sweeping
    assert late.kernel.wires == {id_}

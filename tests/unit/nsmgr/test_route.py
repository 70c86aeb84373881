"""The manager's route: which forwarder carries a connection, and what happens when it cannot."""

import asyncio
import time
from dataclasses import replace

import pytest

from nsm.errors import NotFoundError, UnavailableError
from nsm.hop import Hop
from nsm.model import SECOND, Connection, Endpoint, Found, Path, Request, Segment, Service, State
from nsm.registration import Registration, RegistrationPath
from nsm.rpc.calls import Answer
from nsmgr.discovery import Discovery
from nsmgr.excluded import ExcludedPrefixes
from nsmgr.registry import Locals, NodeRegistry
from nsmgr.route import ManagerRoute
from tests.support.callers import Mesh
from tests.support.wait import until

ASKED = Connection(id="c0", service="vpn", path=Path((Segment("nsc", "c0"),)))


class Domain:
    """A registry with one service."""

    async def find_services(self, query, watch, caller):
        yield Found(Service("vpn", "ETHERNET"))


class Calls:
    """Forwarders that write down what they are asked, and fail as the test says."""

    def __init__(self):
        self.log = []
        self.fail = None

    async def request(self, url, asked, **how):
        self.log.append(("request", url))
        if self.fail:
            raise self.fail
        conn = asked.connection
        first = conn.segments[0]
        own = Segment(url, f"id at {url}", first.token, first.expires)
        segments = (*conn.segments[: conn.index + 1], own)
        return Answer(replace(conn, path=Path(segments, conn.index)), None)

    async def close(self, url, conn, **how):
        self.log.append(("close", url))


class Manager:
    """One life of a manager; forwarders are named as they are reached."""

    def __init__(self, mesh, *forwarders):
        self.mesh = mesh
        self.calls = Calls()
        self.locals = Locals()
        for name in forwarders:
            self.put(name)
        discovery = Discovery(Domain(), self.locals, "forwarder")
        route = ManagerRoute(discovery, self.calls, ExcludedPrefixes("/none"), {}, 0.75)
        self.hop = Hop("nsmgr", route, lifetime=600 * SECOND, spawn=None, moves=True)

    def put(self, name):
        until_when = time.time_ns() + 600 * SECOND
        forwarder = Endpoint(name, ("forwarder",), {"forwarder": {"p2p": "true"}}, "x", until_when)
        self.locals.put(forwarder, name, None)

    async def request(self, conn=ASKED):
        soon = asyncio.get_running_loop().time() + 2.2
        return await self.hop.request(Request(conn), self.mesh.call("nsc", deadline=soon))

    def end(self):
        self.hop.stop()
        self.locals.close()


@pytest.fixture
def lives():
    made = []
    mesh = Mesh()

    def live(*forwarders):
        made.append(Manager(mesh, *forwarders))
        return made[-1]

    yield live
    for manager in made:
        manager.end()


async def test_a_refresh_that_fails_after_a_restart_closes_nothing(lives):
    made = await lives("fwd-a").request()
    second = lives("fwd-a")
    second.calls.fail = UnavailableError("the endpoint's process is being restarted")
    with pytest.raises(UnavailableError):
        await second.request(made)
    assert second.calls.log == [("request", "fwd-a")]


async def test_a_first_request_that_fails_is_closed_where_it_may_have_worked(lives):
    manager = lives("fwd-a")
    manager.calls.fail = UnavailableError("no answer")
    with pytest.raises(UnavailableError):
        await manager.request()
    assert manager.calls.log == [("request", "fwd-a"), ("close", "fwd-a")]


async def test_a_reselect_finds_the_forwarder_that_replaced_the_old_one(lives):
    manager = lives("fwd-a")
    made = await manager.request()
    manager.locals.drop("fwd-a")
    manager.put("fwd-b")
    with pytest.raises(NotFoundError):
        await manager.request(made)
    manager.calls.log.clear()
    moved = await manager.request(replace(made, state=State.RESELECT_REQUESTED))
    assert moved.segments[2].id == "id at fwd-b"
    assert manager.calls.log == [("close", "fwd-a"), ("request", "fwd-b")]


async def test_a_reselect_is_for_the_forwarder_that_has_what_stands(lives):
    manager = lives("fwd-a", "fwd-b")
    made = await manager.request()
    assert made.segments[2].id == "id at fwd-a"
    manager.calls.log.clear()
    manager.calls.fail = NotFoundError("network service endpoint candidates not found")
    with pytest.raises(NotFoundError):
        await manager.request(replace(made, state=State.RESELECT_REQUESTED))
    assert manager.calls.log == [("request", "fwd-a")]  # nothing is closed, nobody else asked


async def test_a_watcher_on_the_node_sees_an_endpoint_though_the_domain_tells_it_first():
    told = asyncio.Queue()
    answer = asyncio.Event()

    class Upstream:
        async def register_endpoint(self, asked, by):
            told.put_nowait(Found(asked))
            await answer.wait()
            return asked, by.path

        async def find_endpoints(self, query, watch, caller):
            while True:
                yield await told.get()

    locals_ = Locals()
    node = NodeRegistry(Upstream(), locals_, {}, spawn=lambda work, _: work.close())
    node.public_url = "tcp://192.0.2.1:5001"
    caller = replace(Mesh().call("nsc"), unix=True)
    seen = []

    async def watch():
        query = Endpoint(services=("vpn",))
        async for found in node.find_endpoints(query, True, caller):
            seen.append((found.item.name, found.item.url))

    by = Registration(caller, RegistrationPath(), ("x", "y"), time.time_ns() + 60 * SECOND)
    asked = Endpoint("nse-1", ("vpn",), url="tcp://192.0.2.9:1")
    async with asyncio.TaskGroup() as group:
        watching = group.create_task(watch())
        registering = group.create_task(node.register_endpoint(asked, by))
        await until(told.empty, "the domain to tell the watcher", bar=0.1)
        answer.set()
        await registering
        await until(lambda: seen == [("nse-1", "tcp://192.0.2.9:1")], "the watcher", bar=0.1)
        watching.cancel()
    locals_.close()

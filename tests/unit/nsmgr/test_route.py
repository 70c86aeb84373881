"""The manager's route: which forwarder carries a connection, and what happens when it cannot."""

import asyncio
import time
from dataclasses import replace

import pytest

from nsm.errors import DeniedError, NotFoundError, UnavailableError
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

    away = False

    async def find_services(self, query, watch, caller):
        if self.away:
            raise UnavailableError("cannot connect to the registry")
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
        self.domain = Domain()
        discovery = Discovery(self.domain, self.locals, "forwarder")
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


async def test_a_refresh_after_a_restart_needs_no_registry(lives):
    made = await lives("fwd-a", "fwd-b").request()
    second = lives("fwd-b", "fwd-a")
    second.domain.away = True
    await second.request(made)
    assert second.calls.log == [("request", "fwd-a")]


async def test_who_may_carry_a_new_wire_is_not_said_while_the_registry_is_away(lives):
    manager = lives("fwd-a")
    manager.domain.away = True
    with pytest.raises(UnavailableError, match="cannot connect to the registry"):
        await manager.request()
    until_when = time.time_ns() + 600 * SECOND
    manager.locals.put(Endpoint("nse", ("vpn",), {}, "x", until_when), "nse", None)
    forged = Path((Segment("nsc", "c0"), Segment("nsmgr", "c1"), Segment("nse", "c2")))
    with pytest.raises(UnavailableError, match="cannot connect to the registry"):
        await manager.request(replace(ASKED, path=forged))
    assert manager.calls.log == []


class Away:
    """A registry that refuses as it is told to, and else takes and tells what it is told to."""

    def __init__(self):
        self.refusal = UnavailableError("cannot connect to the registry")
        self.told = []

    async def register_endpoint(self, asked, by):
        if self.refusal:
            raise self.refusal
        return asked, by.path

    async def find_endpoints(self, query, watch, caller):
        if self.refusal:
            raise self.refusal
        for one in self.told:
            yield Found(one)


@pytest.fixture
def away():
    """A node whose registry is away, where one endpoint has said that it is there."""
    upstream, locals_ = Away(), Locals()
    node = NodeRegistry(upstream, locals_, {}, spawn=lambda work, _: work.close())
    node.public_url = "tcp://192.0.2.1:5001"
    caller = replace(Mesh().call("nsc"), unix=True)
    by = Registration(caller, RegistrationPath(), ("x", "y"), time.time_ns() + 60 * SECOND)

    async def register():
        return await node.register_endpoint(
            Endpoint("nse-1", ("vpn",), url="tcp://192.0.2.9:1"), by
        )

    async def found(query, caller=caller):
        return [one.item.url async for one in node.find_endpoints(query, False, caller)]

    node.register, node.found, node.asker = register, found, caller
    yield node, upstream, locals_
    locals_.close()


async def test_an_endpoint_of_the_node_is_found_by_name_without_the_registry(away):
    node, _, _ = away
    with pytest.raises(UnavailableError):
        await node.register()
    assert await node.found(Endpoint("nse-1")) == ["tcp://192.0.2.9:1"]
    other_node = replace(node.asker, unix=False)
    for query, caller in (
        (Endpoint(services=("vpn",)), node.asker),  # who else serves it nobody can say
        (Endpoint("nse-2"), node.asker),
        (Endpoint("nse-1"), other_node),
    ):
        with pytest.raises(UnavailableError):
            await node.found(query, caller)


async def test_a_name_that_is_somebody_s_elsewhere_is_not_taken_while_the_registry_was_away(away):
    node, upstream, _ = away
    with pytest.raises(UnavailableError):
        await node.register()
    upstream.refusal = None
    upstream.told = [Endpoint("nse-1", ("vpn",), url="tcp://192.0.2.2:5001")]
    assert await node.found(Endpoint("nse-1")) == ["tcp://192.0.2.2:5001"]
    await node.register()
    assert await node.found(Endpoint("nse-1")) == ["tcp://192.0.2.9:1"]


async def test_who_gives_up_registering_is_known_as_before_and_who_is_refused_is_not(away):
    node, upstream, locals_ = away
    with pytest.raises(UnavailableError):
        await node.register()
    upstream.refusal = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await node.register()
    assert locals_.get("nse-1")
    upstream.refusal = DeniedError("the name is another's")
    with pytest.raises(DeniedError):
        await node.register()
    assert locals_.get("nse-1") is None


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

"""The proxy's route and registry: which way a request goes, as what it is called there, and
what happens when nobody answers there any more."""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from nsm.caller import Caller
from nsm.errors import (
    DeniedError,
    InvalidError,
    NotFoundError,
    PeerError,
    PreconditionError,
    UnauthenticatedError,
    UnavailableError,
)
from nsm.hop import Hop
from nsm.identity.spiffe import SpiffeId
from nsm.model import (
    SECOND,
    Connection,
    Endpoint,
    Found,
    Mechanism,
    Path,
    Request,
    Segment,
    Service,
    State,
)
from nsm.registration import Registration, RegistrationPath
from nsm.rpc.calls import Answer
from nsmgr.proxy import names as names_module
from nsmgr.proxy.addresses import AddressMap
from nsmgr.proxy.names import Names
from nsmgr.proxy.registry import ProxyRegistry
from nsmgr.proxy.route import ProxyRoute
from tests.support.callers import Mesh

OURS = "tcp://10.0.0.1:5004"
MAP = AddressMap({"10.0.0.1": "198.18.0.1", "10.0.0.7": "198.18.0.7"}, "/etc/map")
FAR = "tcp://198.18.0.2:5004"
VXLAN = Mechanism("REMOTE", "VXLAN", {"src_ip": "10.0.0.7"})
CAME = Mechanism("REMOTE", "VXLAN", {"src_ip": "198.18.9.9", "orig_src_ip": "10.0.0.7"})


class Beyond:
    """The registry proxy: where endpoints of other domains are."""

    def __init__(self):
        self.holds = {}
        self.asked = []
        self.fails = None
        self.registered = []

    async def find_endpoints(self, query, watch, caller):
        self.asked.append(query.name)
        if self.fails:
            raise self.fails
        for name, url in self.holds.items():
            if query.name in ("", name):
                yield Found(Endpoint(name, ("svc@two",), url=url))

    async def register_endpoint(self, asked, by):
        if self.fails:
            raise self.fails
        self.registered.append(asked)
        return asked, by.path

    async def unregister_endpoint(self, asked, by):
        self.registered.append(asked)

    async def find_services(self, query, watch, caller):
        yield Found(Service("svc@two", "IP"))


class Local:
    """This domain's registry."""

    url = "tcp://registry:5002"

    def __init__(self):
        self.holds = []

    async def find_endpoints(self, query):
        return [
            one
            for one in self.holds
            if one.name == query.name and set(query.services) <= set(one.services)
        ]


class Peers:
    """Who is where: everybody else, but at the URLs a test gives to us."""

    def __init__(self, mesh):
        self.ours = set()
        self._mesh = mesh

    @asynccontextmanager
    async def link(self, url, **how):
        us, them = (self._mesh.call(who).handshake for who in ("hop", "proxy-two"))
        yield SimpleNamespace(handshake=us if url in self.ours else them)


class Calls:
    """Next hops that write down what they are asked, and fail as the test says."""

    def __init__(self):
        self.log = []
        self.last = None
        self.change = lambda made: made
        self.fails = {}

    async def request(self, url, asked, **how):
        conn = asked.connection
        self.log.append(("request", url, conn.endpoint))
        self.last = asked
        if url in self.fails:
            raise self.fails[url]
        segments = conn.segments[: conn.index + 1]
        own = Segment(url, f"id at {url}", segments[0].token, segments[0].expires)
        agreed = conn.mechanism or asked.preferences[0]
        agreed = agreed.with_(dst_ip="10.0.0.7" if "10." in url else "198.18.0.9")
        made = replace(conn, mechanism=agreed, path=Path((*segments, own), conn.index))
        return Answer(self.change(made), None)

    async def close(self, url, conn, **how):
        self.log.append(("close", url, conn.endpoint))
        self.closed = conn
        if url in self.fails:
            raise self.fails[url]

    def told(self):
        told, self.log = self.log, []
        return told


class Proxy:
    """One life of a proxy."""

    def __init__(self, mesh, addresses=MAP, labels=None):
        self.mesh = mesh
        self.calls = Calls()
        self.calls.peers = Peers(mesh)
        self.beyond, self.local, self.names = Beyond(), Local(), Names()
        self.labels = labels or {}
        self.registry = ProxyRegistry(
            self.beyond, self.names, lambda: addresses, lambda: self.labels
        )
        self.registry.public_url = OURS
        route = ProxyRoute(
            self.local,
            self.registry,
            self.names,
            self.calls,
            lambda: addresses,
            lambda: self.labels,
            0.75,
        )
        self.hop = Hop("proxy", route, lifetime=600 * SECOND, spawn=None)

    def caller(self, **how):
        return self.mesh.call("fwd", deadline=asyncio.get_running_loop().time() + 2.2, **how)

    async def request(self, conn, mechanism=VXLAN):
        return await self.hop.request(Request(conn, (mechanism,)), self.caller())

    async def found(self, name=""):
        query = Endpoint(name=name)
        answers = self.registry.find_endpoints(query, False, self.caller())
        return [one.item async for one in answers]

    def by(self):
        caller = Caller(self.caller().handshake)
        return Registration(caller, RegistrationPath(), ("x",), time.time_ns() + 60 * SECOND)


def asking(endpoint="nse@two", service="svc@two", **more):
    path = Path((Segment("fwd", "c0"),))
    return Connection(id="c0", service=service, endpoint=endpoint, path=path, **more)


@pytest.fixture
def lives():
    made = []
    mesh = Mesh()

    def live(**how):
        made.append(Proxy(mesh, **how))
        return made[-1]

    yield live
    for proxy in made:
        proxy.hop.stop()


async def test_who_finds_is_told_our_url_and_we_keep_theirs(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    (found,) = await proxy.found()
    assert (found.name, found.url) == ("nse@two", OURS)
    proxy.beyond.asked.clear()
    await proxy.request(asking())
    assert proxy.calls.told() == [("request", FAR, "nse@two")]
    assert not proxy.beyond.asked, "it was found a moment ago"


async def test_a_request_leaves_with_its_names_and_its_nodes_outer_address(lives):
    proxy = lives(labels={"clusterName": "one"})
    proxy.beyond.holds = {"nse@two": FAR}
    made = await proxy.request(asking(labels={"clusterName": "mine", "app": "x"}))
    sent = proxy.calls.last
    assert (sent.connection.endpoint, sent.connection.service) == ("nse@two", "svc@two")
    assert sent.connection.labels == {"clusterName": "one", "app": "x"}
    (offer,) = sent.preferences
    assert offer.parameters == {"src_ip": "198.18.0.7", "orig_src_ip": "10.0.0.7"}
    assert made.mechanism.parameters == {"src_ip": "10.0.0.7", "dst_ip": "198.18.0.9"}
    assert [one.name for one in made.segments] == ["fwd", "proxy", FAR]


async def test_a_request_enters_without_its_domain_and_comes_back_with_it(lives):
    proxy = lives()
    proxy.local.holds = [Endpoint("nse", ("svc",), url="tcp://10.0.0.8:5001")]
    made = await proxy.request(asking(), CAME)
    assert proxy.calls.told() == [("request", "tcp://10.0.0.8:5001", "nse")]
    assert proxy.calls.last.connection.service == "svc"
    assert not proxy.beyond.asked
    assert (made.endpoint, made.service) == ("nse@two", "svc@two")
    told = made.mechanism.parameters
    assert (told["dst_ip"], told["orig_dst_ip"]) == ("198.18.0.7", "10.0.0.7")
    (event,) = proxy.hop.connections.established()
    assert (event.made.endpoint, event.made.service) == ("nse@two", "svc@two")
    await proxy.hop.close(made, proxy.caller())
    assert proxy.calls.told() == [("close", "tcp://10.0.0.8:5001", "nse")]


async def test_what_enters_is_never_led_to_a_third_domain(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    await proxy.found()  # somebody of this domain looked for it
    with pytest.raises(NotFoundError, match="network service endpoint nse not found"):
        await proxy.request(asking(), CAME)
    assert not proxy.calls.told()


async def test_who_comes_in_does_not_have_us_ask_the_world(lives, monkeypatch):
    """Its name would be looked up, and its address be connected to, by us."""
    proxy = lives()
    proxy.beyond.holds = {"nse@elsewhere.example": FAR}
    monkeypatch.setattr(names_module, "YOUNG", 0)  # else it may have registered before a restart
    with pytest.raises(NotFoundError, match="network service endpoint nse not found"):
        await proxy.request(asking("nse@elsewhere.example", "svc@elsewhere.example"), CAME)
    assert not proxy.beyond.asked


@pytest.mark.parametrize("url", ["unix:///run/nsm.io.sock", "inode://1/2", "", "tcp://h"])
async def test_another_domain_leads_us_to_nothing_of_this_machine(lives, url):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": url}
    (found,) = await proxy.found()
    assert (found.url, proxy.names.found("nse@two")) == (OURS, "")
    with pytest.raises(NotFoundError, match=r"nse@two not found at .*as its domain says"):
        await proxy.request(asking())
    assert not proxy.calls.told()


async def test_nobody_of_another_domain_asks_through_us(lives):
    proxy = lives()
    ours = proxy.caller().handshake
    stranger = Caller(replace(ours, peer_id=SpiffeId("two.test", "/nsmgr")))
    by = replace(proxy.by(), caller=stranger)
    asked, service = Endpoint("nse@three", ("svc@three",), url="tcp://h:1"), Service("svc@three")
    for call in (
        proxy.registry.register_endpoint(asked, by),
        proxy.registry.unregister_endpoint(asked, by),
        proxy.registry.register_service(service, by),
        proxy.registry.unregister_service(service, by),
        anext(proxy.registry.find_endpoints(asked, False, stranger)),
        anext(proxy.registry.find_services(service, True, stranger)),
    ):
        with pytest.raises(DeniedError, match=r"two\.test/nsmgr asks for '(nse|svc)@three'"):
            await call
    assert not proxy.beyond.asked
    assert not proxy.beyond.registered


async def test_an_endpoint_of_another_service_is_not_the_one_that_is_meant(lives):
    proxy = lives()
    proxy.local.holds = [Endpoint("nse", ("other",), url="tcp://10.0.0.8:5001")]
    with pytest.raises(NotFoundError):
        await proxy.request(asking(), CAME)


@pytest.mark.parametrize("own", [{}, {"svc@three": {"a": "b", "region": "mine"}}])
async def test_what_a_cluster_says_is_on_every_service_and_stays_its_own_word(lives, own):
    proxy = lives(labels={"clusterName": "two", "region": "north"})
    asked = Endpoint("nse@three", ("svc@three", "other@three"), own, "tcp://10.0.0.8:5001")
    held, _ = await proxy.registry.register_endpoint(asked, proxy.by())
    assert held.labels == own
    proxy.labels.clear()
    await proxy.registry.register_endpoint(held, proxy.by())
    first, second = proxy.beyond.registered
    cluster = {"clusterName": "two", "region": "north"}
    assert first.labels == {
        "svc@three": {**own.get("svc@three", {}), **cluster},
        "other@three": cluster,
    }
    assert second.labels == own


@pytest.mark.parametrize("url", ["", "unix:///run/nsm.io.sock", "inode://1/2"])
async def test_an_endpoint_that_nobody_could_reach_does_not_register_elsewhere(lives, url):
    proxy = lives()
    asked = Endpoint("nse@three", ("svc@three",), url=url)
    with pytest.raises(InvalidError, match=r"endpoint 'nse@three' of x registers (at|without)"):
        await proxy.registry.register_endpoint(asked, proxy.by())
    assert not proxy.beyond.registered


async def test_a_floating_endpoint_is_met_at_the_manager_it_registered_through(lives):
    proxy = lives(labels={"clusterName": "two"})
    asked = Endpoint(
        "nse@three", ("svc@three",), {"svc@three": {"clusterName": "x", "a": "b"}}, "tcp://10.0.0.8:5001"
    )  # fmt: skip
    held, _ = await proxy.registry.register_endpoint(asked, proxy.by())
    assert held.url == asked.url
    (told,) = proxy.beyond.registered
    assert told.url == "tcp://198.18.0.1:5004"
    assert told.labels == {"svc@three": {"clusterName": "two", "a": "b"}}
    made = await proxy.request(asking("nse@three", "svc@three"), CAME)
    assert proxy.calls.told() == [("request", asked.url, "nse@three")]
    assert made.mechanism.get("dst_ip") == "198.18.0.7"
    proxy.beyond.holds = {"nse@three": "tcp://198.18.0.1:5004"}
    (found,) = await proxy.found()
    assert found.url == OURS
    await proxy.registry.unregister_endpoint(asked, proxy.by())
    assert proxy.names.registered("nse@three") == ""


@pytest.mark.parametrize("asked_for", ["nse@THREE", "nse@three.", "nse@Three"])
async def test_a_domain_is_one_however_it_is_written(lives, asked_for):
    """As DNS has it; the endpoint's manager knows its name as it registered."""
    proxy = lives()
    asked = Endpoint("nse@Three", ("svc@Three",), url="tcp://10.0.0.8:5001")
    await proxy.registry.register_endpoint(asked, proxy.by())
    made = await proxy.request(asking(asked_for, asked_for.replace("nse", "svc")), CAME)
    assert proxy.calls.told() == [("request", asked.url, "nse@Three")]
    assert proxy.calls.last.connection.service == "svc@Three"
    assert (made.endpoint, made.service) == (asked_for, asked_for.replace("nse", "svc"))
    await proxy.hop.close(made, proxy.caller())
    assert proxy.calls.told() == [("close", asked.url, "nse@Three")]
    await proxy.registry.unregister_endpoint(replace(asked, name="nse@three"), proxy.by())
    assert proxy.names.registered("nse@Three") == ""


async def test_a_wire_to_ones_own_floating_endpoint_does_not_cross_the_border(lives):
    proxy = lives()
    asked = Endpoint("nse@three", ("svc@three",), url="tcp://10.0.0.8:5001")
    await proxy.registry.register_endpoint(asked, proxy.by())
    made = await proxy.request(asking("nse@three", "svc@three"))
    assert proxy.calls.last.preferences == (VXLAN,)
    assert made.mechanism.parameters == {"src_ip": "10.0.0.7", "dst_ip": "10.0.0.7"}


@pytest.mark.parametrize("found", [True, False])
async def test_a_url_of_ours_that_only_others_know_leads_nowhere_but_here(lives, found):
    """A load balancer's, say: the request would come back to whom it waits for."""
    proxy = lives()
    proxy.beyond.holds = {"nse@one": "tcp://balancer:5004"}
    proxy.calls.peers.ours = {"tcp://balancer:5004"}
    proxy.local.holds = [Endpoint("nse", ("svc",), url="tcp://10.0.0.8:5001")]
    if found:
        await proxy.found()
    made = await proxy.request(asking("nse@one", "svc@one"))
    assert proxy.calls.told() == [("request", "tcp://10.0.0.8:5001", "nse")]
    assert made.endpoint == "nse@one"
    assert made.mechanism.parameters == {"src_ip": "10.0.0.7", "dst_ip": "10.0.0.7"}


async def test_a_registration_that_is_refused_is_not_remembered(lives):
    proxy = lives()
    proxy.beyond.fails = DeniedError("somebody else's")
    asked = Endpoint("nse@three", ("svc@three",), url="tcp://10.0.0.8:5001")
    with pytest.raises(DeniedError):
        await proxy.registry.register_endpoint(asked, proxy.by())
    assert proxy.names.registered("nse@three") == ""


async def test_a_floating_endpoint_needs_its_domain_in_its_own_name(lives):
    proxy = lives()
    asked = Endpoint("nse", ("svc@three",), url="tcp://10.0.0.8:5001")
    with pytest.raises(InvalidError, match=r"domain 'three' .*; call it nse@three"):
        await proxy.registry.register_endpoint(asked, proxy.by())
    assert not proxy.beyond.registered


@pytest.mark.parametrize("known", ["tcp://198.18.0.1:5004", "tcp://balancer:5004"])
async def test_after_a_restart_a_floating_endpoint_is_waited_for(lives, known):
    proxy = lives()
    proxy.beyond.holds = {"nse@three": known}
    proxy.calls.peers.ours = {"tcp://balancer:5004"}
    asked = Endpoint("nse@three", ("svc@three",), url="tcp://10.0.0.8:5001")

    async def again():
        while not proxy.beyond.asked:
            await asyncio.sleep(0)
        await proxy.registry.register_endpoint(asked, proxy.by())

    async with asyncio.TaskGroup() as group:
        group.create_task(again())
        await proxy.request(asking("nse@three", "svc@three"), CAME)
    assert proxy.calls.told() == [("request", asked.url, "nse@three")]


async def test_after_a_restart_the_way_is_asked_for_by_name(lives):
    first = lives()
    first.beyond.holds = {"nse@two": FAR}
    made = await first.request(asking())
    second = lives()
    second.beyond.holds = {"nse@two": FAR}
    second.calls.fails[FAR] = UnavailableError("not yet")
    with pytest.raises(UnavailableError, match="not yet"):
        await second.request(made)
    assert second.calls.told() == [("request", FAR, "nse@two")], "a failed refresh closes nothing"
    del second.calls.fails[FAR]
    await second.hop.close(made, second.caller())
    assert second.calls.told() == [("close", FAR, "nse@two")]


async def test_a_proxy_that_moved_is_asked_for_anew(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    made = await proxy.request(asking())
    moved = "tcp://198.18.0.3:5004"
    proxy.calls.fails[FAR] = UnavailableError("nobody listens")
    proxy.beyond.holds = {"nse@two": moved}
    proxy.calls.told()
    again = await proxy.request(made)
    assert proxy.calls.told() == [("request", FAR, "nse@two"), ("request", moved, "nse@two")]
    assert [one.name for one in again.segments] == ["fwd", "proxy", moved]
    sent = proxy.calls.last.connection
    assert len(sent.segments) == sent.index + 2, "what lies behind is the same wire"
    await proxy.request(again)
    assert proxy.calls.told() == [("request", moved, "nse@two")]


async def test_what_was_found_and_does_not_answer_is_asked_for_anew_at_the_first_request(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    await proxy.found()
    moved = "tcp://198.18.0.3:5004"
    proxy.beyond.holds = {"nse@two": moved}
    proxy.calls.fails[FAR] = UnavailableError("nobody listens")
    await proxy.request(asking())
    assert proxy.calls.told() == [
        ("request", FAR, "nse@two"),
        ("close", FAR, "nse@two"),
        ("request", moved, "nse@two"),
    ]


async def test_where_nobody_answers_is_no_place_for_the_next_request_either(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    await proxy.found()
    proxy.calls.fails[FAR] = UnavailableError("nobody listens")
    proxy.beyond.fails = UnavailableError("nobody can say where")
    with pytest.raises(UnavailableError, match="nobody listens"):
        await proxy.request(asking())
    proxy.calls.told()
    with pytest.raises(UnavailableError, match="nobody can say where"):
        await proxy.request(asking())
    assert not proxy.calls.told()


async def test_an_endpoint_that_moved_is_met_at_its_new_manager_and_the_old_one_is_told(lives):
    proxy = lives()
    old, new = "tcp://10.0.0.8:5001", "tcp://10.0.0.9:5001"
    proxy.local.holds = [Endpoint("nse", ("svc",), url=old)]
    made = await proxy.request(asking(), CAME)
    proxy.local.holds = [Endpoint("nse", ("svc",), url=new)]
    proxy.calls.fails[old] = NotFoundError("network service endpoint nse not found")
    proxy.calls.told()
    await proxy.request(made, CAME)
    assert proxy.calls.told() == [
        ("request", old, "nse"), ("request", new, "nse"), ("close", old, "nse"),
    ]  # fmt: skip
    sent = proxy.calls.last.connection
    assert len(sent.segments) == sent.index + 1, "what lay behind belongs to the old way"


async def test_a_refusal_that_has_another_cause_is_told_as_it_is(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    proxy.calls.fails[FAR] = DeniedError("not you")
    with pytest.raises(DeniedError, match="not you"):
        await proxy.request(asking())
    assert proxy.calls.told() == [("request", FAR, "nse@two"), ("close", FAR, "nse@two")]


async def test_a_refresh_that_fails_at_a_new_url_closes_nothing_there(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    made = await proxy.request(asking())
    moved = "tcp://198.18.0.3:5004"
    proxy.beyond.holds = {"nse@two": moved}
    proxy.calls.fails = {FAR: UnavailableError("gone"), moved: UnavailableError("not yet")}
    proxy.calls.told()
    with pytest.raises(UnavailableError, match="not yet"):
        await proxy.request(made)
    assert [what for what, *_ in proxy.calls.told()] == ["request", "request"]


async def test_a_reselect_closes_the_old_way_first(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR, "other@two": FAR}
    made = await proxy.request(asking())
    proxy.calls.told()
    asked = replace(made, state=State.RESELECT_REQUESTED, endpoint="other@two", mechanism=None)
    await proxy.request(asked)
    assert proxy.calls.told() == [("close", FAR, "nse@two"), ("request", FAR, "other@two")]


async def test_a_lease_that_ends_closes_the_next_hop_too(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    made = await proxy.request(asking())
    proxy.calls.told()
    proxy.hop.leases.release(made.segments[1].id)
    await proxy.hop.expire(made.segments[1].id)
    assert proxy.calls.told() == [("close", FAR, "nse@two")]
    assert not proxy.hop.connections.established()


async def test_an_unmapped_address_is_refused_before_anybody_is_asked(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    with pytest.raises(PreconditionError, match=r"10\.0\.0\.99"):
        await proxy.request(asking(), VXLAN.with_(src_ip="10.0.0.99"))
    assert not proxy.calls.told()


async def test_an_unmapped_address_of_the_answer_takes_the_wire_back(lives):
    proxy = lives(addresses=AddressMap({}, "/etc/map"))
    proxy.registry.public_url = "tcp://proxy:5004"
    proxy.local.holds = [Endpoint("nse", ("svc",), url="tcp://10.0.0.8:5001")]
    with pytest.raises(PreconditionError, match=r"10\.0\.0\.7"):
        await proxy.request(asking(), CAME)
    assert [what for what, *_ in proxy.calls.told()] == ["request", "close"]
    # an upstream peer would not find it without
    assert proxy.calls.closed.segments[-1].id == "id at tcp://10.0.0.8:5001"


async def test_another_domain_changes_nothing_left_of_us(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}

    def lies(made):
        first, own, *rest = made.segments
        first = replace(first, name="somebody", token="t")
        return replace(made, path=Path((first, replace(own, name="else"), *rest), made.index))

    proxy.calls.change = lies
    made = await proxy.request(asking())
    assert [one.name for one in made.segments] == ["fwd", "proxy", FAR]
    assert made.segments[0].token != "t"
    for wrong in ({"id": "other"}, {"path": Path(made.segments, 0)}, {"path": None}):
        proxy.calls.change = lambda made, wrong=wrong: replace(made, **wrong)
        with pytest.raises(PeerError, match="answered for connection"):
            await proxy.request(made)


@pytest.mark.parametrize("what", ["segments", "labels", "metrics", "name"])
async def test_an_answer_that_no_hop_would_take_as_a_request_is_none(lives, what):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}

    def swollen(made):
        last, long = made.segments[-1], {"x": "x" * 100_000}
        more = {
            "segments": (last,) * 100,
            "metrics": (replace(last, metrics=long),),
            "name": (replace(last, name="x" * 1000),),
        }.get(what, (last,))
        changed = replace(made, path=Path((*made.segments[:-1], *more), made.index))
        return replace(changed, labels=long) if what == "labels" else changed

    proxy.calls.change = swollen
    with pytest.raises(PeerError, match=rf"{FAR} answered for connection \S+ with "):
        await proxy.request(asking())
    assert proxy.calls.told()[-1] == ("close", FAR, "nse@two"), "what it made is taken back"
    assert not proxy.hop.connections.established()


async def test_strangers_say_whose_bundle_is_missing(lives):
    proxy = lives()
    proxy.beyond.holds = {"nse@two": FAR}
    proxy.calls.fails[FAR] = UnauthenticatedError("no bundle of two.test here")
    with pytest.raises(UnauthenticatedError) as refused:
        await proxy.request(asking())
    for word in ("domain 'two'", FAR, "no bundle of two.test here", "NSM_FEDERATION"):
        assert word in str(refused.value)


async def test_a_request_that_names_no_endpoint_is_refused(lives):
    with pytest.raises(InvalidError, match="names no endpoint"):
        await lives().request(asking(""))

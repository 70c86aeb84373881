"""The forwarder's route where something fails: what is closed, what is kept, what is said."""

import asyncio
import os
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace

import pytest

from forwarder.deaths import Deaths
from forwarder.discovery import Offer
from forwarder.joining import ROUNDS
from forwarder.mechanisms import wireguard
from forwarder.probe import Probe, Proof, Verdict
from forwarder.recovery import Recovery
from forwarder.remote import Vxlan, Wireguard
from forwarder.route import ForwarderRoute
from forwarder.search import MOST
from forwarder.sockets import Sockets
from forwarder.tunnels import Tunnels
from nsm.errors import (
    AbortedError,
    DeadlineError,
    DeniedError,
    ExhaustedError,
    InvalidError,
    NotFoundError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)
from nsm.hop import Hop
from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.netlink import PortTakenError
from nsm.kernel.node import Way
from nsm.kernel.owner import Mark
from nsm.kernel.state import Namespace, RemoteWire
from nsm.kernel.tunnels import Engine, StandingWireguard
from nsm.model import (
    SECOND,
    Connection,
    Context,
    Endpoint,
    IPContext,
    Mechanism,
    Path,
    Request,
    Route,
    Segment,
)
from nsm.rpc.calls import Answer
from tests.support.callers import Mesh
from tests.support.wait import until

ASKED = Connection(id="c0", service="vpn", path=Path((Segment("nsc", "c0"),)))
WANTED = (Mechanism("LOCAL", "KERNEL", {"name": "nsm-1", "inodeURL": "inode://4/78"}),)
FAR_WANTED = (
    Mechanism("REMOTE", "WIREGUARD", {
        "src_ip": "10.0.0.2", "src_port": "51820", "MTU": "1440",
        "src_public_key": Key(b"k" * 32).public,
    }),
)  # fmt: skip
THEIRS = Key(b"t" * 32)
ANSWER = Mechanism("LOCAL", "KERNEL", {"name": "n1", "inodeURL": "inode://4/77"})


class Kernel:
    """Counts wires; hangs, or has ports taken, when the test says so."""

    own = Namespace(1, -1)

    def __init__(self):
        self.wires = set()
        self.placed = []  # which wire took whose place, by their legs
        self.tunnels = {}
        self.taken = set()
        self.grabbed = set()  # ports somebody takes just before we do
        self.silent = set()  # addresses of nodes that answer no handshake
        self.patience = []
        self.mighty = False  # whether workloads may configure devices
        self.narrow = {}  # MTUs of ways that are not as wide as others
        self.hang = False
        self.looking = None

    async def namespace(self, *, fd=None, name=""):
        return Namespace(os.fstat(fd).st_ino, 5)

    async def ensure(self, wire, undo, *, fds=None):
        if self.hang:
            await asyncio.Event().wait()
        if isinstance(wire, RemoteWire):
            if wire.tunnel.port in self.grabbed:
                raise PortTakenError(f"UDP port {wire.tunnel.port} is in use")
            before = self.tunnels.get(wire.id)
            undo.add("as before", self.put_back, wire.id, before)
            self.tunnels[wire.id] = wire
        undo.add("remove", self.remove, wire.connection, leg=wire.leg)
        self.wires.add(wire.id)

    async def replace(self, old, wire, undo, *, fds=None):
        assert {owner.wire_id(wire.connection, old), wire.id} <= self.wires
        self.placed.append((old, wire.leg))
        if isinstance(wire, RemoteWire):
            self.tunnels[wire.id] = wire

    async def drained(self, connection, leg):
        assert owner.wire_id(connection, leg) in self.wires

    async def put_back(self, connection, before):
        if before:
            self.wires.add(connection)
            self.tunnels[connection] = before

    async def remove(self, connection, *, leg=None):
        for one in set(self.wires):
            if one.split(" ")[0] == connection and leg in (None, one.partition(" ")[2]):
                self.wires.discard(one)
                self.tunnels.pop(one, None)
        return 1

    async def way_to(self, remote):
        own = ip_address("10.0.0.1" if remote.version == 4 else "fd00::1")
        return Way(own, "eth0", self.narrow.get(str(remote), 1500))

    async def misusable(self, namespace, *, fd=None):
        return self.mighty

    async def vni_free(self, *_, **__):
        return True

    async def port_free(self, port):
        return port not in self.taken

    def knows(self, connection):
        return any(one.split(" ")[0] == connection for one in self.wires)

    async def standing_wireguard(self, connection, side, seat, *, leg, hop, fds):
        assert seat[0] in fds
        wire = self.tunnels.get(owner.wire_id(connection, leg))
        if not wire or (wire.side, wire.end.namespace, wire.end.name) != (side, *seat):
            return None
        return StandingWireguard(wire.tunnel.key, wire.tunnel.port, wire.tunnel.engine)

    async def handshake(self, wire, patience, *, fds=None):
        assert fds
        self.patience.append(patience)
        if str(wire.tunnel.remote) in self.silent:
            raise UnavailableError(f"no handshake with {wire.tunnel.remote}")
        return 0.002

    async def remove_found(self, found):
        assert not found

    async def own_number(self):
        return 3

    async def find(self):
        found = [SimpleNamespace(mark=Mark(one.split(" ")[0], "src")) for one in self.wires]
        if self.looking:
            await self.looking.wait()
        return found


class Endpoints:
    """Endpoints by name; those in `dead` answer nothing, those not in `listed` are unknown."""

    def __init__(self):
        self.listed = {"e-a": "unix:/a", "e-b": "unix:/b"}
        self.payload = "ETHERNET"
        self.dead = set()
        self.slow = {}  # what those wait for who let nobody close at once, by URL
        self.log = []
        self.asked = []  # each mechanism that was offered, and what was agreed on before
        self.mtus = []  # and the wire's MTU as it was then
        self.answers = {}  # what another node says amiss
        self.refusals = {}  # what an endpoint does instead of answering, by its URL
        self.searches = 0
        self.gives = IPContext()  # addresses it adds to those of a request that has none of its own

    async def offers(self, conn, fds, *, without=()):
        self.searches += 1
        if conn.endpoint and conn.endpoint not in self.listed:
            raise NotFoundError(f"network service endpoint {conn.endpoint} not found")
        names = [conn.endpoint] if conn.endpoint else [n for n in self.listed if n not in without]
        names = [n for n in names if n != "supplier"] or names  # the match before falls through
        if not names:
            raise NotFoundError("network service endpoint candidates not found")
        return [Offer(Endpoint(n, ("vpn",), url=self.listed[n]), self.payload) for n in names]

    async def request(self, url, asked, *, fds, **how):
        self._reach("request", url)
        if refusal := self.refusals.get(url):
            refusal()
        conn = self._addressed(asked.connection)
        fds.adopt("inode://4/77", os.open("/proc/self/ns/net", os.O_PATH))
        first = conn.segments[0]
        own = Segment("nse", f"id at {url}", first.token, first.expires)
        path = Path((*conn.segments[: conn.index + 1], own), conn.index)
        mechanism = ANSWER if url.startswith("unix:") else self._tunnel(url, asked)
        return Answer(replace(conn, path=path, mechanism=mechanism), None)

    def _addressed(self, conn):
        ip, gives = conn.ip, self.gives
        if gives.src_ip_addrs and not set(gives.src_ip_addrs) & set(ip.src_ip_addrs):
            src = (*ip.src_ip_addrs, *gives.src_ip_addrs)
            dst = (*ip.dst_ip_addrs, *gives.dst_ip_addrs)
            ip = replace(ip, src_ip_addrs=src, dst_ip_addrs=dst)
        return replace(conn, context=replace(conn.context, ip=ip))

    def _tunnel(self, url, asked):
        """What another node's forwarder says."""
        (offer,) = asked.preferences
        self.asked.append((offer, asked.connection.mechanism))
        self.mtus.append(asked.connection.context.mtu)
        far = ip_address(url.removeprefix("tcp://").rpartition(":")[0])
        own = wireguard.Own("dst", THEIRS, far, 51999, "kernel", Namespace(9, -1))
        told = replace(wireguard.answer(offer, own, 1420), type="WIREGUARD")
        return told.with_(**self.answers)

    async def close(self, url, conn, **how):
        self._reach("close", url)
        if url in self.slow:
            await self.slow[url].wait()
        self.closed = conn

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


ENGINE = Engine("kernel", "it made one")


class Forwarder:
    """One life of a forwarder beside a kernel and endpoints that outlive it."""

    def __init__(self, callers, kernel, mesh, engine=ENGINE, probe=None):
        probe = probe or Probe(kernel, on=False)
        self.callers, self.kernel, self.mesh = callers, kernel, mesh
        self.tasks = []
        recovery, tunnels = Recovery(kernel), Tunnels(kernel, "")
        self.wireguard = Wireguard(kernel, tunnels, engine, 0)
        remotes = (Vxlan(kernel, tunnels, recovery, 0), self.wireguard)
        route = ForwarderRoute(
            mesh, mesh, kernel, tunnels, remotes, Sockets(), recovery, 0.75, self.spawn, probe
        )
        self.hop = Hop("fwd", route, lifetime=600 * SECOND, spawn=self.spawn, moves=True)

    def spawn(self, work, name):
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def request(self, conn=ASKED, within=3.0, wanted=WANTED):
        until_when = asyncio.get_running_loop().time() + within
        call = replace(self.callers.call("nsc", deadline=until_when), fds=Files())
        return await self.hop.request(Request(conn, wanted), call)

    async def said_goodbye(self):
        """Wait until what was left is let go of."""
        while self.tasks:
            await self.tasks.pop()

    async def close(self, conn):
        await self.hop.close(conn, replace(self.callers.call("nsc"), fds=Files()))


@pytest.fixture
async def lives():
    made, callers, kernel, mesh = [], Mesh(), Kernel(), Endpoints()

    def live(**how):
        made.append(Forwarder(callers, kernel, mesh, **how))
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
    await forwarder.said_goodbye()
    assert forwarder.mesh.log[-2:] == [("request", "unix:/b"), ("close", "unix:/a")]


async def test_what_is_left_late_is_not_what_was_made_anew_meanwhile(lives):
    forwarder = lives()
    made = await forwarder.request(replace(ASKED, endpoint="e-a"))
    hung = forwarder.mesh.slow["unix:/a"] = asyncio.Event()
    moved = await forwarder.request(replace(made, endpoint="e-b"))
    await forwarder.close(moved)
    again = await forwarder.request(moved)
    held = forwarder.hop.connections.get(again.segments[1].id)
    hung.set()
    await forwarder.said_goodbye()
    assert forwarder.kernel.wires == {owner.wire_id(held.id, held.memory.leg)}
    await forwarder.close(again)
    assert not forwarder.kernel.wires


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


# --- more than one search within a request ------------------------------------------------------


class Supplier:
    """Says that it has started e-a, and has, or has not; e-a takes nobody at first, or at last."""

    def __init__(self, mesh, *, starts=True, takes_after=0, why=None):
        self.mesh, self.starts, self.left, self.why = mesh, starts, takes_after, why
        self.asked = 0
        mesh.listed = {"supplier": "unix:/s"}
        mesh.refusals = {"unix:/s": self.started, "unix:/a": self.router}

    def started(self):
        self.asked += 1
        if self.starts:
            self.mesh.listed = {"e-a": "unix:/a"} | {"supplier": "unix:/s"}
        raise AbortedError("cannot provide required networkservice: endpoint created as e-a")

    def router(self):
        if self.why:
            raise self.why
        if self.left:
            self.left -= 1
            raise UnavailableError("endpoint expired")


async def test_what_a_supplier_has_started_serves_the_request_that_asked_for_it(lives):
    forwarder = lives()
    supplier = Supplier(forwarder.mesh)
    assert (await forwarder.request()).endpoint == "e-a"
    assert (supplier.asked, forwarder.mesh.searches) == (1, 2)
    assert forwarder.mesh.log == [
        ("request", "unix:/s"),
        ("close", "unix:/s"),
        ("request", "unix:/a"),
    ]
    assert len(forwarder.kernel.wires) == 1


async def test_one_that_is_ending_is_left_out_and_its_successor_found(lives):
    """Its supplier does not know yet that it ends, and says twice that it is there."""
    forwarder = lives()
    supplier = Supplier(forwarder.mesh, takes_after=2)
    assert (await forwarder.request()).endpoint == "e-a"
    assert (supplier.asked, forwarder.mesh.searches) == (3, 6)


async def test_a_supplier_that_only_promises_is_asked_no_more_than_the_bound(lives):
    forwarder = lives()
    supplier = Supplier(forwarder.mesh, starts=False)
    with pytest.raises(AbortedError, match="endpoint created as e-a"):
        await forwarder.request(within=60.0)
    assert supplier.asked == forwarder.mesh.searches == MOST
    with pytest.raises(AbortedError):
        await forwarder.request(within=0.6)
    assert supplier.asked < MOST + 4, "there is no time for more"


@pytest.mark.parametrize(
    ("why", "searches"),
    [(DeniedError("not you"), 2), (ExhaustedError("full"), 3)],
    ids=["for-good", "for-now"],
)
async def test_who_is_there_and_says_no_is_asked_once_and_is_what_is_told(lives, why, searches):
    forwarder = lives()
    supplier = Supplier(forwarder.mesh, why=why)
    with pytest.raises(type(why), match=str(why)):
        await forwarder.request()
    assert (supplier.asked, forwarder.mesh.searches) == (1, searches)


async def test_one_that_came_meanwhile_is_tried_and_nobody_twice(lives):
    forwarder = lives()
    mesh = forwarder.mesh
    mesh.dead.add("unix:/a")
    mesh.listed = {"e-a": "unix:/a"}
    mesh.refusals = {}
    reach = mesh._reach

    def reached(what, url):
        mesh.listed["e-b"] = "unix:/b"
        reach(what, url)

    mesh._reach = reached
    assert (await forwarder.request()).endpoint == "e-b"
    assert mesh.log[-1] == ("request", "unix:/b")
    mesh.dead.add("unix:/b")
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    mesh.log.clear()
    with pytest.raises(UnavailableError, match="all candidates have failed"):
        await forwarder.request(other)
    assert [url for what, url in mesh.log if what == "request"] == ["unix:/a", "unix:/b"]


async def test_who_names_an_endpoint_gets_no_other(lives):
    forwarder = lives()
    forwarder.mesh.dead.add("unix:/a")
    with pytest.raises(UnavailableError, match="cannot connect to unix:/a"):
        await forwarder.request(replace(ASKED, endpoint="e-a"))
    assert forwarder.mesh.searches == 1


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


# --- between nodes ---------------------------------------------------------------------------


@pytest.fixture
def east(lives):
    """A forwarder whose service is on another node, and carries IP."""
    forwarder = lives()
    forwarder.mesh.listed = {"e-far": "tcp://10.0.0.2:5001"}
    forwarder.mesh.payload = "IP"
    return forwarder


def only(tunnels):
    (wire,) = tunnels.values()
    return wire


async def test_ip_packets_go_between_nodes_by_wireguard_and_frames_by_vxlan(east):
    await east.request()
    (offer, before), tunnel = east.mesh.asked[0], only(east.kernel.tunnels).tunnel
    assert (offer.type, before) == ("WIREGUARD", None)
    assert (tunnel.key.public, tunnel.peer) == (offer.get("src_public_key"), THEIRS.public)
    assert (tunnel.port, tunnel.remote_port, str(tunnel.remote)) == (51820, 51999, "10.0.0.2")
    east.mesh.payload = "ETHERNET"
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    with pytest.raises(UnsupportedError, match="WIREGUARD when VXLAN was asked for"):
        await east.request(other)
    assert east.mesh.asked[1][0].type == "VXLAN"
    assert len(east.kernel.tunnels) == 1


async def test_of_a_wire_is_remembered_where_it_is_and_not_what_it_is_configured_with(east, lives):
    ip = IPContext(("10.1.0.1/32",), ("10.1.0.2/32",), src_routes=(Route("10.1.0.2/32"),))
    asked = replace(ASKED, context=Context(ip))
    await east.request(asked)
    near = lives()
    near.mesh.listed = {"e-a": "unix:/a"}
    await near.request(replace(asked, id="c1", path=Path((Segment("nsc", "c1"),))))
    wanted = only(east.kernel.tunnels)
    assert wanted.end.addresses
    assert wanted.end.routes
    bare = replace(wanted.end, addresses=(), routes=(), neighbours=(), policies=())
    (held,) = east.hop.connections.established()
    assert held.memory.wire == replace(wanted, end=bare)
    (held,) = near.hop.connections.established()
    for _, side in held.memory.wire.sides:
        assert side.name in ("nsm-1", "n1")
        assert (side.addresses, side.routes, side.neighbours, side.policies) == ((),) * 4


async def test_what_is_neither_frames_nor_packets_goes_nowhere_else(east):
    east.mesh.payload = "SMOKE"
    with pytest.raises(UnsupportedError, match="only ETHERNET and IP go between nodes"):
        await east.request()
    assert not east.mesh.log


async def test_the_mtu_is_the_lower_of_both_and_the_handshakes_time_is_on_the_path(east):
    made = await east.request()
    assert made.context.mtu == 1420
    assert made.segments[1].metrics["handshake_ms"] == "2.000"
    assert only(east.kernel.tunnels).end.mtu == 1420


async def test_where_less_fits_through_to_the_far_end_than_to_who_is_asked_both_ends_know(east):
    """Another cluster's proxy was asked, and tells where the tunnel ends."""
    east.mesh.answers = {"dst_ip": "10.0.0.9"}
    east.kernel.narrow = {"10.0.0.9": 1280}
    made = await east.request()
    assert made.context.mtu == only(east.kernel.tunnels).end.mtu == 1220
    assert east.mesh.mtus == [9000, 1220]
    await east.request(made)
    assert east.mesh.mtus == [9000, 1220, 1220], "it knows"
    assert [what for what, _ in east.mesh.log] == ["request"] * 3


@pytest.mark.parametrize(
    ("within", "patience"), [(3.0, 1.0), (12.0, 3.0), (40.0, 5.0)], ids=["short", "some", "long"]
)
async def test_a_handshake_gets_a_quarter_of_the_callers_time_within_bounds(east, within, patience):
    await east.request(within=within)
    assert east.kernel.patience == [pytest.approx(patience, abs=0.1)]


@pytest.mark.parametrize("engine", ["userspace", "kernel"])
async def test_who_is_in_a_workload_is_asked_again_as_long_as_nothing_of_ours_is_settled(
    lives, engine
):
    """wireguard-go's device tells nobody whether the kernel's, if one follows, may be there."""
    one = lives(engine=Engine(engine, "it made one"))
    one.mesh.listed, one.mesh.payload = {"e-far": "tcp://10.0.0.2:5001"}, "IP"
    made = await one.request()
    assert not only(one.kernel.tunnels).hop
    one.kernel.mighty = True
    await one.request(made)
    assert only(one.kernel.tunnels).hop is (engine == "userspace")


async def test_key_and_port_stay_over_refreshes_and_restarts(east, lives):
    made = await east.request()
    first = only(east.kernel.tunnels)
    again = await east.request(made)
    assert only(east.kernel.tunnels) == first
    second = lives()
    await second.request(again)
    assert only(east.kernel.tunnels) == first
    (offer, _), (repeated, before), (restarted, nothing) = east.mesh.asked
    assert offer == repeated == restarted
    assert before.get("dst_public_key") == THEIRS.public
    assert nothing is None
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    await second.request(other)
    ports = sorted(wire.tunnel.port for wire in east.kernel.tunnels.values())
    assert ports == [51820, 51821], "a wire of before keeps its port"


async def test_a_device_that_is_made_anew_gets_a_new_key_and_the_other_node_is_told(east):
    made = await east.request()
    first = only(east.kernel.tunnels).tunnel
    await east.kernel.remove(made.segments[1].id)  # its namespace died
    await east.request(made)
    second = only(east.kernel.tunnels).tunnel
    assert second.key != first.key
    (_, _), (offer, before) = east.mesh.asked
    assert offer.get("src_public_key") == before.get("src_public_key") == second.key.public


async def test_a_wire_that_moves_to_another_name_gets_a_new_key(east):
    made = await east.request()
    first = only(east.kernel.tunnels).tunnel
    moved = tuple(one.with_(name="nsm-2") for one in WANTED)
    await east.request(replace(made, mechanism=None), wanted=moved)
    second = only(east.kernel.tunnels)
    assert second.end.name == "nsm-2"
    assert second.tunnel.key != first.key


async def test_ports_that_are_taken_are_passed_over_and_one_just_grabbed_is_drawn_anew(east):
    east.kernel.taken = {51820}
    east.kernel.grabbed = {51821}
    await east.request()
    assert only(east.kernel.tunnels).tunnel.port == 51822
    assert [offer.get("src_port") for offer, _ in east.mesh.asked] == ["51821", "51822"]
    assert [what for what, _ in east.mesh.log] == ["request", "close", "request"]


async def test_when_every_port_is_grabbed_it_ends_and_nothing_is_left(east):
    east.kernel.grabbed = set(range(51820, 51900))
    with pytest.raises(TakenError, match=f"UDP port {51820 + ROUNDS - 1} is in use"):
        await east.request()
    assert len(east.mesh.asked) == ROUNDS
    assert east.mesh.log[-1][0] == "close"
    east.kernel.grabbed = set()
    await east.request()
    assert only(east.kernel.tunnels).tunnel.port == 51820, "the ports were given back"


async def test_a_far_node_that_answers_no_handshake_is_left_and_the_next_one_tried(east):
    east.mesh.listed = {"e-far": "tcp://10.0.0.2:5001", "e-near": "tcp://10.0.0.3:5001"}
    east.kernel.silent = {"10.0.0.2"}
    made = await east.request()
    assert made.endpoint == "e-near"
    assert str(only(east.kernel.tunnels).tunnel.remote) == "10.0.0.3"
    assert ("close", "tcp://10.0.0.2:5001") in east.mesh.log
    east.kernel.silent.add("10.0.0.3")
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    with pytest.raises(UnavailableError, match=r"no handshake with 10\.0\.0\.[23].*; e-"):
        await east.request(other)
    assert len(east.kernel.tunnels) == 1


@pytest.mark.parametrize(
    ("amiss", "words"),
    [
        ({"dst_public_key": "c29tZXRoaW5n"}, "dst_public_key"),
        ({"dst_port": "0"}, "dst_port"),
        ({"dst_ip": "::"}, "dst_ip"),
        ({"dst_ip": "fd00::2"}, "NSM_TUNNEL_IP on both nodes"),
    ],
    ids=["key", "port", "address", "family"],
)
async def test_an_answer_no_tunnel_can_be_made_of_is_refused_and_closed(east, amiss, words):
    east.mesh.answers = amiss
    with pytest.raises((InvalidError, UnsupportedError), match=words):
        await east.request()
    assert not east.kernel.wires
    assert [what for what, _ in east.mesh.log] == ["request", "close"]
    # an upstream peer would not find it without
    assert east.mesh.closed.segments[-1].id == f"id at {east.mesh.log[0][1]}"
    assert not east.wireguard.ports._given


async def test_an_answer_with_our_own_key_is_refused_and_closed(east):
    plain = east.mesh._tunnel

    def mirrored(url, asked):
        return plain(url, asked).with_(dst_public_key=asked.preferences[0].get("src_public_key"))

    east.mesh._tunnel = mirrored
    with pytest.raises(InvalidError, match="this node's own public key"):
        await east.request()
    assert not east.kernel.wires
    assert [what for what, _ in east.mesh.log] == ["request", "close"]


async def test_a_refresh_that_is_answered_amiss_leaves_the_wire_as_it_is(east):
    made = await east.request()
    before = only(east.kernel.tunnels)
    east.mesh.answers = {"dst_port": "0"}
    with pytest.raises(InvalidError):
        await east.request(made)
    assert only(east.kernel.tunnels) == before
    assert [what for what, _ in east.mesh.log] == ["request", "request"]
    assert east.wireguard.ports._given


async def test_a_close_gives_the_port_back(east):
    made = await east.request()
    await east.close(made)
    assert not east.kernel.wires
    await east.request(replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),))))
    assert only(east.kernel.tunnels).tunnel.port == 51820


NONE = Engine("", "the kernel has no WireGuard and wireguard-go is not installed: install it")


async def test_without_any_wireguard_it_is_neither_offered_nor_accepted(east, lives):
    bare = lives(engine=NONE)
    with pytest.raises(UnsupportedError, match=r"payload IP .* wireguard-go is not installed"):
        await bare.request()
    bare.mesh.listed = {"e-a": "unix:/a"}
    with pytest.raises(UnsupportedError, match=r"payload IP .* wireguard-go is not installed"):
        await bare.request(wanted=FAR_WANTED)
    assert not bare.mesh.log, "nobody was asked"


async def test_a_wire_that_stands_goes_on_where_no_new_one_could_be_made(east, lives):
    made = await east.request()
    first = only(east.kernel.tunnels)
    bare = lives(engine=NONE)
    await bare.request(made)
    assert only(east.kernel.tunnels) == first


async def test_asked_from_another_node_it_answers_with_a_tunnel_of_its_own(east):
    east.mesh.listed = {"e-a": "unix:/a"}
    made = await east.request(wanted=FAR_WANTED)
    wire, said = only(east.kernel.tunnels), made.mechanism
    assert (wire.side, wire.tunnel.peer) == ("dst", FAR_WANTED[0].get("src_public_key"))
    assert said.get("dst_public_key") == wire.tunnel.key.public
    assert (said.get("dst_ip"), said.get("dst_port")) == ("10.0.0.1", "51820")
    assert said.get("MTU") == "1440"
    assert not east.kernel.patience, "who is asked begins no handshake"
    again = await east.request(made, wanted=FAR_WANTED)
    assert again.mechanism == said
    assert only(east.kernel.tunnels) == wire


@pytest.mark.parametrize(
    ("amiss", "words"),
    [
        ({"src_public_key": ""}, "src_public_key"),
        ({"src_port": "none"}, "src_port"),
        ({"src_ip": "0.0.0.0"}, "src_ip"),
    ],
    ids=["key", "port", "address"],
)
async def test_what_cannot_be_asked_for_is_refused_before_anybody_else_is_asked(east, amiss, words):
    east.mesh.listed = {"e-a": "unix:/a", "e-b": "unix:/b"}
    wanted = tuple(one.with_(**amiss) for one in FAR_WANTED)
    with pytest.raises(InvalidError, match=words):
        await east.request(wanted=wanted)
    assert not east.kernel.wires
    assert not east.mesh.log
    assert not east.wireguard.ports._given


async def test_an_mtu_nothing_fits_through_is_refused(east):
    east.mesh.listed = {"e-a": "unix:/a"}
    with pytest.raises(InvalidError, match="MTU 1; the least is 68"):
        await east.request(wanted=tuple(one.with_(MTU="1") for one in FAR_WANTED))
    assert not east.kernel.wires
    assert [what for what, _ in east.mesh.log] == ["request", "close"]


async def test_asked_by_a_node_of_the_other_family_it_refuses_before_it_asks_anybody(east):
    east.mesh.listed = {"e-a": "unix:/a"}
    six = tuple(one.with_(src_ip="fd00::2") for one in FAR_WANTED)
    await east.request(wanted=six)
    assert str(only(east.kernel.tunnels).tunnel.local) == "fd00::1"
    east.mesh.log.clear()
    east.wireguard._tunnels._tunnel_ip = ip_address("10.0.0.1")
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    with pytest.raises(UnsupportedError, match=r"begin at 10\.0\.0\.1 .* end at fd00::2"):
        await east.request(other, wanted=six)
    assert not east.mesh.log


# --- the probe ----------------------------------------------------------------------------------


class Said:
    """A probe that says what the test wants, of each wire it is asked about."""

    def __init__(self, broken=(), mtu=0):
        self.broken, self.mtu = broken, mtu
        self.asked = []

    async def judge(self, wire, made, fds, caller):
        self.asked.append((made.endpoint, wire.beside))
        if made.endpoint in self.broken:
            raise UnavailableError(f"{made.endpoint}: nothing gets there")
        return Proof(Verdict.PROVEN, mtu=self.mtu)


async def test_a_wire_that_is_seen_to_carry_nothing_is_closed_and_the_next_one_tried(lives):
    forwarder = lives(probe=Said(broken={"e-a"}))
    made = await forwarder.request()
    assert made.endpoint == "e-b"
    assert made.segments[1].metrics["probe"] == "proven"
    assert forwarder.mesh.log == [
        ("request", "unix:/a"), ("close", "unix:/a"), ("request", "unix:/b"),
    ]  # fmt: skip
    assert len(forwarder.kernel.wires) == 1


async def test_a_refresh_is_not_probed_and_a_move_is_before_it_takes_the_olds_place(lives):
    probe = Said()
    forwarder = lives(probe=probe)
    made = await forwarder.request()
    made = await forwarder.request(made)
    assert probe.asked == [("e-a", False)]
    forwarder.hop.route.leave(made.segments[1].id)
    forwarder.mesh.listed = {"e-b": "unix:/b"}
    probe.broken = {"e-b"}
    assert (await forwarder.request(made)).endpoint == "e-a"
    assert probe.asked == [("e-a", False), ("e-b", True)]
    assert not forwarder.kernel.placed
    assert forwarder.mesh.log[-2:] == [("close", "unix:/b"), ("request", "unix:/a")]


async def test_an_mtu_that_does_not_pass_is_lowered_at_both_ends(lives):
    forwarder = lives(probe=Said(mtu=1226))
    forwarder.mesh.listed, forwarder.mesh.payload = {"far": "tcp://10.0.0.2:5001"}, "IP"
    made = await forwarder.request()
    assert made.context.mtu == 1226
    assert forwarder.mesh.mtus == [9000, 1226]
    assert forwarder.mesh.asked[-1][0].get("MTU") == "1226"
    (wire,) = forwarder.kernel.tunnels.values()
    assert wire.end.mtu == 1226
    made = await forwarder.request(made)
    assert made.context.mtu == 1226


async def test_who_is_looked_for_on_this_node_is_not_found_by_a_way_through_another(lives):
    """The domain knows an endpoint that has not registered again at its own manager yet."""
    made = await lives().request()
    second = lives()
    second.mesh.listed["e-a"] = "tcp://198.18.0.2:5004"
    with pytest.raises(NotFoundError, match="endpoint e-a is not registered on this node"):
        await second.hop.route.reach(made, "e-a")
    second.mesh.listed["e-a"] = "unix:/a"
    assert await second.hop.route.reach(made, "e-a") == "unix:/a"

"""Going along a wire from its registration to its names, up to the first thing that is broken.

Each step looks for itself: what the mesh says of a wire is compared with what the kernel has,
and packets are sent. Nothing is changed. Everything blocks.
"""

import contextlib
import glob
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from typing import Final

from forwarder.store import Lease
from labs.probe import ping
from nsm import domains, mechanisms
from nsm.errors import NsmError
from nsm.kernel import messages, netlink, owner, wireguard_netlink
from nsm.kernel.messages import Device
from nsm.kernel.namespaces import NAMED, Home
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.state import OWN, IPAddress, Namespace
from nsm.kernel.wireguard import Settings
from nsm.kernel.wireguard_go import Processes
from nsm.model import SECOND, Connection, Endpoint, Mechanism, Service
from nsm.path import PROBE
from nsm.selection import match_endpoints

ECHOES: Final = 3
PATIENCE: Final = 0.5  # seconds for an answer from the far end
LATEST_HANDSHAKE: Final = 180  # seconds; WireGuard rejects what is older (REJECT_AFTER_TIME)
_HEADER: Final = {4: 28, 6: 48}  # IP and ICMP
_DNS_PORT: Final = 53


@dataclass(frozen=True, slots=True)
class Line:
    """What a step found; fix is empty where it is well, well None where there is nothing to see."""

    name: str
    well: bool | None
    found: str
    fix: str = ""


class Absent(str):
    """What a step found where the wire has nothing of its kind: why not."""


class BrokenError(Exception):
    """Where the walk ends: what is broken, and what mends it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.found = found
        self.fix = fix


@dataclass(frozen=True, slots=True)
class Held:
    """What a forwarder holds of the wire: on which node, and by which file one gets there."""

    node: str
    space: str  # of the node's network namespace; "" is our own
    lease: Lease


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a wire before anybody looks at it.

    node is the client's, and what its forwarder holds comes first in held. offered and rules are
    the registry's, trouble is why it said nothing; told is what the client last said of the wire.
    """

    id: str
    client: str
    service: str
    node: str
    held: Sequence[Held]
    offered: Sequence[Endpoint] = ()
    rules: Sequence[Service] = ()
    trouble: NsmError | None = None
    told: str = ""

    @property
    def conn(self) -> Connection:
        """The connection as the forwarder next to the client made it."""
        return self.held[0].lease.connection


def named(namespace: str) -> str:
    """The file of a namespace that has a name."""
    return f"{NAMED}/{namespace}"


def walk(known: Known) -> Iterator[Line]:
    """A line for each step, in order, up to the first that is broken."""
    with Home() as home:
        here = _Places(home)
        for name, step in STEPS.items():
            try:
                found = step(known, here)
            except BrokenError as broken:
                yield Line(name, False, broken.found, broken.fix)
                return
            yield Line(name, None if isinstance(found, Absent) else True, found)


def _own(name: str) -> str:
    """A name without its domain: each side of a border writes that differently."""
    return domains.split(name)[0]


# --- the mesh --------------------------------------------------------------------------------


def _registration(known: Known, _: "_Places") -> str:
    if known.trouble:
        raise BrokenError(
            f"who offers {known.service!r} cannot be asked: {known.trouble.message}",
            known.trouble.hint or "see what the manager and the registry log",
        )
    names = [_own(one.name) for one in known.offered]
    if not names:
        raise BrokenError(
            f"nobody offers {known.service!r}",
            "start its endpoint; `nsmctl endpoints` shows who is registered",
        )
    if known.held and _own(known.conn.endpoint) not in names:
        raise BrokenError(
            f"{known.conn.endpoint} at the far end is registered no more; {known.service!r} has"
            f" {', '.join(names[:3])}",
            "start that endpoint again, or wait until the wire is led to another",
        )
    return f"{known.service} is offered by {', '.join(names[:5])}"


def _lease(known: Known, _: "_Places") -> str:
    if not known.held or known.held[0].node != known.node:
        why = f": {known.told}" if known.told else ""
        raise BrokenError(
            f"no forwarder of {known.node} holds a wire of {known.client} to"
            f" {known.service!r}{why}",
            f"is {known.client} running? its log says what was refused",
        )
    one = known.held[0]
    left = (one.lease.ends - time.time_ns()) / SECOND
    if left <= 0:
        raise BrokenError(
            f"it ended {-left:.0f} s ago on {one.node}: nobody refreshed it",
            f"is {known.client} running, and do its node's clock and its manager's agree?",
        )
    return f"on {one.node} for another {left / 60:.0f} min"


def _policy(known: Known, _: "_Places") -> str:
    wanted = _own(known.service)
    rules = next((one for one in known.rules if _own(one.name) == wanted), None)
    if rules is None or not rules.matches:
        return f"{known.service} has no rules: any of its endpoints serves"
    labels = dict(known.conn.labels)
    chosen = [_own(one.endpoint.name) for one in match_endpoints(rules, labels, known.offered)]
    said = ", ".join(f"{k}={v}" for k, v in sorted(labels.items())) or "no labels"
    if _own(known.conn.endpoint) not in chosen:
        whom = f"to {', '.join(chosen)}" if chosen else "to nobody"
        raise BrokenError(
            f"the rules of {known.service} lead {said} {whom}, and not to {known.conn.endpoint}",
            "change the rules with `nsmctl define`, or the client's labels",
        )
    return f"{said} is led to {known.conn.endpoint}"


# --- the kernel ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _End:
    """One end of the wire: where it is, and what it should have."""

    whose: str
    path: str  # of its namespace
    interface: str
    addresses: Sequence[str]
    routes: Sequence[str]


class _Places:
    """Looks into namespaces, from the one this process is in."""

    def __init__(self, home: Home) -> None:
        self.home = home

    @contextlib.contextmanager
    def inside(self, path: str) -> Iterator[int]:
        """This thread is in the namespace of that file; "" is our own. Yields its descriptor."""
        if not path:
            yield self.home.fd
            return
        fd = self.home.opened_path(path, path)
        try:
            with self.home.inside(fd):
                yield fd
        finally:
            os.close(fd)

    def device(self, path: str, name: str) -> Device | None:
        """An interface there; None if there is none."""
        with self.inside(path), Socket.here() as sock:
            try:
                return messages.device(sock.ask(messages.get_link(name=name)))
            except Refusal:
                return None

    def ends(self, known: Known) -> list[_End]:
        """The wire's ends on those nodes. Raises BrokenError where a namespace is gone."""
        found = []
        for one in known.held:
            conn = one.lease.connection
            for space in one.lease.spaces:
                # an adopted one has no sides before its next refresh
                is_src = space.side == "src" if space.side else one is known.held[0]
                whose = known.client if is_src else conn.endpoint
                path = _by_inode(space.inode)
                if not path:
                    raise BrokenError(
                        f"the network namespace of {whose} on {one.node} is gone",
                        f"start {whose} again; what served it is taken away within seconds",
                    )
                ip = conn.ip
                routes = ip.src_routes if is_src else ip.dst_routes
                found.append(
                    _End(
                        whose,
                        path,
                        space.interface,
                        ip.src_ip_addrs if is_src else ip.dst_ip_addrs,
                        (
                            *(ip.dst_ip_addrs if is_src else ip.src_ip_addrs),
                            *(route.prefix for route in routes),
                        ),
                    )
                )
        return found

    def ping(self, path: str, address: str, size: int, count: int = ECHOES) -> str:
        """Why it does not answer; empty if it did."""
        with self.inside(path):
            (said,) = ping([{"address": address, "size": size}], count, PATIENCE)
        if said["lost"] < count:
            return ""
        return said["refused"] or f"no answer within {PATIENCE:g} s"

    def addresses(self, path: str, name: str) -> set[IPAddress]:
        """What an interface there has."""
        device = self.device(path, name)
        if device is None:
            return set()
        with self.inside(path), Socket.here() as sock:
            told = sock.dump(messages.dump_addresses(device.index))
        there = Namespace(0, OWN, 0, path)
        return {one.cidr.ip for one in messages.seen_addresses(told, there, name, device.index)}

    def settings(self, path: str, device: Device) -> Settings | None:
        """What a WireGuard device holds; None if nobody answers for it."""
        if device.kind == "wireguard":
            with self.inside(path), Socket.here(netlink.GENERIC) as sock:
                return wireguard_netlink.settings(sock, device.index)
        mark = owner.Mark.parse(device.alias)
        if mark is None:
            return None
        return Processes(0).settings(owner.tunnel_name(mark.wire, mark.side), PATIENCE)


def _by_inode(inode: int) -> str:
    """A file of the namespace of that inode; empty if nobody is in it."""
    for path in (*glob.glob(f"{NAMED}/*"), *glob.iglob("/proc/[0-9]*/ns/net")):
        with contextlib.suppress(OSError):
            if os.stat(path).st_ino == inode:
                return path
    return ""


def _link(known: Known, here: _Places) -> str:
    found = []
    for end in here.ends(known):
        device = here.device(end.path, end.interface)
        if device is None:
            raise BrokenError(
                f"{end.interface} is missing in {end.whose}",
                f"start {known.client} again: its next request makes it anew",
            )
        if not device.up:
            raise BrokenError(
                f"{end.interface} in {end.whose} is down", f"ip link set {end.interface} up there"
            )
        found.append(f"{end.interface} in {end.whose} ({device.kind})")
    return " and ".join(found)


def _address(known: Known, here: _Places) -> str:
    found = []
    for end in here.ends(known):
        has = here.addresses(end.path, end.interface)
        for wanted in map(ip_interface, end.addresses):
            if wanted.ip not in has:
                raise BrokenError(
                    f"{wanted} is missing on {end.interface} in {end.whose}",
                    f"ip addr add {wanted} dev {end.interface} there, or start {known.client}"
                    " again",
                )
            found.append(str(wanted.ip))
    return " and ".join(found) or Absent("the wire has none")


def _route(known: Known, here: _Places) -> str:
    found = []
    for end in here.ends(known):
        device = here.device(end.path, end.interface)
        for wanted in end.routes:
            network = ip_network(wanted, strict=False)
            with here.inside(end.path), Socket.here() as sock:
                try:
                    index, _ = messages.way(sock.ask(messages.get_route(network[0])))
                except Refusal:
                    index = 0
            if device is None or index != device.index:
                raise BrokenError(
                    f"{network} does not lead into {end.interface} in {end.whose}",
                    f"ip route add {network} dev {end.interface} there, or start {known.client}"
                    " again",
                )
            found.append(str(network))
    found = list(dict.fromkeys(found))
    return f"{', '.join(found)} through the wire" if found else Absent("the wire has none")


# --- the way between nodes -------------------------------------------------------------------


def _tunnels(known: Known) -> Iterator[tuple[Held, Mechanism, str, str]]:
    """For each node: the tunnel as agreed, its own address and the other node's."""
    for one in known.held:
        incoming = one.lease.connection.mechanism
        for mechanism, own, far in (
            (one.lease.outgoing, mechanisms.SRC_IP, mechanisms.DST_IP),
            (incoming, mechanisms.DST_IP, mechanisms.SRC_IP),
        ):
            if mechanism and mechanism.cls == mechanisms.REMOTE:
                yield one, mechanism, mechanism.get(own), mechanism.get(far)


def _tunnel(known: Known, here: _Places) -> str:
    found = ""
    for one, mechanism, own, far in _tunnels(known):
        kind = mechanism.type.lower()
        if refused := here.ping(one.space, far, 64):
            raise BrokenError(
                f"{one.node} ({own}) does not reach {far}, where its {kind} tunnel ends: {refused}",
                "see to the network between the two nodes: addresses, links, firewalls",
            )
        for space in one.lease.spaces:
            path = _by_inode(space.inode)
            device = here.device(path, space.interface) if path else None
            if device and device.kind == "vxlan":
                wanted = (mechanisms.vni(mechanism), ip_address(far))
                if (device.vni, device.remote) != wanted:
                    raise BrokenError(
                        f"{space.interface} on {one.node} has VNI {device.vni} to"
                        f" {device.remote}, agreed are {wanted[0]} to {wanted[1]}",
                        f"start {known.client} again: its next request makes it anew",
                    )
        found = found or f"{kind} {own} \N{LEFT RIGHT ARROW} {far}"
    return found or Absent("none: both ends are on one node")


def _handshake(known: Known, here: _Places) -> str:
    seen = ""
    for one, mechanism, _, far in _tunnels(known):
        if mechanism.type != mechanisms.WIREGUARD:
            continue
        for space in one.lease.spaces:
            path = _by_inode(space.inode)
            device = here.device(path, space.interface) if path else None
            settings = _greeted(known, here, path, device) if device else None
            if settings is None:
                raise BrokenError(
                    f"nobody seals what goes through {space.interface} on {one.node}: its"
                    " wireguard-go does not answer",
                    f"start {known.client} again: its next request makes it anew",
                )
            last = max((peer.handshake for peer in settings.peers), default=0)
            age = time.time() - last
            if age > LATEST_HANDSHAKE:
                ago = f"the last one was {age:.0f} s ago" if last else "there was none"
                raise BrokenError(
                    f"{one.node} and {far} do not agree on keys: {ago}",
                    f"do UDP packets reach {far}, and has each the other's key? start"
                    f" {known.client} again: its next request tells both anew",
                )
            seen = seen or f"{age:.0f} s ago"
    return seen or Absent("nothing is encrypted")


def _greeted(known: Known, here: _Places, path: str, device: Device) -> Settings | None:
    """What a device holds, once it has had an occasion: a wire that is idle shakes no hands."""
    end, settings = here.ends(known)[0], None
    for _ in range(ECHOES):
        settings = here.settings(path, device)
        last = max((peer.handshake for peer in settings.peers), default=0) if settings else 0
        if settings is None or time.time() - last <= LATEST_HANDSHAKE:
            break
        for far in known.conn.ip.dst_ip_addrs[:1]:
            here.ping(end.path, str(ip_interface(far).ip), 64)
    return settings


def _packets(known: Known, here: _Places) -> str:
    if not known.conn.ip.dst_ip_addrs:
        return Absent("the far end has no address")
    end = here.ends(known)[0]
    verdicts = [one.metrics[PROBE] for one in known.conn.segments if PROBE in one.metrics]
    far = [str(ip_interface(one).ip) for one in known.conn.ip.dst_ip_addrs]
    for address in far:
        if refused := here.ping(end.path, address, 64):
            made = f" (when it was made: {verdicts[0]})" if verdicts else ""
            raise BrokenError(
                f"{address} does not answer pings from {end.whose}: {refused}{made}",
                f"look at {known.conn.endpoint}: is it running, and does a firewall there drop"
                " them?",
            )
    return f"{', '.join(far)} answers"


def _mtu(known: Known, here: _Places) -> str:
    agreed = known.conn.context.mtu if known.conn.context else 0
    found = 0
    for end in here.ends(known):
        device = here.device(end.path, end.interface)
        found = device.mtu if device else 0
        if agreed and found != agreed:
            raise BrokenError(
                f"{end.interface} in {end.whose} has {found}, agreed are {agreed}",
                f"ip link set {end.interface} mtu {agreed} there",
            )
    end = here.ends(known)[0]
    for address in (str(ip_interface(one).ip) for one in known.conn.ip.dst_ip_addrs):
        if here.ping(end.path, address, found):
            raise BrokenError(
                f"packets of {found} bytes do not arrive at {address}, small ones do",
                "the network between the nodes carries less than its links say: give the"
                " forwarders' nodes its true MTU",
            )
    return f"{found} bytes arrive in one piece"


def _dns(known: Known, here: _Places) -> str:
    context = known.conn.context
    configs = context.dns.configs if context and context.dns else ()
    servers = list(dict.fromkeys(server for one in configs for server in one.servers))
    if not servers:
        return Absent("the wire says nothing of names")
    end = here.ends(known)[0]
    for server in servers:
        with here.inside(end.path):
            if not _answers(server):
                raise BrokenError(
                    f"{server} answers no question about names from {end.whose}",
                    f"start the DNS server of {known.conn.endpoint}, or take it out of what that"
                    " endpoint says (NSM_DNS_CONFIGS)",
                )
    return f"{', '.join(servers)} answers"


def _answers(server: str) -> bool:
    """Whether a DNS server answers anything."""
    ident = secrets.randbelow(1 << 16)
    question = struct.pack("!HHHHHH", ident, 0x0100, 1, 0, 0, 0) + b"\0" + struct.pack("!HH", 2, 1)
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.settimeout(PATIENCE)
        try:
            asking.connect((server, _DNS_PORT))
            for _ in range(2):  # one may be lost
                asking.send(question)
                with contextlib.suppress(TimeoutError):
                    return asking.recv(1 << 16)[:2] == question[:2]
        except OSError:
            return False
    return False


STEPS: Final[Mapping[str, Callable[[Known, _Places], str]]] = {
    "registration": _registration,
    "lease": _lease,
    "policy": _policy,
    "link": _link,
    "address": _address,
    "route": _route,
    "tunnel": _tunnel,
    "handshake": _handshake,
    "packets": _packets,
    "MTU": _mtu,
    "DNS": _dns,
}

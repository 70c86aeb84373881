"""What network namespaces should hold, and what they hold: the same values for both.

A *wire* is what a forwarder asks for. `items` breaks it into the single things
the kernel knows: devices, sysctls, addresses, routes, neighbours, rules. Looking
at the kernel yields the same values, so the difference is set arithmetic
(`nsm.kernel.plan`). `str()` of an item is its part of an `ip` command.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Literal

from nsm.errors import InvalidError
from nsm.kernel import owner
from nsm.kernel.keys import Key, check_public

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network

OWN = -1
"""The nsid of the namespace this process runs in."""

VXLAN_PORT = 4789
WIREGUARD_PORT = 51820
LONGEST_NAME = 15  # IFNAMSIZ - 1, bytes
_SMALLEST_MTU = {4: 68, 6: 1280}  # below it the kernel takes the family's addresses away
_LARGEST_MTU = 65535

EngineName = Literal["kernel", "userspace"]
"""Who makes a WireGuard device: the kernel, or a wireguard-go process."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace, known without holding it.

    cookie is its identity: inode numbers are given to the next namespace within
    seconds, cookies never. nsid is the number under which this process's own
    namespace knows it. Neither keeps it alive. name is for people.
    """

    cookie: int
    nsid: int = field(compare=False)
    inode: int = field(compare=False, default=0)
    name: str = field(compare=False, default="")
    handle: bytes = field(compare=False, default=b"", repr=False)

    def __str__(self) -> str:
        return self.name or f"net:[{self.inode}]"

    @property
    def own(self) -> bool:
        """Whether it is the namespace this process runs in."""
        return self.nsid == OWN


# --- single things ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class End:
    """One device: where it stands, and what of it can be changed while it lives.

    quiet: nobody is asked for MACs on it, because all it leads to is one far end.
    """

    namespace: Namespace
    name: str
    mac: str
    mtu: int
    group: int
    alias: str
    up: bool = True
    quiet: bool = False

    @property
    def seat(self) -> tuple[Namespace, str]:
        """What nobody else can have at the same time: a name in a namespace."""
        return (self.namespace, self.name)

    def __str__(self) -> str:
        mac = f" address {self.mac}" if self.mac else ""
        return f"{self.name}{mac} mtu {self.mtu} group {self.group}"


@dataclass(frozen=True, slots=True)
class Veth:
    """A pair of devices: what goes in at one comes out at the other."""

    src: End
    dst: End

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.src, self.dst)

    @property
    def core(self) -> tuple[object, ...]:
        """What cannot be changed without making it anew."""
        return ("veth", self.src.seat, self.dst.seat)

    def __str__(self) -> str:
        return f"link {self.src} type veth peer {self.dst} netns {self.dst.namespace}"


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A tunnel device in a workload's namespace whose UDP socket stays in the underlay."""

    end: End
    vni: int
    local: IPAddress
    remote: IPAddress
    port: int
    underlay: Namespace

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.end,)

    @property
    def core(self) -> tuple[object, ...]:
        """What cannot be changed without making it anew (the kernel: EOPNOTSUPP)."""
        family = self.remote.version
        return ("vxlan", self.end.seat, self.vni, self.port, self.underlay, family)

    @property
    def claim(self) -> tuple[Namespace, int, int, int]:
        """What only one device may hold: a VNI on a port of an underlay, per family."""
        return (self.underlay, self.port, self.vni, self.remote.version)

    def __str__(self) -> str:
        return (
            f"link {self.end} netns {self.end.namespace} type vxlan id {self.vni}"
            f" local {self.local} remote {self.remote} dstport {self.port} nolearning"
        )


@dataclass(frozen=True, slots=True)
class Wireguard:
    """An encrypted tunnel in a workload's namespace whose UDP socket stays in the underlay.

    Its end has no MAC, because only IP packets go through it. far is where the far end said
    it is, ADDRESS:PORT: the device itself sends to where authentic packets came from last.
    As found it may be half made: no key, port 0, no peer. strangers are further peers it has.
    """

    end: End
    engine: EngineName
    underlay: Namespace
    key: Key | None
    port: int
    peer: str
    far: str
    keepalive: int = 0
    strangers: tuple[str, ...] = ()

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.end,)

    @property
    def core(self) -> tuple[object, ...]:
        """What cannot be changed without making it anew."""
        return ("wireguard", self.end.seat, self.underlay, self.engine)

    @property
    def claim(self) -> tuple[Namespace, int]:
        """What only one device may hold: a UDP port of an underlay."""
        return (self.underlay, self.port)

    @property
    def called(self) -> str:
        """What `wg` calls it: wireguard-go's device keeps the name it was made under."""
        mark = owner.Mark.parse(self.end.alias)
        if self.engine == "kernel" or mark is None:
            return self.end.name
        return owner.tunnel_name(mark.wire, mark.side)

    def __str__(self) -> str:
        return f"link {self.end} netns {self.end.namespace} type wireguard"


@dataclass(frozen=True, slots=True)
class Macvlan:
    """A workload's only way to a tunnel that stands in the underlay: it has frames, no more.

    lower is the tunnel's seat, on is the tunnel's core: on another tunnel it is another device.
    It has the tunnel's MAC, and goes when the tunnel goes.
    """

    end: End
    lower: tuple[Namespace, str]
    on: tuple[object, ...]

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.end,)

    @property
    def core(self) -> tuple[object, ...]:
        """What cannot be changed without making it anew."""
        return ("macvlan", self.end.seat, self.on)

    def __str__(self) -> str:
        return (
            f"link {self.end} netns {self.end.namespace} link {self.lower[1]}"
            " type macvlan mode passthru"
        )


@dataclass(frozen=True, slots=True)
class Splice:
    """A workload's only way to an encrypted tunnel that stands in the underlay.

    A veth pair whose end there, near, is joined with the tunnel: what goes in at the one comes
    out at the other (`nsm.kernel.splice`). lower is the tunnel's seat, on is the tunnel's core.
    """

    end: End
    near: End
    lower: tuple[Namespace, str]
    on: tuple[object, ...]

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.end, self.near)

    @property
    def core(self) -> tuple[object, ...]:
        """What cannot be changed without making it anew: what joins them knows the MAC."""
        return ("splice", self.end.seat, self.near.seat, self.end.mac, self.on)

    def __str__(self) -> str:
        return (
            f"link {self.end} netns {self.end.namespace} type veth peer {self.near}"
            f" netns {self.near.namespace}"
        )


@dataclass(frozen=True, slots=True)
class Stub:
    """A device of ours that is not what it was made as: its far end is elsewhere or gone."""

    end: End
    kind: str

    @property
    def ends(self) -> tuple[End, ...]:
        return (self.end,)

    @property
    def core(self) -> tuple[object, ...]:
        return ("stub", self.end.seat, self.kind)

    def __str__(self) -> str:
        return f"link {self.end} type {self.kind}"


@dataclass(frozen=True, slots=True)
class Sysctl:
    """A kernel setting of a namespace: `net.…` with slashes, as below /proc/sys."""

    namespace: Namespace
    key: str
    value: str

    def __str__(self) -> str:
        return f"{self.key.replace('/', '.')}={self.value!r}"


@dataclass(frozen=True, slots=True)
class Address:
    namespace: Namespace
    link: str
    cidr: IPInterface

    def __str__(self) -> str:
        return f"addr {self.cidr} dev {self.link}" + (" nodad" if self.cidr.version == 6 else "")


@dataclass(frozen=True, slots=True)
class Route:
    """A route of ours over a link; via None is on-link. table 254 is main."""

    namespace: Namespace
    link: str
    to: IPNetwork
    via: IPAddress | None = None
    metric: int = 0
    table: int = 254

    def __str__(self) -> str:
        return (
            f"route {self.to}"
            + (f" via {self.via}" if self.via else "")
            + f" dev {self.link}"
            + (" onlink" if self.via else "")
            + (f" metric {self.metric}" if self.metric else "")
            + (f" table {self.table}" if self.table != 254 else "")
            + f" proto {owner.PROTOCOL}"
        )


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent neighbour: nobody is asked for its link-layer address."""

    namespace: Namespace
    link: str
    ip: IPAddress
    mac: str

    def __str__(self) -> str:
        return f"neigh {self.ip} lladdr {self.mac} dev {self.link} nud permanent"


@dataclass(frozen=True, slots=True)
class Selector:
    """Which traffic a policy is about (`wire.md` §10.5); None matches all."""

    from_: IPNetwork | None = None
    proto: int | None = None
    src_port: tuple[int, int] | None = None
    dst_port: tuple[int, int] | None = None

    def __str__(self) -> str:
        parts = [f"from {self.from_ or 'all'}"]
        if self.proto is not None:
            parts.append(f"ipproto {self.proto}")
        if self.src_port:
            parts.append(f"sport {self.src_port[0]}-{self.src_port[1]}")
        if self.dst_port:
            parts.append(f"dport {self.dst_port[0]}-{self.dst_port[1]}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Rule:
    """Sends what the selector matches to a table; link is the device the table leads to."""

    namespace: Namespace
    link: str
    family: int  # 4 or 6
    selector: Selector
    table: int
    priority: int

    def __str__(self) -> str:
        return (
            f"rule {self.selector} lookup {self.table} priority {self.priority}"
            f" protocol {owner.PROTOCOL}"
        )


OnTop = Macvlan | Splice
Made = Veth | Vxlan | Wireguard | Macvlan | Splice
Link = Made | Stub
Member = Address | Route | Neighbour | Rule
Item = Link | Sysctl | Member
State = frozenset[Item]


# --- what is asked for -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hop:
    """A route as it is asked for: over the wire, on-link or by a gateway taken as on-link."""

    to: IPNetwork
    via: IPAddress | None = None
    metric: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """Routes for some traffic only; no hops means everything goes over the wire."""

    selector: Selector
    hops: tuple[Hop, ...] = ()

    def families(self) -> tuple[int, ...]:
        """4, 6 or both: of the source, else of the hops, else IPv4 (`wire.md` §10.5)."""
        if self.selector.from_ is not None:
            return (self.selector.from_.version,)
        return tuple(sorted({hop.to.version for hop in self.hops})) or (4,)

    def routes(self, family: int) -> tuple[Hop, ...]:
        """The hops of that family; the default route if there are none."""
        return tuple(hop for hop in self.hops if hop.to.version == family) or (
            Hop(ip_network("0.0.0.0/0" if family == 4 else "::/0")),
        )


@dataclass(frozen=True, slots=True)
class Interface:
    """One end of a wire as it is asked for.

    mtu in bytes. mac "" is derived from the connection id and the side. neighbours
    map addresses to MACs and become permanent. ping allows unprivileged ICMP echo in
    the whole namespace (upstream's liveness check needs it, in both namespaces).
    """

    namespace: Namespace
    name: str
    mtu: int = 1500
    mac: str = ""
    addresses: tuple[IPInterface, ...] = ()
    routes: tuple[Hop, ...] = ()
    neighbours: tuple[tuple[IPAddress, str], ...] = ()
    policies: tuple[Policy, ...] = ()
    route_localnet: bool = False
    ping: bool = True

    @property
    def v6(self) -> bool:
        """Whether anything of it needs IPv6."""
        return (
            any(address.version == 6 for address in self.addresses)
            or any(hop.to.version == 6 for hop in self.routes)
            or any(ip.version == 6 for ip, _ in self.neighbours)
            or any(6 in policy.families() for policy in self.policies)
        )


@dataclass(frozen=True, slots=True)
class LocalWire:
    """Two workloads on one node, joined by a veth pair; leg and beside as in `owner.Mark`."""

    connection: str
    src: Interface
    dst: Interface
    leg: str = ""
    beside: bool = False

    @property
    def id(self) -> str:
        """What tells it from all others, those of the same connection too."""
        return owner.wire_id(self.connection, self.leg)

    @property
    def sides(self) -> tuple[tuple[owner.SideName, Interface], ...]:
        return (("src", self.src), ("dst", self.dst))


@dataclass(frozen=True, slots=True)
class VxlanTunnel:
    """The VXLAN between two nodes: outer addresses, UDP port, and where the socket stands."""

    vni: int
    local: IPAddress
    remote: IPAddress
    underlay: Namespace
    port: int = VXLAN_PORT


@dataclass(frozen=True, slots=True)
class WireguardTunnel:
    """The WireGuard between two nodes, as one of them has it.

    key is ours, peer is the far end's public one. local is what we say of ourselves; the
    socket hears on all addresses, on port. remote and remote_port are where the far end said
    it is. keepalive in seconds is for the side that begins the handshake, 0 is none.
    """

    key: Key = field(repr=False)
    peer: str
    local: IPAddress
    remote: IPAddress
    remote_port: int
    underlay: Namespace
    port: int
    engine: EngineName
    keepalive: int = 0


@dataclass(frozen=True, slots=True)
class RemoteWire:
    """One node's half of a wire between two nodes: one tunnel device in the workload.

    hop: the tunnel device stands in the underlay and the workload gets one on top of it,
    because whoever may configure a tunnel can lead it elsewhere, send from the node's
    address under other identifiers, or read its key. A wireguard-go's device is none of that:
    socket and key are the process's, so it is in the workload either way. leg and beside as
    in `owner.Mark`.
    """

    connection: str
    side: owner.SideName
    end: Interface
    tunnel: VxlanTunnel | WireguardTunnel
    hop: bool = False
    leg: str = ""
    beside: bool = False

    @property
    def id(self) -> str:
        """What tells it from all others, those of the same connection too."""
        return owner.wire_id(self.connection, self.leg)

    @property
    def sides(self) -> tuple[tuple[owner.SideName, Interface], ...]:
        return ((self.side, self.end),)

    @property
    def apart(self) -> bool:
        """Whether the tunnel's device stands in the underlay."""
        tunnel = self.tunnel
        return self.hop and not (
            isinstance(tunnel, WireguardTunnel) and tunnel.engine == "userspace"
        )

    @property
    def below(self) -> tuple[Namespace, str]:
        """Where the tunnel stands if it is not in the workload."""
        return (self.tunnel.underlay, owner.tunnel_name(self.id, self.side))

    @property
    def lead(self) -> tuple[Namespace, str]:
        """Where what leads to an encrypted tunnel that is not in the workload has its end."""
        return (self.tunnel.underlay, owner.lead_name(self.id, self.side))


Wire = LocalWire | RemoteWire


def items(wire: Wire, group: int) -> State:
    """Everything the wire needs, but its policies, whose tables depend on what is there.

    Raises InvalidError for what the kernel could not hold: bad names, MTUs, VNIs, MACs, keys.
    """
    ends = [_end(wire, side, interface, group) for side, interface in wire.sides]
    found: set[Item] = set()
    if isinstance(wire, LocalWire):
        if ends[0].seat == ends[1].seat:
            raise InvalidError(
                f"both ends of wire {wire.connection} are to be called {ends[0].name}"
                f" in {ends[0].namespace}",
                hint="client and endpoint share a namespace: give them different interface names",
            )
        found.add(Veth(ends[0], ends[1]))
    elif isinstance(wire.tunnel, WireguardTunnel):
        found.update(_encrypted(wire, wire.tunnel, ends[0]))
    elif wire.apart:
        where, name = wire.below
        alias = str(owner.mark(wire.connection, wire.side, hop=True, leg=wire.leg))
        end = replace(ends[0], namespace=where, name=name, alias=alias)
        tunnel = _vxlan(wire, wire.tunnel, end)
        found |= {tunnel, Macvlan(ends[0], wire.below, tunnel.core)}
    else:
        found.add(_vxlan(wire, wire.tunnel, ends[0]))
    for _, interface in wire.sides:
        found.update(_members(interface))
    if any(isinstance(item, Wireguard) for item in found):
        # nobody is asked for a MAC where there is none
        found -= {item for item in found if isinstance(item, Neighbour)}
    return frozenset(found)


def _end(wire: Wire, side: owner.SideName, interface: Interface, group: int) -> End:
    check_name(interface.name, f"wire {wire.connection}")
    smallest = _SMALLEST_MTU[6 if interface.v6 else 4]
    if not smallest <= interface.mtu <= _LARGEST_MTU:
        raise InvalidError(
            f"wire {wire.connection}: an MTU of {interface.mtu} on {interface.name} in"
            f" {interface.namespace} is not within {smallest} and {_LARGEST_MTU}",
            hint="IPv6 needs 1280 at least; check the underlay's MTU" if interface.v6 else "",
        )
    mac = check_mac(interface.mac) if interface.mac else owner.mac(wire.connection, side)
    mark = owner.mark(
        wire.connection,
        side,
        rules=bool(interface.policies),
        leg=wire.leg,
        beside=wire.beside and side == "src",
    )
    return End(interface.namespace, interface.name, mac, interface.mtu, group, str(mark))


def _vxlan(wire: RemoteWire, tunnel: VxlanTunnel, end: End) -> Vxlan:
    _check_outside(wire, tunnel)
    if not 0 < tunnel.vni < 1 << 24:
        raise InvalidError(f"wire {wire.connection}: VNI {tunnel.vni} is not within 1 and 16777215")
    return Vxlan(end, tunnel.vni, tunnel.local, tunnel.remote, tunnel.port, tunnel.underlay)


def _encrypted(wire: RemoteWire, tunnel: WireguardTunnel, end: End) -> Iterator[Link]:
    mark = owner.Mark.parse(end.alias)
    assert mark is not None
    if not wire.apart:
        yield _wireguard(wire, tunnel, end, mark)
        return
    where, name = wire.below
    mark = owner.mark(wire.connection, wire.side, hop=True, leg=wire.leg)
    below = _wireguard(wire, tunnel, replace(end, namespace=where, name=name), mark)
    yield below
    where, name = wire.lead
    alias = str(owner.mark(wire.connection, wire.side, hop=True, lead=True, leg=wire.leg))
    near = replace(end, namespace=where, name=name, alias=alias)
    yield Splice(replace(end, quiet=True), near, wire.below, below.core)


def _wireguard(wire: RemoteWire, tunnel: WireguardTunnel, end: End, mark: owner.Mark) -> Wireguard:
    _check_outside(wire, tunnel)
    _check_port(wire, tunnel.remote_port)
    peer = check_public(tunnel.peer, f"wire {wire.connection}: the far end's key")
    if peer == tunnel.key.public:
        raise InvalidError(f"wire {wire.connection}: both ends have the key {peer}")
    if not 0 <= tunnel.keepalive < 1 << 16:
        raise InvalidError(
            f"wire {wire.connection}: a keepalive of {tunnel.keepalive} s is not within 0 and 65535"
        )
    far = endpoint(tunnel.remote, tunnel.remote_port)
    mark = owner.mark(
        wire.connection,
        wire.side,
        rules=mark.rules,
        hop=mark.hop,
        underlay=tunnel.underlay.cookie,
        far=far,
        leg=wire.leg,
        beside=mark.beside,
    )
    return Wireguard(
        replace(end, mac="", alias=str(mark), quiet=True),
        tunnel.engine,
        tunnel.underlay,
        tunnel.key,
        tunnel.port,
        peer,
        far,
        tunnel.keepalive,
    )


def endpoint(address: IPAddress, port: int) -> str:
    """Where packets are sent to, as WireGuard writes it."""
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def endpoint_of(text: str) -> tuple[IPAddress, int]:
    """What `endpoint` wrote."""
    address, _, port = text.rpartition(":")
    return ip_address(address.strip("[]")), int(port)


def _check_outside(wire: RemoteWire, tunnel: VxlanTunnel | WireguardTunnel) -> None:
    if tunnel.local.version != tunnel.remote.version:
        raise InvalidError(
            f"wire {wire.connection}: a tunnel from {tunnel.local} to {tunnel.remote}"
            " mixes IPv4 and IPv6"
        )
    _check_port(wire, tunnel.port)


def _check_port(wire: RemoteWire, port: int) -> None:
    if not 0 < port < 1 << 16:
        raise InvalidError(f"wire {wire.connection}: UDP port {port} is not within 1 and 65535")


def _members(interface: Interface) -> Iterator[Item]:
    where, link = interface.namespace, interface.name
    connected = {cidr.network for cidr in interface.addresses}
    for cidr in interface.addresses:
        yield Address(where, link, cidr)
    for hop in interface.routes:
        if hop.via is None and hop.metric == 0 and hop.to in connected:
            continue  # the kernel makes that one itself, with the address
        yield Route(where, link, hop.to, hop.via, _metric(hop))
    for ip, mac in interface.neighbours:
        yield Neighbour(where, link, ip, check_mac(mac))
    if interface.ping:
        yield Sysctl(where, "net/ipv4/ping_group_range", "0\t2147483647")
    if interface.v6:
        yield Sysctl(where, f"net/ipv6/conf/{link}/disable_ipv6", "0")
    if interface.route_localnet:
        yield Sysctl(where, f"net/ipv4/conf/{link}/route_localnet", "1")


def _metric(hop: Hop) -> int:
    # because the kernel turns "none" into 1024 for IPv6, and we compare with what it says
    return hop.metric or (1024 if hop.to.version == 6 else 0)


def policies(
    interface: Interface, present: Iterable[Rule | Route], busy: set[int], taken: set[int]
) -> State:
    """The rules and tables of an interface's policies (`wire.md` §10.5).

    present: our rules and their tables' routes on this interface now; a policy that is
    there keeps its table and priority. busy: table numbers and taken: rule priorities in
    use by anybody in the namespace. A new policy gets the lowest free table from 1.
    """
    where, link = interface.namespace, interface.name
    there = list(present)
    rules = sorted((r for r in there if isinstance(r, Rule)), key=lambda rule: rule.priority)
    made: set[Item] = set()
    kept: set[Rule] = set()
    wanted = [(policy, family) for policy in interface.policies for family in policy.families()]
    for policy, family in wanted:
        selector = policy.selector
        if selector.from_ is not None and not selector.from_.prefixlen:
            selector = replace(selector, from_=None)  # the kernel has no other word for "all"
        held = next(
            (r for r in rules if r not in kept and (r.family, r.selector) == (family, selector)),
            None,
        )
        if held is None:
            table = next(n for n in range(1, 1 << 31) if n not in busy and not 253 <= n <= 255)
            free = next((n for n in owner.RULES if n not in taken), None)
            if free is None:
                raise InvalidError(f"more than {len(owner.RULES)} policies in {where}")
            held = Rule(where, link, family, selector, table, free)
        kept.add(held)
        busy.add(held.table)
        taken.add(held.priority)
        made.add(held)
        made.update(
            Route(where, link, hop.to, hop.via, _metric(hop), held.table)
            for hop in policy.routes(family)
        )
    return frozenset(made)


def check_name(name: str, whose: str) -> str:
    """The interface name, or InvalidError saying what is wrong with it."""
    if not name:
        raise InvalidError(f"{whose}: the interface has no name")
    if len(name.encode()) > LONGEST_NAME:
        raise InvalidError(
            f"{whose}: interface name {name[:60]!r} has {len(name.encode())} bytes,"
            f" Linux allows {LONGEST_NAME}",
            hint="choose a shorter name in the NSURL",
        )
    if (
        not re.fullmatch(r"[!-~]+", name)
        or set(name) & set("/:%")
        or name in (".", "..", "all", "default")
    ):
        raise InvalidError(
            f"{whose}: {name!r} cannot be the name of an interface",
            hint="use letters, digits, - _ . only",
        )
    return name


def check_mac(mac: str) -> str:
    """The MAC in lower case, or InvalidError: six bytes, and no group address."""
    if not re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", mac):
        raise InvalidError(
            f"{mac[:40]!r} is not a MAC address", hint="six bytes: 02:00:00:00:00:01"
        )
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidError(
            f"{mac} is not the MAC address of one interface", hint="give a unicast one"
        )
    return mac.lower()


def member_of(item: Item) -> tuple[Namespace, str] | None:
    """The seat of the device an item stands on; None for what stands on none."""
    if isinstance(item, Address | Route | Neighbour):
        return (item.namespace, item.link)
    return None

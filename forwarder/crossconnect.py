"""From an agreed connection to what its two ends should be in the kernel. Pure.

src is the client's side, dst the endpoint's. Each side gets its own addresses,
a way to the other side's, and the routes the other side gave it (`wire.md`
§10.6).
"""

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_interface, ip_network
from typing import TypeVar

from nsm import mechanisms
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel import owner
from nsm.kernel.state import (
    Hop,
    Interface,
    IPAddress,
    IPInterface,
    IPNetwork,
    Namespace,
    Policy,
    Selector,
)
from nsm.model import Connection, Mechanism, PolicyRoute, Route

T = TypeVar("T")
LOWEST_MTU = 68  # below it no IPv4 packet fits whole (RFC 791)
MOST = 1024  # addresses, routes, neighbours or policies of one side


def client_side(
    conn: Connection, mechanism: Mechanism, namespace: Namespace, far_mac: str
) -> Interface:
    """The interface the client gets. far_mac is the endpoint's; empty where it is not known."""
    ip = conn.ip
    mac = conn.context.ethernet.src_mac if conn.context and conn.context.ethernet else ""
    name = _name(mechanism, f"the client of {conn.service!r}")
    if _trunk(mechanism):
        return Interface(namespace, name, mac=mac)
    return Interface(
        namespace=namespace,
        name=name,
        mtu=_mtu(conn),
        mac=mac,
        addresses=_addresses(ip.src_ip_addrs, conn),
        routes=_routes(ip.src_ip_addrs, ip.dst_ip_addrs, ip.src_routes, conn),
        neighbours=_neighbours(conn, ip.dst_ip_addrs, far_mac),
        policies=tuple(_policy(one, ip.dst_ip_addrs, conn) for one in _few(ip.policies, conn)),
    )


def endpoint_side(
    conn: Connection, mechanism: Mechanism, namespace: Namespace, far_mac: str
) -> Interface:
    """The interface the endpoint gets: the client's mirrored, and without policies."""
    if mechanism.get(mechanisms.NAT_TEMPLATE):
        raise UnsupportedError(
            f"endpoint {conn.endpoint} asks for {mechanisms.NAT_TEMPLATE} on its interface",
            hint="set the rules up in the endpoint itself",
        )
    ip = conn.ip
    mac = conn.context.ethernet.dst_mac if conn.context and conn.context.ethernet else ""
    name = _name(mechanism, f"endpoint {conn.endpoint}")
    if _trunk(mechanism):
        return Interface(namespace, name, mac=mac)
    return Interface(
        namespace=namespace,
        name=name,
        mtu=_mtu(conn),
        mac=mac,
        addresses=_addresses(ip.dst_ip_addrs, conn),
        routes=_routes(ip.dst_ip_addrs, ip.src_ip_addrs, ip.dst_routes, conn),
        neighbours=_neighbours(conn, ip.src_ip_addrs, far_mac),
        route_localnet=mechanism.get(mechanisms.ROUTE_LOCAL_NET).lower() in ("1", "t", "true"),
    )


def macs(conn: Connection) -> tuple[str, str]:
    """The client's and the endpoint's MAC on a wire of one node: given ones, else derived."""
    given = conn.context.ethernet if conn.context else None
    return (
        (given.src_mac if given else "") or owner.mac(conn.id, "src"),
        (given.dst_mac if given else "") or owner.mac(conn.id, "dst"),
    )


def _trunk(mechanism: Mechanism) -> bool:
    """Whether its owner tags frames on it, and so sets up what is on top (`wire.md` §2.2)."""
    return mechanisms.number(mechanism.get(mechanisms.KERNEL_VLAN), limit=1 << 12) != 0


def _name(mechanism: Mechanism, whose: str) -> str:
    return mechanisms.check_name(mechanism.get(mechanisms.NAME), whose=whose)


def _mtu(conn: Connection) -> int:
    mtu = conn.context.mtu if conn.context else 0
    if mtu and mtu < LOWEST_MTU:
        raise InvalidError(
            f"connection {conn.id} of {conn.service!r}: MTU {mtu}; the least is {LOWEST_MTU}"
        )
    return mtu or mechanisms.JUMBO_MTU


def _addresses(texts: Iterable[str], conn: Connection) -> tuple[IPInterface, ...]:
    found = [_address(text, conn) for text in _few(tuple(texts), conn)]
    return tuple(dict.fromkeys(found))


def _routes(
    own: tuple[str, ...], far: tuple[str, ...], given: tuple[Route, ...], conn: Connection
) -> tuple[Hop, ...]:
    """On-link to each far address no own network holds, then the routes that were given.

    A route without a next hop goes through the first far address of its family,
    or on-link where a far network holds it.
    """
    here = [_address(text, conn) for text in own]
    there = [_address(text, conn) for text in _few(far, conn)]
    direct = [
        Hop(ip_network(one.ip))
        for one in there
        if not any(one.ip in net.network for net in here if net.version == one.version)
    ]
    return tuple(dict.fromkeys((*direct, *_given(given, there, conn))))


def _given(
    routes: tuple[Route, ...], there: Sequence[IPInterface], conn: Connection
) -> Iterator[Hop]:
    for route in _few(routes, conn):
        to = _prefix(route.prefix, conn)
        via = _gateway(route.next_hop, conn) if route.next_hop else None
        if via is None:
            same = [one for one in there if one.version == to.version]
            inside = any(to.subnet_of(one.network) for one in same)  # type: ignore[arg-type] # one family
            via = same[0].ip if same and not inside else None
        yield Hop(to, via)


def _neighbours(
    conn: Connection, far: tuple[str, ...], far_mac: str
) -> tuple[tuple[IPAddress, str], ...]:
    """The given neighbours; on a wire for IP packets also the far end itself, for nobody
    there needs to answer who has an address that only one can have."""
    found = {_gateway(one.ip, conn): one.mac for one in _few(conn.ip.neighbours, conn)}
    if conn.payload == mechanisms.IP and far_mac:
        for text in far:
            found.setdefault(_address(text, conn).ip, far_mac)
    return tuple(found.items())


def _policy(policy: PolicyRoute, far: tuple[str, ...], conn: Connection) -> Policy:
    try:
        source = ip_network(policy.from_, strict=False) if policy.from_ else None
        proto = int(policy.proto) if policy.proto else None
        selector = Selector(source, proto, _ports(policy.src_port), _ports(policy.dst_port))
    except ValueError as wrong:
        raise InvalidError(
            f"a policy route of connection {conn.id}: {wrong}",
            hint="from is a prefix, proto a number, ports are `80` or `80-90`",
        ) from wrong
    if proto is not None and not 0 <= proto <= 255:
        raise InvalidError(f"a policy route of connection {conn.id}: IP protocol {proto}")
    there = [_address(text, conn) for text in far]
    return Policy(selector, tuple(_given(policy.routes, there, conn)))


def _ports(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    first, _, last = text.partition("-")
    ports = (int(first), int(last or first))
    if not 0 < ports[0] <= ports[1] <= 65535:
        raise ValueError(f"ports {text!r}")
    return ports


def _address(text: str, conn: Connection) -> IPInterface:
    try:
        return ip_interface(text)
    except ValueError as wrong:
        raise InvalidError(f"an address of connection {conn.id}: {wrong}") from wrong


def _gateway(text: str, conn: Connection) -> IPAddress:
    try:
        return ip_address(text.partition("/")[0])
    except ValueError as wrong:
        raise InvalidError(f"a next hop or neighbour of connection {conn.id}: {wrong}") from wrong


def _prefix(text: str, conn: Connection) -> IPNetwork:
    try:
        return ip_network(text, strict=False)
    except ValueError as wrong:
        raise InvalidError(f"a route of connection {conn.id}: {wrong}") from wrong


def _few(values: tuple[T, ...], conn: Connection) -> tuple[T, ...]:
    if len(values) > MOST:
        raise InvalidError(
            f"connection {conn.id} carries {len(values)} addresses or routes of one kind;"
            f" at most {MOST} are taken"
        )
    return values

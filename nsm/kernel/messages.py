"""Our values as rtnetlink messages, and the kernel's answers as our values. No I/O here."""

import random
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from typing import Literal

from nsm.kernel import netlink, owner
from nsm.kernel.netlink import message, nested, text, u32
from nsm.kernel.state import (
    Address,
    End,
    IPAddress,
    Macvlan,
    Namespace,
    Neighbour,
    Route,
    Rule,
    Selector,
    Vxlan,
)

# linux/if_link.h
_ADDRESS, _IFNAME, _MTU, _LINK = 1, 3, 4, 5
_OPERSTATE, _LINKINFO, _IFALIAS, _STATS64, _GROUP, _NET_NS_FD = 16, 18, 20, 23, 27, 28
_EXT_MASK, _LINK_NETNSID, _TARGET_NETNSID, _NEW_IFINDEX = 29, 37, 46, 49
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_MACVLAN_MODE, _PASSTHRU = 1, 8
_AF_SPEC, _AF_INET6, _ADDR_GEN_MODE = 26, 10, 8
_VX_ID, _VX_GROUP, _VX_LOCAL, _VX_LEARNING, _VX_PORT, _VX_GROUP6, _VX_LOCAL6 = (
    1,
    2,
    4,
    7,
    15,
    16,
    17,
)
_OF_INTEREST = frozenset(
    (_ADDRESS, _IFNAME, _MTU, _LINK, _LINKINFO, _IFALIAS, _GROUP, _LINK_NETNSID)
)
_SKIP_STATS = 8
_UP, _NOARP, _LOWER_UP = 1, 0x80, 0x10000
_FAMILY = {4: 2, 6: 10}
_VERSION = {2: 4, 10: 6}
_LINK_BODY = struct.Struct("=BBHiII")  # family, pad, type, index, flags, change
_ROUTE_BODY = struct.Struct("=BBBBBBBBI")
_NO_TARGET = -1

Verb = Literal["add", "del"]


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the kernel describes it."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    group: int
    alias: str
    kind: str
    peer: int  # IFLA_LINK: a veth's far end, in the numbering of its namespace
    far: (
        int | None
    )  # IFLA_LINK_NETNSID: where peer or socket are, numbered by the device's namespace
    vni: int = 0
    port: int = 0
    local: IPAddress | None = None
    remote: IPAddress | None = None
    quiet: bool = False  # NOARP: nobody is asked for MACs
    carrier: bool = True  # the cable is in, as far as its driver can tell

    def end(self, namespace: Namespace) -> End:
        """What of it is a wire's end."""
        return End(
            namespace,
            self.name,
            self.mac,
            self.mtu,
            self.group,
            self.alias,
            self.up,
            self.quiet,
        )


@dataclass(frozen=True, slots=True)
class Counters:
    """What went through a device since it was made."""

    rx_packets: int
    tx_packets: int
    rx_bytes: int
    tx_bytes: int
    rx_errors: int
    tx_errors: int
    rx_dropped: int
    tx_dropped: int


# --- links -----------------------------------------------------------------------------------


def fresh_index() -> int:
    """An interface index nobody has, very likely: known before creation, a batch can use it.

    Far above the kernel's own numbers. The one in a million that is taken is refused
    with EBUSY, and tried again.
    """
    return random.randrange(1 << 16, 1 << 30)  # noqa: S311 - not a secret


def create_veth(a: End, a_index: int, b: End, b_index: int, b_fd: int) -> bytearray:
    """Both ends at once, from a's namespace, both down: they come up as they get their alias.

    Up at once would cost more: what changes of a device that is up makes the kernel walk all
    IPv6 routes of its namespace, 0.4 ms each time beside a thousand wires.
    """
    peer = _LINK_BODY.pack(0, 0, 0, b_index, 0, 0) + _shape(b) + u32(_NET_NS_FD, b_fd)
    info = nested(
        _LINKINFO, text(_INFO_KIND, "veth"), nested(_INFO_DATA, netlink.attr(_VETH_PEER, peer))
    )
    body = _LINK_BODY.pack(0, 0, 0, a_index, 0, 0) + _shape(a) + info
    return message(netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body)


def create_vxlan(item: Vxlan, index: int, fd: int) -> bytearray:
    """From the underlay straight into the namespace behind fd, down as a veth pair is."""
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + _shape(item.end) + u32(_NET_NS_FD, fd)
    return message(
        netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body + _vxlan_info(item, new=True)
    )


def create_wireguard(end: End, index: int, fd: int | None = None) -> bytearray:
    """From the underlay straight into the namespace behind fd, down and without a key.

    Without fd in the namespace the message is sent in.
    """
    info = nested(_LINKINFO, text(_INFO_KIND, "wireguard"))
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + _shape(end)
    body += b"" if fd is None else u32(_NET_NS_FD, fd)
    return message(netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body + info)


def move_link(index: int, fd: int, name: str, new_index: int) -> bytearray:
    """Into the namespace behind fd, under that name and index there. Waits 10 to 20 ms."""
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + u32(_NET_NS_FD, fd)
    return message(netlink.NEWLINK, 0, body + text(_IFNAME, name) + u32(_NEW_IFINDEX, new_index))


def rename_link(index: int, name: str) -> bytearray:
    """Call it so; a device that is up, only from Linux 6.2 on (EBUSY before)."""
    return message(netlink.NEWLINK, 0, _LINK_BODY.pack(0, 0, 0, index, 0, 0) + text(_IFNAME, name))


def renamed(index: int, name: str, alias: str) -> bytearray:
    """As `rename_link`, with another alias, both or neither."""
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + text(_IFNAME, name) + text(_IFALIAS, alias)
    return message(netlink.NEWLINK, 0, body)


def set_up(index: int) -> bytearray:
    """Bring a device up."""
    return message(netlink.NEWLINK, 0, _LINK_BODY.pack(0, 0, 0, index, _UP, _UP))


def set_down(index: int) -> bytearray:
    """Take it down, in its own namespace."""
    return message(netlink.NEWLINK, 0, _LINK_BODY.pack(0, 0, 0, index, 0, _UP))


def create_macvlan(item: Macvlan, index: int, lower: int, fd: int) -> bytearray:
    """From the underlay, on the tunnel with that index, into the namespace behind fd.

    Passthru: alone on its tunnel, which gets every frame of it and gives it every one.
    """
    mode = nested(_INFO_DATA, u32(_MACVLAN_MODE, _PASSTHRU))
    info = nested(_LINKINFO, text(_INFO_KIND, "macvlan"), mode)
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + _shape(item.end) + u32(_LINK, lower)
    return message(
        netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body + u32(_NET_NS_FD, fd) + info
    )


def silence(index: int) -> bytearray:
    """Give a device no IPv6 address of its own, so that the node says nothing on it."""
    none = nested(_AF_INET6, netlink.attr(_ADDR_GEN_MODE, b"\x01"))
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + nested(_AF_SPEC, none)
    return message(netlink.NEWLINK, 0, body)


def probe_vni(vni: int, port: int, local: IPAddress, remote: IPAddress) -> bytearray:
    """Asks whether a VXLAN device could be made, without making one.

    The kernel looks for the VNI (EEXIST) before it looks at the name, and a
    pattern with two numbers in it is no name (EINVAL).
    """
    info = nested(_LINKINFO, text(_INFO_KIND, "vxlan"), _tunnel(vni, port, local, remote, new=True))
    body = _LINK_BODY.pack(0, 0, 0, 0, 0, 0) + text(_IFNAME, "nsm%d%d") + info
    return message(netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body)


def set_link(
    index: int, before: End | None, after: End, tunnel: Vxlan | None = None
) -> bytearray | None:
    """Change what differs, or None. Sent in the device's own namespace: found only there."""
    flags = change = 0
    attributes = b""
    if before is None or before.alias != after.alias:
        attributes += text(_IFALIAS, after.alias)
    if before and before.mac != after.mac:
        attributes += netlink.attr(_ADDRESS, _mac(after.mac))
    if before and before.mtu != after.mtu:
        attributes += u32(_MTU, after.mtu)
    if before and before.group != after.group:
        attributes += u32(_GROUP, after.group)
    if before is None or before.up != after.up:
        flags, change = (_UP if after.up else 0), _UP
    if before and before.quiet != after.quiet:
        flags, change = flags | (_NOARP if after.quiet else 0), change | _NOARP
    if tunnel:
        attributes += _vxlan_info(tunnel, new=False)
    if not (attributes or change):
        return None
    return message(netlink.NEWLINK, 0, _LINK_BODY.pack(0, 0, 0, index, flags, change) + attributes)


def delete_link(index: int, nsid: int = _NO_TARGET) -> bytearray:
    """Delete by index, in another namespace by its nsid."""
    return message(netlink.DELLINK, 0, _LINK_BODY.pack(0, 0, 0, index, 0, 0) + _target(nsid))


def delete_group(group: int, nsid: int = _NO_TARGET) -> bytearray:
    """Delete all devices of a link group of one namespace, in one go."""
    body = _LINK_BODY.pack(0, 0, 0, 0, 0, 0) + u32(_GROUP, group) + _target(nsid)
    return message(netlink.DELLINK, 0, body)


def get_link(
    *, name: str = "", index: int = 0, nsid: int = _NO_TARGET, stats: bool = False
) -> bytearray:
    """Ask for one device by name or index, in another namespace by its nsid."""
    body = _LINK_BODY.pack(0, 0, 0, index, 0, 0) + _target(nsid)
    if name:
        body += text(_IFNAME, name)
    if not stats:
        body += u32(_EXT_MASK, _SKIP_STATS)
    return message(netlink.GETLINK, 0, body)


def dump_links(nsid: int = _NO_TARGET, kind: str = "") -> bytearray:
    """Ask for all devices of a namespace, or those of a kind."""
    body = _LINK_BODY.pack(0, 0, 0, 0, 0, 0) + _target(nsid) + u32(_EXT_MASK, _SKIP_STATS)
    if kind:
        body += nested(_LINKINFO, text(_INFO_KIND, kind))
    return message(netlink.GETLINK, 0, body)


def device(body: memoryview) -> Device:
    """Read a link message; a veth's and a tunnel's particulars too."""
    _, _, _, index, flags, _ = _LINK_BODY.unpack_from(body)
    have = netlink.table(body, 16, _OF_INTEREST)
    info = netlink.table(have[_LINKINFO], 0) if _LINKINFO in have else {}
    kind = netlink.string(info[_INFO_KIND]) if _INFO_KIND in info else ""
    vni = port = 0
    local = remote = None
    if kind == "vxlan" and _INFO_DATA in info:
        data = netlink.table(info[_INFO_DATA], 0)
        vni = netlink.number(data[_VX_ID]) if _VX_ID in data else 0
        port = int.from_bytes(data[_VX_PORT], "big") if _VX_PORT in data else 0
        local = _address(data.get(_VX_LOCAL, data.get(_VX_LOCAL6)))
        remote = _address(data.get(_VX_GROUP, data.get(_VX_GROUP6)))
    return Device(
        index=index,
        name=netlink.string(have[_IFNAME]) if _IFNAME in have else "",
        mac=bytes(have[_ADDRESS]).hex(":") if _ADDRESS in have else "",
        mtu=netlink.number(have[_MTU]) if _MTU in have else 0,
        up=bool(flags & _UP),
        group=netlink.number(have[_GROUP]) if _GROUP in have else 0,
        alias=netlink.string(have[_IFALIAS]) if _IFALIAS in have else "",
        kind=kind,
        peer=netlink.number(have[_LINK]) if _LINK in have else 0,
        far=netlink.signed(have[_LINK_NETNSID]) if _LINK_NETNSID in have else None,
        vni=vni,
        port=port,
        local=local,
        remote=remote,
        quiet=bool(flags & _NOARP),
        carrier=bool(flags & _LOWER_UP),
    )


def counters(body: memoryview) -> Counters | None:
    """Read the statistics of a link message; nothing else of it is looked at."""
    for kind, value in netlink.attrs(body, 16):
        if kind == _STATS64:
            rx, tx, rxb, txb, rxe, txe, rxd, txd = struct.unpack_from("=8Q", value)
            return Counters(rx, tx, rxb, txb, rxe, txe, rxd, txd)
    return None


def _shape(end: End) -> bytes:
    mac = netlink.attr(_ADDRESS, _mac(end.mac)) if end.mac else b""
    return text(_IFNAME, end.name) + mac + u32(_MTU, end.mtu) + u32(_GROUP, end.group)


def _vxlan_info(item: Vxlan, *, new: bool) -> bytes:
    data = _tunnel(item.vni, item.port, item.local, item.remote, new=new)
    return nested(_LINKINFO, text(_INFO_KIND, "vxlan"), data)


def _tunnel(vni: int, port: int, local: IPAddress, remote: IPAddress, *, new: bool) -> bytes:
    far, near = (_VX_GROUP, _VX_LOCAL) if remote.version == 4 else (_VX_GROUP6, _VX_LOCAL6)
    parts = [netlink.attr(far, remote.packed), netlink.attr(near, local.packed)]
    if new:
        # one far end, so nothing to learn, and nobody can redirect the wire by sending first
        parts += [
            u32(_VX_ID, vni),
            netlink.attr(_VX_PORT, port.to_bytes(2, "big")),
            netlink.attr(_VX_LEARNING, b"\0"),
        ]
    return nested(_INFO_DATA, *parts)


def _target(nsid: int) -> bytes:
    return u32(_TARGET_NETNSID, nsid) if nsid >= 0 else b""


def _mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def _address(value: memoryview | None) -> IPAddress | None:
    return ip_address(bytes(value)) if value is not None and len(value) in (4, 16) else None


# --- addresses, routes, neighbours, rules ----------------------------------------------------

_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_PERMANENT, _NODAD = 0x80, 0x02
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_MULTIPATH, _RTA_TABLE, _CLONED = 9, 15, 0x200
_RTNH_ONLINK, _UNICAST, _SCOPE_LINK = 4, 1, 253
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX, _NDA_PROTOCOL = 1, 2, 8, 12
_NUD_PERMANENT = 0x80
_FRA_SRC, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL, _FRA_IP_PROTO, _FRA_SPORT, _FRA_DPORT = (
    *(2, 6, 15),
    *(21, 22, 23, 24),
)
_TO_TABLE = 1
_MAIN, _LOCAL = 254, 255
_KERNEL = 2  # RTPROT_KERNEL
_LINK_LOCAL = (b"\xfe\x80", b"\xff\x00")
_RTA_SRC, _RTA_METRICS, _RTA_PREF = 2, 8, 20
_COPIED = (
    *(_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC),
    *(_RTA_METRICS, _RTA_TABLE, _RTA_PREF),
)


def address(verb: Verb, item: Address, index: int) -> bytearray:
    """An address; IPv6 without duplicate detection, so that it works at once."""
    ip, network = item.cidr.ip.packed, item.cidr.network
    flags = _PERMANENT | (_NODAD if item.cidr.version == 6 else 0)
    body = struct.pack("=BBBBi", _FAMILY[item.cidr.version], network.prefixlen, flags, 0, index)
    body += netlink.attr(_IFA_LOCAL, ip) + netlink.attr(_IFA_ADDRESS, ip)
    if verb == "del":
        return message(netlink.DELADDR, 0, body)
    return message(netlink.NEWADDR, netlink.CREATE | netlink.EXCL, body)


def dump_addresses(index: int = 0) -> bytearray:
    """Ask for the addresses of one device, or of all."""
    return message(netlink.GETADDR, 0, struct.pack("=BBBBi", 0, 0, 0, 0, index))


def index_of(bodies: Iterable[tuple[int, memoryview]], address: IPAddress) -> int:
    """The device that has an address; 0 if none has."""
    for kind, body in bodies:
        if kind == netlink.NEWADDR:
            have = netlink.table(body, 8)
            value = have.get(_IFA_LOCAL, have.get(_IFA_ADDRESS))
            if value is not None and bytes(value) == address.packed:
                return int(struct.unpack_from("=i", body, 4)[0])
    return 0


def seen_addresses(
    bodies: Iterable[tuple[int, memoryview]], namespace: Namespace, link: str, index: int
) -> Iterable[Address]:
    """The global addresses; the kernel's own link-local ones are its business."""
    for kind, body in bodies:
        if kind != netlink.NEWADDR:
            continue
        family, length, _, scope, on = struct.unpack_from("=BBBBi", body)
        if on != index or scope != 0 or family not in _VERSION:
            continue
        have = netlink.table(body, 8)
        value = have.get(_IFA_LOCAL, have.get(_IFA_ADDRESS))
        if value is not None:
            yield Address(namespace, link, ip_interface((bytes(value), length)))


def route(verb: Verb, item: Route, index: int, *, append: bool = False) -> bytearray:
    """A route over the device; a gateway is taken as on-link."""
    scope = _SCOPE_LINK if item.via is None and item.to.version == 4 else 0
    body = _ROUTE_BODY.pack(
        _FAMILY[item.to.version],
        item.to.prefixlen,
        0,
        0,
        item.table if item.table < 256 else 0,
        owner.PROTOCOL,
        scope,
        _UNICAST,
        _RTNH_ONLINK if item.via else 0,
    )
    if item.to.prefixlen:
        body += netlink.attr(_RTA_DST, item.to.network_address.packed)
    body += u32(_RTA_OIF, index) + u32(_RTA_TABLE, item.table)
    if item.via:
        body += netlink.attr(_RTA_GATEWAY, item.via.packed)
    if item.metric:
        body += u32(_RTA_PRIORITY, item.metric)
    if verb == "del":
        return message(netlink.DELROUTE, 0, body)
    return message(
        netlink.NEWROUTE, netlink.CREATE | (netlink.APPEND if append else netlink.EXCL), body
    )


def dump_routes(index: int = 0) -> bytearray:
    """Ask for our routes over one device in all tables; for index 0 for everybody's routes."""
    protocol = owner.PROTOCOL if index else 0
    body = _ROUTE_BODY.pack(0, 0, 0, 0, 0, protocol, 0, 0, 0)
    return message(netlink.GETROUTE, 0, body + (u32(_RTA_OIF, index) if index else b""))


def seen_routes(
    bodies: Iterable[tuple[int, memoryview]], namespace: Namespace, link: str, index: int
) -> Iterable[Route]:
    """Our routes over that device."""
    for kind, body in bodies:
        if kind != netlink.NEWROUTE:
            continue
        family, length, _, _, table, protocol, _, _, flags = _ROUTE_BODY.unpack_from(body)
        have = netlink.table(body, 12)
        if protocol != owner.PROTOCOL or family not in _VERSION or flags & _CLONED:
            continue
        zero = b"\0" * (4 if family == 2 else 16)
        for over, via in _next_hops(have):
            if over == index:
                yield Route(
                    namespace,
                    link,
                    ip_network((bytes(have.get(_RTA_DST, zero)), length)),
                    via,
                    netlink.number(have[_RTA_PRIORITY]) if _RTA_PRIORITY in have else 0,
                    netlink.number(have[_RTA_TABLE]) if _RTA_TABLE in have else table,
                )


@dataclass(frozen=True, slots=True)
class OthersRoute:
    """A route over a device that is not ours; connected: the kernel made it with an address."""

    header: bytes
    attributes: tuple[tuple[int, bytes], ...]
    connected: bool

    def over(self, index: int) -> bytearray:
        """The same over that device, behind those that are there."""
        return message(netlink.NEWROUTE, netlink.CREATE | netlink.APPEND, self._body(index))

    def deleted_over(self, index: int) -> bytearray:
        """What takes the same away from that device."""
        return message(netlink.DELROUTE, 0, self._body(index))

    def _body(self, index: int) -> bytes:
        return self.header + b"".join(
            netlink.attr(kind, struct.pack("=I", index) if kind == _RTA_OIF else value)
            for kind, value in self.attributes
        )


def others_routes(bodies: Iterable[tuple[int, memoryview]], index: int) -> list[OthersRoute]:
    """Other people's unicast routes over that device, and the kernel's to its networks.

    Not those to its own addresses, nor the link-local ones: they belong to the device.
    """
    found = []
    for kind, body in bodies:
        if kind != netlink.NEWROUTE:
            continue
        family, _length, _, _, table, protocol, _, type_, flags = _ROUTE_BODY.unpack_from(body)
        have = netlink.table(body, 12)
        number = netlink.number(have[_RTA_TABLE]) if _RTA_TABLE in have else table
        if (
            family not in _VERSION
            or protocol == owner.PROTOCOL
            or type_ != _UNICAST
            or number == _LOCAL
            or flags & _CLONED
            or _RTA_OIF not in have
            or netlink.number(have[_RTA_OIF]) != index
            or (family == _FAMILY[6] and bytes(have.get(_RTA_DST, b""))[:2] in _LINK_LOCAL)
        ):
            continue
        header = _ROUTE_BODY.pack(*_ROUTE_BODY.unpack_from(body)[:8], flags & _RTNH_ONLINK)
        attributes = tuple((one, bytes(have[one])) for one in _COPIED if one in have)
        found.append(OthersRoute(header, attributes, protocol == _KERNEL))
    return found


def _next_hops(have: dict[int, memoryview]) -> Iterable[tuple[int, IPAddress | None]]:
    """Device and gateway; several where IPv6 shows the routes of several wires as one."""
    if _RTA_OIF in have:
        yield netlink.number(have[_RTA_OIF]), _address(have.get(_RTA_GATEWAY))
    rest = have.get(_RTA_MULTIPATH, memoryview(b""))
    while len(rest) >= 8:
        size, _, _, index = struct.unpack_from("=HBBi", rest)
        if size < 8:
            return
        yield index, _address(netlink.table(rest[:size], 8).get(_RTA_GATEWAY))
        rest = rest[size + 3 & ~3 :]


def holders(bodies: Iterable[tuple[int, memoryview]], item: Route) -> set[int]:
    """The protocol numbers of all routes to the same prefix in the same table."""
    found = set()
    for _, body in bodies:
        family, length, _, _, table, protocol, _, _, _ = _ROUTE_BODY.unpack_from(body)
        if _VERSION.get(family) != item.to.version or length != item.to.prefixlen:
            continue
        have = netlink.table(body, 12)
        to = bytes(have.get(_RTA_DST, memoryview(b"\0" * (4 if family == 2 else 16))))
        if _RTA_TABLE in have:
            table = netlink.number(have[_RTA_TABLE])
        if to == item.to.network_address.packed and table == item.table:
            found.add(protocol)
    return found


def tables(bodies: Iterable[tuple[int, memoryview]]) -> set[int]:
    """The numbers of all tables that hold a route."""
    found = set()
    for _, body in bodies:
        have = netlink.table(body, 12)
        found.add(netlink.number(have[_RTA_TABLE]) if _RTA_TABLE in have else body[4])
    return found


def neighbour(verb: Verb, item: Neighbour, index: int) -> bytearray:
    """A permanent neighbour, marked as ours."""
    body = struct.pack("=BBHiHBB", _FAMILY[item.ip.version], 0, 0, index, _NUD_PERMANENT, 0, 0)
    body += netlink.attr(_NDA_DST, item.ip.packed)
    if verb == "del":
        return message(netlink.DELNEIGH, 0, body)
    body += netlink.attr(_NDA_LLADDR, _mac(item.mac)) + netlink.attr(
        _NDA_PROTOCOL, bytes([owner.PROTOCOL])
    )
    return message(netlink.NEWNEIGH, netlink.CREATE | netlink.REPLACE, body)


def dump_neighbours(index: int) -> bytearray:
    """Ask for the neighbours on one device."""
    body = struct.pack("=BBHiHBB", 0, 0, 0, 0, 0, 0, 0) + u32(_NDA_IFINDEX, index)
    return message(netlink.GETNEIGH, 0, body)


def seen_neighbours(
    bodies: Iterable[tuple[int, memoryview]], namespace: Namespace, link: str, index: int
) -> Iterable[Neighbour]:
    """Our permanent neighbours on that device."""
    for kind, body in bodies:
        if kind != netlink.NEWNEIGH:
            continue
        family, _, _, on, nud, _, _ = struct.unpack_from("=BBHiHBB", body)
        have = netlink.table(body, 12)
        ours = _NDA_PROTOCOL in have and have[_NDA_PROTOCOL][0] == owner.PROTOCOL
        if on != index or not nud & _NUD_PERMANENT or not ours or family not in _VERSION:
            continue
        if _NDA_DST in have and _NDA_LLADDR in have:
            ip = _address(have[_NDA_DST])
            assert ip is not None
            yield Neighbour(namespace, link, ip, bytes(have[_NDA_LLADDR]).hex(":"))


def learned_neighbours(bodies: Iterable[tuple[int, memoryview]], index: int) -> Iterable[bytearray]:
    """What deletes the neighbours that the kernel found by itself on that device."""
    for kind, body in bodies:
        family, _, _, on, nud, _, _ = struct.unpack_from("=BBHiHBB", body)
        if kind != netlink.NEWNEIGH or on != index or nud & _NUD_PERMANENT:
            continue
        if family in _VERSION and (ip := netlink.table(body, 12).get(_NDA_DST)):
            gone = struct.pack("=BBHiHBB", family, 0, 0, index, 0, 0, 0)
            yield message(netlink.DELNEIGH, 0, gone + netlink.attr(_NDA_DST, bytes(ip)))


def rule(verb: Verb, item: Rule) -> bytearray:
    """A policy routing rule, marked as ours."""
    selector = item.selector
    body = struct.pack(
        "=BBBBBBBBI",
        _FAMILY[item.family],
        0,
        selector.from_.prefixlen if selector.from_ else 0,
        0,
        item.table if item.table < 256 else 0,
        0,
        0,
        _TO_TABLE,
        0,
    )
    body += u32(_FRA_TABLE, item.table) + u32(_FRA_PRIORITY, item.priority)
    body += netlink.attr(_FRA_PROTOCOL, bytes([owner.PROTOCOL]))
    if selector.from_ and selector.from_.prefixlen:
        body += netlink.attr(_FRA_SRC, selector.from_.network_address.packed)
    if selector.proto is not None:
        body += netlink.attr(_FRA_IP_PROTO, bytes([selector.proto]))
    if selector.src_port:
        body += netlink.attr(_FRA_SPORT, struct.pack("=HH", *selector.src_port))
    if selector.dst_port:
        body += netlink.attr(_FRA_DPORT, struct.pack("=HH", *selector.dst_port))
    if verb == "del":
        return message(netlink.DELRULE, 0, body)
    return message(netlink.NEWRULE, netlink.CREATE | netlink.EXCL, body)


def dump_rules() -> bytearray:
    """Ask for all rules."""
    return message(netlink.GETRULE, 0, b"\0" * 12)


def seen_rules(
    bodies: Iterable[tuple[int, memoryview]], namespace: Namespace
) -> Iterable[tuple[Rule, bool]]:
    """All rules that lead to a table, and whether each is ours."""
    for _, body in bodies:
        family, _, length, _, table, _, _, action, _ = struct.unpack_from("=BBBBBBBBI", body)
        if family not in _VERSION or action != _TO_TABLE:
            continue
        have = netlink.table(body, 12)
        priority = netlink.number(have[_FRA_PRIORITY]) if _FRA_PRIORITY in have else 0
        ours = _FRA_PROTOCOL in have and have[_FRA_PROTOCOL][0] == owner.PROTOCOL
        selector = Selector(
            ip_network((bytes(have[_FRA_SRC]), length)) if _FRA_SRC in have else None,
            have[_FRA_IP_PROTO][0] if _FRA_IP_PROTO in have else None,
            _ports(have.get(_FRA_SPORT)),
            _ports(have.get(_FRA_DPORT)),
        )
        to = netlink.number(have[_FRA_TABLE]) if _FRA_TABLE in have else table
        found = Rule(namespace, "", _VERSION[family], selector, to, priority)
        yield found, ours and priority in owner.RULES


def _ports(value: memoryview | None) -> tuple[int, int] | None:
    if value is None or len(value) != 4:
        return None
    first, last = struct.unpack("=HH", value)
    return (first, last)


# --- the underlay ----------------------------------------------------------------------------


def get_route(to: IPAddress) -> bytearray:
    """Ask which way leads to an address."""
    body = _ROUTE_BODY.pack(_FAMILY[to.version], to.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    return message(netlink.GETROUTE, 0, body + netlink.attr(_RTA_DST, to.packed))


def way(body: memoryview) -> tuple[int, IPAddress | None]:
    """The device and source address an answer to `get_route` names."""
    have = netlink.table(body, 12)
    index = netlink.number(have[_RTA_OIF]) if _RTA_OIF in have else 0
    return index, _address(have.get(_RTA_PREFSRC))


def gateway(body: memoryview) -> IPAddress | None:
    """Through whom an answer to `get_route` leads; None if straight to where it leads."""
    return _address(netlink.table(body, 12).get(_RTA_GATEWAY))


def default_devices(bodies: Iterable[tuple[int, memoryview]]) -> list[tuple[int, int]]:
    """Devices of default routes of the main table, as (metric, index), best first."""
    return [(metric, index) for metric, index, _ in default_routes(bodies)]


def default_routes(
    bodies: Iterable[tuple[int, memoryview]],
) -> list[tuple[int, int, IPAddress | None]]:
    """Default routes of the main table, as (metric, index, gateway), best first."""
    found = []
    for _, body in bodies:
        _, length, _, _, table, _, _, kind, _ = _ROUTE_BODY.unpack_from(body)
        have = netlink.table(body, 12)
        if length == 0 and table == _MAIN and kind == _UNICAST and _RTA_OIF in have:
            metric = netlink.number(have[_RTA_PRIORITY]) if _RTA_PRIORITY in have else 0
            index = netlink.number(have[_RTA_OIF])
            found.append((metric, index, _address(have.get(_RTA_GATEWAY))))
    return sorted(found, key=lambda one: one[:2])

"""Cables, bridges and addresses of labs: the network a lab's nodes stand in.

Not the mesh's wires: those are desired state with an owner (`ensure`). A lab's
network is made once, lives in namespaces of its own, and goes with them, so plain
making is enough. Nothing here touches the namespace it is called from.

Everything blocks; call it in a thread where a loop runs.
"""

import ctypes
import errno
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from typing import Final

from nsm.errors import NotFoundError, UnsupportedError
from nsm.kernel import messages, netlink, nftables
from nsm.kernel.messages import Device
from nsm.kernel.namespaces import NAMED, Home, cookie_here
from nsm.kernel.netlink import Refusal, Socket, attr, message, nested, text, u32
from nsm.kernel.state import OWN, Namespace

_ADDRESS, _IFNAME, _MTU, _MASTER, _LINKINFO, _NET_NS_FD = 1, 3, 4, 10, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_OPERSTATE, _OPER_UP = 16, 6
_INFO_SLAVE_DATA, _BRPORT_STATE, _FORWARDING = 5, 1, 3
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_NODAD, _PERMANENT = 0x02, 0x80
_LINK_BODY: Final = struct.Struct("=BBHiII")
_UP = 1
_ENODEV = 19
_NEWQDISC, _DELQDISC, _ROOT, _TCA_KIND, _TCA_OPTIONS = 36, 37, 0xFFFFFFFF, 1, 2
_TBF_PARMS, _TBF_BURST, _ETHERNET = 1, 6, 1
_KIND = "tbf"
_CUT: Final = "vwire-lab-cut"  # a table of nf_tables in a lab's node
_LEAST_BURST: Final = 16_384  # bytes; some packets
_FAMILY: Final = {4: 2, 6: 10}
_CLONE_NEWNET = 0x4000_0000


@dataclass(frozen=True, slots=True)
class Plug:
    """One end of a cable: an interface in a named namespace."""

    namespace: str
    interface: str


def enter_named(name: str) -> None:
    """Move the calling thread into a named namespace, for good. Raises NotFoundError."""
    try:
        fd = os.open(f"{NAMED}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFoundError(f"there is no network namespace {name}") from None
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWNET) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), f"setns {name}")
    finally:
        os.close(fd)


def inode_named(name: str) -> int:
    """The inode of a named namespace: what /proc/PID/ns/net of those inside shows."""
    return os.stat(f"{NAMED}/{name}").st_ino


def cookie_named(name: str) -> int:
    """The cookie of a named namespace, which no other ever has.

    Raises NotFoundError without the name, InvalidError if no namespace is mounted there.
    """
    with Home() as home, _door(home, Plug(name, "")) as fd, home.inside(fd):
        return cookie_here()


def cable(a: Plug, b: Plug, mtu: int) -> None:
    """Join two interfaces by a veth pair, made straight in their namespaces, both down."""
    with Home() as home, _door(home, a) as a_fd, _door(home, b) as b_fd, Socket.here() as sock:
        # numbers of their own, because the kernel puts off for up to a second whatever
        # happens to a link whose number is by chance its peer's in the other namespace
        a_index, b_index = messages.fresh_index(), messages.fresh_index()
        peer = _LINK_BODY.pack(0, 0, 0, b_index, 0, 0) + _shape(b, mtu) + u32(_NET_NS_FD, b_fd)
        body = (
            _LINK_BODY.pack(0, 0, 0, a_index, 0, 0)
            + _shape(a, mtu)
            + u32(_NET_NS_FD, a_fd)
            + nested(
                _LINKINFO, text(_INFO_KIND, "veth"), nested(_INFO_DATA, attr(_VETH_PEER, peer))
            )
        )
        made = message(netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body)
        command = f"ip link add {a.interface} type veth peer {b.interface} netns {b.namespace}"
        _all_done(sock.do([made]), [command], a.namespace)


def slow_down(namespace: str, interface: str, rate: int) -> None:
    """Let no more leave by an interface than rate bits a second, by a token bucket.

    In place of the one that is there. Raises UnsupportedError where this kernel has none.
    """
    octets = rate // 8
    burst = max(octets // 100, _LEAST_BURST)  # what passes at once: 10 ms
    limit = burst + octets // 20  # what waits: 50 ms
    with _inside(namespace) as sock:
        index = _index(sock, namespace, interface)
        # cell_log, link layer (Ethernet), overhead, cell_align, mpu, rate: see pkt_sched.h
        speed = struct.pack("=BBHhHI", 0, _ETHERNET, 0, 0, 0, octets)
        params = struct.pack("=12s12sIII", speed, bytes(12), limit, burst, 0)
        body = struct.pack("=BxxxiIII", 0, index, 0, _ROOT, 0) + text(_TCA_KIND, _KIND)
        body += nested(_TCA_OPTIONS, attr(_TBF_PARMS, params), u32(_TBF_BURST, burst))
        made = message(_NEWQDISC, netlink.CREATE | netlink.REPLACE, body)
        (refusal,) = sock.do([made])
    if refusal and refusal.errno == errno.ENOENT:
        raise UnsupportedError(
            f"this kernel cannot hold {interface} to {rate} bits a second",
            hint="modprobe sch_tbf, or leave out the link's rate",
        )
    command = (
        f"tc qdisc replace dev {interface} root tbf rate {rate}bit burst {burst} limit {limit}"
    )
    _all_done([refusal], [command], namespace)


def speed_up(namespace: str, interface: str) -> None:
    """Take back what `slow_down` did; nothing where it did nothing."""
    with _inside(namespace) as sock:
        index = _index(sock, namespace, interface)
        gone = message(_DELQDISC, 0, struct.pack("=BxxxiIII", 0, index, 0, _ROOT, 0))
        (refusal,) = sock.do([gone])
    if refusal and refusal.errno not in (errno.ENOENT, errno.EINVAL):  # it has none of its own
        raise netlink.explain(refusal, f"tc qdisc del dev {interface} root", namespace)


def switch(namespace: str, interface: str, *, up: bool) -> None:
    """Set an interface up or down. Raises NotFoundError."""
    with _inside(namespace) as sock:
        flags = _UP if up else 0
        index = _index(sock, namespace, interface)
        change = message(netlink.NEWLINK, 0, _LINK_BODY.pack(0, 0, 0, index, flags, _UP))
        command = f"ip link set {interface} {'up' if up else 'down'}"
        _all_done(sock.do([change]), [command], namespace)


def unplug(plug: Plug) -> None:
    """Take a cable away by one of its ends; no error if it has gone with its other end."""
    with _inside(plug.namespace) as sock:
        body = _LINK_BODY.pack(0, 0, 0, 0, 0, 0) + text(_IFNAME, plug.interface)
        (refusal,) = sock.do([message(netlink.DELLINK, 0, body)])
    if refusal and refusal.errno != _ENODEV:
        raise netlink.explain(refusal, f"ip link del {plug.interface}", plug.namespace)


def cut_off(namespace: str, addresses: Sequence[str]) -> None:
    """Lose silently whatever comes from addresses, and nothing else; of nobody: as before.

    What comes and not what leaves, because who sends into a broken network is not told.
    """
    changes = [nftables.new_table(_CUT), nftables.delete_table(_CUT)]
    if addresses:
        changes += [nftables.new_table(_CUT), nftables.new_chain(_CUT, "in", nftables.INPUT)]
    for address in addresses:
        drop = nftables.verdict(nftables.DROP)
        changes.append(
            nftables.new_rule(_CUT, "in", nftables.comes_from(ip_network(address)), drop)
        )
    with Home() as home, _door(home, Plug(namespace, "")) as fd, home.inside(fd):
        refusal = nftables.transact(changes)
    if refusal:
        raise netlink.explain(refusal, f"nft add rule inet {_CUT} in ip saddr … drop", namespace)


def configure(namespace: str, interface: str, addresses: Sequence[str]) -> None:
    """Set addresses (`a/len`) and bring the interface up.

    No duplicate address detection: it would keep an address unusable for a second,
    and the lab drew its addresses itself.
    """
    with _inside(namespace) as sock:
        index = _index(sock, namespace, interface)
        batch, commands = [], []
        for address in addresses:
            cidr = ip_interface(address)
            body = struct.pack(
                "=BBBBI", _FAMILY[cidr.version], cidr.network.prefixlen, _NODAD, 0, index
            )
            body += attr(_IFA_LOCAL, cidr.ip.packed) + attr(_IFA_ADDRESS, cidr.ip.packed)
            body += u32(_IFA_FLAGS, _NODAD | _PERMANENT)
            batch.append(message(netlink.NEWADDR, netlink.CREATE | netlink.EXCL, body))
            commands.append(f"ip addr add {address} dev {interface}")
        batch.append(_set_up(index))
        commands.append(f"ip link set {interface} up")
        _all_done(sock.do(batch), commands, namespace)


def open_low_ports(namespace: str) -> None:
    """Let anybody in a namespace listen on ports below 1024, as container runtimes do."""
    path = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
    with (
        Home() as home,
        _door(home, Plug(namespace, "")) as fd,
        home.inside(fd),
        open(path, "w") as setting,
    ):
        setting.write("0")


def bridge(namespace: str, name: str, ports: Sequence[str]) -> None:
    """A bridge over ports that are there, all of them up, in a namespace of its own."""
    with _inside(namespace) as sock:
        info = nested(_LINKINFO, text(_INFO_KIND, "bridge"))
        mac = attr(_ADDRESS, _mac(Plug(namespace, name)))
        body = _LINK_BODY.pack(0, 0, 0, 0, _UP, _UP) + text(_IFNAME, name) + mac + info
        make = message(netlink.NEWLINK, netlink.CREATE | netlink.EXCL, body)
        _all_done(sock.do([make]), [f"ip link add {name} type bridge"], namespace)
        master = _index(sock, namespace, name)
        batch, commands = [], []
        for port in ports:
            flags = _LINK_BODY.pack(0, 0, 0, _index(sock, namespace, port), _UP, _UP)
            batch.append(message(netlink.NEWLINK, 0, flags + u32(_MASTER, master)))
            commands.append(f"ip link set {port} master {name} up")
        _all_done(sock.do(batch), commands, namespace)


def plug_in(namespace: str, name: str, port: str) -> None:
    """One more port of a bridge that is there, and up."""
    with _inside(namespace) as sock:
        master = _index(sock, namespace, name)
        flags = _LINK_BODY.pack(0, 0, 0, _index(sock, namespace, port), _UP, _UP)
        change = message(netlink.NEWLINK, 0, flags + u32(_MASTER, master))
        _all_done(sock.do([change]), [f"ip link set {port} master {name} up"], namespace)


def device(namespace: str, interface: str) -> Device | None:
    """What the kernel says of an interface; None if there is none."""
    with _inside(namespace) as sock:
        try:
            return messages.device(sock.ask(messages.get_link(name=interface)))
        except Refusal as refusal:
            if refusal.errno == _ENODEV:
                return None
            raise netlink.explain(refusal, f"ip link show {interface}", namespace) from refusal


def interfaces(namespace: str) -> list[str]:
    """The names of all interfaces of a namespace but its loopback."""
    with _inside(namespace) as sock:
        found = [messages.device(body).name for _, body in sock.dump(messages.dump_links())]
    return [name for name in found if name != "lo"]


def addresses(namespace: str, interface: str) -> list[str]:
    """The global addresses of an interface, without lengths. Raises NotFoundError."""
    with _inside(namespace) as sock:
        index = _index(sock, namespace, interface)
        told = sock.dump(messages.dump_addresses(index))
    there = Namespace(0, OWN, 0, namespace)
    return [str(one.cidr.ip) for one in messages.seen_addresses(told, there, interface, index)]


def leads(namespace: str, address: str) -> bool:
    """Whether packets to an address would leave a namespace."""
    with _inside(namespace) as sock:
        try:
            return messages.way(sock.ask(messages.get_route(ip_address(address))))[0] > 0
        except Refusal:  # unreachable, in one of the kernel's words for it
            return False


def carries(namespace: str, interface: str) -> bool:
    """Whether an interface passes packets now, and as a bridge's port too.

    Up is not enough: the kernel attaches queues and opens ports in the background.
    """
    with _inside(namespace) as sock:
        try:
            found = netlink.table(sock.ask(messages.get_link(name=interface)), 16)
        except Refusal as refusal:
            raise netlink.explain(refusal, f"ip link show {interface}", namespace) from refusal
    if netlink.number(found[_OPERSTATE]) != _OPER_UP:
        return False
    if _MASTER not in found:
        return True
    info = netlink.table(found[_LINKINFO], 0)
    port = netlink.table(info[_INFO_SLAVE_DATA], 0)
    return netlink.number(port[_BRPORT_STATE]) == _FORWARDING


@contextmanager
def _door(home: Home, plug: Plug) -> Iterator[int]:
    fd = home.opened_path(f"{NAMED}/{plug.namespace}", plug.namespace)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _inside(namespace: str) -> Iterator[Socket]:
    with Home() as home, _door(home, Plug(namespace, "")) as fd, home.socket(fd) as sock:
        yield sock


def _shape(plug: Plug, mtu: int) -> bytes:
    return text(_IFNAME, plug.interface) + attr(_ADDRESS, _mac(plug)) + u32(_MTU, mtu)


def _mac(plug: Plug) -> bytes:
    """A local unicast MAC drawn from the name: given ones are left alone by udevd."""
    drawn = hashlib.sha256(f"{plug.namespace}/{plug.interface}".encode()).digest()[:5]
    return b"\x02" + drawn


def _set_up(index: int) -> bytearray:
    return message(netlink.NEWLINK, 0, _LINK_BODY.pack(0, 0, 0, index, _UP, _UP))


def _index(sock: Socket, namespace: str, interface: str) -> int:
    try:
        return messages.device(sock.ask(messages.get_link(name=interface))).index
    except Refusal as refusal:
        raise netlink.explain(refusal, f"ip link show {interface}", namespace) from refusal


def _all_done(results: Sequence[Refusal | None], commands: Sequence[str], where: str) -> None:
    for refusal, command in zip(results, commands, strict=True):
        if refusal:
            raise netlink.explain(refusal, command, where)

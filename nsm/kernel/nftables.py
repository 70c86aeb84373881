"""nf_tables' netlink: changes that are made together or not at all. Blocks.

Rules are lists of expressions that work on registers; ours need one register.
"""

import errno
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from nsm.errors import UnsupportedError
from nsm.kernel import netlink
from nsm.kernel.netlink import Refusal, attr, message, nested, text

NFTABLES: Final = 10  # the subsystem
NEWTABLE, DELTABLE, NEWCHAIN, GETCHAIN, NEWRULE, GETRULE = 0, 2, 3, 4, 6, 7
INET: Final = 1  # both families
PREROUTING, INPUT, FORWARD = 0, 1, 2  # hooks
ACCEPT, DROP = 1, 0
_NETFILTER = 12
_BEGIN, _END = 0x10, 0x11
_PATIENCE = 5.0  # seconds; the kernel answers at once or has a defect
_TABLE, _CHAIN_NAME, _CHAIN_HOOK, _CHAIN_POLICY, _CHAIN_TYPE = 1, 3, 4, 5, 7
_HOOKNUM, _PRIORITY = 1, 2
_RULE_CHAIN, _RULE_EXPRESSIONS = 2, 4
_ELEMENT, _EXPRESSION, _DATA = 1, 1, 2
_REGISTER, _VERDICT_REGISTER = 1, 0
_JUMP = -3
_NFPROTO = 15  # key of `meta`
_FIB_OIF, _FIB_SADDR, _FIB_IIF, _FIB_PRESENT = 1, 1, 8, 32
_FAMILY = {4: 2, 6: 10}
_SOURCE, _DESTINATION = {4: 12, 6: 8}, {4: 16, 6: 24}  # where in the header

Network = IPv4Network | IPv6Network


def open_socket() -> socket.socket:
    """A socket of netfilter's netlink, in the namespace the calling thread is in."""
    try:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER)
    except OSError as failure:
        raise UnsupportedError(f"this kernel has no netfilter: {failure.strerror}") from failure


def request(kind: int, flags: int, body: bytes = b"") -> bytearray:
    """A message of nf_tables, about inet where there is a body."""
    return _message(NFTABLES << 8 | kind, flags, INET if body else 0, 0, body)


def transact(changes: Sequence[bytearray]) -> Refusal | None:
    """Make all changes at once, in the calling thread's namespace; or none, and why."""
    batch = [_message(_BEGIN, 0, 0, NFTABLES), *changes, _message(_END, 0, 0, NFTABLES)]
    for number, entry in enumerate(batch):
        struct.pack_into("=I", entry, 8, number)
    (flags,) = struct.unpack_from("=H", changes[-1], 6)
    struct.pack_into("=H", changes[-1], 6, flags | netlink.ACK)
    with open_socket() as sock:
        sock.settimeout(_PATIENCE)
        with suppress(PermissionError):  # then what is too long is refused
            # a batch is one message, and the kernel takes none that is longer than this
            sock.setsockopt(socket.SOL_SOCKET, netlink.SO_SNDBUFFORCE, 2 * sum(map(len, batch)))
        try:
            sock.sendmsg(batch)
        except OSError as failure:
            if failure.errno != errno.EMSGSIZE:
                raise
            return Refusal(errno.EMSGSIZE)
        while True:
            for _, _, sequence, data in netlink.split(memoryview(sock.recv(1 << 16))):
                (code,) = struct.unpack_from("=i", data)
                if code:
                    return Refusal(-code)
                if sequence == len(changes):
                    return None


# --- changes ---------------------------------------------------------------------------------


def new_table(name: str, *, exclusive: bool = False) -> bytearray:
    """Have a table. exclusive: refused, with all of the batch, where it is there."""
    flags = netlink.CREATE | (netlink.EXCL if exclusive else 0)
    return request(NEWTABLE, flags, text(_TABLE, name))


def delete_table(name: str) -> bytearray:
    """Forget a table and all in it."""
    return request(DELTABLE, 0, text(_TABLE, name))


def new_chain(table: str, name: str, hook: int | None = None, policy: int = ACCEPT) -> bytearray:
    """A chain; with a hook packets meet it by themselves, else rules jump there."""
    body = text(_TABLE, table) + text(_CHAIN_NAME, name)
    if hook is not None:
        body += nested(_CHAIN_HOOK, be32(_HOOKNUM, hook), be32(_PRIORITY, 0))
        body += be32(_CHAIN_POLICY, policy) + text(_CHAIN_TYPE, "filter")
    return request(NEWCHAIN, netlink.CREATE, body)


def new_rule(table: str, chain: str, *expressions: bytes) -> bytearray:
    """A rule behind those that are there."""
    body = text(_TABLE, table) + text(_RULE_CHAIN, chain)
    body += nested(_RULE_EXPRESSIONS, *expressions)
    return request(NEWRULE, netlink.CREATE | netlink.APPEND, body)


# --- expressions -----------------------------------------------------------------------------


def comes_from(network: Network) -> bytes:
    """The packet's source is of the network."""
    return _address(network, _SOURCE[network.version])


def goes_to(network: Network) -> bytes:
    """The packet's destination is of the network."""
    return _address(network, _DESTINATION[network.version])


def fits_interface(*, fits: bool) -> bytes:
    """Whether the way to the packet's source is the interface it came by."""
    flags = _FIB_SADDR | _FIB_IIF | _FIB_PRESENT
    look = _expression("fib", be32(1, _REGISTER), be32(2, _FIB_OIF), be32(3, flags))
    return look + _equals(b"\1" if fits else b"\0")


def verdict(code: int, chain: str = "") -> bytes:
    """What becomes of the packet: ACCEPT, DROP."""
    said = be32(1, code & 0xFFFF_FFFF) + (text(2, chain) if chain else b"")
    return _expression("immediate", be32(1, _VERDICT_REGISTER), nested(2, nested(2, said)))


def jump(chain: str) -> bytes:
    """Go on in another chain."""
    return verdict(_JUMP, chain)


def _address(network: Network, offset: int) -> bytes:
    size = network.max_prefixlen // 8
    family = _expression("meta", be32(1, _REGISTER), be32(2, _NFPROTO))
    load = _expression("payload", be32(1, _REGISTER), be32(2, 1), be32(3, offset), be32(4, size))
    cut = _expression(
        "bitwise",
        be32(1, _REGISTER),
        be32(2, _REGISTER),
        be32(3, size),
        nested(4, attr(1, network.netmask.packed)),
        nested(5, attr(1, bytes(size))),
    )
    proto = _equals(bytes((_FAMILY[network.version],)))
    return family + proto + load + cut + _equals(network.network_address.packed)


def _equals(value: bytes) -> bytes:
    return _expression("cmp", be32(1, _REGISTER), be32(2, 0), nested(3, attr(1, value)))


def _expression(name: str, *attributes: bytes) -> bytes:
    return nested(_ELEMENT, text(_EXPRESSION, name), nested(_DATA, *attributes))


def _message(kind: int, flags: int, family: int, resource: int, body: bytes = b"") -> bytearray:
    return message(kind, flags, struct.pack("=BBH", family, 0, socket.htons(resource)) + body)


def be32(kind: int, value: int) -> bytes:
    """A 32-bit attribute in the network's byte order, as netfilter has them."""
    return attr(kind, value.to_bytes(4, "big"))

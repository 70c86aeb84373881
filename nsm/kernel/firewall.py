"""What this namespace's packet filter does with packets no rule speaks of. Changes nothing.

Rules are in one of two places: nf_tables, where also today's `iptables` and docker put
them, or the older tables of iptables-legacy. Both are asked; the older ones only if they
are in use, because asking would make them. Blocks.
"""

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from nsm.errors import UnsupportedError
from nsm.kernel import netlink, nftables
from nsm.kernel.netlink import Refusal, Socket

Hook = Literal["input", "forward"]

_FAMILIES: Final = {1: "inet", 2: "ip", 10: "ip6"}
_HOOKS: Final[dict[int, Hook]] = {1: "input", 2: "forward"}
_TABLE, _NAME, _HOOK, _POLICY, _TYPE = 1, 3, 4, 5, 7  # attributes of a chain
_HOOKNUM = 1
_DROP = 0
_IN_TABLE, _IN_CHAIN, _EXPRESSIONS, _ELEMENT = 1, 2, 4, 1  # attributes of a rule
_EXPR_NAME, _EXPR_DATA, _IMMEDIATE_DATA, _VERDICT, _CODE = 1, 2, 2, 2, 1
_TARGET_NAME = 1  # of a rule that iptables wrote with a target of its own
_PASSED_BY: Final = frozenset({"counter", "log", "limit", "comment"})  # these choose no packets
# linux/netfilter_ipv4/ip_tables.h, and its twin for IPv6
_GET_INFO, _GET_ENTRIES = 64, 65
_INFO: Final = struct.Struct("=32sI5I5III")
_ENTRIES = 40  # bytes before the entries in their answer
_VERDICT_DROP = -1
_LEGACY: Final = (  # names of tables in use, family, socket level, bytes of an entry's addresses
    ("/proc/self/net/ip_tables_names", socket.AF_INET, 0, 84, "ip"),
    ("/proc/self/net/ip6_tables_names", socket.AF_INET6, 41, 136, "ip6"),
)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of the filter that packets meet by themselves."""

    family: str  # ip, ip6, or inet for both
    table: str
    name: str
    hook: Hook
    drops: bool  # what no rule accepts
    legacy: bool = False
    shuts: bool = False  # by its last rule, whatever its policy is; of nf_tables

    def __str__(self) -> str:
        way = "iptables-legacy" if self.legacy else "nft"
        return f"{way} {self.family} {self.table} {self.name}"


def chains() -> list[Chain]:
    """The chains that see what comes in, and what is passed on.

    Raises RightsError without CAP_NET_ADMIN.
    """
    return [*_nft(), *_legacy()]


def has(chain: Chain, name: str) -> bool:
    """Whether the table of a chain of nf_tables has another one of that name."""
    return any(
        _FAMILIES.get(body[0]) == chain.family
        and netlink.string(have[_TABLE]) == chain.table
        and netlink.string(have[_NAME]) == name
        for body, have in _dumped(nftables.GETCHAIN, nftables.NEWCHAIN, "nft list chains")
    )


def attempt() -> None:
    """Make a table and a chain of nf_tables; only where nobody else is, because they stay.

    Raises UnsupportedError where the kernel has none, RightsError without CAP_NET_ADMIN.
    """
    made = [nftables.new_table("try"), nftables.new_chain("try", "in", nftables.INPUT)]
    if refusal := nftables.transact(made):
        raise netlink.explain(refusal, "nft add chain inet try in", "a namespace made for trying")


# --- nf_tables -------------------------------------------------------------------------------


def _nft() -> Iterator[Chain]:
    found = [
        chain
        for body, have in _dumped(nftables.GETCHAIN, nftables.NEWCHAIN, "nft list chains")
        if body[0] in _FAMILIES
        for chain in _chain(_FAMILIES[body[0]], have)
    ]
    if not found:
        return
    last = {  # rules come in the order in which packets meet them
        (body[0], netlink.string(have[_IN_TABLE]), netlink.string(have[_IN_CHAIN])): have
        for body, have in _dumped(nftables.GETRULE, nftables.NEWRULE, "nft list ruleset")
    }
    shut = {
        (_FAMILIES.get(family), table, name)
        for (family, table, name), have in last.items()
        if _EXPRESSIONS in have and _ends_all(have[_EXPRESSIONS])
    }
    for chain in found:
        yield replace(chain, shuts=(chain.family, chain.table, chain.name) in shut)


def _dumped(
    question: int, answer: int, command: str
) -> list[tuple[memoryview, dict[int, memoryview]]]:
    """Each object of nf_tables of that kind: its message, and its attributes."""
    try:
        with Socket(nftables.open_socket()) as sock:
            dumped = sock.dump(nftables.request(question, 0))
    except UnsupportedError:
        return []  # no rules either
    except Refusal as refusal:
        if refusal.errno == errno.EINVAL:  # netfilter's word for a part it lacks
            return []
        raise netlink.explain(refusal, command, "this namespace") from refusal
    return [
        (body, netlink.table(body, 4))
        for kind, body in dumped
        if kind == nftables.NFTABLES << 8 | answer
    ]


def _ends_all(expressions: memoryview) -> bool:
    """Whether a rule drops or rejects every packet that comes to it."""
    for kind, element in netlink.attrs(expressions, 0):
        if kind != _ELEMENT:
            continue
        have = netlink.table(element, 0)
        name = netlink.string(have[_EXPR_NAME])
        if name == "reject":
            return True
        data = netlink.table(have[_EXPR_DATA], 0) if _EXPR_DATA in have else {}
        if name == "immediate" and _IMMEDIATE_DATA in data:
            verdict = netlink.table(data[_IMMEDIATE_DATA], 0).get(_VERDICT)
            code = netlink.table(verdict, 0).get(_CODE) if verdict else None
            return code is not None and int.from_bytes(code, "big") == _DROP
        if name == "target":
            return netlink.string(data[_TARGET_NAME]) == "REJECT"
        if name not in _PASSED_BY:
            return False
    return False


def _chain(family: str, have: dict[int, memoryview]) -> Iterator[Chain]:
    if _HOOK not in have or netlink.string(have.get(_TYPE, memoryview(b""))) != "filter":
        return
    number = int.from_bytes(netlink.table(have[_HOOK], 0)[_HOOKNUM], "big")
    if number in _HOOKS:
        drops = _POLICY in have and int.from_bytes(have[_POLICY], "big") == _DROP
        table, name = netlink.string(have[_TABLE]), netlink.string(have[_NAME])
        yield Chain(family, table, name, _HOOKS[number], drops)


# --- iptables-legacy -------------------------------------------------------------------------


def _legacy() -> Iterator[Chain]:
    for names, family, level, addresses, shown in _LEGACY:
        try:
            with open(names) as file:
                used = file.read().split()
        except OSError:
            continue  # no such tables, or not for us to see
        if "filter" in used:
            yield from _policies(family, level, addresses, shown)


def _policies(family: int, level: int, addresses: int, shown: str) -> Iterator[Chain]:
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        info = _INFO.unpack(_asked(sock, level, _GET_INFO, b"filter".ljust(_INFO.size, b"\0")))
        underflows, size = info[7:12], info[13]
        head = struct.pack("=32sI4x", b"filter", size)
        entries = _asked(sock, level, _GET_ENTRIES, head.ljust(_ENTRIES + size, b"\0"))
    for number, hook in _HOOKS.items():
        entry = _ENTRIES + underflows[number]  # the chain's last rule, which is its policy
        (target,) = struct.unpack_from("=H", entries, entry + addresses + 4)
        (verdict,) = struct.unpack_from("=i", entries, entry + target + 32)
        yield Chain(shown, "filter", hook.upper(), hook, verdict == _VERDICT_DROP, legacy=True)


def _asked(sock: socket.socket, level: int, option: int, question: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(question, len(question))
    size = ctypes.c_uint32(len(question))
    if _libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(size)) < 0:
        code = ctypes.get_errno()
        failure = OSError(code, os.strerror(code))
        raise netlink.explain(failure, "iptables-legacy -S", "this namespace")
    return buffer.raw

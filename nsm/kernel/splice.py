"""Joining a veth's end with a device that has IP packets only, past all a node does to packets.

A workload that could read a tunnel's key gets a veth, and the tunnel stands on the node. Were
packets forwarded from the one to the other, the node would have to be a router: for its own
devices too, with a firewall that may refuse it, and every wire one hop longer. So a program of
some ten instructions stands where packets come in at either, takes the Ethernet header off or
puts one on, and sends them out at the other. It goes with its device.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable

from nsm.errors import RightsError, UnsupportedError
from nsm.kernel import netlink
from nsm.kernel.netlink import Refusal, message, nested, text, u32

# linux/bpf.h: operations, and what they are called there
_LOAD_WORD, _STORE_WORD, _STORE_HALF = 0x61, 0x63, 0x6B  # LDX MEM W, STX MEM W, STX MEM H
_MOVE, _MOVE_NUMBER, _ADD_NUMBER, _IF_EQUAL, _UNLESS_EQUAL, _CALL, _EXIT = (
    *(0xBF, 0xB7, 0x07),
    *(0x15, 0x55, 0x85, 0x95),
)
_STORE_BYTES, _REDIRECT, _CHANGE_HEAD = 9, 23, 43
_DROP = 2  # TC_ACT_SHOT
_PROTOCOL = 16  # where __sk_buff has it
_PROG_LOAD, _SCHED_CLS = 5, 3
_LICENSE = b"Apache-2.0\0"
_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "s390x": 351, "ppc64le": 361}

# linux/pkt_sched.h, linux/pkt_cls.h
_NEWQDISC, _NEWTFILTER, _GETTFILTER = 36, 44, 46
_KIND, _OPTIONS, _BPF_FD, _BPF_NAME, _BPF_FLAGS, _ACT_DIRECT = 1, 2, 6, 7, 8, 1
_INGRESS, _FIRST = 0xFFFF_FFF1, 0xFFFF_0000
_TC_BODY = struct.Struct("=BxHiIII")  # family, pad, index, handle, parent, info
_ANY = 1 << 16 | int.from_bytes(b"\x00\x03", sys.byteorder)  # the first to look, at any protocol

_libc = ctypes.CDLL(None, use_errno=True)


def _one(code: int, dst: int = 0, src: int = 0, offset: int = 0, number: int = 0) -> bytes:
    registers = src << 4 | dst if sys.byteorder == "little" else dst << 4 | src
    return struct.pack("=BBhi", code, registers, offset, number)


def outward(index: int) -> bytes:
    """What a workload's IPv4 and IPv6 packets meet: off with the header, out at that device."""
    four, six = (int.from_bytes(kind, sys.byteorder) for kind in (b"\x08\x00", b"\x86\xdd"))
    return b"".join(
        (
            _one(_LOAD_WORD, 2, 1, _PROTOCOL),
            _one(_IF_EQUAL, 2, offset=3, number=four),
            _one(_IF_EQUAL, 2, offset=2, number=six),
            _one(_MOVE_NUMBER, 0, number=_DROP),
            _one(_EXIT),
            *_send(index),
        )
    )


def inward(index: int, mac: str) -> bytes:
    """What a tunnel's packets meet: a header, from and to that MAC, and out at that device."""
    six = bytes.fromhex(mac.replace(":", ""))
    words = struct.unpack("=iii", six + six)
    return b"".join(
        (
            _one(_MOVE, 6, 1),
            _one(_LOAD_WORD, 7, 1, _PROTOCOL),
            _one(_MOVE_NUMBER, 2, number=14),
            _one(_MOVE_NUMBER, 3),
            _one(_CALL, number=_CHANGE_HEAD),
            _one(_UNLESS_EQUAL, 0, offset=15),
            *(
                part
                for n, word in enumerate(words)
                for part in (
                    _one(_MOVE_NUMBER, 1, number=word),
                    _one(_STORE_WORD, 10, 1, 4 * n - 16),
                )
            ),
            _one(_STORE_HALF, 10, 7, -4),
            _one(_MOVE, 1, 6),
            _one(_MOVE_NUMBER, 2),
            _one(_MOVE, 3, 10),
            _one(_ADD_NUMBER, 3, number=-16),
            _one(_MOVE_NUMBER, 4, number=14),
            _one(_MOVE_NUMBER, 5),
            _one(_CALL, number=_STORE_BYTES),
            _one(_IF_EQUAL, 0, offset=2),
            _one(_MOVE_NUMBER, 0, number=_DROP),
            _one(_EXIT),
            *_send(index),
        )
    )


def _send(index: int) -> Iterable[bytes]:
    return (
        _one(_MOVE_NUMBER, 1, number=index),
        _one(_MOVE_NUMBER, 2),
        _one(_CALL, number=_REDIRECT),
        _one(_EXIT),
    )


def load(program: bytes) -> int:
    """A descriptor of the program, checked by the kernel; the caller closes it.

    Raises UnsupportedError where this kernel takes none.
    """
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise UnsupportedError(f"programs for packets are not known on {platform.machine()}")
    code, license_ = ctypes.create_string_buffer(program), ctypes.create_string_buffer(_LICENSE)
    wish = struct.pack(
        "=IIQQIIQII16s",
        _SCHED_CLS,
        len(program) // 8,
        ctypes.addressof(code),
        ctypes.addressof(license_),
        0,
        0,
        0,
        0,
        0,
        b"vwire",
    )
    made = int(_libc.syscall(number, _PROG_LOAD, wish, len(wish)))
    if made >= 0:
        return made
    failure = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if failure.errno == errno.EPERM:
        raise RightsError(
            "may not load a program for packets", hint="it needs CAP_BPF, or CAP_SYS_ADMIN"
        )
    raise cannot(failure)


def cannot(refusal: Refusal | OSError) -> UnsupportedError:
    """What a kernel lacks that refuses so, and what does without it."""
    return UnsupportedError(
        f"the running kernel cannot join a workload with a tunnel on the node: {refusal}",
        hint="it needs CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF and CONFIG_BPF_SYSCALL;"
        " NSM_WIREGUARD=userspace keeps keys from workloads without them",
    )


def place(index: int) -> bytearray:
    """Makes a place where a device's incoming packets can be met."""
    body = _TC_BODY.pack(0, 0, index, _FIRST, _INGRESS, 0) + text(_KIND, "ingress")
    return message(_NEWQDISC, netlink.CREATE | netlink.EXCL, body)


def is_place(wish: bytearray) -> bool:
    """Whether a message is one of `place`."""
    return int(struct.unpack_from("=H", wish, 4)[0]) == _NEWQDISC


def attach(index: int, program: int, name: str) -> bytearray:
    """Has the loaded program meet them, and none of before; its name says what it does."""
    options = u32(_BPF_FD, program) + text(_BPF_NAME, name) + u32(_BPF_FLAGS, _ACT_DIRECT)
    body = _TC_BODY.pack(0, 0, index, 1, _FIRST, _ANY) + text(_KIND, "bpf")
    return message(_NEWTFILTER, netlink.CREATE, body + nested(_OPTIONS, options))


def dump(index: int) -> bytearray:
    """Ask for the programs that meet a device's incoming packets."""
    return message(_GETTFILTER, 0, _TC_BODY.pack(0, 0, index, 0, _FIRST, 0))


def seen(bodies: Iterable[tuple[int, memoryview]]) -> list[str]:
    """The names of the programs in the answers to `dump`."""
    found = []
    for kind, body in bodies:
        have = netlink.table(body, _TC_BODY.size) if kind == _NEWTFILTER else {}
        if _OPTIONS in have and netlink.string(have.get(_KIND, memoryview(b""))) == "bpf":
            options = netlink.table(have[_OPTIONS], 0)
            if _BPF_NAME in options:
                found.append(netlink.string(options[_BPF_NAME]))
    return found


def name(index: int, mac: str = "") -> str:
    """What a program is called that sends to that device, with that MAC where it has one."""
    return f"vwire to {index}" + (f" as {mac}" if mac else "")

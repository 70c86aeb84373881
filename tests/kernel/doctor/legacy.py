"""Sets the policy of a chain as `iptables-legacy -P CHAIN DROP` does, where that is not installed.

    python legacy.py 4|6 INPUT|FORWARD DROP|ACCEPT

Reads the filter table with getsockopt, changes the verdict of the chain's last rule, and
writes the table back.
"""

import ctypes
import socket
import struct
import sys

LEVELS = {"4": (socket.AF_INET, 0, 84), "6": (socket.AF_INET6, 41, 136)}
HOOKS = {"INPUT": 1, "FORWARD": 2}
VERDICTS = {"DROP": -1, "ACCEPT": -2}
GET_INFO, GET_ENTRIES, SET_REPLACE = 64, 65, 64
INFO = struct.Struct("=32sI5I5III")
HEAD = 40
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "iptables-legacy")


def get(sock: socket.socket, level: int, option: int, question: bytes) -> bytearray:
    buffer = ctypes.create_string_buffer(question, len(question))
    size = ctypes.c_uint32(len(question))
    checked(libc.getsockopt(sock.fileno(), level, option, buffer, ctypes.byref(size)))
    return bytearray(buffer.raw)


def main(version: str, chain: str, verdict: str) -> None:
    family, level, addresses = LEVELS[version]
    name = b"filter".ljust(32, b"\0")
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        info = INFO.unpack(get(sock, level, GET_INFO, name.ljust(INFO.size, b"\0")))
        hooks, entries, underflows, count, size = (
            info[1], info[2:7], info[7:12], info[12], info[13]
        )  # fmt: skip
        head = (name + struct.pack("=I4x", size)).ljust(HEAD + size, b"\0")
        rules = get(sock, level, GET_ENTRIES, head)[HEAD:]
        last = underflows[HOOKS[chain]]
        (target,) = struct.unpack_from("=H", rules, last + addresses + 4)
        struct.pack_into("=i", rules, last + target + 32, VERDICTS[verdict])
        counters = ctypes.create_string_buffer(16 * count)
        replace = struct.pack(
            "=32sIII5I5IIQ", name, hooks, count, size, *entries, *underflows, count,
            ctypes.addressof(counters),
        )  # fmt: skip
        sock.setsockopt(level, SET_REPLACE, replace + bytes(rules))


if __name__ == "__main__":
    main(*sys.argv[1:])

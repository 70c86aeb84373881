"""Runs a command for which the kernel refuses a system call, as a container's seccomp profile does.

    python fence.py ERRNO SYSCALL [ARGUMENT=VALUE...] -- COMMAND...

SYSCALL fails with ERRNO (its name) where its arguments, counted from 0, have those values.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

NUMBERS = {
    "x86_64": {"socket": 41, "bpf": 321, "clock_adjtime": 305, "pidfd_open": 434},
    "aarch64": {"socket": 198, "bpf": 280, "clock_adjtime": 266, "pidfd_open": 434},
}
LOAD, SAME, RETURN = 0x20, 0x15, 0x06  # BPF: a word of the call; jump if equal; the verdict
ALLOW, REFUSE = 0x7FFF_0000, 0x0005_0000
NO_NEW_PRIVS, SET_SECCOMP, FILTER = 38, 22, 2


def program(number: int, arguments: dict[int, int], code: int) -> bytes:
    asked = [(0, number), *((16 + 8 * place, value) for place, value in arguments.items())]
    steps = []
    for place, (offset, value) in enumerate(asked):
        left = 2 * (len(asked) - place) - 1  # to the ALLOW behind the verdict
        steps += [struct.pack("=HBBI", LOAD, 0, 0, offset)]
        steps += [struct.pack("=HBBI", SAME, 0, left, value)]
    steps += [struct.pack("=HBBI", RETURN, 0, 0, REFUSE | code)]
    steps += [struct.pack("=HBBI", RETURN, 0, 0, ALLOW)]
    return b"".join(steps)


def main(words: list[str]) -> None:
    end = words.index("--")
    name, call, *pairs = words[:end]
    arguments = {int(place): int(value) for place, _, value in (p.partition("=") for p in pairs)}
    number = NUMBERS[platform.machine()][call]
    steps = program(number, arguments, getattr(errno, name))
    buffer = ctypes.create_string_buffer(steps, len(steps))
    filter_ = struct.pack("=H6xQ", len(steps) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(SET_SECCOMP, FILTER, filter_, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")
    os.execvp(words[end + 1], words[end + 1 :])


if __name__ == "__main__":
    main(sys.argv[1:])

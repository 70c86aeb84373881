"""Who has a UDP port in the namespace the calling thread is in. Blocks."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import suppress

_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}
_TABLES = ("/proc/thread-self/net/udp", "/proc/thread-self/net/udp6")


def free(port: int) -> bool:
    """Whether a socket could have it now, on all addresses of IPv4 and of IPv6."""
    return all(_binds(family, port) for family in (socket.AF_INET, socket.AF_INET6))


def _binds(family: socket.AddressFamily, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            if family == socket.AF_INET6:  # IPv4 is asked about by itself
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            return False
        if failure.errno not in _NO_FAMILY:  # a kernel without IPv6 has no port of it to take
            raise
    return True


def holder(port: int) -> str:
    """Who holds it, in words; empty if nobody does."""
    inodes = set(_bound(port))
    if not inodes:
        return ""
    doors = {f"socket:[{inode}]" for inode in inodes}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it ended, or is hidden from us
            files = (f"/proc/{pid}/fd/{fd}" for fd in os.listdir(f"/proc/{pid}/fd"))
            if any(_leads(file) in doors for file in files):
                with open(f"/proc/{pid}/comm") as name:
                    return f"{name.read().strip()} (pid {pid})"
    return "a tunnel of the kernel, or a process that is not seen from here"


def _leads(file: str) -> str:
    try:
        return os.readlink(file)
    except OSError:
        return ""  # closed meanwhile


def _bound(port: int) -> Iterator[str]:
    for table in _TABLES:
        with suppress(FileNotFoundError), open(table, encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]

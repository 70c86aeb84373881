"""Who has a port: what is taken is explained by the process that took it.

From /proc, so as far as it shows others' processes: those of other users are hidden from an
ordinary one. A tunnel device's socket is the kernel's own, and no process has it. All of it
blocks, for some milliseconds.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Literal

Protocol = Literal["tcp", "udp"]
_LISTENS: Final = "0A"  # the state in /proc/net/tcp
_LONGEST: Final = 4096  # bytes of a command line


@dataclass(frozen=True, slots=True)
class Process:
    """A process as /proc shows it."""

    pid: int
    argv: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its program is called."""
        return os.path.basename(self.argv[0])[:40] if self.argv else "a process"


@dataclass(frozen=True, slots=True)
class Holder:
    """A socket that has a port: which user's it is, and whose, if that is seen."""

    uid: int
    process: Process | None


def of_port(protocol: Protocol, port: int) -> list[Holder]:
    """Who has that port in the network namespace of the calling thread, over IPv4 and IPv6.

    Of TCP only who listens: a port somebody talks from is free. Who is seen comes first.
    """
    users = dict(_sockets(protocol, port))
    pids = _owners(set(users)) if users else {}
    found = [Holder(uid, seen(pids[one]) if one in pids else None) for one, uid in users.items()]
    return sorted(found, key=lambda one: one.process is None)


def seen(pid: int) -> Process | None:
    """A process by its number; None if it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(_LONGEST).decode(errors="replace").split("\0")
    except OSError:
        return None
    return Process(pid, tuple(word for word in words if word))


def _sockets(protocol: Protocol, port: int) -> Iterator[tuple[str, int]]:
    """The inode of each socket that has the port, and its user."""
    for version in ("", "6"):
        try:
            with open(f"/proc/thread-self/net/{protocol}{version}") as file:
                lines = file.readlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) != port:
                continue
            if protocol == "udp" or fields[3] == _LISTENS:
                yield fields[9], int(fields[7])


def _owners(inodes: set[str]) -> dict[str, int]:
    """For each of the sockets a process that has it open, if one is seen to."""
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[str, int] = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it ended, or is another user's
            for fd in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):  # closed meanwhile
                    if inode := wanted.get(os.readlink(fd.path)):
                        found.setdefault(inode, int(pid))
        if len(found) == len(wanted):
            break
    return found

"""Who has a port: an address that is taken is explained by the process that took it."""

import glob
import os

_LISTEN = "0A"  # the state in /proc/net/tcp


def holder_of_port(port: int) -> int | None:
    """The pid of a process that listens on a TCP port in this network namespace, if /proc shows
    one: other users' processes are hidden from an ordinary user. Blocks for some milliseconds.
    """
    wanted = {f"socket:[{inode}]" for inode in _listening(port)}
    if not wanted:
        return None
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        try:
            if os.readlink(link) in wanted:
                return int(link.split("/")[2])
        except OSError:
            continue  # it ended, or is another user's
    return None


def _listening(port: int) -> list[str]:
    found = []
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        try:
            with open(table, encoding="ascii") as file:
                lines = file.readlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.append(fields[9])
    return found

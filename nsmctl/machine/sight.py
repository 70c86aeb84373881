"""What is seen of this machine: its namespaces, and whether who is not seen does not run."""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from nsm.errors import NsmError
from nsm.kernel.namespaces import NAMED, Home
from nsm.kernel.netlink import Socket

OUTSIDE: Final = "outside of this PID namespace"
_FIRST: Final = 0xEFFF_FFFC  # the inode of a machine's first PID namespace: PROC_PID_INIT_INO


def of_everybody() -> bool:
    """Whether nobody who runs on this machine is hidden: by a PID namespace, or by hidepid=."""
    try:
        with open("/proc/1/cmdline"):
            return os.stat("/proc/self/ns/pid").st_ino == _FIRST
    except OSError:
        return False


def namespaces() -> Iterator[tuple[Socket, str]]:
    """A socket in each network namespace that somebody's process or name leads to.

    With what to write before a command to run it there: nothing for our own, which is the
    first. An ordinary user sees no other.
    """
    with Socket.here() as sock:
        yield sock, ""
    if os.geteuid() != 0:
        return
    with Home() as home:
        seen = {home.namespace.inode}
        for path, inside in _doors():
            with contextlib.suppress(OSError, NsmError):
                inode = os.stat(path).st_ino
                if inode in seen:
                    continue
                seen.add(inode)
                fd = home.opened_path(path, path)
                try:
                    with home.socket(fd) as sock:
                        yield sock, inside
                finally:
                    os.close(fd)


def _doors() -> Iterator[tuple[str, str]]:
    for name in sorted(os.listdir(NAMED)) if os.path.isdir(NAMED) else ():
        yield f"{NAMED}/{name}", f"ip netns exec {name} "
    for pid in os.listdir("/proc"):
        if pid.isdigit():
            yield f"/proc/{pid}/ns/net", f"nsenter -n -t {pid} "

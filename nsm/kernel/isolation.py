"""Whether a tunnel device may stand in a workload's namespace.

Whoever has CAP_NET_ADMIN there can lead it to another far end and send from the node's
address under other identifiers; root of a user namespace that owns the network namespace
can do the latter. So we look at who is in there, before anything is made. Blocks.
"""

import fcntl
import os

_NS_GET_USERNS = 0xB701
_NET_ADMIN = 12  # the capability's bit


def misusable(fd: int) -> bool:
    """Whether anybody in the network namespace behind fd may configure its devices.

    Sees the processes that this one's /proc shows, so a forwarder in a PID namespace of its
    own does not see who is there.
    """
    own = os.stat("/proc/self/ns/user").st_ino
    if _owner(fd) != own:
        return True
    link, user = f"net:[{os.fstat(fd).st_ino}]", f"user:[{own}]"
    return any(_may(f"/proc/{pid}", link, user) for pid in os.listdir("/proc") if pid.isdigit())


def _owner(fd: int) -> int:
    """The user namespace that owns the network namespace; 0 if it is none of ours to see."""
    try:
        found = fcntl.ioctl(fd, _NS_GET_USERNS)
    except PermissionError:
        return 0
    try:
        return os.fstat(found).st_ino
    finally:
        os.close(found)


def _may(process: str, link: str, user: str) -> bool:
    try:
        # what it may do in another user namespace does not count here
        if os.readlink(f"{process}/ns/net") != link or os.readlink(f"{process}/ns/user") != user:
            return False
        with open(f"{process}/status") as status:
            held = next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm:"))
    except (OSError, StopIteration):
        return False  # it ended meanwhile
    return bool(held >> _NET_ADMIN & 1)

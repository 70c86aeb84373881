"""Who keeps a network namespace: tasks that are in it, and places where it is mounted.

A file descriptor keeps a namespace as well, a debugger's or a foreign manager's for example,
and then the kernel never says that it is gone though nobody can be in it any more. So /proc
is looked through. What once showed somebody is looked at first, which is one readlink; all
of /proc only when that is gone. Blocks: call it in threads, one at a time.
"""

import errno
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

_EVERYBODYS = "pid:[4026531836]"  # the PID namespace the machine began with: it shows all
_GONE = {errno.ENOENT, errno.ESRCH, errno.EINVAL}  # a process that ends meanwhile, and a zombie


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look showed: the inodes of namespaces that somebody keeps.

    whole says that nobody was hidden, so that the others are kept by descriptors alone: as far
    as this process's PID namespace goes (`Inhabitants.sees_all`).
    """

    kept: frozenset[int]
    whole: bool


class Inhabitants:
    """Looks through /proc, and remembers by whom it has seen each namespace kept."""

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._witness: dict[int, str] = {}  # a task's link, or a mountinfo
        self.scans = 0
        """How often all of /proc was looked through."""

    def sees_all(self) -> bool:
        """Whether no process of this machine can be beyond our PID namespace."""
        return os.readlink(f"{self._proc}/self/ns/pid") == _EVERYBODYS

    def look(self, inodes: Collection[int]) -> Seen:
        """Which of the namespaces of these inodes somebody is in, or has mounted."""
        self._witness = {inode: path for inode, path in self._witness.items() if inode in inodes}
        mounted: dict[str, set[int]] = {}
        kept = {inode for inode in inodes if self._still(inode, mounted)}
        missing = set(inodes) - kept
        if not missing:
            return Seen(frozenset(kept), True)
        self.scans += 1
        whole = self._scan(missing, mounted)
        return Seen(frozenset(set(inodes) - missing), whole)

    def _still(self, inode: int, mounted: dict[str, set[int]]) -> bool:
        path = self._witness.get(inode)
        if path is None:
            return False
        try:
            if path.endswith("/mountinfo"):
                if path not in mounted:
                    mounted[path] = set(_mounted(path))
                return inode in mounted[path]
            return os.readlink(path) == f"net:[{inode}]"
        except OSError:
            return False

    def _scan(self, missing: set[int], mounted: dict[str, set[int]]) -> bool:
        """Find witnesses of the missing, and take those from it; whether all could be seen."""
        wanted = {f"net:[{inode}]": inode for inode in missing}
        spaces: dict[str, str] = {}  # a mountinfo of each mount namespace
        rooted: set[str] = set()  # those whose shows all that is mounted there
        pids = [pid for pid in os.listdir(self._proc) if pid.isdigit()]
        own = self._own()
        # mounted with hidepid, /proc does not say whom it leaves out: the first process among them
        whole = "1" in pids
        for pid in pids:
            folder = f"{self._proc}/{pid}"
            try:
                # threads of ours are in workloads' namespaces for moments, and keep none
                if pid != own:
                    self._tasks(folder, wanted, missing)
                mounts = os.readlink(f"{folder}/ns/mnt")
                if mounts not in rooted:  # from inside a chroot one sees only what is below it
                    if os.readlink(f"{folder}/root") == "/":
                        rooted.add(mounts)
                        spaces[mounts] = f"{folder}/mountinfo"
                    spaces.setdefault(mounts, f"{folder}/mountinfo")
            except OSError as failure:
                # the first process stays where the machine began; some hide it even from root
                whole = whole and (failure.errno in _GONE or pid == "1")
            if not missing:
                return True
        for path in spaces.values():
            try:
                here = mounted[path] = set(_mounted(path))
            except OSError as failure:
                whole = whole and failure.errno in _GONE
                continue
            for inode in here & missing:
                self._witness[inode] = path
            missing -= here
        return whole

    def _tasks(self, folder: str, wanted: Mapping[str, int], missing: set[int]) -> None:
        """Find those of the missing that a task of that process is in."""
        for task in os.listdir(f"{folder}/task"):
            path = f"{folder}/task/{task}/ns/net"
            try:
                inode = wanted.get(os.readlink(path))
            except OSError as failure:
                if failure.errno not in _GONE:
                    raise
                continue  # this one ended: the first may, and the others go on
            if inode is not None and inode in missing:
                self._witness[inode] = path
                missing.discard(inode)

    def _own(self) -> str:
        """Our number in that /proc; empty if we are not in it."""
        try:
            return os.readlink(f"{self._proc}/self")
        except OSError:
            return ""


def _mounted(path: str) -> Iterator[int]:
    """The network namespaces that are mounted where that mountinfo is of."""
    with open(path, "rb") as file:
        for line in file:
            # ID PARENT MAJOR:MINOR net:[INODE] WHERE OPTIONS … - nsfs nsfs rw
            if b" net:[" in line:
                root = line.split(b" ", 4)[3]
                if root.startswith(b"net:[") and root.endswith(b"]"):
                    yield int(root[5:-1])

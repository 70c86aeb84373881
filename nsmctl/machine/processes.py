"""Who runs here, and who holds a socket: from /proc, as far as it shows others' processes."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

OURS: Final = ("registry", "nsmgr", "forwarder", "nsm.process.issuer")
_COMM: Final = 15  # characters the kernel keeps of a command's name


@dataclass(frozen=True, slots=True)
class Process:
    """A process as /proc shows it."""

    pid: int
    argv: tuple[str, ...]

    @property
    def module(self) -> str:
        """Which of our programs it is, by what `python -m` was given; empty if none."""
        with contextlib.suppress(ValueError, IndexError):
            name = self.argv[self.argv.index("-m") + 1]
            return name if name in OURS else ""
        return ""

    def __str__(self) -> str:
        if self.module:
            return f"{self.module}, pid {self.pid}"
        name = os.path.basename(self.argv[0]) if self.argv else "a process"
        return f"{name[:40]}, pid {self.pid}"


def listed() -> Iterator[Process]:
    """All processes that can be seen."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := seen(int(name))):
            yield found


def seen(pid: int) -> Process | None:
    """A process by its number; None if it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).decode(errors="replace").split("\0")
    except OSError:
        return None
    return Process(pid, tuple(word for word in words if word))


def running(command: str) -> bool:
    """Whether a process of that command's name runs here."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/comm") as file:
                if file.read().rstrip("\n") == command[:_COMM]:
                    return True
    return False


def holder(inode: int) -> Process | None:
    """The process that holds a socket; None if none is seen to."""
    wanted = f"socket:[{inode}]"
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            for fd in os.scandir(f"/proc/{name}/fd"):
                with contextlib.suppress(OSError):
                    if os.readlink(fd.path) == wanted:
                        return seen(int(name))
    return None

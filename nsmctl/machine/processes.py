"""Who runs here: from /proc, as far as it shows others' processes."""

import contextlib
import os
from collections.abc import Iterator
from typing import Final

from nsm import holders

OURS: Final = ("registry", "nsmgr", "forwarder", "nsm.process.issuer")
_COMM: Final = 15  # characters the kernel keeps of a command's name


class Process(holders.Process):
    """A process as /proc shows it, by the name it has among ours."""

    __slots__ = ()

    @property
    def module(self) -> str:
        """Which of our programs it is, by what `python -m` was given; empty if none."""
        with contextlib.suppress(ValueError, IndexError):
            name = self.argv[self.argv.index("-m") + 1]
            return name if name in OURS else ""
        return ""

    def __str__(self) -> str:
        return f"{self.module or self.name}, pid {self.pid}"


def listed() -> Iterator[Process]:
    """All processes that can be seen."""
    for name in os.listdir("/proc"):
        if name.isdigit() and (found := holders.seen(int(name))):
            yield Process(found.pid, found.argv)


def running(command: str) -> bool:
    """Whether a process of that command's name runs here."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/comm") as file:
                if file.read().rstrip("\n") == command[:_COMM]:
                    return True
    return False

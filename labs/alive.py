"""Ending processes that were noted: held by a pidfd, so that signals reach those or nobody."""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator, Sequence

from nsm.process.alive import Mark, started

__all__ = ["Mark", "held", "inside", "kill", "started", "stop"]


@contextlib.contextmanager
def held(marks: Sequence[Mark]) -> Iterator[dict[Mark, int]]:
    """A pidfd for each of marks that is alive; closed at the end."""
    fds: dict[Mark, int] = {}
    try:
        for mark in marks:
            with contextlib.suppress(ProcessLookupError):
                fd = os.pidfd_open(mark.pid)
                fds[mark] = fd
                if not mark.alive:  # looked at after opening: now the fd cannot be another's
                    os.close(fds.pop(mark))
        yield fds
    finally:
        for fd in fds.values():
            os.close(fd)


def stop(marks: Sequence[Mark], patience: float) -> int:
    """Ask processes to end, wait up to patience seconds, then kill. How many had to be killed."""
    with held(marks) as fds:
        _send(fds.values(), signal.SIGTERM)
        _send(fds.values(), signal.SIGCONT)  # who is stopped hears of nothing else
        stubborn = _wait(fds.values(), patience)
        _send(stubborn, signal.SIGKILL)
        _wait(stubborn, 5.0)
        return len(stubborn)


def kill(marks: Sequence[Mark]) -> None:
    """End processes at once."""
    with held(marks) as fds:
        _send(fds.values(), signal.SIGKILL)
        _wait(fds.values(), 5.0)


def inside(inodes: Sequence[int]) -> list[Mark]:
    """All processes in network namespaces, by the namespaces' inodes, but ourselves."""
    wanted = set(inodes)
    device = os.stat("/proc/self/ns/net").st_dev
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            there = os.stat(f"/proc/{name}/ns/net")
            if there.st_dev == device and there.st_ino in wanted:
                found.append(Mark(int(name), started(int(name))))
    return [mark for mark in found if mark.start]


def _send(fds: Iterable[int], number: signal.Signals) -> None:
    for fd in fds:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, number)


def _wait(fds: Iterable[int], patience: float) -> list[int]:
    """Those that did not end in time; a pidfd is readable when its process has ended."""
    left = set(fds)
    poll = select.poll()
    for fd in left:
        poll.register(fd, select.POLLIN)
    end = time.monotonic() + patience
    while left and (rest := end - time.monotonic()) > 0:
        for fd, _ in poll.poll(rest * 1000):
            poll.unregister(fd)
            left.discard(fd)
    return list(left)

"""What the processes of a lab hold, looked at again and again, and whether that stays as it is.

Memory, open files and threads are the kernel's word; the tasks of an event loop are what a
process logs when it is asked (SIGUSR2).
"""

import contextlib
import json
import os
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from labs import alive
from labs.alive import Mark

PATIENCE: Final = 2.0  # seconds for a process to say what runs in it
LEAST: Final = 6  # looks, before anything is said of a trend
_LOOK: Final = 0.02
_MORE: Final[Mapping[str, tuple[float, float]]] = {  # no trend: a part of what was, and so much
    "pss_kib": (0.25, 4096), "fds": (0.0, 8), "threads": (0.0, 4), "tasks": (0.0, 8),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds; tasks is None where it did not say, because it is stopped maybe."""

    pss_kib: int
    fds: int
    threads: int
    tasks: int | None


def held(of: Mapping[str, tuple[Mark, str]]) -> dict[str, Held]:
    """What each process holds, by its name; of: who it is, and its log. Who ended is left out."""
    asked = {}
    with alive.held([mark for mark, _ in of.values()]) as there:
        for name, (mark, log) in of.items():
            with contextlib.suppress(OSError):
                if mark in there:  # whoever else has its number by now would end by that signal
                    asked[name] = os.path.getsize(log)
                    signal.pidfd_send_signal(there[mark], signal.SIGUSR2)
    end = time.monotonic() + PATIENCE
    tasks: dict[str, int] = {}
    while time.monotonic() < end and tasks.keys() != asked.keys():
        for name in asked.keys() - tasks.keys():
            if (count := _tasks(of[name][1], asked[name])) is not None:
                tasks[name] = count
        time.sleep(_LOOK)
    found = {}
    for name in asked:
        mark, _ = of[name]
        with contextlib.suppress(OSError, StopIteration):
            one = Held(
                _field(f"/proc/{mark.pid}/smaps_rollup", "Pss:"),
                len(os.listdir(f"/proc/{mark.pid}/fd")),
                _field(f"/proc/{mark.pid}/status", "Threads:"),
                tasks.get(name),
            )
            if mark.alive:  # else it may be another's that was looked at
                found[name] = one
    return found


def trend(looks: Sequence[Mapping[str, Held]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each process, the medians of the first third of all looks, and of the last. Pure.

    What was not known in a look is not counted in it.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name in sorted({name for look in looks for name in look}):
        rows = [asdict(look[name]) for look in looks if name in look]
        for what in _MORE:
            known = [row[what] for row in rows if row[what] is not None]
            if len(known) >= LEAST:
                third = len(known) // 3
                ends = statistics.median(known[:third]), statistics.median(known[-third:])
                found.setdefault(name, {})[what] = ends
    return found


def growing(trends: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
    """What is no longer flat, a sentence each. Pure."""
    return [
        f"{name}: {what} went from {first:g} to {last:g}"
        for name, of in trends.items()
        for what, (first, last) in of.items()
        if last > first * (1 + _MORE[what][0]) + _MORE[what][1]
    ]


def _tasks(log: str, offset: int) -> int | None:
    """How many tasks a process says it has, in what it has logged since; None: it has not."""
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(offset)
        for line in file:
            if b'"tasks"' not in line or not line.endswith(b"\n"):
                continue
            with contextlib.suppress(ValueError):
                said: Any = json.loads(line)
                if isinstance(said.get("tasks"), dict):
                    return sum(map(int, said["tasks"].values()))
    return None


def _field(path: str, key: str) -> int:
    with open(path) as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))

"""Processes of others, as the kernel knows them."""

import contextlib
import os
from pathlib import Path


def children(pid: int) -> list[int]:
    """Those that a process, its main thread, has started; none of one that has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def below(pid: int) -> set[int]:
    """Those that stand below one, at every depth."""
    found = set()
    for child in children(pid):
        found |= {child} | below(child)
    return found


def alive(pids: set[int]) -> set[int]:
    """Those that have not ended."""
    return {pid for pid in pids if os.path.exists(f"/proc/{pid}")}


def arguments(pid: int) -> list[str]:
    """What it was started with."""
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]

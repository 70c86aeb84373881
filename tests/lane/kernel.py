"""The lane's kernel on this machine: where it is kept, and having it built.

It is kept by what it is made of and the version of its source, so that another checkout shares
it, and a change of its configuration makes another one beside it.
"""

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = "linux-source-6.1"  # Debian 12's package
MADE_OF = ("kernel.config", "fpshim.c")  # which are for that source


class LaneError(Exception):
    """The lane cannot do what it is asked for; status is the exit code that says so."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class UnavailableError(LaneError):
    """There is no lane on this machine, and why."""


def foreign() -> str:
    """What this machine is where there can be no lane; '' where there can."""
    machine = os.uname()
    fits = (machine.sysname, machine.machine) == ("Linux", "x86_64")
    return "" if fits else machine.machine


def cache() -> Path:
    """Where kernels are kept."""
    if named := os.environ.get("KERNEL_LANE_DIR"):
        return Path(named).absolute()
    of_all = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(of_all).absolute() / "kernel-lane"


def key() -> str:
    """The name of what the kernel is made of."""
    digest = hashlib.sha256(SOURCE.encode())
    for name in MADE_OF:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()[:12]


def standing() -> Path | None:
    """The folder of the kernel, if it has been built."""
    folders = sorted(cache().glob(f"{key()}-*"), key=lambda folder: folder.stat().st_mtime)
    return folders[-1] if folders else None


def built(say: Callable[[str], None]) -> Path:
    """The folder of the kernel, which is built first if it is not there: minutes.

    say is told what goes on, in lines. Raises UnavailableError.
    """
    if kind := foreign():
        raise UnavailableError(f"user-mode Linux is for x86-64 only; this is {kind}", 3)
    if there := standing():
        return there
    command = [str(HERE / "build"), str(cache()), key(), SOURCE]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, text=True, stdin=nothing, stdout=pipe, stderr=pipe) as build:
        assert build.stdout is not None
        assert build.stderr is not None
        for line in build.stdout:
            say(line.rstrip())
        why = build.stderr.read().strip()  # some lines, written before it ended
    if build.returncode == 0 and (there := standing()):
        return there
    status = 3 if build.returncode == 3 else 126
    raise UnavailableError(why or f"{command[0]}: exit code {build.returncode}", status)

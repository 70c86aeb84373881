"""One start of the lane's kernel, with one command in it."""

import contextlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.lane.kernel import HERE, LaneError

NEVER_REPORTED = 125
MEMORY = 2048  # MiB; it is taken from the host as the guest touches it


class Guest:
    """A command in a kernel of its own, from entering the block to leaving it.

    share is a folder that both sides write to, at the same path. Its output goes to the file
    descriptor output; with a terminal, its input comes from descriptor 0. What it needs of files
    is in folder meanwhile: in /tmp, and not where TMPDIR says, as the kernel's command line knows
    no blanks.
    """

    def __init__(
        self,
        kernel: Path,
        command: Sequence[str],
        *,
        share: Path | None = None,
        folder: Path = Path("/tmp"),
        environment: Mapping[str, str] | None = None,
        output: int = 1,
        terminal: bool = False,
        memory: int = MEMORY,
        boot: Sequence[str] = (),
    ) -> None:
        self._kernel = kernel
        self._share = share.resolve() if share else None
        if self._share and "," in str(self._share):
            raise LaneError(f"{self._share}: a share's path cannot have a comma in it", 2)
        self._command = _script(command, environment or os.environ, self._share)
        self._output = output
        self._terminal = terminal
        self._memory = memory
        self._boot = tuple(boot)
        self._parent = folder
        self._folder = Path()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="vwire-lane-", dir=self._parent))
        try:
            self._start()
        except BaseException:
            shutil.rmtree(self._folder)
            raise
        return self

    def _start(self) -> None:
        folder = self._folder
        (folder / "kernel").symlink_to(self._kernel)
        (folder / "init").symlink_to(HERE / "init")
        (folder / "command").write_text(self._command)
        (folder / "shares").write_text(f"{self._share}\n" if self._share else "")
        (folder / "needed").write_text("".join(f"{path}\n" for path in _needed()))
        shutil.copy(self._kernel / "busybox", folder)
        output = os.dup(self._output)
        source = 0 if self._terminal else os.open(os.devnull, os.O_RDONLY)
        arguments = [
            f"mem={self._memory}M", "rootfstype=hostfs", "ro", "quiet", "loglevel=4",
            f"uml_dir={folder}/", "fb_tunnels=none", "dummy.numdummies=0", "ifb.numifbs=0",
            "con=null", "ssl=null", "con0=null,fd:1",
            f"ssl0={'fd:0' if self._terminal else 'null'},fd:{output}",
            f"lane={folder}", f"input={'/dev/ttyS0' if self._terminal else '/dev/null'}",
            *self._boot,
            f"init={folder}/busybox", "--", "sh", f"{folder}/init",
        ]  # fmt: skip
        try:
            with (folder / "console").open("wb") as console:
                self._process = subprocess.Popen(
                    [*together(), f"{folder}/kernel/linux", *arguments],
                    stdin=source, stdout=console, stderr=console, pass_fds=[output],
                    start_new_session=True,  # Ctrl-C is our matter
                    env={
                        "PATH": os.defpath, "TMPDIR": _room_for(self._memory),
                        "LD_PRELOAD": f"{folder}/kernel/fpshim.so",
                    },
                )  # fmt: skip
        finally:
            os.close(output)
            if source:
                os.close(source)

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder)

    @property
    def _started(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "a guest is used inside its block"
        return self._process

    def wait(self, patience: float | None = None) -> int | None:
        """The command's exit code, NEVER_REPORTED where the guest ended without the command.

        None after patience seconds.
        """
        try:
            self._started.wait(patience)
            return int((self._folder / "status").read_text())
        except subprocess.TimeoutExpired:
            return None
        except (FileNotFoundError, ValueError):
            return NEVER_REPORTED

    def kill(self) -> None:
        """End it, all of it, now."""
        process = self._started
        if process.poll() is not None:
            return
        first = _children(process.pid)
        for pid in first or [process.pid]:
            _kill(pid)
        process.wait()

    def console(self, lines: int = 0) -> str:
        """What the kernel said; its last lines only."""
        text = (self._folder / "console").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])


def _script(command: Sequence[str], environment: Mapping[str, str], share: Path | None) -> str:
    own = {"LANE_GUEST": "1", **({"LANE_OUT": str(share)} if share else {})}
    passed = {k: v for k, v in environment.items() if k.isidentifier() and "PYTEST" not in k}
    return "\n".join(
        [
            "unset lane input",
            *(f"export {name}={shlex.quote(value)}" for name, value in (passed | own).items()),
            f"cd {shlex.quote(os.getcwd())} || exit",
            f"exec {shlex.join(command)}",
            "",
        ]
    )


def together() -> list[str]:
    """How the guest's processes live: on one processor, and none longer than the others.

    On one, because the guest's kernel and the process it runs wait for one another at each
    system call and each page fault: between two processors that takes three times as long.

    In a namespace of processes, whose first one ends with the guest, with us, or when it is
    killed; then the kernel ends the others. No signal would find them all: each of the guest's
    processes is one of the host's, traced, in a session of its own.
    """
    processor = random.choice([*os.sched_getaffinity(0)])
    return [
        "taskset", "--cpu-list", str(processor), "setpriv", "--pdeathsig", "KILL",
        "unshare", "--pid", "--fork", "--kill-child", "sh", "-c", '"$@"; exit $?', "lane",
    ]  # fmt: skip


def _needed() -> list[Path]:
    """What must be there of the folders that are empty inside."""
    wanted = {Path.cwd(), Path(sys.prefix)}
    outer = [one for one in wanted if not any(other in one.parents for other in wanted)]
    return [one for one in outer if one.is_relative_to("/tmp") or one.is_relative_to("/run")]


def _room_for(memory: int) -> str:
    """The folder for the file that is the guest's memory."""
    try:
        shm = os.statvfs("/dev/shm")
    except FileNotFoundError:
        return "/tmp"
    fits = shm.f_bavail * shm.f_frsize >= memory << 20 and not shm.f_flag & os.ST_NOEXEC
    # a guest that outgrows it dies of SIGBUS: containers have 64 MB there
    return "/dev/shm" if fits else "/tmp"


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):  # it has ended
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

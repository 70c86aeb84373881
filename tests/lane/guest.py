"""One start of the lane's kernel, with one command in it."""

import contextlib
import os
import random
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tests.lane.kernel import HERE, LaneError

NEVER_REPORTED = 125
MEMORY = 2048  # MiB; it is taken from the host as the guest touches it
_DYING = 20  # s


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
        output = _own(self._output, os.O_WRONLY)
        source = _own(0, os.O_RDONLY) if self._terminal else os.open(os.devnull, os.O_RDONLY)
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
            if self._terminal:
                self._pass_on_what_was_typed()
            self._started.wait(patience)
            return int((self._folder / "status").read_text())
        except subprocess.TimeoutExpired:
            return None
        except (FileNotFoundError, ValueError):
            return NEVER_REPORTED

    def _pass_on_what_was_typed(self) -> None:
        """Have it look for input, once it reads: of what came before that, no signal tells it."""
        while not (self._folder / "listens").exists():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._started.wait(0.05)
                return
        for pid, told in self.processes().items():
            if (told / "comm").read_text() == "linux\n":
                os.kill(pid, signal.SIGIO)
                break
        self._terminal = False

    def kill(self) -> None:
        """End it, all of it, now."""
        process = self._started
        if process.poll() is not None:
            return
        first = _children(process.pid)
        for pid in first or [process.pid]:
            _kill(pid)
        try:
            process.wait(_DYING)
        except subprocess.TimeoutExpired:
            raise LaneError(
                f"process {process.pid} was killed {_DYING} s ago, and the kernel has not ended it:"
                f" see /proc/{process.pid}/stack; what it uses stays in {self._folder}", 1,
            ) from None  # fmt: skip

    def processes(self) -> dict[int, Path]:
        """Those of the host's that it consists of, and where the host tells about each."""
        return {pid: Path(f"/proc/{pid}") for pid in _below(self._started.pid)}

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

    With as many descriptors as there may be, because the guest holds one for each file it has ever
    opened; and without a core, which a kernel that panics would write: its memory.
    """
    processor = random.choice([*os.sched_getaffinity(0)])
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return [
        "taskset", "--cpu-list", str(processor), "setpriv", "--pdeathsig", "KILL",
        "prlimit", f"--nofile={most}:{most}", "--core=0:0", "--",
        "unshare", "--pid", "--fork", "--kill-child", "sh", "-c", '"$@"; exit $?', "lane",
    ]  # fmt: skip


def _needed() -> list[Path]:
    """What must be there of the folders that are empty inside."""
    wanted = {Path.cwd(), Path(sys.prefix)}
    outer = [one for one in wanted if not any(other in one.parents for other in wanted)]
    return [one for one in outer if one.is_relative_to("/tmp") or one.is_relative_to("/run")]


def _room_for(memory: int) -> str:
    """The folder for the file that is the guest's memory, which dies of SIGBUS where that is full.

    Containers have 64 MB in /dev/shm; the others may be on a disk, which is slower.
    """
    folders = ("/dev/shm", "/tmp", "/var/tmp")
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            there = os.statvfs(folder)
            room = there.f_bavail * there.f_frsize >> 20
            if room >= memory and not there.f_flag & os.ST_NOEXEC:
                return folder
    raise LaneError(
        f"the guest's {memory} MiB of memory fit into none of {', '.join(folders)}"
        " (with programs allowed there): make room, or ask for less with -m", 3,
    )  # fmt: skip


def _own(descriptor: int, how: int) -> int:
    """A second descriptor of the same, with flags of its own where that can be.

    The guest does not wait for what it reads and writes, and says so in the flags (O_NONBLOCK),
    which all who share them would have to live with: make, pytest, the shell.
    """
    kind = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        with contextlib.suppress(OSError):
            return os.open(f"/proc/self/fd/{descriptor}", how | os.O_NOCTTY | os.O_NONBLOCK)
    return os.dup(descriptor)


def _below(pid: int) -> list[int]:
    return [one for child in _children(pid) for one in (child, *_below(child))]


def _children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):  # it has ended
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)

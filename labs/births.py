"""Starting a lab's processes, from the engine's side: orders to the nursery, and waiting.

A stage is over when each of its processes has said that it is ready, and broken as
soon as one says no; then its own last words are the message.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self

from labs import alive, processes, state
from labs.paths import Paths
from labs.processes import Process, Stage
from nsm.errors import DeadlineError, NsmError
from nsm.kernel import topology
from nsm.process.words import last_words

READY: Final = 20.0  # seconds a process may take
REFUSED: Final = 6.0  # seconds a client may be refused: a hop waits up to 5 s for an endpoint
LOOK: Final = 0.25  # seconds between looks at what clients are told


class ProcessFailedError(NsmError):
    """A process of the lab ended, or said no, before it was ready."""


class Births:
    """The parent of a lab's processes; see labs/nursery.py. Left alone, it stays with them."""

    def __init__(self, paths: Paths, modules: Sequence[str]) -> None:
        self._paths = paths
        self._modules = modules
        self._process: subprocess.Popen[bytes] | None = None
        self._heard = b""
        self._warm = False
        self._known: dict[str, Process] = {}
        self._log = f"{paths.folder}/log/nursery"

    def __enter__(self) -> Self:
        # the same code as ours, wherever that lies
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        # the very file, by number: should we be killed now, a nursery that is still importing
        # must not write into the journal of the next lab of that name
        with open(self._log, "ab") as log, open(self._paths.processes, "ab") as journal:
            number = journal.fileno()
            # open for writing too, or its end would be read whenever nobody else has it open
            later = os.open(self._paths.orders, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "labs.nursery", self._paths.lab,
                 f"/proc/self/fd/{number}", str(later), *self._modules],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd="/",
                start_new_session=True, pass_fds=[number, later],
                env={"PATH": processes.PATH, "PYTHONPATH": here},
            )  # fmt: skip
            os.close(later)
        return self

    def __exit__(self, *_: object) -> None:
        process = self._started
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        if not self._warm:
            process.kill()  # nothing is written of it yet: nobody else could find it
            process.wait()
        elif process.poll() is None:
            process.returncode = 0  # it outlives us on purpose; down finds it in the journal

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "a nursery is used inside its block"
        return self._process

    def warm(self) -> None:
        """Wait until all programs are imported. Raises ProcessFailedError with why not."""
        for event in self._events(time.monotonic() + 60.0):
            if event["event"] == "born":
                self._warm = True
                return
        raise ProcessFailedError(f"the lab's programs cannot be imported: {last_words(self._log)}")

    def bear(self, todo: Sequence[Process]) -> None:
        """Start processes and wait until all of them are ready."""
        stdin = self._started.stdin
        assert stdin is not None
        self._known |= {process.name: process for process in todo}
        for process in todo:
            stdin.write(json.dumps(process.order()).encode() + b"\n")
        stdin.flush()
        waiting = {process.name: process for process in todo if not process.later}
        if todo[0].is_foreign:
            self._programs(waiting)
            return
        self._ready(waiting, READY)
        refused = {name: self._refusal(process) for name, process in waiting.items()}
        for name, said in refused.items():
            if said:
                raise ProcessFailedError(f"{name} got no wire: {said}")
        for name, late in waiting.items():
            raise DeadlineError(
                f"{name} is not ready after {READY:.0f} s; its log ends: {last_words(late.log)}",
                hint=f"{len(waiting)} of {len(todo)} are missing",
            )

    def _ready(self, waiting: dict[str, Process], patience: float) -> None:
        """Take out of waiting whoever says that it is ready, for at most patience seconds."""
        end = time.monotonic() + patience
        while waiting and time.monotonic() < end:
            look = time.monotonic() + LOOK
            for event in self._events(min(end, look)):
                if event["event"] == "ready":
                    waiting.pop(event["name"], None)
                elif event["event"] == "ended":  # also one started earlier: without it, no lab
                    ended = self._known[event["name"]]
                    if event["status"] or not ended.is_errand:
                        raise self._failed(ended, event["status"])
                    waiting.pop(ended.name, None)
                if not waiting:
                    return
            if end - time.monotonic() < READY - REFUSED and any(
                self._refusal(process) for process in waiting.values()
            ):
                return  # clients ask again for ever; whoever offers anything is up already

    def _programs(self, waiting: Mapping[str, Process]) -> None:
        """Programs say nothing: those with a port are ready when something listens there."""
        end = time.monotonic() + READY
        for process in waiting.values():
            while process.tcp and not listens(process.namespace, process.tcp):
                if time.monotonic() > end:
                    raise DeadlineError(
                        f"{process.name}: nothing listens on TCP port {process.tcp} after"
                        f" {READY:.0f} s; its log ends: {last_words(process.log)}"
                    )
                gone = state.born(self._paths).get(process.name)
                if gone and gone.ended is not None:
                    raise self._failed(process, gone.ended)
                time.sleep(0.02)

    def _failed(self, process: Process, status: int) -> ProcessFailedError:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        said = self._refusal(process) or last_words(process.log)
        return ProcessFailedError(f"{process.name} {how} before the lab was up: {said}")

    def _refusal(self, process: Process) -> str:
        """What the mesh told a client that has no wire, from its status file."""
        if process.stage != Stage.CLIENT:
            return ""
        told = state.statuses(self._paths, process.name.rpartition("/")[2])
        errors = [str(line["error"]) for line in told if line["event"] == "refused"]
        return "; ".join(dict.fromkeys(errors))

    def _events(self, end: float) -> Iterator[dict[str, Any]]:
        """What the nursery tells, until the end (of the loop's clock) or its own end."""
        out = self._started.stdout
        assert out is not None
        while True:
            while b"\n" in self._heard:
                line, _, self._heard = self._heard.partition(b"\n")
                yield json.loads(line)
            patience = end - time.monotonic()
            if patience <= 0 or not select.select([out], [], [], patience)[0]:
                return
            data = os.read(out.fileno(), 1 << 16)
            if not data:
                return
            self._heard += data


def listens(namespace: str, port: int) -> bool:
    """Whether something listens on a TCP port, as the kernel's table says."""
    inode = topology.inode_named(namespace)
    for mark in alive.inside([inode]):
        with contextlib.suppress(OSError):
            for table in ("tcp", "tcp6"):
                with open(f"/proc/{mark.pid}/net/{table}") as file:
                    rows = [line.split() for line in file][1:]
                if any(r[3] == "0A" and int(r[1].rpartition(":")[2], 16) == port for r in rows):
                    return True
            return False
    return False

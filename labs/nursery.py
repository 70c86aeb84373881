"""The parent of a lab's processes: imports once, forks each in milliseconds.

    python -P -m labs.nursery LAB JOURNAL ORDERS MODULE...

It reads orders (one JSON object a line) from its standard input and tells what
happens on its standard output: born, ready, ended. At a fork it holds no thread, no
loop and no socket, only imports, so that a child is what `python -P -m MODULE` would
have been. It stays as long as it has children, because somebody must reap them and
keep their logs within bounds, and as long as the lab's folder is there, because
whoever was killed may be started again: `{"again": NAME}`, through the named pipe of
which ORDERS is the fd (-1: none), by anybody, bears it by the order it was first born by.

A child is written to the journal before it is let go: whoever finds a lab whose
engine was killed finds every process of it by pid and start time.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from labs import become
from labs.alive import started
from nsm.errors import NsmError
from nsm.kernel.topology import enter_named

READY_FD: Final = 3
LARGEST_LOG: Final = 4 << 20  # bytes of one; as much again in the one before it
LOOK_AT_LOGS: Final = 2.0  # seconds
_HIGH: Final = 100  # above every fd a child is given


@dataclass(slots=True)
class Child:
    """A process we bore and have not yet reaped."""

    name: str
    pid: int
    pidfd: int
    ready: int  # the pipe it says "ready" on; -1 once it has
    log: str
    born: float


class Nursery:
    """Bears, listens and reaps, until there is nobody left."""

    def __init__(self, journal: int, later: int = -1) -> None:
        self._journal = journal
        self._later = later
        self._children: dict[int, Child] = {}
        self._given: dict[str, dict[str, Any]] = {}  # orders, by whose they are
        self._heard = {fd: b"" for fd in (0, later) if fd >= 0}
        self._listening = True
        self._poll = select.poll()

    def run(self) -> None:
        """Until nobody can give orders any more, and the last child has ended."""
        self._note(event="born", name="nursery", pid=os.getpid(), start=started(os.getpid()))
        for fd in self._heard:
            self._poll.register(fd, select.POLLIN)
        while self._listening or self._children or self._has_a_folder():
            ready = [fd for fd, _ in self._poll.poll(LOOK_AT_LOGS * 1000)]
            # orders last, because they free and take fds that the others' events are named by
            for fd in sorted(ready, key=self._heard.__contains__):
                if fd in self._heard:
                    self._read_orders(fd)
                else:
                    self._look_at(fd)
            self._bound_logs()

    def _has_a_folder(self) -> bool:
        """Whether the pipe for later orders has a name still: it goes with the lab's folder."""
        return self._later >= 0 and os.fstat(self._later).st_nlink > 0

    # -- orders -----------------------------------------------------------------------------

    def _read_orders(self, fd: int) -> None:
        data = os.read(fd, 1 << 16)
        if not data:
            self._poll.unregister(fd)
            self._listening = False
            return
        *lines, self._heard[fd] = (self._heard[fd] + data).split(b"\n")
        for line in lines:
            try:
                order = json.loads(line)
                again = order.get("again")
                name = again or order["name"]
            except (ValueError, KeyError, AttributeError):  # all here would be nobody's without us
                text = line[:64].decode(errors="replace")
                self._note(event="refused", name="", because=f"{text!r} is no order")
                continue
            if again:
                self._bear_again(name)
            else:
                self._given[name] = order
                if not order.get("later"):
                    self._bear(order)

    def _bear_again(self, name: str) -> None:
        """Never beside one that lives: two would fight for one socket and one identity."""
        living = next((child for child in self._children.values() if child.name == name), None)
        if living and _has_ended(living):
            self._reap(living)  # the order came in the same round as its end, or just after
            living = None
        if name not in self._given:
            self._note(event="refused", name=name, because="it was never started here")
        elif living:
            because = f"pid {living.pid} of it has not ended yet"
            self._note(event="refused", name=name, because=because)
        else:
            self._bear(self._given[name])

    def _bear(self, order: dict[str, Any]) -> None:
        check_clean()
        ready, ready_end = os.pipe()
        go_end, go = os.pipe()
        pid = os.fork()
        if pid == 0:
            # because until the journal has its name, nobody could find it
            os.close(go)
            os.close(ready)
            if not os.read(go_end, 1):
                os._exit(0)
            be_child(order, ready_end)
        os.close(ready_end)
        os.close(go_end)
        child = Child(order["name"], pid, os.pidfd_open(pid), ready, order["log"], time.monotonic())
        self._note(event="born", name=child.name, pid=pid, start=started(pid))
        os.write(go, b"\n")
        os.close(go)
        self._children[child.pidfd] = self._children[ready] = child
        self._poll.register(child.pidfd, select.POLLIN)
        self._poll.register(ready, select.POLLIN)

    # -- children ---------------------------------------------------------------------------

    def _look_at(self, fd: int) -> None:
        child = self._children.get(fd)
        if child is None:
            return  # it ended in the same round
        if fd == child.ready:
            self._hear(child)
        else:
            self._reap(child)

    def _hear(self, child: Child) -> None:
        """Its word, or the end of its pipe; never both, because only the first line counts."""
        line = os.read(child.ready, 4096)
        seconds = round(time.monotonic() - child.born, 4)
        if line:
            said = line.decode(errors="replace").strip()
            self._note(event="ready", name=child.name, says=said, seconds=seconds)
        self._forget(child.ready)
        child.ready = -1

    def _reap(self, child: Child) -> None:
        if child.ready >= 0:
            self._hear(child)
        _, status = os.waitpid(child.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._note(event="ended", name=child.name, pid=child.pid, status=code)
        self._forget(child.pidfd)

    def _forget(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._children[fd]
        os.close(fd)

    def _bound_logs(self) -> None:
        for log in {child.log for child in self._children.values()}:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(log).st_size > LARGEST_LOG:
                    # copied and emptied, not renamed: its writers keep the file, in append mode
                    shutil.copyfile(log, f"{log}.1")
                    os.truncate(log, 0)

    # -- what is told -----------------------------------------------------------------------

    def _note(self, **event: object) -> None:
        line = json.dumps({**event, "time": time.time_ns()}).encode() + b"\n"
        os.write(self._journal, line)
        with contextlib.suppress(BrokenPipeError):  # nobody listens any more: the lab is up
            os.write(1, line)


def _has_ended(child: Child) -> bool:
    end = select.poll()
    end.register(child.pidfd, select.POLLIN)
    return bool(end.poll(0))


def check_clean() -> None:
    """Only imports may have happened: a thread, loop or socket would be shared with children."""
    threads = os.listdir("/proc/self/task")
    if len(threads) != 1:
        raise RuntimeError(f"{len(threads)} threads run in the nursery; an import started them")
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith(("socket:", "anon_inode:[eventpoll]")):
                raise RuntimeError(f"an import opened {target} in the nursery")


def be_child(order: dict[str, Any], ready: int) -> NoReturn:
    """Become the process of an order: in its namespace, as its group, with its fds only."""
    try:
        os.setsid()
        enter_named(order["namespace"])
        if not order["module"]:
            become.at_home(order["namespace"])
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        log = fcntl.fcntl(os.open(order["log"], flags, 0o644), fcntl.F_DUPFD, _HIGH)
        ready = fcntl.fcntl(ready, fcntl.F_DUPFD, _HIGH)
        os.dup2(os.open("/dev/null", os.O_RDWR), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(ready, READY_FD)
        os.closerange(READY_FD + 1, 1 << 20)
        become.default_signals()
        os.umask(0o022)
        os.chdir(order["folder"])
        become.group(order["gid"])
        if not order["privileged"]:
            become.powerless()
        become.environment(order["environment"])
    except (OSError, NsmError) as failure:
        sys.stderr.write(f"{order['name']} could not be started: {failure!r}\n")
        sys.stderr.flush()
        os._exit(70)
    if not order["module"]:
        become.program(order["argv"], order["environment"], order["name"])
    become.titled(order["module"], order["environment"].get("VWIRE_LAB", order["name"]))
    run_module(order["module"], order["argv"])


def run_module(module: str, arguments: Sequence[str] = ()) -> NoReturn:
    """What the interpreter does for `-m MODULE ARGUMENTS`, with its imports already there."""
    name = module
    if hasattr(sys.modules[module], "__path__"):
        name = f"{module}.__main__"
    # runpy makes it anew, as `__main__`; what it imports is warm
    sys.modules.pop(name, None)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit(0)


def warm(modules: list[str]) -> None:
    """Import programs with all they stand on."""
    for module in modules:
        package = importlib.import_module(module)
        if hasattr(package, "__path__"):
            importlib.import_module(f"{module}.__main__")
    gc.collect()
    gc.freeze()  # children share these pages as long as no collection writes to them


def main() -> int:
    """Warm up, say so, and bear whom one is told to."""
    lab, journal, later, *modules = sys.argv[1:]
    become.titled("labs.nursery", lab)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's matter
    warm(modules)
    fd = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    nursery = Nursery(fd, int(later))
    nursery.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

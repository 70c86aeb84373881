"""Runs tests beside the host's: the process that tests/lane/plugin.py starts.

Those for the lane first, in there; and then, on this machine and one after the other, those that
need nothing of it but processors: one is free once the lane's kernel is built and its tests are
done.

    python -m tests.lane.beside FOLDER      FOLDER/order: an Order, as JSON

It builds the kernel if it is not there, and then starts a guest, with a pytest in it. When the
guest dies, the test that was running in it has failed, and the next one starts another. What it
has to tell is in FOLDER/told, a line of JSON each:

    {"say": TEXT}                               of the build
    {"unavailable": WHY}                        there is no lane
    {"test": NAME, "what": "start"|"done"}      pytest in there has begun with a test, and ended it
    {"test": NAME, "report": {…}}               pytest's report on a part of it
    {"test": NAME, "failed": WHY}               the guest has ended in it, which ends it
    {"what": "over"}                            nothing more comes

Whoever started it holds its input open. With the end of that, guest and FOLDER are gone and so is
this process, whatever it was doing; and not before, for the tests of the host would see it go.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

from tests.lane.guest import Guest
from tests.lane.kernel import UnavailableError, built
from tests.support import wait

REPORTS = "VWIRE_LANE_REPORTS"  # in the guest: the file to hand reports out in
TIMES = "times.json"
SLOWER = 5  # times: to start a process, on one processor, at 0.1 ms a system call
# A test inside is ended after the first, with a traceback of where it hangs; the second is for a
# guest that hangs as a whole. The slowest test takes 35 s on a quiet machine, the next one 19 s.
# Both are of the guest's own time: see Patience.
LONGEST = 150.0
SILENCE = 180.0
LOOK = 1.0  # s, from one to the next
# What a pytest inside is started by: when $1 is there, faulthandler says where it hangs, in C and
# so whatever holds Python up. No process is started to look: tests look for what is left of them.
WATCHED = """\
( ( exec {never}<> <(:)
    while [ ! -e "$1" ]; do read -rt 1 -u "$never"; done
    kill -ABRT $$
) & )
exec "${@:2}"
"""
# A pytest here has a network of its own, and empty folders of its own where labs leave traces. $1:
# for a copy of /etc, because a mount on /etc/netns ends when somebody outside removes that folder.
APART = """\
mount --make-rprivate /
mkdir "$1"
tar -C /etc --exclude=./netns -c . | tar -C "$1" -x
mkdir "$1/netns"
mount --bind "$1" /etc
mount -t tmpfs tmpfs /run
ip link set lo up
shift
exec "$@"
"""
NICE = 5  # the host's tests go first, where the scheduler does not share by session


class Order(TypedDict):
    """What is to be run: a pytest, which is told in one more argument where its tests are named."""

    command: list[str]
    tests: list[str]  # in the lane
    light: list[str]  # here, afterwards: all that is in their files
    live: bool  # its output goes where ours goes


class Lines:
    """Lines of JSON in a file that somebody else is writing."""

    def __init__(self, path: Path) -> None:
        self._file = path.open()
        self._part = ""

    def next(self) -> dict[str, Any] | None:
        """The next one, if it has been written."""
        self._part += self._file.readline()
        if not self._part.endswith("\n"):
            return None
        line, self._part = self._part, ""
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """Read no more."""
        self._file.close()


class Patience:
    """How much of its own time somebody has had, on a machine that others use too.

    Not of its own is what its processes waited for a processor, and what passed while nobody
    looked: the machine stood still, and so did it.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._looked = time.monotonic()
        self._waited: dict[int, float] = {}

    def look(self, now: float, waited: Mapping[int, float]) -> None:
        """Take in what each of its processes has waited by now, in seconds."""
        new = sum(max(0.0, there - self._waited.get(pid, 0.0)) for pid, there in waited.items())
        self.spent += max(0.0, min(now - self._looked, 2 * LOOK) - new)
        self._looked, self._waited = now, dict(waited)


def waited(processes: Mapping[int, Path]) -> dict[int, float]:
    """What each has waited for a processor, in seconds."""
    found = {}
    for pid, told in processes.items():
        with contextlib.suppress(OSError):  # it has ended, or this kernel does not count it
            found[pid] = int((told / "schedstat").read_text().split()[1]) / 1e9
    return found


def doing(processes: Mapping[int, Path]) -> str:
    """What the host sees of each: state, time used within a second, what it waits for, signals."""
    before = {pid: _used(told) for pid, told in processes.items()}
    time.sleep(1)
    lines = []
    for pid, told in processes.items():
        with contextlib.suppress(OSError):
            new = [now - then for now, then in zip(_used(told), before[pid], strict=True)]
            status = dict(
                line.split(":\t", 1) for line in (told / "status").read_text().splitlines()
            )
            lines.append(
                f"{pid} {status['Name']}: {status['State']}, in one second {new[0]} ticks as itself"
                f" and {new[1]} in the kernel, waits in {(told / 'wchan').read_text()},"
                f" pending {status['SigPnd']}, blocked {status['SigBlk']}"
            )
    return "\n".join(lines)


def _used(told: Path) -> list[int]:
    try:
        return [
            int(ticks) for ticks in (told / "stat").read_text().rpartition(")")[2].split()[11:13]
        ]
    except OSError:
        return [0, 0]


class Run:
    """One start of the lane, with a pytest in it."""

    def __init__(self, kernel: Path, folder: Path, order: Order, tests: Sequence[str]) -> None:
        self.why = ""  # it has ended
        with ExitStack() as stack:
            share = stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=folder))
            self._share = Path(share)
            stack.callback(self._merge_times)
            (self._share / "tests").write_text("\n".join(tests))
            (self._share / "reports").touch()
            self._lines = Lines(self._share / "reports")
            stack.callback(self._lines.close)
            out = stack.enter_context((self._share / "output").open("wb"))
            self._guest = stack.enter_context(
                Guest(
                    kernel,
                    [
                        *("bash", "-c", WATCHED, "bash", f"{share}/end"),
                        *order["command"],
                        f"@{share}/tests",
                    ],
                    share=self._share,
                    folder=folder,
                    output=1 if order["live"] else out.fileno(),
                    environment={**os.environ, REPORTS: f"{share}/reports"},
                )
            )
            self._open = stack.pop_all()
        self._in_test = Patience()

    def listen(self) -> dict[str, Any] | None:
        """What the pytest in there says next; None if it has ended, and why then says how."""
        silence = Patience()
        looked = start = time.monotonic()
        while True:
            status = self._guest.wait(0)  # asked first: what it said, it said before it ended
            if said := self._lines.next():
                if "what" in said:
                    self._in_test = Patience()
                return said
            if status is not None:
                late = f"not done after {LONGEST:.0f} s, " if self._told_to_end.exists() else ""
                self.why = f"{late}exit code {status}\n{self._last_words()}"
                return None
            if (now := time.monotonic()) - looked >= LOOK:
                looked = now
                processes = self._guest.processes()
                for patience in (silence, self._in_test):
                    patience.look(now, waited(processes))
                if self._in_test.spent > LONGEST:
                    self._told_to_end.touch()
            if silence.spent > SILENCE:
                self.why = (
                    f"nothing was heard for {SILENCE:.0f} s of its time ({now - start:.0f} s)\n"
                    f"{self._last_words()}\nthe host sees of it:\n{doing(self._guest.processes())}"
                )
                return None
            self._guest.wait(0.05)

    @property
    def _told_to_end(self) -> Path:
        return self._share / "end"

    def _last_words(self) -> str:
        output = (self._share / "output").read_text(errors="replace").splitlines()
        return "\n".join([*output[-40:], "the kernel said last:", self._guest.console(12)])

    def _merge_times(self) -> None:
        """Add the times taken in there to this session's, as what they are."""
        times = self._share / TIMES
        if not times.exists():
            return
        wait.TIMES.parent.mkdir(exist_ok=True)
        with wait.TIMES.open("a") as out:
            for line in times.read_text().splitlines():
                entry = json.loads(line)
                entry["what"] += ", in the lane"
                entry["bar"] *= SLOWER
                out.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._open.close()


class Here:
    """One start of a pytest on this machine, in our process group and namespaces of its own."""

    def __init__(self, folder: Path, order: Order, tests: Sequence[str]) -> None:
        self.why = ""  # it has ended
        with ExitStack() as stack:
            share = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
            # by file: there are names that cannot be told to pytest
            (share / "tests").write_text(
                "\n".join(dict.fromkeys(one.split("::")[0] for one in tests))
            )
            (share / "reports").touch()
            self._lines = Lines(share / "reports")
            stack.callback(self._lines.close)
            self._output = share / "output"
            out = stack.enter_context(self._output.open("wb"))
            self._process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--net", "sh", "-e", "-c", APART, "sh", f"{share}/etc"),
                    *order["command"],
                    f"@{share}/tests",
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                # what tests make in a folder for that is no file that others left
                env={**os.environ, REPORTS: f"{share}/reports", "TMPDIR": str(share)},
            )  # fmt: skip
            stack.callback(self._end)
            self._open = stack.pop_all()

    def listen(self) -> dict[str, Any] | None:
        """What it says next; None if it has ended, and why then says how."""
        while True:
            status = self._process.poll()  # asked first: what it said, it said before it ended
            if said := self._lines.next():
                return said
            if status is not None:
                words = self._output.read_text(errors="replace").splitlines()
                self.why = "\n".join([f"exit code {status}", *words[-40:]])
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._open.close()


class Beside:
    """The order's tests, run one after the other, in as many starts of the lane as it takes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._order: Order = json.loads((folder / "order").read_text())
        self._todo = self._order["tests"].copy()

    def run(self) -> None:
        """All of it; every test has been told about afterwards."""
        try:
            kernel = built(lambda line: self._tell(say=line))
            while self._todo:
                run = Run(kernel, self._folder, self._order, self._todo)
                with contextlib.closing(run):
                    self._follow(run, "the lane")
        except UnavailableError as no:
            self._tell(unavailable=str(no))
        self._todo = self._order["light"].copy()
        if self._todo:
            with contextlib.closing(Here(self._folder, self._order, self._todo)) as here:
                self._follow(here, "the run beside the others")
                for test in self._todo:
                    self._tell(test=test, failed=f"nobody ran it beside the others: {here.why}")
        self._tell(what="over")

    def _follow(self, run: Run | Here, what: str) -> None:
        """Pass on what is said, until it ends or has nothing left to say."""
        running = ""
        while self._todo:
            said = run.listen()
            if said is None:
                break
            self._tell(**said)
            match said.get("what"):
                case "start":
                    running = said["test"]
                case "done":
                    if said["test"] in self._todo:
                        self._todo.remove(said["test"])
                    running = ""
        # its end is the running test's fault, or nobody can run in there
        lost = [running] if running else self._todo.copy()
        how = f"{what} ended while this test ran in it" if running else f"no test can run in {what}"
        for test in lost:
            self._todo.remove(test)
            self._tell(test=test, failed=f"{how}: {run.why}")

    def _tell(self, **what: Any) -> None:
        with (self._folder / "told").open("a") as out:
            out.write(json.dumps(what) + "\n")


def end_with_input() -> None:
    """Be told to end when nobody holds our input open any more."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=watch, daemon=True).start()


def end(*_: object) -> None:
    """End what is being built, which is in our process group, and then whatever we are doing."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    sys.exit()


def step_back() -> None:
    """Let the host's tests go first."""
    os.nice(NICE)


def main() -> None:
    """Run, and wait to be told to end."""
    folder = Path(sys.argv[1])
    try:
        end_with_input()
        step_back()
        Beside(folder).run()
        while True:
            signal.pause()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""Tests of what not every kernel has: here where it can be, in the lane where not.

    @pytest.mark.needs_kernel("wireguard", "netem")
    @pytest.mark.needs_lane      # a test of the lane itself: it is built before the first test

Of a session's tests those that this kernel cannot run come first, in one start of the lane: a
pytest of its own in there, which hands its reports out in the share, line by line. They are the
reports of this session then, as if the tests had run here. When the lane's kernel dies, the test
that was running has failed, and the next one starts another.

Inside, the variable LANE_GUEST is set, and every marked test runs where it is.
"""

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.lane.features import TRIALS, lacks
from tests.lane.guest import Guest
from tests.lane.kernel import UnavailableError, built, foreign
from tests.support import leaks, wait

INSIDE = "LANE_GUEST" in os.environ
REPORTS = "VWIRE_LANE_REPORTS"  # in the guest: the file to hand reports out in
# A test inside is ended after the first, with a traceback of where it hangs. The second is for a
# guest that hangs as a whole. Both are below the time after which pytest ends this session.
LONGEST = 240
SILENCE = 270.0
TIMES = "times.json"
SLOWER = 5  # times: to start a process, on one processor, at 0.1 ms a system call


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lane", choices=("auto", "always"), default="auto",
        help="always: tests marked needs_kernel run in the lane also where this kernel would do",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if path := os.environ.pop(REPORTS, ""):  # not for a pytest that a test starts
        config.pluginmanager.register(Reporter(config, Path(path)), "lane-reporter")


def features(item: pytest.Item) -> list[str]:
    """What a test needs of the kernel."""
    return [name for mark in item.iter_markers("needs_kernel") for name in mark.args]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if unknown := [name for name in features(item) if name not in TRIALS]:
            known = ", ".join(TRIALS)
            raise pytest.UsageError(f"{item.nodeid}: needs_kernel knows {known}; not {unknown[0]}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Put the tests for the lane first, and have it built: neither is a test's time."""
    option = session.config.option
    if option.collectonly or os.geteuid() != 0:
        return
    if session.testsfailed and not option.continue_on_collection_errors:
        return
    always = option.lane == "always" and not INSIDE
    lacking = {}
    for item in session.items:
        if names := [name for name in features(item) if always or lacks(name)]:
            lacking[item] = ", ".join(names)
            if INSIDE:
                why = f"the lane's kernel lacks {names[0]}: {lacks(names[0])}"
                raise pytest.UsageError(f"{item.nodeid}: {why}")
    own = [item for item in session.items if item.get_closest_marker("needs_lane")]
    if not lacking and not own:
        return
    try:
        kernel = built(_sayer(session.config))
    except UnavailableError as no:
        for item, names in {**dict.fromkeys(own, "user mode"), **lacking}.items():
            item.add_marker(pytest.mark.skip(reason=_reason(names, no)))
        return
    if lacking:
        session.items[:] = [*lacking, *(item for item in session.items if item not in lacking)]
        lane = Lane(session.config, kernel, list(lacking))
        session.config.pluginmanager.register(lane, "lane")


def _reason(names: str, no: UnavailableError) -> str:
    """Why a test is skipped; where there can be no lane that is all right, in CI too."""
    if kind := foreign():
        return f"kernel lacks {names}, and there is no lane on {kind}"
    return f"there is no lane, and this kernel lacks {names}: {no}"


def _sayer(config: pytest.Config) -> Callable[[str], None]:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    return terminal.write_line if terminal else lambda line: None


class Lane:
    """The host's side: has tests run in the lane, and reports what they did."""

    def __init__(self, config: pytest.Config, kernel: Path, items: Sequence[pytest.Item]) -> None:
        self._config = config
        self._kernel = kernel
        self._todo = {item.nodeid: item for item in items}
        self._run: Run | None = None
        self._running = ""
        self._reports: dict[str, list[pytest.TestReport]] = defaultdict(list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        if item not in self._todo.values() and item.nodeid not in self._reports:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        while item.nodeid in self._todo:
            self._go_on()
        for report in self._reports.pop(item.nodeid):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self) -> None:
        self._stop()

    def _go_on(self) -> None:
        """Until one more thing is known of a test."""
        if self._run is None:
            self._run = Run(self._config, self._kernel, list(self._todo))
        said = self._run.listen()
        if said is None:
            self._lament(self._run.why)
        elif "report" in said:
            data = said["report"]
            if isinstance(data["longrepr"], list):  # of a skipped test; JSON knows no tuples
                data["longrepr"] = tuple(data["longrepr"])
            report = self._config.hook.pytest_report_from_serializable(
                config=self._config, data=data
            )
            self._reports[said["test"]].append(report)
        elif said["what"] == "start":
            self._running = said["test"]
        else:
            self._finish(said["test"])

    def _lament(self, why: str) -> None:
        """The guest has ended: that is the running test's fault, or nobody can run in there."""
        if self._running:
            self._fail(self._running, f"the lane ended while this test ran in it: {why}")
        else:
            for test in list(self._todo):
                self._fail(test, f"no test can run in the lane: {why}")
        self._stop()

    def _fail(self, test: str, why: str) -> None:
        item = self._todo[test]
        report = pytest.TestReport(
            nodeid=test, location=item.location, keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed", longrepr=why, when="call",
        )  # fmt: skip
        self._reports[test].append(report)
        self._finish(test)

    def _finish(self, test: str) -> None:
        self._running = ""
        del self._todo[test]
        if not self._todo:
            self._stop()

    def _stop(self) -> None:
        if self._run:
            self._run.close()
            self._run = None


class Run:
    """One start of the lane, with a pytest in it."""

    def __init__(self, config: pytest.Config, kernel: Path, tests: Sequence[str]) -> None:
        self.why = ""  # it has ended
        with ExitStack() as stack:
            # our folders come and go: other runs of tests on this machine are not alone
            stack.callback(leaks.Alone().close)
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vwire-tests-"))
            self._folder = Path(folder)
            stack.callback(self._merge_times)
            (self._folder / "tests").write_text("\n".join(tests))
            (self._folder / "reports").touch()
            self._lines = stack.enter_context((self._folder / "reports").open())
            out = stack.enter_context((self._folder / "output").open("wb"))
            self._guest = stack.enter_context(
                Guest(
                    kernel,
                    self._command(config),
                    share=self._folder,
                    output=1 if config.option.capture == "no" else out.fileno(),
                    environment={**os.environ, REPORTS: f"{folder}/reports"},
                )
            )
            self._open = stack.pop_all()

    def _command(self, config: pytest.Config) -> list[str]:
        asked = config.option
        return [
            sys.executable, "-P", "-m", "pytest", f"--rootdir={config.rootpath}",
            "-c", str(config.inipath), "-p", "no:cacheprovider",
            "--color=no", "-o", f"faulthandler_timeout={LONGEST}", "--no-header", "--no-summary",
            f"--tb={asked.tbstyle}", f"--capture={asked.capture}",
            *["-v"] * max(asked.verbose, 0), *["--showlocals"] * bool(asked.showlocals),
            *["--runxfail"] * bool(asked.runxfail), f"@{self._folder}/tests",
        ]  # fmt: skip

    def listen(self) -> dict[str, Any] | None:
        """What the pytest in there says next; None if it has ended, and why then says how."""
        quiet, part = time.monotonic(), ""
        while True:
            status = self._guest.wait(0)  # asked first: what it said, it said before it ended
            part += self._lines.readline()
            if part.endswith("\n"):
                said: dict[str, Any] = json.loads(part)
                return said
            if status is not None:
                self.why = f"exit code {status}\n{self._last_words()}"
                return None
            if time.monotonic() - quiet > SILENCE:
                self.why = f"nothing was heard for {SILENCE:.0f} s\n{self._last_words()}"
                return None
            self._guest.wait(0.05)

    def _last_words(self) -> str:
        output = (self._folder / "output").read_text(errors="replace").splitlines()
        return "\n".join([*output[-40:], "the kernel said last:", self._guest.console(12)])

    def _merge_times(self) -> None:
        """Add the times taken in there to this session's, as what they are."""
        times = self._folder / TIMES
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


class Reporter:
    """The guest's side: each report as a line of JSON, and each time taken into the share."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._path = path
        wait.TIMES = path.with_name(TIMES)
        wait.PATIENCE *= SLOWER

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._say({"test": nodeid, "what": "start"})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._say({"test": report.nodeid, "report": data})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._say({"test": nodeid, "what": "done"})

    def _say(self, what: dict[str, Any]) -> None:
        with self._path.open("a") as out:
            out.write(json.dumps(what) + "\n")

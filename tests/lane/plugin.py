"""Tests of what not every kernel has: here where it can be, in the lane where not.

    @pytest.mark.needs_kernel("wireguard", "netem")
    @pytest.mark.needs_lane      # a test of the lane itself: it is built before

Those of a session's tests that this kernel cannot run are for the lane: another process has it
built and runs them in there, while the session runs its others (tests/lane/beside.py). They come
last in the session's order, and their reports are the session's then, as if the tests had run
here. Tests of the lane itself come after them. A session that has tests for the lane, others of
this machine and many unit tests leaves those to that process as well, once it is done in there,
and with them those of labs: they need nothing of the machine, or bring it along.

Inside, the variable LANE_GUEST is set, and every marked test runs where it is.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Container, Mapping
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import pytest

from tests.lane.beside import REPORTS, SLOWER, TIMES, Lines, Order
from tests.lane.features import TRIALS, lacks
from tests.lane.kernel import foreign, standing
from tests.support import leaks, wait

INSIDE = "LANE_GUEST" in os.environ
ROOT = Path(__file__).parents[2]
DEAF = 1800  # s; the longest that is right is a builder who waits for another one
LABS = ("tests/e2e/labs/", "tests/e2e/parity/")  # of a lab each: two at once are an ordinary thing
MANY = 500  # unit tests: fewer take no longer than another start of pytest


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
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """Run the tests, those for the lane there; None where there are none: pytest does it then."""
    option = session.config.option
    if option.collectonly or os.geteuid() != 0:
        return None
    if session.testsfailed and not option.continue_on_collection_errors:
        return None
    there = _for_the_lane(session)
    own = [item for item in session.items if item.get_closest_marker("needs_lane")]
    if not there and not own:
        return None
    rest = [item for item in session.items if item not in there and item not in own]
    light = _light(session.config, there, rest)
    first = [item for item in rest if item not in light]
    session.items[:] = [*first, *light, *there, *own]
    here = [*first, *own]
    # what tests share ends with the last of them here: those that run elsewhere have no part in it
    elsewhere = [*light, *there]
    following = dict.fromkeys(elsewhere, own[0] if own else None) | dict(pairwise([*here, None]))
    with Lane(session.config, there, light, own) as lane:
        for item in session.items:
            if not lane.reports(item):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following[item])
            if session.shouldfail:
                raise session.Failed(session.shouldfail)
            if session.shouldstop:
                raise session.Interrupted(session.shouldstop)
        lane.wait()
    return True


def _for_the_lane(session: pytest.Session) -> dict[pytest.Item, str]:
    """The tests that cannot run here, each with what this kernel lacks.

    One that is skipped anyway is skipped here: in there its module would be imported for that.
    """
    always = session.config.option.lane == "always" and not INSIDE
    found = {}
    for item in session.items:
        if item.get_closest_marker("skip"):
            continue
        if names := [name for name in features(item) if always or lacks(name)]:
            found[item] = ", ".join(names)
            if INSIDE:
                why = f"the lane's kernel lacks {names[0]}: {lacks(names[0])}"
                raise pytest.UsageError(f"{item.nodeid}: {why}")
    return found


def _light(
    config: pytest.Config, there: Container[pytest.Item], rest: list[pytest.Item]
) -> dict[pytest.Item, None]:
    """Those of the rest that may run beside the others: labs' and units', where there are many."""
    option = config.option
    chosen = option.keyword or option.markexpr or option.deselect
    if not there or INSIDE or chosen or option.capture == "no" or option.usepdb:
        return {}
    unit = [item for item in rest if item.get_closest_marker("unit")]
    labs = [item for item in rest if item.nodeid.startswith(LABS)]
    return dict.fromkeys([*labs, *unit]) if MANY <= len(unit) < len(rest) else {}


class Lane:
    """The process beside this one that has tests run in the lane, and what is known from it.

    All that this takes of files, descriptors and processes is there from before the first test to
    after the last one, and its guests are below it: no test sees it come or go.
    """

    def __init__(
        self,
        config: pytest.Config,
        there: Mapping[pytest.Item, str],
        light: Collection[pytest.Item],
        own: Container[pytest.Item],
    ) -> None:
        self._config = config
        self._there = there
        self._light = light
        self._own = own
        self._todo = {item.nodeid: item for item in (*there, *light)}
        self._reports: dict[str, list[pytest.TestReport]] = defaultdict(list)
        self._unavailable = ""
        self._waits = False
        self._over = False
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        self._say = terminal.write_line if terminal else lambda line: None

    def __enter__(self) -> Self:
        leaks.alone()  # our folder comes and goes: other runs of tests on this machine are not
        with ExitStack() as stack:
            # in /tmp, and not where TMPDIR says: see Guest
            folder = Path(tempfile.mkdtemp(prefix="vwire-tests-", dir="/tmp"))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)  # where it has not done it
            order = Order(
                command=_pytest(self._config),
                tests=[item.nodeid for item in self._there],
                light=[item.nodeid for item in self._light],
                live=self._config.option.capture == "no",
            )  # fmt: skip
            (folder / "order").write_text(json.dumps(order))
            (folder / "told").touch()
            self._lines = Lines(folder / "told")
            stack.callback(self._lines.close)
            self._complaints = stack.enter_context((folder / "complaints").open("w+"))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.lane.beside", str(folder)], cwd=ROOT,
                stdin=subprocess.PIPE, stdout=None if order["live"] else subprocess.DEVNULL,
                stderr=self._complaints, start_new_session=True,  # Ctrl-C is our matter
            )  # fmt: skip
            stack.callback(self._end)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def reports(self, item: pytest.Item) -> bool:
        """Report on a test that has run in there, once it has; False if it is to run here.

        Which is true of all of them where there is no lane: they are skipped.
        """
        while self._hear():
            pass
        if item in self._there or item in self._light:
            self._await(item.nodeid)
        elif item in self._own:
            self.wait()
        else:
            return False
        if self._unavailable and item not in self._light:
            item.add_marker(pytest.mark.skip(reason=self._reason(item)))
        if item.nodeid not in self._reports:
            return False
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self._reports.pop(item.nodeid):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _reason(self, item: pytest.Item) -> str:
        """Why a test is skipped; where there can be no lane that is all right, in CI too."""
        names = self._there.get(item, "user mode")
        if kind := foreign():
            return f"kernel lacks {names}, and there is no lane on {kind}"
        return f"there is no lane, and this kernel lacks {names}: {self._unavailable}"

    def wait(self) -> None:
        """Until all is known, and nothing goes on beside us any more."""
        self._await(None)

    def _await(self, test: str | None) -> None:
        """Until all is known of a test, or of all of them."""
        if not (self._waits or self._over or standing() or foreign()):
            self._say("lane: it is not built yet, and the tests that are left wait for it")
        self._waits = True
        heard = time.monotonic()
        while not self._over and (test is None or test in self._todo):
            if self._hear():
                heard = time.monotonic()
                continue
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.05)
            if time.monotonic() - heard > DEAF:
                self._say(f"lane: nothing was heard for {DEAF} s of its process, which is ended")
                self._end()

    def _hear(self) -> bool:
        """Take in one more thing that is told, if there is one."""
        ended = self._process.poll() is not None  # asked first: it told what it told before
        if said := self._lines.next():
            self._take(said)
            return True
        if ended and not self._over:
            self._complaints.seek(0)
            why = f"exit code {self._process.returncode}\n{self._complaints.read()}"
            for test in [*self._todo]:
                self._fail(test, f"the process that runs the lane has ended: {why}")
            self._over = True
        return False

    def _take(self, said: dict[str, Any]) -> None:
        match said:
            case {"say": line}:
                self._say(line)
            case {"unavailable": why}:
                self._unavailable = why
            case {"test": test, "report": data}:
                if isinstance(data["longrepr"], list):  # of a skipped test; JSON knows no tuples
                    data["longrepr"] = tuple(data["longrepr"])
                report = self._config.hook.pytest_report_from_serializable(
                    config=self._config, data=data
                )
                self._reports[test].append(report)
            case {"test": test, "failed": why}:
                self._fail(test, why)
            case {"test": test, "what": "done"}:
                self._todo.pop(test, None)  # a name that differs from run to run is nobody's
            case {"what": "over"}:
                self._over = True

    def _fail(self, test: str, why: str) -> None:
        if (item := self._todo.pop(test, None)) is None:
            return
        report = pytest.TestReport(
            nodeid=test, location=item.location, keywords=dict.fromkeys(item.keywords, 1),
            outcome="failed", longrepr=why, when="call",
        )  # fmt: skip
        self._reports[test].append(report)


def _pytest(config: pytest.Config) -> list[str]:
    """The pytest in there, told what this one was."""
    asked = config.option
    return [
        sys.executable, "-P", "-m", "pytest", f"--rootdir={config.rootpath}",
        "-c", str(config.inipath), "-p", "no:cacheprovider",
        "--color=no", "-o", "faulthandler_timeout=0", "--no-header", "--no-summary",
        f"--tb={asked.tbstyle}", f"--capture={asked.capture}",
        *["-v"] * max(asked.verbose, 0), *["--showlocals"] * bool(asked.showlocals),
        *["--runxfail"] * bool(asked.runxfail),
    ]  # fmt: skip


class Reporter:
    """The other side: each report as a line of JSON, and a guest's times into the share."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._path = path
        if INSIDE:
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

"""The rules every test keeps: its folder says what it needs, and it leaves nothing behind.

unit: no root, nothing of the network. kernel: namespaces of its own. e2e: real
processes. lane: a kernel with what most lack, see tests/lane/plugin.py. Without
root, all but unit tests are skipped; where CI=true, a skipped one is a failure
unless its reason names a kernel feature (`kernel lacks …`) or it is marked as
`long`: those are for `make matrix`, which sets VWIRE_MATRIX.
"""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import leaks

pytest_plugins = ("tests.lane.plugin",)
FOLDERS = ("unit", "kernel", "e2e", "lane")
NEED_ROOT = ("kernel", "e2e", "lane")
NAMES_A_FEATURE = re.compile(r"(this )?kernel (lacks|has no) \S+")
LONG = "make matrix runs it"
not_judged: list[str] = []
IN_CI = os.environ.get("CI", "").lower() == "true"

# how long an example takes, or drawing one, is the machine's affair
settings.register_profile(
    "any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any-machine")


def folder_of(path: Path) -> str:
    """The folder of tests/ a test is in."""
    return path.relative_to(Path(__file__).parent).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = folder_of(item.path)
        if folder not in FOLDERS:
            raise pytest.UsageError(f"{item.nodeid}: tests are in one of {', '.join(FOLDERS)}")
        item.add_marker(folder)
        if folder in NEED_ROOT and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root: sudo make test"))
        if item.get_closest_marker("long") and not os.environ.get("VWIRE_MATRIX"):
            item.add_marker(pytest.mark.skip(reason=LONG))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and IN_CI and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")
        for_later = LONG in reason and item.get_closest_marker("long")
        if not for_later and not NAMES_A_FEATURE.match(reason.removeprefix("Skipped: ")):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped where CI=true: {reason}"
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not_judged:
        terminalreporter.section("not judged, because other tests were running on this machine")
        terminalreporter.write_line("\n".join(not_judged))


@pytest.fixture(scope="session")
def alone() -> leaks.Alone:
    """Whether this is the only run of tests on the machine, asked when it matters."""
    return leaks.alone()


@pytest.fixture(scope="session", autouse=True)
def _host_is_as_before(request: pytest.FixtureRequest) -> Iterator[None]:
    """The host's network is the same after the whole run as before it.

    Unit tests touch none of it: they may run beside others.
    """
    if all(folder_of(item.path) == "unit" for item in request.session.items):
        yield
        return
    alone = request.getfixturevalue("alone")
    before = leaks.host()
    machine = leaks.of_machine()
    yield
    found = [
        *leaks.changed(before, leaks.host()),
        *leaks.left(leaks.of_machine, machine),
    ]
    judge(found, alone, "the host's network is not as it was before the tests")


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the test opened, started or made is gone."""
    alone = None
    if folder_of(request.path) != "unit":
        alone = request.getfixturevalue("alone")
    process = leaks.of_process()
    machine = leaks.of_machine() if alone is not None else {}
    if alone is not None:
        alone.anew()
    yield
    if found := leaks.left(leaks.of_process, process):
        pytest.fail("\n".join(found), pytrace=False)
    if alone is not None:
        judge(leaks.left(leaks.of_machine, machine), alone, "the test left something")


def judge(found: list[str], alone: leaks.Alone, what: str) -> None:
    """Fail if there is anything, unless it may well be another run's."""
    if not found:
        return
    text = "\n".join([what, *found])
    if IN_CI or alone:
        pytest.fail(text, pytrace=False)
    not_judged.append(text)


@pytest.fixture(autouse=True)
def _no_task_is_left(_nothing_is_left: None, request: pytest.FixtureRequest) -> None:
    """After a coroutine test, no task of its loop is running."""
    if asyncio.iscoroutinefunction(getattr(request.node, "function", None)):
        request.getfixturevalue("_tasks_of_the_loop")


@pytest.fixture
async def _tasks_of_the_loop() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    for _ in range(3):  # a task that was cancelled ends when the loop comes round
        await asyncio.sleep(0)
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        pytest.fail("\n".join(f"left over: {task!r}" for task in left), pytrace=False)


@pytest.fixture(autouse=True)
def _nothing_blocks_a_loop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """In e2e, every process of ours tells on calls that can block its event loop."""
    if folder_of(request.path) != "e2e":
        yield
        return
    told = tmp_path_factory.mktemp("guard") / "calls"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSM_LOOP_GUARD", str(told))
        yield
    if told.exists() and (lines := told.read_text().splitlines()):
        calls = [json.loads(line) for line in lines]
        shown = [
            "\n    ".join([f"on an event loop's thread: {call['what']}", *call["stack"][:12]])
            for call in calls[:5]
        ]
        pytest.fail("\n".join([*shown, f"{len(calls)} such calls"]), pytrace=False)

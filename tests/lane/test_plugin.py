"""Tests that run in the lane, as the pytest that started it tells about them."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lane import beside, kernel
from tests.support.processes import alive, arguments, below, children
from tests.support.wait import TIMES, until

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs_lane


def command(sample: str, *options: str) -> list[str]:
    """A pytest of its own, on a file of samples, always in the lane."""
    return [
        sys.executable, "-P", "-m", "pytest", "--color=no", "--lane", "always",
        "-p", "no:cacheprovider", *options, f"tests/lane/samples/{sample}",
    ]  # fmt: skip


def environment(**variables: str) -> dict[str, str]:
    theirs = {k: v for k, v in os.environ.items() if "PYTEST" not in k and k != "CI"}
    return {**theirs, **variables}


def run(
    sample: str, *options: str, before: tuple[str, ...] = (), **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*before, *command(sample, *options)], cwd=ROOT, env=environment(**variables),
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


@contextmanager
def running(sample: str, said: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """One that goes on, and what it says."""
    with (
        said.open("wb") as out,
        subprocess.Popen(
            command(sample, "-v"), cwd=ROOT, env=environment(**variables), stdout=out, stderr=out
        ) as session,
    ):
        try:
            yield session
        finally:
            session.kill()


async def folder_of(session: "subprocess.Popen[bytes]", told: str) -> Path:
    """The folder of a session's lane, once the lane has told something."""

    def found() -> Path | None:
        for pid in children(session.pid):
            if (line := arguments(pid))[1:3] == ["-m", "tests.lane.beside"]:
                folder = Path(line[3])
                return folder if told in (folder / "told").read_text() else None
        return None

    folder = await until(found, f"the lane tells of its {told}", bar=10.0, record=False)
    assert folder
    return folder


def outcomes(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    """What a verbose run says of each test; of errors after a test too."""
    found = re.findall(r"::(test_\w+)\S*(?: \S+)* (PASSED|FAILED|SKIPPED|XFAIL|ERROR)", done.stdout)
    return dict(found)


def test_what_happens_in_there_is_told_as_if_it_had_happened_here() -> None:
    times = TIMES.read_text() if TIMES.exists() else ""
    done = run("outcomes.py", "-v", "--durations=0", "-vv")
    assert done.returncode == 1, done.stdout
    assert outcomes(done) == {
        "test_passes": "PASSED", "test_fails": "FAILED", "test_is_skipped": "SKIPPED",
        "test_fails_as_expected": "XFAIL", "test_leaves_something": "ERROR",
        "test_is_skipped_for_no_good_reason": "SKIPPED",
    }  # fmt: skip
    for words in (
        ">       assert answer == 42, told",
        "E       AssertionError: told [to] me::by a parameter",
        ": AssertionError\n",
        "said by the test",
        "left over: network namespace left-by-a-sample",
        "1 failed, 2 passed, 2 skipped, 1 xfailed, 1 error",
    ):
        assert words in done.stdout, f"{words!r} is not in\n{done.stdout}"
    assert re.search(r"[\d.]+s call +\S+::test_leaves_something", done.stdout)
    told = [json.loads(line) for line in TIMES.read_text().removeprefix(times).splitlines()]
    assert [entry for entry in told if entry["what"].startswith("a sample")] == [
        {
            "test": "tests/lane/samples/outcomes.py::test_passes", "bar": 5.0, "seconds": 0.25,
            "what": "a sample's wait, in the lane",
        }
    ]  # fmt: skip


@pytest.mark.long
def test_in_ci_a_test_skipped_in_there_has_failed_unless_it_names_a_feature() -> None:
    done = run("outcomes.py", "-v", "-k", "skipped", CI="true")
    assert done.returncode == 1
    assert outcomes(done) == {
        "test_is_skipped": "SKIPPED", "test_is_skipped_for_no_good_reason": "FAILED",
    }  # fmt: skip
    assert "was skipped where CI=true: Skipped: not today" in done.stdout


@pytest.mark.long
def test_a_test_that_kills_the_kernel_has_failed_and_the_others_have_not() -> None:
    done = run("deadly.py", "-v")
    assert done.returncode == 1
    assert outcomes(done) == {
        "test_before": "PASSED", "test_ends_the_kernel": "FAILED", "test_after": "PASSED",
    }  # fmt: skip
    assert "the lane ended while this test ran in it: exit code 125" in done.stdout
    assert "the kernel said last:" in done.stdout
    assert "System halted" in done.stdout


@pytest.mark.long
def test_a_lane_in_which_nothing_moves_is_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(beside, "SILENCE", 15.0)
    standing = kernel.standing()
    assert standing
    pytest_there = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    frozen = "tests/lane/samples/frozen.py::test_stops"
    order = beside.Order(command=pytest_there, tests=[frozen], light=[], live=False)
    (tmp_path / "order").write_text(json.dumps(order))
    beside.Beside(tmp_path).run()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert told[0] == {"test": frozen, "what": "start"}
    assert told[-1] == {"what": "over"}
    assert told[-2]["test"] == frozen
    why = "the lane ended while this test ran in it: nothing was heard for 15 s of its time ("
    assert told[-2]["failed"].startswith(why)
    assert "collected 1 item" in told[-2]["failed"]
    assert re.search(r"\d+ linux: \S \(.*\), in one second \d+ ticks as ", told[-2]["failed"])


@pytest.mark.long
def test_a_test_that_hangs_is_ended_and_says_where(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(beside, "LONGEST", 5.0)
    pytest_there = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider"]
    waits = "tests/lane/samples/waits.py::test_waits"
    order = beside.Order(command=pytest_there, tests=[waits], light=[], live=False)
    (tmp_path / "order").write_text(json.dumps(order))
    beside.Beside(tmp_path).run()
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    why = "the lane ended while this test ran in it: not done after 5 s, exit code 134\n"
    assert told[-2]["failed"].startswith(why)
    assert 'samples/waits.py", line 10 in test_waits' in told[-2]["failed"]


@pytest.mark.long
def test_only_what_needs_it_goes_there_and_is_told_after_the_hosts() -> None:
    done = run("here.py", "-v")
    assert done.returncode == 0, done.stdout
    assert list(outcomes(done)) == [
        "test_stays_on_the_host", "test_goes_to_the_lane", "test_of_the_lane_itself",
    ]  # fmt: skip


@pytest.mark.long
def test_both_run_at_the_same_time_and_no_test_of_the_host_sees_the_lane_come_or_go() -> None:
    """In CI, which judges what a test leaves whoever else there is."""
    done = run("meanwhile.py", "-v", CI="true")
    assert done.returncode == 0, done.stdout
    assert outcomes(done) == {
        "test_begins_before": "PASSED", "test_ends_after": "PASSED", "test_meanwhile": "PASSED",
    }  # fmt: skip


@pytest.mark.long
def test_what_tests_of_the_host_share_ends_with_the_last_of_them() -> None:
    done = run("shared.py", "-v")
    assert outcomes(done) == {"test_here": "ERROR", "test_there": "PASSED"}
    assert "it did not end well" in done.stdout
    assert "2 passed, 1 error" in done.stdout


@pytest.mark.long
def test_who_wants_no_more_than_one_failure_gets_no_more() -> None:
    done = run("outcomes.py", "-v", "-x")
    assert done.returncode == 1
    assert outcomes(done) == {"test_passes": "PASSED", "test_fails": "FAILED"}
    assert "stopping after 1 failures" in done.stdout


@pytest.mark.long
async def test_the_hosts_tests_do_not_wait_for_it_to_be_built(tmp_path: Path) -> None:
    """It is, as far as the session knows, being built by somebody: us."""
    standing = kernel.standing()
    assert standing
    cache, said = tmp_path / "cache", tmp_path / "said"
    cache.mkdir()
    begun = ("host PASSED", "waiting until they are done", "not built yet, and the tests")
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with running("here.py", said, KERNEL_LANE_DIR=str(cache)) as session:
            await until(
                lambda: all(words in said.read_text() for words in begun), "it comes to wait",
                bar=3.0, record=False,
            )  # fmt: skip
            shutil.copytree(standing, cache / standing.name)
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert session.wait(100) == 0, said.read_text()
    text = said.read_text()
    assert text.index("host PASSED") < text.index(begun[-1]) < text.index("to_the_lane PASSED")


async def nothing_stays(
    session: "subprocess.Popen[bytes]",
    number: int,
    folder: Path,
    *,
    least: int,
    what: str,
    bar: float,
) -> None:
    """Ended by that signal, a session of more than `least` processes takes them and its folder."""
    ours = below(session.pid)
    assert len(ours) > least
    session.send_signal(number)
    session.wait(20)
    await until(lambda: not alive(ours), f"{what} processes are gone", bar=bar)
    await until(lambda: not folder.exists(), "its lane's folder is gone", bar=1.0)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
async def test_of_a_session_that_ends_early_nothing_stays(number: int, tmp_path: Path) -> None:
    with running("frozen.py", tmp_path / "said") as session:
        folder = await folder_of(session, "start")
        await nothing_stays(session, number, folder, least=5, what="its lane's", bar=2.0)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_of_a_session_that_ends_while_it_builds_nothing_stays(
    number: int, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with running("frozen.py", tmp_path / "said", KERNEL_LANE_DIR=str(cache)) as session:
            folder = await folder_of(session, "waiting until they are done")
            await nothing_stays(session, number, folder, least=1, what="the builder's", bar=1.0)


@pytest.mark.long
async def test_if_what_runs_the_lane_is_killed_its_tests_have_failed(tmp_path: Path) -> None:
    said = tmp_path / "said"
    with running("frozen.py", said) as session:
        await folder_of(session, "start")
        (runner,) = children(session.pid)
        ours = below(session.pid)
        os.kill(runner, signal.SIGKILL)
        assert session.wait(20) == 1, said.read_text()
        await until(lambda: not alive(ours), "its guest's processes are gone", bar=2.0)
    assert "the process that runs the lane has ended: exit code -9" in said.read_text()


@pytest.mark.long
def test_what_runs_the_lane_and_says_nothing_is_ended(tmp_path: Path) -> None:
    """It waits for a builder who does nothing."""
    (tmp_path / "impatient.py").write_text(
        "def pytest_configure():\n    from tests.lane import plugin\n    plugin.DEAF = 2\n"
    )
    variables = {"KERNEL_LANE_DIR": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run("here.py", "-p", "impatient", **variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "lane: nothing was heard for 2 s of its process, which is ended" in done.stdout
    assert "the process that runs the lane has ended" in done.stdout


def test_nothing_is_started_for_who_only_looks_or_selects_others(tmp_path: Path) -> None:
    """Where it would have to be built, which cannot be: a start would be seen."""
    cannot = {"KERNEL_LANE_DIR": str(tmp_path), "PATH": "/nowhere"}
    assert "3 tests collected" in run("here.py", "--collect-only", **cannot).stdout
    others = run("here.py", "-k", "host", **cannot)
    assert "lane:" not in others.stdout


def test_a_feature_nobody_knows_is_asked_wrongly() -> None:
    done = run("unknown.py")
    assert done.returncode == 4
    assert "::test_travels: needs_kernel knows wireguard, netem, vrf" in done.stderr + done.stdout
    assert "not time-travel" in done.stderr + done.stdout


@pytest.fixture
def no_lane(tmp_path: Path) -> dict[str, str]:
    """The variables of a machine on which the lane has not been built, and apt is offline."""
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho no route; exit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    return {"KERNEL_LANE_DIR": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.long
def test_where_there_should_be_a_lane_and_is_none_it_is_a_skip_that_ci_refuses(
    no_lane: dict[str, str],
) -> None:
    here = run("here.py", "-v", **no_lane)
    assert here.returncode == 0, here.stdout
    assert outcomes(here) == {
        "test_stays_on_the_host": "PASSED", "test_goes_to_the_lane": "SKIPPED",
        "test_of_the_lane_itself": "SKIPPED",
    }  # fmt: skip
    assert "there is no lane, and this kernel lacks wireguard: apt-get " in here.stdout
    assert "(offline?): no route" in here.stdout
    there = run("here.py", "-v", CI="true", **no_lane)
    assert there.returncode == 1
    assert outcomes(there)["test_goes_to_the_lane"] == "ERROR"
    assert outcomes(there)["test_of_the_lane_itself"] == "ERROR"


def test_where_there_can_be_no_lane_it_is_a_skip_in_ci_too() -> None:
    done = run("here.py", "-v", before=("setarch", "i686"), CI="true")
    assert done.returncode == 0, done.stdout
    assert outcomes(done)["test_goes_to_the_lane"] == "SKIPPED"
    assert "kernel lacks wireguard, and there is no lane on i686" in done.stdout
    assert "kernel lacks user mode, and there is no lane on i686" in done.stdout

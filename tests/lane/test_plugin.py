"""Tests that run in the lane, as the pytest that started it tells about them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lane import kernel, plugin
from tests.support.wait import TIMES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs_lane


def run(
    sample: str, *options: str, before: tuple[str, ...] = (), **variables: str
) -> "subprocess.CompletedProcess[str]":
    """A pytest of its own, on a file of samples, always in the lane."""
    theirs = {k: v for k, v in os.environ.items() if "PYTEST" not in k and k != "CI"}
    return subprocess.run(
        [*before, sys.executable, "-P", "-m", "pytest", "--color=no", "--lane", "always",
         "-p", "no:cacheprovider", *options, f"tests/lane/samples/{sample}"],
        cwd=ROOT, env={**theirs, **variables},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip


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


def test_in_ci_a_test_skipped_in_there_has_failed_unless_it_names_a_feature() -> None:
    done = run("outcomes.py", "-v", "-k", "skipped", CI="true")
    assert done.returncode == 1
    assert outcomes(done) == {
        "test_is_skipped": "SKIPPED", "test_is_skipped_for_no_good_reason": "FAILED",
    }  # fmt: skip
    assert "was skipped where CI=true: Skipped: not today" in done.stdout


def test_a_test_that_kills_the_kernel_has_failed_and_the_others_have_not() -> None:
    done = run("deadly.py", "-v")
    assert done.returncode == 1
    assert outcomes(done) == {
        "test_before": "PASSED", "test_ends_the_kernel": "FAILED", "test_after": "PASSED",
    }  # fmt: skip
    assert "the lane ended while this test ran in it: exit code 125" in done.stdout
    assert "the kernel said last:" in done.stdout
    assert "System halted" in done.stdout


def test_a_lane_in_which_nothing_moves_is_given_up(
    monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    monkeypatch.setattr(plugin, "SILENCE", 6.0)
    standing = kernel.standing()
    assert standing
    session = plugin.Run(pytestconfig, standing, ["tests/lane/samples/frozen.py::test_stops"])
    try:
        assert session.listen() == {
            "test": "tests/lane/samples/frozen.py::test_stops", "what": "start",
        }  # fmt: skip
        while session.listen():
            pass
        assert session.why.startswith("nothing was heard for 6 s\n")
        assert "collected 1 item" in session.why
    finally:
        session.close()


def test_only_what_needs_it_goes_there_and_goes_first() -> None:
    done = run("here.py", "-v")
    assert done.returncode == 0, done.stdout
    assert list(outcomes(done)) == [
        "test_goes_to_the_lane", "test_stays_on_the_host", "test_of_the_lane_itself",
    ]  # fmt: skip


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

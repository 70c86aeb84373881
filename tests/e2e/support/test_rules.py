"""The rules of tests/conftest.py catch what they are there for."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
OFFENDERS = "tests/e2e/support/offenders.py"


async def run(*tests: str, **environ: str) -> tuple[int | None, str]:
    """Run offenders in a pytest of its own; return its exit code and what it wrote."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(f"{OFFENDERS}::{test}" for test in tests),
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


def sh(command: str) -> None:
    subprocess.run(command.split(), check=False, capture_output=True)


@pytest.fixture
def _swept() -> Iterator[None]:
    path = Path("/proc/sys/net/ipv4/ping_group_range")
    before = path.read_text()
    sh("ip link add vwoff2 type veth peer name vwoff3")
    yield
    path.write_text(before)
    sh("ip netns delete vwire-offender")
    sh("ip link delete vwoff0")
    sh("ip link delete vwoff2")
    sh("ip route delete blackhole 203.0.113.77/32")
    sh("ip rule delete from 203.0.113.77 table 977")
    sh("nft delete table inet vwire_offender")
    for left in Path("/tmp").glob("vwire-offender-*"):
        left.unlink()


async def test_a_test_that_keeps_the_rules_passes() -> None:
    code, out = await run("test_keeps_the_rules")
    assert (code, "1 passed" in out) == (0, True), out


@pytest.mark.long
async def test_what_a_test_keeps_in_its_own_process_fails_it() -> None:
    offenders = {
        "test_keeps_a_file_descriptor": "left over: file descriptor",
        "test_keeps_a_thread": "left over: thread keeper",
        "test_keeps_a_child": "left over: child process",
        "test_keeps_a_task": "left over: <Task pending name='keeper of nothing'",
    }
    code, out = await run(*offenders)
    assert code == 1, out
    for offender, told in offenders.items():
        assert told in out
        assert f"ERROR {OFFENDERS}::{offender} - " in out


@pytest.mark.usefixtures("_swept")
async def test_what_a_test_leaves_on_the_machine_fails_it() -> None:
    offenders = {
        "test_keeps_a_file_of_ours": "left over: file /tmp/vwire-offender-",
        "test_keeps_a_namespace": "left over: network namespace vwire-offender",
        "test_keeps_a_link": "left over: link of the host vwoff0",
        "test_takes_a_link_away": "taken away: link of the host vwoff2",
    }
    code, out = await run(*offenders, CI="true")
    assert code == 1, out
    for offender, told in offenders.items():
        assert told in out
        assert f"ERROR {OFFENDERS}::{offender} - " in out


@pytest.mark.usefixtures("_swept")
async def test_what_the_tests_change_in_the_hosts_network_fails_the_run() -> None:
    offenders = {
        "test_changes_a_sysctl": "/proc/sys/net/ipv4/ping_group_range: was",
        "test_adds_a_route": "ip -4 route show table all: gone [], come [{'type': 'blackhole'",
        "test_adds_a_rule": "ip -4 rule: gone [], come [",
        "test_adds_a_table_of_nftables": "nft list ruleset: was",
    }
    code, out = await run(*offenders, CI="true")
    assert code == 1, out
    for told in offenders.values():
        assert told in out


async def test_a_process_that_blocks_its_loop_fails_the_test_that_ran_it() -> None:
    code, out = await run("test_blocks_the_loop_of_a_process")
    assert code == 1, out
    assert "on an event loop's thread: os.listdir" in out


async def test_a_process_of_a_lab_that_blocks_its_loop_fails_the_test_that_ran_the_lab() -> None:
    code, out = await run("test_blocks_the_loop_of_a_process_of_a_lab")
    assert code == 1, out
    assert "1 passed, 1 error" in out  # the lab itself holds
    assert "on an event loop's thread: os.listdir '/proc/self/fd'" in out
    assert "tests/e2e/support/blocker.py" in out


async def test_in_ci_a_skip_is_a_failure_unless_the_kernel_lacks_something() -> None:
    assert (await run("test_is_skipped_for_no_good_reason"))[0] == 0
    code, out = await run("test_is_skipped_for_no_good_reason", CI="true")
    assert code == 1
    assert "was skipped where CI=true: Skipped: felt like it" in out
    assert (await run("test_is_skipped_for_the_kernel", CI="true"))[0] == 0

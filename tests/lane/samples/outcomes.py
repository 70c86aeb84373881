"""Every way a test can end."""

import os
import subprocess

import pytest

from tests.support.wait import write

pytestmark = pytest.mark.needs_kernel("wireguard")


def test_passes() -> None:
    assert os.environ["LANE_GUEST"] == "1"
    write("a sample's wait", 0.25, 1.0)


@pytest.mark.parametrize("told", ["told [to] me::by a parameter"])
def test_fails(told: str) -> None:
    print("said by the test")
    answer = 41
    assert answer == 42, told


def test_is_skipped() -> None:
    pytest.skip("kernel lacks a sample")


@pytest.mark.xfail(reason="as it should", strict=True)
def test_fails_as_expected() -> None:
    raise AssertionError


def test_is_skipped_for_no_good_reason() -> None:
    pytest.skip("not today")


def test_leaves_something() -> None:
    subprocess.run(["ip", "netns", "add", "left-by-a-sample"], check=True)

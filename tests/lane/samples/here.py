"""Tests of what every kernel has, and of what none has: not in the order in which they run."""

import os

import pytest


@pytest.mark.needs_lane
def test_of_the_lane_itself() -> None:
    assert "LANE_GUEST" not in os.environ


@pytest.mark.needs_kernel("wireguard")
def test_goes_to_the_lane() -> None:
    assert "LANE_GUEST" in os.environ


def test_stays_on_the_host() -> None:
    assert "LANE_GUEST" not in os.environ

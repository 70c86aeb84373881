"""A test that waits for what does not come."""

import signal

import pytest


@pytest.mark.needs_kernel("wireguard")
def test_waits() -> None:
    signal.pause()

"""A test in which everything stands still."""

import os
import signal

import pytest


@pytest.mark.needs_kernel("wireguard")
def test_stops() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)

"""A test that takes the whole kernel with it, between two that do not."""

import ctypes

import pytest

pytestmark = pytest.mark.needs_kernel("wireguard")
_POWER_OFF = 0x4321FEDC


def test_before() -> None:
    pass


def test_ends_the_kernel() -> None:
    print("last seen here", flush=True)
    ctypes.CDLL(None).reboot(_POWER_OFF)


def test_after() -> None:
    pass

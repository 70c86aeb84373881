"""A test that asks for what nobody knows how to try."""

import pytest


@pytest.mark.needs_kernel("wireguard", "time-travel")
def test_travels() -> None:
    pass

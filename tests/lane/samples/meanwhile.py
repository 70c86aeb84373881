"""A test of the host that ends after one of the lane has, and the guest with it."""

import os
from pathlib import Path

import pytest

from tests.support.processes import arguments, children
from tests.support.wait import until


async def test_ends_later() -> None:
    (beside,) = children(os.getpid())
    told = Path(arguments(beside)[-1]) / "told"
    await until(lambda: '"over"' in told.read_text(), "the lane is over", bar=10, record=False)


@pytest.mark.needs_kernel("wireguard")
def test_ends_sooner() -> None:
    pass

"""Tests of the host that see a test of the lane come and go."""

import os
from pathlib import Path

import pytest

from tests.support.processes import arguments, children
from tests.support.wait import until


@pytest.fixture
def folder() -> Path:
    """The folder of this session's lane."""
    (beside,) = children(os.getpid())
    return Path(arguments(beside)[-1])


async def test_begins_before(folder: Path) -> None:
    told = folder / "told"
    assert told.read_text() == ""
    await until(lambda: "start" in told.read_text(), "a test in there runs", bar=10, record=False)
    assert list(folder.glob("vwire-lane-*"))


async def test_ends_after(folder: Path) -> None:
    told = folder / "told"
    assert "over" not in told.read_text()
    (share,) = folder.glob("run-*")
    (share / "go").touch()
    await until(lambda: "over" in told.read_text(), "the lane is over", bar=10, record=False)


@pytest.mark.needs_kernel("wireguard")
async def test_meanwhile() -> None:
    go = Path(os.environ["LANE_OUT"]) / "go"
    await until(go.exists, "the host lets it end", bar=10, record=False)

"""Two tests that share something which does not end well; one of them is not on the host."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def shared() -> Iterator[str]:
    yield "there"
    raise RuntimeError("it did not end well")


def test_here(shared: str) -> None:
    assert shared


@pytest.mark.needs_kernel("wireguard")
def test_there() -> None:
    pass

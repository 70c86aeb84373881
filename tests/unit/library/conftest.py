"""A trust domain, and what a client or an endpoint needs of it."""

from pathlib import Path

import pytest

from tests.support.certs import Authority


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority("td.test")


@pytest.fixture
def door(tmp_path: Path) -> str:
    """The URL of a unix socket to be."""
    return f"unix://{tmp_path}/door.sock"

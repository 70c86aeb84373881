"""A pair of machines for the tests of a module, each of which leaves them as it found them."""

from collections.abc import Iterator

import pytest

from tests.e2e.systemd.machine import Machine
from tests.e2e.systemd.mesh import pair


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    """East has everything and an endpoint `pong`, west all but the registry and `far`."""
    with pair() as (east, west):
        near = {"NSM_SERVICE_NAMES": "echo", "NSM_CIDR_PREFIX": "172.16.1.0/24"}
        far = {"NSM_SERVICE_NAMES": "far", "NSM_CIDR_PREFIX": "172.16.2.0/24"}
        east.start("pong", "endpoints.responder", NSM_PAYLOAD="ETHERNET", **near)
        west.start("far", "endpoints.responder", NSM_PAYLOAD="ETHERNET", **far)
        yield east, west

"""A pair of machines for the tests of a module, each of which leaves them as it found them."""

from collections.abc import Iterator

import pytest

from tests.e2e.systemd.machine import Machine
from tests.e2e.systemd.mesh import pair


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    """East has everything and an endpoint `pong`; west all but the registry, `far` and `vault`."""
    with pair() as (east, west):
        for one, name, service, prefix, payload in (
            (east, "pong", "echo", "172.16.1.0/24", "ETHERNET"),
            (west, "far", "far", "172.16.2.0/24", "ETHERNET"),
            (west, "vault", "sealed", "172.16.3.0/24", "IP"),
        ):
            serving = {"NSM_SERVICE_NAMES": service, "NSM_CIDR_PREFIX": prefix}
            one.start(name, "endpoints.responder", NSM_PAYLOAD=payload, **serving)
        yield east, west

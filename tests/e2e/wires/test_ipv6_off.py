"""IPv6 switched off by sysctl, on nodes and in workloads, as container engines do it."""

from collections.abc import Iterator

import pytest

from tests.e2e.wires.conftest import LAB
from tests.e2e.wires.nodes import Nodes, addresses
from tests.support.spaces import Space, kernel_state

SERVICES = """\
  six:
    payload: ethernet
    endpoints:
      pong-six: {on: two, prefixes: ["fd00:6::/64"]}
  packets:
    payload: ip
    endpoints:
      wg: {on: two, prefixes: [172.16.3.0/24]}
clients:
"""
WIRES = {"nsm-4": "echo", "nsm-6": "six", "nsm-e": "packets"}
OFF = [f"net.ipv6.conf.{which}.disable_ipv6" for which in ("all", "default")]


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB.replace("clients:\n", SERVICES)


@pytest.fixture
def switched_off(nodes: Nodes) -> Iterator[Nodes]:
    """Every namespace without IPv6, and every process of the mesh started there anew."""
    spaces = [nodes.space(place) for place in nodes.lab.places]
    try:
        switch(spaces, "1")
        for name in [*nodes.now]:
            if not name.endswith("/issuer"):
                nodes.now[name].end()
                nodes.start(name).ready()
        yield nodes
    finally:
        switch(spaces, "0")


def switch(spaces: list[Space], value: str) -> None:
    for space in spaces:
        done = space.run("sysctl", "-w", *(f"{key}={value}" for key in OFF))
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", ["app", "near"])
async def test_wires_of_both_families_come_up_and_nothing_else_gets_ipv6(switched_off, place):
    client = switched_off.space(place)
    before = kernel_state(client)
    app = switched_off.client(place, *(f"kernel://{of}/{name}" for name, of in WIRES.items()))
    for name, far in {"nsm-4": "172.16.1.0", "nsm-6": "fd00:6::", "nsm-e": "172.16.3.0"}.items():
        assert await client.pings(far), name
    assert [":" in one for one in addresses(client, "nsm-4")] == [False]
    assert not any(":" in info["local"] for info in _infos(client, "lo"))
    assert app.end() == 0
    assert kernel_state(client) == before


def _infos(space: Space, name: str) -> list[dict[str, str]]:
    return [info for one in space.ip("addr", "show", name) for info in one["addr_info"]]

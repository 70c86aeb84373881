"""A line that loses and delays is no reason to heal: wires over it stay what they are.

Where the running kernel has WireGuard and netem, this runs in place.
"""

import pytest

from tests.e2e.wires.nodes import Nodes, addresses, identity, link, tentative, two_nodes
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until

pytestmark = pytest.mark.needs_kernel("wireguard", "netem")
LAB = two_nodes("""
name: wires
services:                            # of each somebody else, to whom a wire could be led
  frames:
    payload: ethernet
    endpoints:
      frames-1: {on: two, prefixes: [172.16.1.0/24]}
      frames-2: {on: two, prefixes: [172.16.1.0/24]}
  packets:
    payload: ip
    endpoints:
      packets-1: {on: two, prefixes: [172.16.2.0/24]}
      packets-2: {on: two, prefixes: [172.16.2.0/24]}
clients:
  app: {on: one, connect: ["kernel://frames/vxlan", "kernel://packets/wg"]}
""")
WIRES = {"vxlan": "vxlan", "wg": "wireguard"}  # interface: kind of its device
ENDPOINTS = ("frames-1", "frames-2", "packets-1", "packets-2")
LINE = "netem delay 100ms loss 5%"
OFTEN = {"NSM_MAX_TOKEN_LIFETIME": "12s"}  # a fifth of it is between two refreshes
SECONDS = 2.4  # between two of a wire


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


def refreshes(nodes: Nodes) -> int:
    """How many requests the endpoints' manager granted."""
    granted = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return sum(all(word in line for word in granted) for line in nodes.now["two/nsmgr"].log)


@pytest.mark.parametrize("seconds", [6, pytest.param(30, marks=pytest.mark.long)])
async def test_over_a_line_that_loses_and_delays_wires_are_refreshed_and_nothing_is_healed(
    nodes: Nodes, seconds: int
) -> None:
    """100 ms and 5 % lost, each way: what mesh and tunnels say there, and the wires' pings."""
    client = nodes.space("app")
    ends = [nodes.space(name) for name in ENDPOINTS]
    app = nodes.client("app", "kernel://frames/vxlan", "kernel://packets/wg", **OFTEN)
    await until(lambda: not tentative(client, *ends), "the kernel's own addresses", bar=2)
    before = {name: identity(link(client, name)) for name in WIRES}
    for name, kind in WIRES.items():
        assert link(client, name)["linkinfo"]["info_kind"] == kind
    view = kernel_state(client, *ends)
    far = {end.name: [identity(one) for one in end.ip("link")] for end in ends}
    try:
        for node in ("one", "two"):
            done = nodes.space(node).run(*f"tc qdisc add dev eth0 root {LINE}".split())
            assert done.returncode == 0, done.stderr
        so_far = refreshes(nodes)
        wanted = round(len(WIRES) * seconds / SECONDS)
        await until(
            lambda: refreshes(nodes) >= so_far + wanted,
            f"{wanted} refreshes over a line that loses and delays",
            bar=seconds,
        )
        for name in WIRES:
            assert await client.pings(far_address(client, name), "-c5", "-i0.2")
    finally:
        for node in ("one", "two"):
            nodes.space(node).run("tc", "qdisc", "del", "dev", "eth0", "root")
    told = [one["event"] for one in app.told]
    assert told == ["up"] * len(WIRES), app.words
    assert {name: identity(link(client, name)) for name in WIRES} == before, app.words
    assert {end.name: [identity(one) for one in end.ip("link")] for end in ends} == far, app.words
    assert kernel_state(client, *ends) == view, app.words
    assert app.end() == 0


def far_address(client: Space, name: str) -> str:
    """The endpoint's address: the client's is the odd one of two."""
    (own,) = addresses(client, name)
    network, _, last = own.rpartition(".")
    return f"{network}.{int(last) ^ 1}"

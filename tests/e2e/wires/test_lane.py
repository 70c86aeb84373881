"""What the lane is for: a mesh whose wires the kernel encrypts, and a line that loses and delays.

Where the running kernel has WireGuard and netem, this runs in place.
"""

import json
import statistics
from functools import partial
from typing import Any

import pytest
from scapy.layers.inet import UDP

from tests.e2e.wires.capture import Capture, capture
from tests.e2e.wires.nodes import Nodes, Program, addresses, far_end, link, two_nodes
from tests.support.wait import until, write

pytestmark = pytest.mark.needs_kernel("wireguard", "netem")
LAB = two_nodes("""
name: wires
services:
  private: {payload: ip, endpoints: {safe: {on: two, prefixes: [172.16.2.0/24]}}}
clients:
  app: {on: one, connect: ["kernel://private/nsm-1"]}
""")
INITIATION, RESPONSE, DATA = 1, 2, 4  # types of WireGuard's messages, in their first byte
ITS_OWN = 5000.0  # ms after which WireGuard itself says again what was lost


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


def types(cable: Capture) -> list[int]:
    """The types of the WireGuard messages that have passed, and that nothing of a ping has."""
    found = []
    for packet in cable.packets():
        assert b"\xfa\xde" * 4 not in bytes(packet)
        if UDP in packet:
            found.append(bytes(packet[UDP].payload)[0])
    return found


def made(client: Program) -> dict[str, Any] | None:
    """What a client wrote of its wire when it was made."""
    return next((one for one in client.told if one["event"] == "up"), None)


def test_the_kernel_seals_a_wire_before_a_packet_is_on_it(nodes: Nodes) -> None:
    with capture(nodes.space("lan"), "p1") as cable:
        app = nodes.client("app", "kernel://private/nsm-1")
        assert types(cable)[:2] == [INITIATION, RESPONSE]
        client, endpoint = nodes.space("app"), nodes.space("safe")
        far = far_end(client, "nsm-1", endpoint)
        for device in (link(client, "nsm-1"), far):
            assert device["linkinfo"]["info_kind"] == "wireguard"
        address = addresses(endpoint, far["ifname"])[0]
        done = client.run("ping", "-n", "-c5", "-i0.2", "-W5", "-p", "fade", address)
        assert " 0% packet loss" in done.stdout, done.stdout
        assert types(cable).count(DATA) >= 10
    assert app.end() == 0


@pytest.mark.parametrize("wires", [5, pytest.param(9, marks=pytest.mark.long)])
async def test_a_wire_over_a_line_that_loses_does_not_wait_for_wireguards_own_patience(
    nodes: Nodes, wires: int
) -> None:
    """Every packet takes 20 ms, and of the tunnels' 30 % are lost each way."""
    for node in ("one", "two"):
        for words in (
            "qdisc add dev eth0 root handle 1: prio",
            "qdisc add dev eth0 parent 1:1 handle 10: netem delay 20ms",
            "qdisc add dev eth0 parent 1:2 handle 20: netem delay 20ms",
            "qdisc add dev eth0 parent 1:3 handle 30: netem delay 20ms loss 30%",
            "filter add dev eth0 parent 1: protocol ip u32 match ip protocol 17 0xff flowid 1:3",
        ):
            done = nodes.space(node).run("tc", *words.split())
            assert done.returncode == 0, done.stderr
    handshakes = []
    for _ in range(wires):
        app = nodes.client("app", "kernel://private/nsm-1")
        told = await until(partial(made, app), "a client writes of its wire", record=False)
        handshakes.append(told["stages"]["handshake"])
        write("a wire over a line that loses 30 % of its tunnels", told["ms"] / 1000, 3.0)
        assert app.end() == 0
    lines = json.loads(nodes.space("one").run("tc", "-s", "-j", "qdisc", "show").stdout)
    assert next(one["packets"] for one in lines if one["handle"] == "30:") > wires
    assert min(handshakes) > 40
    # each second one loses its first handshake: the mean would be the 5 s
    assert statistics.mean(handshakes) < ITS_OWN / 2
    for node in ("one", "two"):
        nodes.space(node).run("tc", "qdisc", "del", "dev", "eth0", "root")

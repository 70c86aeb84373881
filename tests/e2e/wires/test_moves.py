"""A live wire goes over to another endpoint while packets flow: none is lost, nothing is left."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from labs import seats
from tests.e2e.wires.nodes import ROOT, Nodes, addresses, far_end, flow, link, two_nodes
from tests.support.wait import until

RATE = 0.005  # seconds between echoes: 200 a second, each way
LAB = two_nodes("""
name: moves
services:
  frames:
    payload: ethernet
    matches: [{routes: [{destination_selector: {colour: blue}}]}]
    endpoints:                      # each answers at the same address, so that none is lost
      blue: {on: two, prefixes: [172.16.1.0/24], labels: {colour: blue}}
      green: {on: one, prefixes: [172.16.1.0/24], labels: {colour: green}}
      teal: {on: two, prefixes: [172.16.1.0/24], labels: {colour: teal}}
  sealed:
    payload: ip
    matches: [{routes: [{destination_selector: {colour: blue}}]}]
    endpoints:
      dark-blue: {on: two, prefixes: [172.16.2.0/24], labels: {colour: blue}}
      dark-green: {on: one, prefixes: [172.16.2.0/24], labels: {colour: green}}
clients:
  app: {on: one, connect: ["kernel://frames/nsm-1"]}
""")


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


def define(nodes: Nodes, service: str, payload: str, colour: str) -> None:
    """Edit a service's rules, as its operator does."""
    seat = seats.of(nodes.lab, nodes.paths, "one")
    rules = (
        f"{{kind: NetworkService, metadata: {{name: {service}}}, spec: {{payload: {payload},"
        f" matches: [{{routes: [{{destination_selector: {{colour: {colour}}}}}]}}]}}}}"
    )
    done = subprocess.run(
        [
            "ip",
            "netns",
            "exec",
            nodes.space("one").name,
            sys.executable,
            "-P",
            "-m",
            "nsmctl",
            "define",
            "-",
        ],
        env={**os.environ, **seat.variables, "PYTHONPATH": str(ROOT)},
        group=seat.gid,
        input=rules,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("service", "payload", "ways"),
    [
        ("frames", "ETHERNET", [("blue", "vxlan"), ("green", "veth"), ("teal", "vxlan"),
                                ("blue", "vxlan")]),
        ("sealed", "IP", [("blue", "tun"), ("green", "veth"), ("blue", "tun")]),
    ],
    ids=["vxlan-and-veth", "wireguard-and-veth"],
)  # fmt: skip
async def test_edited_rules_move_a_client_from_endpoint_to_endpoint_and_no_packet_is_lost(
    nodes: Nodes, service: str, payload: str, ways: list[tuple[str, str]]
) -> None:
    client, net = nodes.space("app"), 1 if service == "frames" else 2
    (first, _), *later = ways
    define(nodes, service, payload, first)
    app = nodes.client("app", f"kernel://{service}/nsm-1")
    own = addresses(client, "nsm-1")
    prefix = "" if service == "frames" else "dark-"
    assert app.told[-1]["endpoint"] == prefix + first
    with flow(client, f"172.16.{net}.0", RATE) as echoes:
        before = prefix + first
        for colour, kind in later:
            define(nodes, service, payload, colour)
            name = prefix + colour
            await until(
                lambda name=name: app.told[-1]["endpoint"] == name, f"it is led to {name}", bar=1
            )
            await until(
                lambda before=before: not nodes.space(before).links(),
                "nothing is left where it was",
                bar=1,
            )
            assert link(client, "nsm-1")["linkinfo"]["info_kind"] == kind
            await until(lambda: client.links() == {"nsm-1"}, "nothing but the wire", bar=1)
            assert addresses(client, "nsm-1") == own
            before = name
    assert echoes.received == echoes.sent > 200, (echoes.sent, echoes.received)
    assert app.end() == 0
    assert client.links() == set()


def only_small(nodes: Nodes, size: int) -> Iterator[None]:
    """The way between the nodes takes packets of so many bytes, and says nothing of others."""
    for words in (
        "add table ip t",
        "add chain ip t c { type filter hook prerouting priority 0 ; }",
        f"add rule ip t c ip length > {size} meta l4proto udp drop",
    ):
        done = nodes.space("two").run("nft", words)
        assert done.returncode == 0, done.stderr
    yield
    assert nodes.space("two").run("nft", "delete table ip t").returncode == 0


@pytest.fixture
def narrow(nodes: Nodes) -> Iterator[None]:
    yield from only_small(nodes, 1280)


@pytest.mark.parametrize(
    ("service", "payload", "over"), [("frames", "ETHERNET", 50), ("sealed", "IP", 60)]
)
async def test_a_way_that_drops_large_packets_without_a_word_makes_the_wire_as_small_as_it_is(
    nodes: Nodes, narrow: None, service: str, payload: str, over: int
) -> None:
    client, net = nodes.space("app"), 1 if service == "frames" else 2
    end = nodes.space("blue" if service == "frames" else "dark-blue")
    define(nodes, service, payload, "blue")
    app = nodes.client("app", f"kernel://{service}/nsm-1")
    mtu = link(client, "nsm-1")["mtu"]
    assert 1280 - over - 20 <= mtu <= 1280 - over
    assert far_end(client, "nsm-1", end)["mtu"] == mtu
    assert await client.pings(f"172.16.{net}.0", "-M", "do", "-s", str(mtu - 28))
    assert app.end() == 0

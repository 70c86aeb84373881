"""What passes on the cable between two nodes, and what does not, as a capture shows it."""

import ipaddress
import os

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN

from tests.e2e.wires.capture import capture
from tests.e2e.wires.nodes import Nodes, addresses, far_end, link
from tests.support.wait import until

LAB = """
name: wires
topology:
  clusters:
    four: {trust-domain: four.test}
    six: {trust-domain: six.test, underlay: ipv6}
  nodes:
    four-one: {cluster: four}
    four-two: {cluster: four}
    six-one: {cluster: six}
    six-two: {cluster: six}
    lan: {kind: switch}
  links:
    - {endpoints: ["four-one:eth0", "lan:f1"]}
    - {endpoints: ["four-two:eth0", "lan:f2"]}
    - {endpoints: ["six-one:eth0", "lan:s1"]}
    - {endpoints: ["six-two:eth0", "lan:s2"]}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  there@four: {payload: ethernet, endpoints: {four-there: {on: four-two, prefixes: [172.16.1.0/24, "2001:db8:1::/64"]}}}
  back@four: {payload: ethernet, endpoints: {four-back: {on: four-one, prefixes: [172.16.2.0/24, "2001:db8:2::/64"]}}}
  there@six: {payload: ethernet, endpoints: {six-there: {on: six-two, prefixes: [172.16.3.0/24, "2001:db8:3::/64"]}}}
  back@six: {payload: ethernet, endpoints: {six-back: {on: six-one, prefixes: [172.16.4.0/24, "2001:db8:4::/64"]}}}
clients:
  four-app: {on: four-one, connect: ["kernel://there/nsm-1"]}
  four-other: {on: four-one, connect: ["kernel://there/nsm-1"]}
  four-near: {on: four-two, connect: ["kernel://there/nsm-1"]}
  four-nearby: {on: four-two, connect: ["kernel://there/nsm-1"]}
  four-far: {on: four-two, connect: ["kernel://back/nsm-1"]}
  six-app: {on: six-one, connect: ["kernel://there/nsm-1"]}
  six-far: {on: six-two, connect: ["kernel://back/nsm-1"]}
"""  # noqa: E501 - a line for each
PORT = 4789
ETHERNET, VXLAN_HEADERS = 14, {"four": 20 + 8 + 8 + 14, "six": 40 + 8 + 8 + 14}
CABLE = 1500
ALL_HOSTS = "33:33:00:00:00:01"


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


class Wire:
    """A wire's two ends, as the kernel has them, and the cable under it."""

    def __init__(self, nodes: Nodes, of: str, way: str) -> None:
        here, there = ("one", "two") if way == "there" else ("two", "one")
        self.of = of
        self.client = nodes.space(f"{of}-{'app' if way == 'there' else 'far'}")
        self.endpoint = nodes.space(f"{of}-{way}")
        self.node, self.far_node = nodes.space(f"{of}-{here}"), nodes.space(f"{of}-{there}")
        self.lan = nodes.space("lan")
        self.port = f"{of[0]}{1 if way == 'there' else 2}"
        self.near = link(self.client, "nsm-1")
        self.far = far_end(self.client, "nsm-1", self.endpoint)
        self.src = addresses(self.client, self.near["ifname"])
        self.dst = addresses(self.endpoint, self.far["ifname"])

    def underlay(self, node: object) -> str:
        version = 4 if self.of == "four" else 6
        (found,) = node.ip("addr", "show", "eth0")  # type: ignore[attr-defined]
        (address,) = (
            i["local"]
            for i in found["addr_info"]
            if i["scope"] == "global" and ipaddress.ip_address(i["local"]).version == version
        )
        return str(address)


@pytest.fixture
def wire(nodes: Nodes, request: pytest.FixtureRequest):
    of, way = request.param
    place = f"{of}-{'app' if way == 'there' else 'far'}"
    client = nodes.client(place, f"kernel://{way}/nsm-1")
    try:
        yield Wire(nodes, of, way)
    finally:
        assert client.end() == 0
        assert nodes.space(place).links() == set()


both_ways = pytest.mark.parametrize(
    "wire",
    [(of, way) for of in ("four", "six") for way in ("there", "back")],
    indirect=True,
    ids=lambda param: "-".join(param),
)
one_way = pytest.mark.parametrize(
    "wire", [("four", "there"), ("six", "there")], indirect=True, ids=lambda param: param[0]
)


@both_ways
async def test_the_agreed_vni_is_on_the_cable_and_the_frame_inside_is_untouched(wire: Wire):
    near, far = (end["linkinfo"]["info_data"] for end in (wire.near, wire.far))
    assert near["id"] == far["id"]
    assert near["port"] == far["port"] == PORT
    here, there = wire.underlay(wire.node), wire.underlay(wire.far_node)
    assert (near.get("local") or near["local6"]) == here
    assert (near.get("remote") or near["remote6"]) == there
    assert _sixteen(here) != _sixteen(there)
    assert near["id"] % 2 == (0 if _sixteen(here) <= _sixteen(there) else 1)
    assert 0 < near["id"] < 1 << 24
    for source, target, sender, receiver, outer in (
        (wire.client, wire.endpoint, wire.near, wire.far, (here, there)),
        (wire.endpoint, wire.client, wire.far, wire.near, (there, here)),
    ):
        mark = os.urandom(700)
        frame = bytes(
            Ether(src=sender["address"], dst=receiver["address"])
            / IP(src=_four(source, sender), dst=_four(target, receiver), ttl=7, flags="DF")
            / UDP(sport=1111, dport=9)
            / mark
        )
        with (
            capture(source, sender["ifname"]) as out,
            capture(wire.lan, wire.port) as cable,
            capture(target, receiver["ifname"]) as inside,
        ):
            out.send(frame)
            await until(
                lambda i=inside, f=frame: f in i.frames(), "a frame at the far end", bar=0.5
            )
            (passed,) = [p for p in cable.packets() if mark in bytes(p)]
        assert bytes(passed[VXLAN].payload) == frame
        assert passed[VXLAN].vni == near["id"]
        assert passed[UDP].dport == PORT
        layer = passed[IPv6] if wire.of == "six" else passed[IP]
        assert (layer.src, layer.dst) == outer
        assert passed.type == (0x86DD if wire.of == "six" else 0x0800)


@one_way
@pytest.mark.parametrize("inner", [4, 6], ids=["v4-payload", "v6-payload"])
async def test_a_full_packet_passes_in_one_piece_and_one_byte_more_is_refused(wire: Wire, inner):
    mtu = wire.near["mtu"]
    assert mtu == wire.far["mtu"]
    # bytes per packet: VXLAN leaves room for one tag more than the headers need
    assert CABLE - VXLAN_HEADERS[wire.of] - 4 == mtu
    headers = (20 if inner == 4 else 40) + 8
    for source, addresses_there in ((wire.client, wire.dst), (wire.endpoint, wire.src)):
        (address,) = (a for a in addresses_there if ipaddress.ip_address(a).version == inner)
        with capture(wire.lan, wire.port) as cable:
            full = source.run(
                "ping", "-n", "-c1", "-W5", "-M", "do", "-s", str(mtu - headers), address
            )
            assert full.returncode == 0, full.stdout
            seen = [p for p in cable.packets() if VXLAN in p or _in_pieces(p)]
            assert not any(map(_in_pieces, seen))
            lengths = [len(p) - ETHERNET for p in seen]
            assert lengths.count(max(lengths)) >= 2  # one there, one back
            assert max(lengths) == mtu + VXLAN_HEADERS[wire.of] <= CABLE
            more = source.run(
                "ping", "-n", "-c1", "-W0.1", "-M", "do", "-s", str(mtu - headers + 1), address
            )
            assert more.returncode != 0
            assert f"mtu={mtu}" in more.stderr.replace(" ", "").replace(":", "=") + more.stdout, (
                more
            )
            assert not [p for p in cable.packets() if len(p) - ETHERNET > max(lengths)]
        with capture(source, "nsm-1" if source is wire.client else wire.far["ifname"]) as device:
            device.send(b"\xff" * (mtu + ETHERNET))
            with pytest.raises(OSError, match="Message too long"):
                device.send(b"\xff" * (mtu + ETHERNET + 1))


@pytest.mark.parametrize(
    ("place", "place_beside"),
    [
        ("four-app", "four-other"),  # both over a tunnel
        ("four-near", "four-nearby"),  # both on the endpoint's node
        ("four-near", "four-app"),  # one here, one there
        ("four-app", "four-near"),
    ],
    ids=["vxlan-vxlan", "veth-veth", "veth-vxlan", "vxlan-veth"],
)
async def test_nothing_of_one_clients_traffic_is_seen_by_another_or_outside_its_wire(
    nodes: Nodes, place: str, place_beside: str
):
    """Two clients with the same endpoint, each frame of the one with a mark."""
    first = nodes.client(place, "kernel://there/nsm-1")
    second = nodes.client(place_beside, "kernel://there/nsm-1")
    app, other, endpoint = map(nodes.space, (place, place_beside, "four-there"))
    mine, theirs = link(app, "nsm-1"), link(other, "nsm-1")
    far = far_end(app, "nsm-1", endpoint)
    with (
        capture(app, "nsm-1") as out,
        capture(endpoint, far["ifname"]) as arrives,
        capture(endpoint) as everything_there,
        capture(other) as beside,
        capture(nodes.space("four-one")) as here,
        capture(nodes.space("four-two")) as there,
        capture(nodes.space("lan")) as cables,
        capture(nodes.space("six-one")) as elsewhere,
    ):
        mark = os.urandom(64)
        sent = [
            bytes(
                Ether(src=mine["address"], dst=target)
                / IP(src="172.16.1.1", dst=address)
                / UDP(sport=1111, dport=9)
                / mark
            )
            for target in (far["address"], theirs["address"], "ff:ff:ff:ff:ff:ff", ALL_HOSTS)
            for address in ("172.16.1.0", "172.16.1.2", "172.16.1.3", "255.255.255.255")
        ]
        for frame in sent:
            out.send(frame)
        got: list[bytes] = []

        def arrived() -> bool:
            got.extend(arrives.frames())
            return sent[-1] in got

        await until(arrived, "the last frame at the far end", bar=0.5)
        assert [frame for frame in got if frame in sent] == sent
        there_in_all = [frame for frame in everything_there.frames() if frame in sent]
        assert there_in_all == sent, "the endpoint has it on another client's device as well"
        assert not [frame for frame in beside.frames() if mark in frame]
        assert not [frame for frame in elsewhere.frames() if mark in frame]
        for where in (here, there, cables):
            passing = [p for p in where.packets() if mark in bytes(p)]
            if mine["linkinfo"]["info_kind"] == "veth":
                assert not passing, "a wire of one node passes through nothing but itself"
                continue
            assert len(passing) >= 16
            assert all(
                VXLAN in p and p[VXLAN].vni == mine["linkinfo"]["info_data"]["id"] for p in passing
            )
    assert first.end() == 0
    assert second.end() == 0


def _sixteen(address: str) -> bytes:
    """An address as both families compare: 16 bytes (`wire.md` §2.2)."""
    found = ipaddress.ip_address(address)
    return found.packed if found.version == 6 else b"\0" * 10 + b"\xff\xff" + found.packed


def _four(space, device) -> str:
    (found,) = (a for a in addresses(space, device["ifname"]) if "." in a)
    return found


def _in_pieces(packet: Ether) -> bool:
    if IPv6ExtHdrFragment in packet:
        return True
    return IP in packet and (packet[IP].flags.MF or packet[IP].frag > 0)

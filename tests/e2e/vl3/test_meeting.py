"""A floating domain's network: its registry and address plan are in a third cluster, its routers
and members in two others, and between those there is WireGuard only.
"""

from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, UDPerror
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Ether

from tests.e2e.vl3.domain import Domain, Member, full, joined, routes, unreachable
from tests.e2e.wires.capture import capture
from tests.e2e.wires.nodes import link
from tests.e2e.wires.sealed import kind
from tests.support.wait import until

LAB = """
name: meeting
topology:
  clusters:
    east: {trust-domain: east.test}
    west: {trust-domain: west.test}
    meet: {trust-domain: meet.test, managers: false}
  federation: [[east, west, meet]]
  discovery: static
  nodes:
    e: {cluster: east}
    w: {cluster: west}
    m: {cluster: meet}
    wan: {kind: switch}
  links:
    - {endpoints: ["e:eth0", "wan:p1"]}
    - {endpoints: ["w:eth0", "wan:p2"]}
    - {endpoints: ["m:eth0", "wan:p3"]}
  underlay: {ipv4: 198.18.0.0/24}
services:
  net@meet:
    payload: ip
    endpoints:
      r1: {on: e, prefixes: [172.16.0.0/24]}
      r2: {on: w, prefixes: [172.16.0.0/24]}
clients:
  m1: {on: e, connect: ["kernel://net@meet/nsm-1"]}
  m2: {on: e, connect: ["kernel://net@meet/nsm-1"]}
  m3: {on: w, connect: ["kernel://net@meet/nsm-1"]}
  m4: {on: w, connect: ["kernel://net@meet/nsm-1"]}
must-be-red: {up: "clients of a test are started by it"}
"""
SECRET = "6e6f626f64792072656164732074686973"  # what pings carry, as ping -p wants it
TLS = range(5001, 5007)  # where programs listen
MESSAGES = {bytes([kind, 0, 0, 0]) for kind in (1, 2, 3, 4)}  # of WireGuard


@pytest.fixture(
    scope="module",
    params=[20, pytest.param(40, marks=pytest.mark.long)],
    ids=["ipv4", "ipv6"],
)
def header(request: pytest.FixtureRequest) -> int:
    """How long the header is that the nodes' own network has: it is of one family."""
    return int(request.param)


@pytest.fixture(scope="module")
def lab_text(header: int) -> str:
    return LAB if header == 20 else LAB.replace("ipv4: 198.18.0.0/24", 'ipv6: "fd00:18::/64"')


async def start(domain: Domain, **variables: str) -> list[Member]:
    """An address plan, a router in each cluster, and a member of each."""
    domain.lend()
    for name in ("r1", "r2"):
        domain.route(name, **variables)
    members = [domain.member("m1", at="r1"), domain.member("m3", at="r2")]
    await joined(domain, "r1", "r2", families=1 if variables else 2)
    return members


async def all_reached(members: list[Member]) -> None:
    async def reached() -> bool:
        return await unreachable(members) == []

    await until(reached, "all members to reach one another", bar=2)


def readable(packets: list[Ether]) -> list[str]:
    """What of them is neither a tunnel's, nor a call between programs, nor a search for MACs."""
    found = []
    for packet in packets:
        if bytes.fromhex(SECRET) in bytes(packet):
            found.append(f"a member's ping: {packet.summary()}")
        elif TCP in packet and {packet[TCP].sport, packet[TCP].dport} & set(TLS):
            continue
        elif ARP in packet or (IPv6 in packet and packet[IPv6].nh in (0, 58)):
            continue  # the nodes' own: members' addresses are looked for below
        elif ICMP in packet and packet[ICMP].type in (0, 8):
            continue  # a forwarder's, of whether the other node is alive; as above
        elif IP in packet and packet[IP].proto == 2:
            continue  # IGMP: a switch says within a second that it joined "all snoopers"
        elif UDP in packet and bytes(packet[UDP].payload)[:4] in MESSAGES:
            continue
        elif UDPerror in packet and bytes(packet[UDPerror].payload)[:4] in MESSAGES:
            continue  # what came before the tunnel that it is for, sent back
        else:
            found.append(packet.summary())
    return found


async def test_members_of_two_clusters_are_one_network_that_nobody_between_them_reads(
    domain: Domain, header: int
) -> None:
    with capture(domain.space("wan"), "p1") as between:
        members = await start(domain)
        members += [domain.member("m2", at="r1"), domain.member("m4", at="r2")]
        assert [one.router for one in members] == ["r1", "r2", "r1", "r2"]
        fits = 1500 - header - 40  # UDP's header and WireGuard's
        await until(lambda: {one.mtu for one in members} == {fits}, "one MTU for all", bar=2)
        assert await unreachable(members, "-p", SECRET) == []
        for one, other in ((members[0], members[1]), (members[1], members[0])):
            for address in other.addresses:
                assert await one.space.pings(address, *full(one, address)), address
        packets = between.packets()
    assert readable(packets) == []
    inner = {address for one in members for address in one.addresses}
    assert not [one.summary() for one in packets if inner & set(named(one))]
    carried = [one for one in packets if UDP in one and bytes(one[UDP].payload)[0] == 4]
    assert len(carried) >= 2 * 2 * 8, "the pings of eight pairs in both families"
    (device,) = (one for one in domain.space("r2").ip("route", "get", members[0].addresses[0]))
    assert kind(link(domain.space("r2"), device["dev"])) == "wireguard"


def named(packet: Ether) -> list[str]:
    """The addresses of an ARP or a neighbour's message, and of the IP header."""
    fields = ("src", "dst", "psrc", "pdst", "tgt")
    layers = [packet.getlayer(n) for n in range(1, 6) if packet.getlayer(n)]
    return [str(one.fields[field]) for one in layers for field in fields if field in one.fields]


async def test_who_registered_no_router_is_no_router_in_whatever_cluster(domain: Domain) -> None:
    members = await start(domain)
    for place in ("m2", "m4"):  # of the router's own trust domain, and of the other
        process = replace(domain.process(place), module="tests.e2e.vl3.pretender")
        pretending = domain.bear(
            process,
            place,
            NSM_NAME=place,
            PRETENDER_URL=domain.url(place, "r1"),
            PRETENDER_BEHIND="172.16.1.0/24",
        )
        assert pretending.ended() == 0, pretending.words
        assert "has registered no router of it" in pretending.words, pretending.words
        assert f"/client/{place}, who says that more of the domain" in pretending.words
    assert await unreachable(members) == []


async def test_a_network_of_ipv6_only_crosses_clusters_as_well(domain: Domain) -> None:
    with capture(domain.space("wan"), "p2") as between:
        members = await start(domain, NSM_FAMILIES="6")
        assert [len(one.addresses) for one in members] == [1, 1]
        await all_reached(members)
        assert await unreachable(members, "-p", SECRET) == []
        assert readable(between.packets()) == []
    for name in ("r1", "r2"):
        assert all(":" in one for one in routes(domain.space(name)))


async def test_the_least_mtu_between_clusters_is_every_members(domain: Domain, header: int) -> None:
    """Down to an underlay of 1280 bytes, which leaves IPv4 enough."""
    west = domain.space("w")
    west.do("link", "set", "eth0", "mtu", "1280")
    try:
        members = await start(domain, NSM_FAMILIES="4")
        await until(lambda: [one.mtu for one in members] == [1240 - header] * 2, "the MTU", bar=2)
        await all_reached(members)
        one, other = members
        assert await one.space.pings(other.addresses[0], *full(one, other.addresses[0]))
        domain.end_clients()
        domain.lend()
        domain.route("r1")
        six = domain.route("r2")
        await until(
            lambda: any("IPv6 needs 1280" in line for line in six.log),
            "a router to say why it does not join another",
            bar=2,
        )
    finally:
        west.do("link", "set", "eth0", "mtu", "1500")

"""What a router passes on, and what it does not: by captures wherever it could come out."""

from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, UDP, IPOption_LSRR
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Packet, Raw

from tests.e2e.vl3.domain import LAB as ONE
from tests.e2e.vl3.domain import Domain, Member, echoes, joined, unreachable
from tests.e2e.wires.capture import capture
from tests.e2e.wires.nodes import link
from tests.support.wait import until

TWIN = """
  twin:
    payload: ip
    endpoints:
      t1: {on: one, prefixes: [172.16.0.0/24]}
      t2: {on: two, prefixes: [172.16.0.0/24]}
clients:
  n1: {on: one, connect: ["kernel://twin/nsm-1"]}
  n3: {on: two, connect: ["kernel://twin/nsm-1"]}
"""
SECRET = b"only for net"
STOLEN, NOBODYS = "172.16.0.2", "172.16.0.77"  # of the second member's, and of no member's
ELSEWHERE = ("10.9.9.9", "198.18.0.2", "2001:db8:99::9", "fd00::9")


@pytest.fixture(scope="module")
def lab_text() -> str:
    return ONE.replace("\nclients:", TWIN)


async def net(domain: Domain) -> list[Member]:
    domain.lend()
    for name in ("r1", "r2"):
        domain.route(name)
    members = [domain.member(f"m{n}", at=at) for n, at in ((1, "r1"), (2, "r1"), (3, "r2"))]
    await joined(domain, "r1", "r2")
    return members


async def test_two_networks_of_the_same_addresses_on_the_same_nodes_never_meet(
    domain: Domain,
) -> None:
    members = await net(domain)
    domain.lend("twin")
    for name in ("t1", "t2"):
        domain.route(name)
    twins = [domain.member("n1", at="t1"), domain.member("n3", at="t2")]
    await joined(domain, "t1", "t2")
    one, _, three = members
    assert [twin.addresses for twin in twins] == [one.addresses, three.addresses]
    before = [echoes(each) for each in (three, *twins)]
    pattern = SECRET.hex()
    with (
        capture(twins[0].space) as first,
        capture(twins[1].space) as second,
        capture(domain.space("t1")) as third,
        capture(domain.space("t2")) as fourth,
        capture(three.space) as right,
    ):
        assert await unreachable(members, "-p", pattern) == []
        assert await unreachable(twins) == []
        wrong = [frame for place in (first, second, third, fourth) for frame in place.frames()]
        assert wrong, "what the twins say themselves"
        assert not [frame for frame in wrong if SECRET in frame]
        assert any(SECRET in frame for frame in right.frames())
    after = [echoes(each) for each in (three, *twins)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 1]


def foreign(own: str, own6: str, to: str, to6: str) -> Iterator[tuple[str, Packet]]:
    """Packets that a router has no business to pass on; own is the sender's, to a member's."""
    for stolen in (STOLEN, NOBODYS, "10.9.9.9", "127.0.0.1", "0.0.0.0", "255.255.255.255"):
        yield f"from {stolen}", IP(src=stolen, dst=to) / UDP(sport=1, dport=9)
        yield f"from {stolen}, to end here", IP(src=stolen, dst=to, ttl=1) / UDP(sport=1, dport=9)
        yield f"from {stolen} to nobody", IP(src=stolen, dst=NOBODYS) / ICMP()
    for stolen in (to6, "2001:db8:10::77", "2001:db8:99::1", "::1", "fe80::1", "ff02::1"):
        yield f"from {stolen}", IPv6(src=stolen, dst=to6) / UDP(sport=1, dport=9)
        yield f"from {stolen}, to end here", IPv6(src=stolen, dst=to6, hlim=1) / UDP(dport=9)
        yield (
            f"from {stolen} to nobody",
            IPv6(src=stolen, dst="2001:db8:10::77") / ICMPv6EchoRequest(),
        )
    for far in (*ELSEWHERE, "255.255.255.255", "172.16.255.255", "224.0.0.251", "239.1.2.3"):
        if ":" not in far:
            yield f"to {far}", IP(src=own, dst=far, ttl=9) / UDP(sport=1, dport=9)
    for far in (*ELSEWHERE, "ff02::1", "ff0e::1", "::1", "fe80::1"):
        if ":" in far:
            yield f"to {far}", IPv6(src=own6, dst=far, hlim=9) / UDP(sport=1, dport=9)
    loose = IP(src=own, dst="172.16.0.0", options=[IPOption_LSRR(routers=[to])])
    yield "by a route of its own", loose / UDP(sport=1, dport=9)
    yield "asking who has it", ARP(op=1, psrc=own, pdst=to)
    yield "of another VLAN", Dot1Q(vlan=1) / IP(src=own, dst=to) / UDP(sport=1, dport=9)
    yield "of no protocol", Dot1Q(vlan=0, type=0x88B5)


async def test_what_is_not_the_networks_comes_out_nowhere(domain: Domain) -> None:
    members = await net(domain)
    one, two, three = members
    assert two.addresses[0] == STOLEN
    own, own6 = one.addresses
    (way,) = one.space.ip("route", "get", two.addresses[0])
    (near,) = (
        at for at in one.space.ip("neigh", "show", "dev", "nsm-1") if at["dst"] == way["gateway"]
    )
    ether = Ether(src=link(one.space, "nsm-1")["address"], dst=near["lladdr"])
    with (
        capture(one.space, "nsm-1") as door,
        capture(two.space, "nsm-1") as beside,
        capture(three.space, "nsm-1") as far,
        capture(domain.space("r2")) as router,
        capture(domain.space("lan"), "p1") as between,
    ):
        sent = 0
        for other, other6 in (two.addresses, three.addresses):
            for what, packet in foreign(own, own6, other, other6):
                door.send(bytes(ether / packet / Raw(SECRET + what.encode())))
                sent += 1
        for address in (*two.addresses, *three.addresses):  # what came before these has come
            kind = IPv6 if ":" in address else IP
            good = kind(src=own6 if ":" in address else own, dst=address)
            door.send(bytes(ether / good / UDP(sport=1, dport=9) / Raw(b"the last")))
        came: dict[str, list[bytes]] = {"beside": [], "far": []}

        def all_last() -> bool:
            came["beside"] += beside.frames()
            came["far"] += far.frames()
            last = [{one[12:14] for one in each if b"the last" in one} for each in came.values()]
            return last == [{b"\x08\x00", b"\x86\xdd"}] * 2

        await until(all_last, "what is the network's", bar=1)
        others = [*came["beside"], *came["far"], *router.frames(), *between.frames()]
    leaked = [frame for frame in others if SECRET in frame]
    assert sent > 100
    assert not leaked, f"{len(leaked)} of {sent}: {Ether(leaked[0]).summary()} {leaked[0]!r}"
    assert await unreachable(members) == []

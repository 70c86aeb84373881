"""Routers, members and the wires between them, as routes: in whatever order things happen, each
namespace knows one way to each place, and in the end everybody reaches everybody.
"""

from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoints.vl3.addresses import RouterAddresses
from forwarder import crossconnect
from nsm.kernel.state import Address, Interface, Namespace, Route, _members
from nsm.mechanisms import NAME
from nsm.model import Connection, Context, Mechanism, Path, Segment

pytestmark = pytest.mark.unit
BEFORE, AFTER = ("172.16.0.0/16", "2001:db8:10::/64"), ("10.77.0.0/16", "2001:db8:77::/64")


@dataclass
class Network:
    """Each pair of routers has a wire, which the later asks the earlier for; so has each member.

    A namespace's wires are as the last request of each left them at both ends.
    """

    routers: dict[str, RouterAddresses]
    wires: dict[str, tuple[str, str]]  # who asks, and which router
    held: dict[str, Connection] = field(default_factory=dict)
    ends: dict[str, dict[str, Interface]] = field(default_factory=dict)

    def lend(self, router: str, number: int, domain: tuple[str, str], family: int) -> None:
        """The prefix of that number goes to that router."""
        whole = ip_network(domain[family == 6])
        length = 24 if family == 4 else 112
        start = int(whole.network_address) + (number << (whole.max_prefixlen - length))
        self.routers[router].lend(f"{ip_address(start)}/{length}", domain)

    def ask(self, wire: str) -> None:
        """A request for a wire, and what both forwarders make of the answer."""
        who, router = self.wires[wire]
        segment = Segment(who, wire)
        new = Connection(id=wire, service="net", path=Path((segment,)), context=Context())
        conn = self.held.get(wire, new)
        asked = self.routers[who].ask(conn.ip) if who in self.routers else conn.ip
        ip = self.routers[router].assign(wire, asked, router=who in self.routers)
        conn = self.held[wire] = replace(conn, context=Context(ip=ip))
        here = Namespace(hash(who), 0, name=who)
        mechanism = Mechanism("LOCAL", "KERNEL", {NAME: wire[:15]})
        self.ends.setdefault(who, {})[wire] = crossconnect.client_side(conn, mechanism, here, "")
        self.ends.setdefault(router, {})[wire] = crossconnect.endpoint_side(
            conn, mechanism, here, ""
        )

    def ways(self, place: str) -> dict[object, str]:
        """Where each prefix leads to; one place each."""
        found: dict[object, str] = {}
        for wire, interface in self.ends.get(place, {}).items():
            (other,) = set(self.wires[wire]) - {place}
            for item in _members(interface):
                if isinstance(item, Route):
                    assert found.setdefault(item.to, other) == other, f"{place}: {item.to}"
        return found

    def has(self, place: str) -> set[IPv4Address | IPv6Address]:
        """The addresses of its wires."""
        items = [item for one in self.ends.get(place, {}).values() for item in _members(one)]
        return {item.cidr.ip for item in items if isinstance(item, Address)}

    def reached(self, start: str, address: IPv4Address | IPv6Address) -> str:
        """Who gets a packet to that address; empty if nobody does."""
        place = start
        for _ in range(4):
            if address in self.has(place):
                return place
            ways = self.ways(place)
            fitting = [to for to in ways if address in to]  # type: ignore[operator]
            if not fitting:
                return ""
            place = ways[max(fitting, key=lambda to: to.prefixlen)]  # type: ignore[attr-defined]
        return ""


@st.composite
def networks(draw: st.DrawFn) -> Network:
    routers = [f"r{n}" for n in range(draw(st.integers(1, 4)))]
    wires = {f"{b}-{a}": (b, a) for n, a in enumerate(routers) for b in routers[n + 1 :]}
    for n in range(draw(st.integers(1, 5))):
        wires[f"m{n}"] = (f"m{n}", draw(st.sampled_from(routers)))
    return Network({one: RouterAddresses((4, 6)) for one in routers}, wires)


def check(network: Network, domain: tuple[str, str]) -> None:
    """Everybody reaches everybody, over what is the domain's only."""
    inside = [ip_network(one) for one in domain]
    everybody = network.ends.keys()
    for one in everybody:
        addresses = network.has(one)
        assert len(addresses) == 2, f"{one} has {addresses}"
        assert all(any(address in net for net in inside) for address in addresses)
        for to in network.ways(one):
            assert any(to.version == net.version and to.subnet_of(net) for net in inside), to  # type: ignore[attr-defined]
        for other in everybody:
            for address in network.has(other):
                assert network.reached(one, address) == other, f"{one} → {other} {address}"


@settings(max_examples=60)
@given(networks(), st.data())
def test_in_whatever_order_a_network_comes_and_moves_it_is_one(
    network: Network, data: st.DataObject
) -> None:
    for domain in (BEFORE, AFTER):
        lends = []
        for family in (4, 6):
            numbers = data.draw(st.permutations(range(len(network.routers))))
            lends += [
                (router, number, family)
                for router, number in zip(network.routers, numbers, strict=True)
            ]
        lends = data.draw(st.permutations(lends))
        for router, number, family in lends:
            network.lend(router, number, domain, family)
            if not all(one.ready for one in network.routers.values()):
                continue
            for wire in data.draw(st.lists(st.sampled_from(sorted(network.wires)), max_size=3)):
                network.ask(wire)
                for place in network.ends:
                    network.ways(place)  # has one way to each place
        for wire in data.draw(st.permutations(sorted(network.wires))):
            network.ask(wire)
        # what others were told meanwhile they are asked to ask for again
        for wire in data.draw(st.permutations(sorted(network.wires))):
            network.ask(wire)
        check(network, domain)

"""What both ends of a wire are to be, from what was agreed (`wire.md` §10.6, §14.5)."""

from ipaddress import ip_address, ip_interface, ip_network

import pytest

from forwarder.crossconnect import client_side, endpoint_side, macs
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel.state import Hop, Namespace, Policy, Selector
from nsm.model import (
    Connection,
    Context,
    EthernetContext,
    IPContext,
    Mechanism,
    Neighbour,
    PolicyRoute,
    Route,
)

HERE = Namespace(cookie=1, nsid=1)
KERNEL = Mechanism("LOCAL", "KERNEL", {"name": "nsm-1"})
A, B = "169.254.0.1/32", "169.254.0.0/32"


def conn(ip=None, *, payload="ETHERNET", ethernet=None, mtu=0):
    ip = ip or IPContext((A,), (B,), src_routes=(Route(B),), dst_routes=(Route(A),))
    return Connection("c", "svc", context=Context(ip, ethernet=ethernet, mtu=mtu), payload=payload)


def test_the_default_responders_context_becomes_an_address_and_a_route_a_side():
    client = client_side(conn(), KERNEL, HERE, "")
    assert client.addresses == (ip_interface(A),)
    assert client.routes == (Hop(ip_network(B)),)
    endpoint = endpoint_side(conn(), KERNEL, HERE, "")
    assert endpoint.addresses == (ip_interface(B),)
    assert endpoint.routes == (Hop(ip_network(A)),)


def test_a_far_address_within_an_own_network_needs_no_route():
    ip = IPContext(("10.0.0.2/24",), ("10.0.0.1/24", "10.9.0.1/32"))
    assert client_side(conn(ip), KERNEL, HERE, "").routes == (Hop(ip_network("10.9.0.1/32")),)


def test_a_route_without_a_next_hop_goes_by_the_first_far_address_of_its_family():
    ip = IPContext(
        (A, "2001:db8::1/128"),
        (B, "2001:db8::/128"),
        src_routes=(Route("10.0.0.0/8"), Route("2001:db8:1::/64")),
    )
    routes = client_side(conn(ip), KERNEL, HERE, "").routes
    assert Hop(ip_network("10.0.0.0/8"), ip_address("169.254.0.0")) in routes
    assert Hop(ip_network("2001:db8:1::/64"), ip_address("2001:db8::")) in routes


def test_a_route_inside_a_far_network_is_on_link_and_a_given_next_hop_is_kept():
    ip = IPContext(
        ("10.1.0.2/32",),
        ("10.1.0.1/24",),
        src_routes=(Route("10.1.0.128/25"), Route("10.2.0.0/16", "10.1.0.7")),
    )
    routes = client_side(conn(ip), KERNEL, HERE, "").routes
    assert Hop(ip_network("10.1.0.128/25")) in routes
    assert Hop(ip_network("10.2.0.0/16"), ip_address("10.1.0.7")) in routes


def test_wires_for_ip_packets_pin_the_far_end_and_those_for_frames_do_not():
    far = "02:00:00:00:00:01"
    assert client_side(conn(payload="IP"), KERNEL, HERE, far).neighbours == (
        (ip_address("169.254.0.0"), far),
    )
    assert client_side(conn(), KERNEL, HERE, far).neighbours == ()
    given = IPContext((A,), (B,), neighbours=(Neighbour("10.0.0.9", "02:00:00:00:00:09"),))
    for side in (client_side, endpoint_side):
        assert side(conn(given), KERNEL, HERE, "").neighbours == (
            (ip_address("10.0.0.9"), "02:00:00:00:00:09"),
        )


def test_macs_that_were_agreed_are_taken_and_the_others_derived():
    agreed = EthernetContext("02:00:00:00:00:0a", "02:00:00:00:00:0b")
    assert client_side(conn(ethernet=agreed), KERNEL, HERE, "").mac == "02:00:00:00:00:0a"
    assert endpoint_side(conn(ethernet=agreed), KERNEL, HERE, "").mac == "02:00:00:00:00:0b"
    assert macs(conn(ethernet=agreed)) == ("02:00:00:00:00:0a", "02:00:00:00:00:0b")
    src, dst = macs(conn())
    assert src != dst
    assert macs(conn()) == (src, dst)


def test_policies_are_the_clients():
    ip = IPContext(
        (A,),
        (B,),
        policies=(
            PolicyRoute("172.16.3.1/32", "6", "5555", "", (Route("172.16.4.0/24", "172.16.3.1"),)),
            PolicyRoute(proto="17", src_port="100-200"),
        ),
    )
    assert client_side(conn(ip), KERNEL, HERE, "").policies == (
        Policy(
            Selector(ip_network("172.16.3.1/32"), 6, None, (5555, 5555)),
            (Hop(ip_network("172.16.4.0/24"), ip_address("172.16.3.1")),),
        ),
        Policy(Selector(None, 17, (100, 200), None)),
    )
    assert endpoint_side(conn(ip), KERNEL, HERE, "").policies == ()


def test_the_agreed_mtu_counts_and_without_one_a_large_one():
    assert client_side(conn(mtu=1446), KERNEL, HERE, "").mtu == 1446
    assert client_side(conn(), KERNEL, HERE, "").mtu == 9000
    with pytest.raises(InvalidError, match="MTU 20; the least is 68"):
        client_side(conn(mtu=20), KERNEL, HERE, "")


@pytest.mark.parametrize(
    ("ip", "words"),
    [
        (IPContext(("300.0.0.1/32",)), "an address of connection c"),
        (IPContext((A,), (B,), src_routes=(Route("10.0.0.0/99"),)), "a route of connection c"),
        (IPContext((A,), (B,), src_routes=(Route("10.0.0.0/8", "x"),)), "a next hop or neighbour"),
        (IPContext((A,), (B,), policies=(PolicyRoute("y"),)), "a policy route of connection c"),
        (IPContext((A,), (B,), policies=(PolicyRoute(dst_port="9-1"),)), "ports '9-1'"),
        (IPContext((A,), (B,), policies=(PolicyRoute(proto="999"),)), "IP protocol 999"),
        (IPContext((A,) * 2000, (B,)), "carries 2000 addresses"),
    ],
)
def test_what_cannot_be_is_refused_with_whose_it_is(ip, words):
    with pytest.raises(InvalidError, match=words):
        client_side(conn(ip), KERNEL, HERE, "")


def test_a_name_the_kernel_would_refuse_is_refused_before():
    with pytest.raises(InvalidError, match="has 16 bytes, and Linux takes at most 15"):
        client_side(conn(), Mechanism("LOCAL", "KERNEL", {"name": "x" * 16}), HERE, "")


def test_what_an_endpoint_wants_and_we_do_not_do_is_said():
    wish = KERNEL.with_(IPTables4NatTemplate="-t nat -A POSTROUTING")
    with pytest.raises(UnsupportedError, match="IPTables4NatTemplate"):
        endpoint_side(conn(), wish, HERE, "")
    assert endpoint_side(conn(), KERNEL.with_(routeLocalNet="true"), HERE, "").route_localnet


@pytest.mark.parametrize("vlan", ["0", "", "4096", "x"])
def test_no_vlan_is_an_interface_like_any_other(vlan):
    for side in (client_side, endpoint_side):
        plain = side(conn(mtu=1400), KERNEL, HERE, "")
        assert side(conn(mtu=1400), KERNEL.with_(vlan=vlan), HERE, "") == plain


def test_an_interface_with_a_vlan_gets_nothing_but_its_name_and_mac():
    for side, mac in ((client_side, "02:00:00:00:00:01"), (endpoint_side, "02:00:00:00:00:02")):
        ethernet = EthernetContext("02:00:00:00:00:01", "02:00:00:00:00:02")
        found = side(conn(ethernet=ethernet, mtu=1400), KERNEL.with_(vlan="4095"), HERE, "")
        assert (found.name, found.mac) == ("nsm-1", mac)
        assert found.addresses == found.routes == found.neighbours == found.policies == ()

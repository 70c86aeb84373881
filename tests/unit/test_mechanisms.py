"""Choosing mechanisms, VXLAN identifiers, MTUs and interface names."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm import mechanisms
from nsm.errors import ExhaustedError, InvalidError, UnsupportedError
from nsm.mechanisms import IPSEC, KERNEL, LOCAL, MEMIF, NOOP, REMOTE, VLAN, VXLAN, WIREGUARD
from nsm.model import Connection, Mechanism


def test_what_was_agreed_is_kept_whatever_the_preferences_say():
    agreed = Mechanism(LOCAL, KERNEL, {"name": "nsm-1"})
    conn = Connection("c", mechanism=agreed)
    found = mechanisms.acceptable(conn, [Mechanism(LOCAL, NOOP)], {KERNEL, NOOP})
    assert found == (agreed,)


def test_what_was_agreed_and_is_not_served_here_is_refused():
    conn = Connection("c", "svc", mechanism=Mechanism(LOCAL, MEMIF))
    with pytest.raises(UnsupportedError) as refused:
        mechanisms.acceptable(conn, [Mechanism(LOCAL, KERNEL)], {KERNEL, NOOP})
    assert str(refused.value) == (
        "unsupported mechanism 'MEMIF' of connection c to 'svc'; ask for KERNEL or NOOP"
    )


def test_preferences_count_in_their_order_and_by_type_alone():
    offered = [Mechanism("", NOOP), Mechanism("", MEMIF), Mechanism("odd", KERNEL)]
    found = mechanisms.acceptable(Connection("c"), offered, {KERNEL, NOOP})
    assert [one.type for one in found] == [NOOP, KERNEL]


@pytest.mark.parametrize(
    ("offered", "said"), [([Mechanism(LOCAL, MEMIF), Mechanism()], "MEMIF, (empty)"), ([], "none")]
)
def test_nothing_in_common_is_said_in_upstreams_words(offered, said):
    with pytest.raises(UnsupportedError) as refused:
        mechanisms.acceptable(Connection("c", "svc"), offered, {KERNEL})
    assert str(refused.value) == (
        f"cannot support any of the requested mechanism: {said}, for connection c to 'svc';"
        " ask for KERNEL"
    )


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("unix:///run/x.sock", LOCAL),
        ("inode://4/12", LOCAL),
        ("tcp://10.0.0.1:5001", REMOTE),
        ("10.0.0.1:5001", REMOTE),
    ],
)
def test_the_next_hops_url_says_whether_it_is_on_this_node(url, kept):
    both = [Mechanism(LOCAL, KERNEL), Mechanism(REMOTE, VXLAN)]
    assert [one.cls for one in mechanisms.reachable(url, both)] == [kept]


def test_priority_moves_types_to_the_front_in_any_case_and_keeps_the_rest_in_order():
    offered = [Mechanism(REMOTE, type_) for type_ in (VXLAN, WIREGUARD, IPSEC, VLAN)]
    ordered = mechanisms.prioritised(offered, ["vlan", "Wireguard", "absent"])
    assert [one.type for one in ordered] == [VLAN, WIREGUARD, VXLAN, IPSEC]


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0), ("12", 12), ("-1", 0), ("0x10", 0), (" 1", 0), ("٣", 0), ("9" * 40, 0), ("+1", 0)],
)
def test_what_is_no_number_reads_as_zero(text, value):
    assert mechanisms.number(text) == value


@pytest.mark.parametrize(
    ("parameters", "parity"),
    [
        ({"src_ip": "10.0.0.1", "dst_ip": "10.0.0.2"}, 0),
        ({"src_ip": "10.0.0.2", "dst_ip": "10.0.0.1"}, 1),
        ({"src_ip": "10.0.0.1", "dst_ip": "10.0.0.1"}, 0),
        ({"src_ip": "10.0.0.9", "dst_ip": "10.0.0.10"}, 0),  # as bytes, not as text
        ({"src_ip": "fd00::2", "dst_ip": "10.0.0.1"}, 1),
        ({"src_ip": "10.0.0.1", "dst_ip": "::ffff:10.0.0.1"}, 0),
        ({"src_ip": "9.9.9.9", "dst_ip": "1.1.1.1", "orig_src_ip": "1.1.1.0"}, 0),
        ({"src_ip": "1.1.1.1", "dst_ip": "9.9.9.9", "orig_dst_ip": "1.1.1.0"}, 1),
        ({"src_ip": "9.9.9.9", "dst_ip": "1.1.1.1", "orig_src_ip": ""}, 0),
        ({"src_ip": "1.1.1.1", "dst_ip": "9.9.9.9", "orig_dst_ip": ""}, 1),
        ({"src_ip": "9.9.9.9", "dst_ip": "1.1", "orig_src_ip": "", "orig_dst_ip": ""}, 0),
        ({"src_ip": "fe80::1%eth0", "dst_ip": "fe80::"}, 0),
        ({}, 0),
    ],
)
def test_the_side_of_the_lower_address_draws_even_identifiers(parameters, parity):
    assert mechanisms.vni_parity(Mechanism(REMOTE, VXLAN, parameters)) == parity


@given(st.ip_addresses(), st.ip_addresses())
def test_two_nodes_that_tunnel_both_ways_never_draw_the_same(a, b):
    there = Mechanism(REMOTE, VXLAN, {"src_ip": str(a), "dst_ip": str(b)})
    back = Mechanism(REMOTE, VXLAN, {"src_ip": str(b), "dst_ip": str(a)})
    same = _sixteen(a) == _sixteen(b)
    assert (mechanisms.vni_parity(there) == mechanisms.vni_parity(back)) == same


@given(st.sets(st.integers(0, 40)), st.booleans())
def test_a_drawn_identifier_is_free_not_zero_and_of_the_right_parity(taken, odd):
    ends = ("10.0.0.2", "10.0.0.1") if odd else ("10.0.0.1", "10.0.0.2")
    mechanism = Mechanism(REMOTE, VXLAN, dict(zip(("src_ip", "dst_ip"), ends, strict=True)))
    draws = iter(range(64))
    drawn = mechanisms.draw_vni(mechanism, taken, below=lambda _: next(draws))
    assert drawn not in taken
    assert 0 < drawn < 1 << 24
    assert drawn % 2 == odd


def test_the_last_identifiers_fit_into_24_bits():
    odd = Mechanism(REMOTE, VXLAN, {"src_ip": "2.0.0.0", "dst_ip": "1.0.0.0"})
    assert mechanisms.draw_vni(odd, (), below=lambda limit: limit - 1) == 0xFFFFFF
    assert mechanisms.vni(odd.with_(vni="16777215")) == 0xFFFFFF
    assert mechanisms.vni(odd.with_(vni="16777216")) == 0


def test_when_all_are_taken_it_says_between_whom():
    mechanism = Mechanism(REMOTE, VXLAN, {"src_ip": "10.0.0.1", "dst_ip": "10.0.0.2"})
    with pytest.raises(ExhaustedError, match=r"no free even .* from 10\.0\.0\.1 to 10\.0\.0\.2"):
        mechanisms.draw_vni(mechanism, range(1 << 24))


@pytest.mark.parametrize(
    ("type_", "ip", "mtu"),
    [
        (VXLAN, "10.0.0.1", 1446),
        (VXLAN, "fd00::1", 1426),
        (WIREGUARD, "10.0.0.1", 1440),
        (WIREGUARD, "fd00::1", 1420),
        (IPSEC, "10.0.0.1", 1419),
        (IPSEC, "fd00::1", 1399),
        (VLAN, "", 1500),
    ],
)
def test_tunnels_cost_what_the_protocol_says(type_, ip, mtu):
    assert mechanisms.tunnel_mtu(type_, ip, 1500) == mtu


def test_a_tunnel_without_room_or_without_address_is_refused():
    with pytest.raises(InvalidError, match="leaves 46 bytes of its device's 100"):
        mechanisms.tunnel_mtu(VXLAN, "10.0.0.1", 100)
    with pytest.raises(InvalidError, match="'eth0' is no IP address"):
        mechanisms.tunnel_mtu(VXLAN, "eth0", 1500)


def test_the_lowest_mtu_that_somebody_said_counts():
    assert mechanisms.lowest_mtu(0, 1446, 9000) == 1446
    assert mechanisms.lowest_mtu(0, 0) == 0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * 16, "has 16 bytes, and Linux takes at most 15"),
        ("é" * 8, "has 16 bytes"),
        ("", "is empty"),
        (".", "means something else to Linux"),
        ("..", "means something else to Linux"),
        ("all", "means something else to Linux"),
        ("default", "means something else to Linux"),
        ("a/b", "holds '/'"),
        ("a b", "holds ' '"),
        ("a:b", "holds ':'"),
        ("nsm%d", "holds '%'"),
        ("é", "holds 'é'"),
        ("a\0b", r"holds '\x00'"),
    ],
)
def test_a_name_the_kernel_would_not_take_is_refused_with_whose_it_is(name, problem):
    with pytest.raises(InvalidError) as refused:
        mechanisms.check_name(name, whose="client app")
    assert f"of client app {problem}" in str(refused.value)


def test_names_the_kernel_takes_are_taken():
    for name in ("nsm-1", "a" * 15, "svc@x", "eth0.100", "-"):
        assert mechanisms.check_name(name, whose="client app") == name


@given(st.text(max_size=40))
def test_a_generated_name_is_one_the_kernel_takes(service):
    name = mechanisms.generate_name(service)
    assert mechanisms.check_name(name, whose="us") == name
    assert len(name) == 15


def test_a_generated_name_begins_with_ten_bytes_of_the_service():
    assert mechanisms.generate_name("icmp-responder", choose=lambda _: "A") == "icmp-respo-AAAA"
    assert mechanisms.generate_name("vpn", choose=lambda _: "A") == "vpn-AAAAAAAAAAA"


def _sixteen(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bytes:
    v4 = address.version == 4
    return (ipaddress.ip_address(f"::ffff:{address}") if v4 else address).packed

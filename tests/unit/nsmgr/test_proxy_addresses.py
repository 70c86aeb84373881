"""Addresses at a domain's border, on both sides of it (`wire.md` §9.5)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import PreconditionError
from nsm.mechanisms import DST_IP, ORIG_DST_IP, ORIG_SRC_IP, SRC_IP, vni_parity
from nsm.model import Mechanism
from nsmgr.proxy.addresses import AddressMap, Crossing, back, has_left, onward, parse

ONE = AddressMap({"10.0.0.1": "198.18.0.1", "2001:db8::1": "2001:db8:f::1"}, "/etc/one.yaml")
TWO = AddressMap({"10.0.0.1": "198.18.0.2", "2001:db8::1": "2001:db8:f::2"}, "/etc/two.yaml")
LEAVING, ENTERING, NONE = Crossing.LEAVING, Crossing.ENTERING, Crossing.NONE
ENDS = {  # inner of both (they may well be the same), outer of one, outer of two
    "ipv4": ("10.0.0.1", "198.18.0.1", "198.18.0.2"),
    "ipv6": ("2001:db8::1", "2001:db8:f::1", "2001:db8:f::2"),
}


def vxlan(**parameters):
    return Mechanism("REMOTE", "VXLAN", {"src_port": "4789", **parameters})


@pytest.mark.parametrize("family", ENDS)
def test_each_side_sees_its_own_inner_address_and_the_others_outer_one(family):
    inner, outer_one, outer_two = ENDS[family]
    asked = vxlan(src_ip=inner)

    between = onward(asked, LEAVING, ONE)
    assert between.parameters == {
        "src_port": "4789", SRC_IP: outer_one, ORIG_SRC_IP: inner,
    }  # fmt: skip
    assert has_left((between,))
    assert not has_left((asked,))
    at_two = onward(between, ENTERING, TWO)
    assert at_two == between

    answered = at_two.with_(**{DST_IP: inner, "vni": "8"})
    out_again = back(answered, ENTERING, (between,), TWO)
    assert out_again.parameters == {
        "src_port": "4789", "vni": "8", SRC_IP: outer_one, ORIG_SRC_IP: inner,
        DST_IP: outer_two, ORIG_DST_IP: inner,
    }  # fmt: skip
    at_one = back(out_again, LEAVING, (asked,), ONE)
    assert at_one.parameters == {
        "src_port": "4789", "vni": "8", SRC_IP: inner, DST_IP: outer_two, ORIG_DST_IP: inner,
    }  # fmt: skip


@pytest.mark.parametrize("family", ENDS)
def test_a_refresh_says_the_same_again(family):
    inner, outer_one, outer_two = ENDS[family]
    agreed = vxlan(src_ip=inner, dst_ip=outer_two, orig_dst_ip=inner, vni="8")
    between = onward(agreed, LEAVING, ONE)
    assert between.get(SRC_IP) == outer_one
    assert between.get(ORIG_SRC_IP) == inner
    # the responder speaks for its own side: what it said last time is not told it
    at_two = onward(between, ENTERING, TWO)
    assert DST_IP not in at_two.parameters
    assert ORIG_DST_IP not in at_two.parameters
    answered = at_two.with_(**{DST_IP: inner})
    assert back(back(answered, ENTERING, (), TWO), LEAVING, (agreed,), ONE) == agreed


def test_an_upstream_peers_empty_original_is_none():
    """A Go proxy's forwarder sends `orig_src_ip` back as it got it: empty (`wire.md` §9.5)."""
    asked = vxlan(src_ip="10.0.0.1", orig_src_ip="")
    assert not has_left((asked,))
    assert onward(asked, LEAVING, ONE).get(ORIG_SRC_IP) == "10.0.0.1"


def test_who_draws_an_identifier_gets_the_parity_of_addresses_that_are_there():
    asked = vxlan(src_ip="10.0.0.1")
    answered = vxlan(src_ip="198.18.0.1", orig_src_ip="10.0.0.1", dst_ip="9.0.0.1")
    assert vni_parity(back(answered, LEAVING, (asked,), ONE)) == 1


def test_what_the_other_domain_says_of_our_side_counts_nothing():
    asked = vxlan(src_ip="10.0.0.1")
    lied = vxlan(src_ip="192.0.2.66", orig_src_ip="192.0.2.67", dst_ip="198.18.0.2")
    assert back(lied, LEAVING, (asked,), ONE).get(SRC_IP) == "10.0.0.1"


@pytest.mark.parametrize("crossing", Crossing)
def test_what_names_no_address_passes_as_it_is(crossing):
    for mechanism in (
        Mechanism("LOCAL", "KERNEL", {"name": "nsm-1"}),
        Mechanism("REMOTE", "VLAN", {"vlan-id": "7"}),
    ):
        assert onward(mechanism, crossing, ONE) == mechanism
        assert back(mechanism, crossing, (mechanism,), ONE) == mechanism


def test_inside_a_domain_nothing_changes():
    asked = vxlan(src_ip="192.0.2.1")
    assert onward(asked, NONE, ONE) == asked
    answered = asked.with_(**{DST_IP: "192.0.2.2"})
    assert back(answered, NONE, (asked,), ONE) == answered


@given(st.ip_addresses(), st.ip_addresses())
def test_without_a_file_each_address_is_its_own(src, dst):
    asked = vxlan(src_ip=str(src))
    answered = onward(onward(asked, LEAVING, AddressMap()), ENTERING, AddressMap())
    answered = answered.with_(**{DST_IP: str(dst)})
    told = back(answered, ENTERING, (), AddressMap())
    told = back(told, LEAVING, (asked,), AddressMap())
    assert (told.get(SRC_IP), told.get(DST_IP)) == (str(src), str(dst))


@given(st.ip_addresses(), st.ip_addresses())
def test_addresses_are_compared_as_addresses(inner, outer):
    text = f"{inner.exploded.upper()}: {outer.exploded.upper()}\n"
    for asked in (str(inner), inner.exploded, inner.exploded.upper()):
        assert parse(text, "f").outside(asked) == str(outer)


def test_an_address_that_yaml_takes_for_a_number_is_one():
    assert parse("1:2:3:4:5:6:7:8: 2001:db8::8", "f").outside("1:2:3:4:5:6:7:8") == "2001:db8::8"


@pytest.mark.parametrize("crossing", [LEAVING, ENTERING])
def test_an_unmapped_address_is_refused_by_name_file_and_what_to_add(crossing):
    with pytest.raises(PreconditionError) as refused:
        onward(vxlan(src_ip="10.0.0.9"), LEAVING, ONE)
    if crossing is ENTERING:
        with pytest.raises(PreconditionError) as refused:
            back(vxlan(src_ip="x", dst_ip="10.0.0.9"), ENTERING, (), ONE)
    for word in ("'10.0.0.9'", "/etc/one.yaml", "add the line  10.0.0.9: "):
        assert word in str(refused.value)


def test_an_address_that_the_other_domains_map_lacks_is_told_as_such():
    """An upstream proxy leaves it empty (`wire.md` §9.5)."""
    with pytest.raises(PreconditionError, match=r"lacks 10\.0\.0\.9"):
        onward(vxlan(src_ip="", orig_src_ip="10.0.0.9"), ENTERING, ONE)
    asked = vxlan(src_ip="10.0.0.1")
    with pytest.raises(PreconditionError, match=r"lacks 10\.0\.0\.9"):
        back(vxlan(dst_ip="", orig_dst_ip="10.0.0.9"), LEAVING, (asked,), ONE)


def test_an_empty_file_maps_nothing_and_is_not_none():
    with pytest.raises(PreconditionError):
        parse("", "f").outside("10.0.0.1")


@pytest.mark.parametrize("text", ["- 10.0.0.1", "10.0.0.1: nobody", "host: 10.0.0.1", "a: ["])
def test_a_file_that_is_no_map_of_addresses_is_refused(text):
    import yaml

    with pytest.raises((ValueError, yaml.YAMLError)):
        parse(text, "f")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("tcp://10.0.0.1:5004", "tcp://198.18.0.1:5004"),
        ("tcp://[2001:db8::1]:5004", "tcp://[2001:db8:f::1]:5004"),
        ("tcp://proxy.example:5004", "tcp://proxy.example:5004"),
        ("unix:///run/p.sock", "unix:///run/p.sock"),
    ],
)
def test_the_host_of_a_url_is_told_as_seen_from_outside(url, told):
    assert ONE.outside_url(url) == told

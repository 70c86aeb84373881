"""One workload's wires do not get the same addresses."""

import pytest

from nsm.errors import PreconditionError
from nsm.exclusions import check, excluded_for, hosts
from nsm.model import IPContext, Route
from nsm.nsurl import awareness_groups, parse

A, B, C = (parse(f"kernel://{name}") for name in "abc")


def wire(last: int) -> IPContext:
    return IPContext(src_ip_addrs=(f"10.0.0.{last}/32",), dst_ip_addrs=(f"10.0.0.{last - 1}/32",))


def test_hosts_are_both_ends_and_what_is_routed_to_alone():
    ip = IPContext(
        src_ip_addrs=("10.0.0.1/24", "fd00::1/128", "no address"),
        dst_ip_addrs=("10.0.0.2/32",),
        src_routes=(Route("10.0.0.2/32"), Route("10.0.9.9/32"), Route("192.0.2.0/24")),
        dst_routes=(Route("10.0.0.1/32"), Route("no prefix")),
    )
    assert hosts(ip) == ("10.0.0.1/32", "fd00::1/128", "10.0.0.2/32", "10.0.9.9/32")


def test_every_other_wire_is_excluded_once():
    both = [(A, wire(1)), (B, wire(1)), (C, wire(3))]
    assert excluded_for(parse("kernel://d"), both) == (
        "10.0.0.1/32",
        "10.0.0.0/32",
        "10.0.0.3/32",
        "10.0.0.2/32",
    )


def test_wires_of_one_awareness_group_may_overlap_and_others_may_not():
    groups = awareness_groups("[kernel://a,kernel://b],[kernel://c]")
    there = [(A, wire(1)), (C, wire(3))]
    assert excluded_for(B, there, groups) == ("10.0.0.3/32", "10.0.0.2/32")
    assert excluded_for(C, [(A, wire(1))], groups) == ("10.0.0.1/32", "10.0.0.0/32")


def test_an_answer_with_an_excluded_address_is_refused_in_upstreams_words():
    check(wire(1), ["10.0.0.9/32", "10.0.0.0/24", "x"], whose="wire w")
    with pytest.raises(PreconditionError) as refused:
        check(wire(1), ["10.0.0.0/32"], whose="wire w")
    assert "IP 10.0.0.0/32 is excluded, but it was found in response IPs of wire w" in str(
        refused.value
    )

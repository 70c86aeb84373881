"""What members and routers are told: upstream's contexts, and nobody's address twice."""

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoints.vl3.addresses import RouterAddresses
from nsm.errors import ExhaustedError, UnavailableError
from nsm.model import IPContext, Route

pytestmark = pytest.mark.unit
NOTHING = IPContext()


@pytest.fixture
def router() -> RouterAddresses:
    made = RouterAddresses([4])
    made.lend("172.16.1.0/24")
    return made


def test_a_member_gets_what_upstreams_routers_give(router: RouterAddresses) -> None:
    """`wire.md` §10.3: the global prefix is not masked."""
    assert router.assign("a-0", NOTHING) == IPContext(
        src_ip_addrs=("172.16.1.1/32",),
        dst_ip_addrs=("172.16.1.0/32",),
        src_routes=(
            Route("172.16.1.0/32", "172.16.1.0"),
            Route("172.16.1.0/24", "172.16.1.0"),
            Route("172.16.1.0/16", "172.16.1.0"),
        ),
        dst_routes=(Route("172.16.1.1/32"),),
    )


def test_both_families_are_one_wires(router: RouterAddresses) -> None:
    both = RouterAddresses([4, 6])
    both.lend("172.16.1.0/24")
    with pytest.raises(UnavailableError, match=r"^prefix pool is initializing"):
        both.assign("a-0", NOTHING)
    both.lend("2001:db8:10::1:0/112")
    made = both.assign("a-0", NOTHING)
    assert made.src_ip_addrs == ("172.16.1.1/32", "2001:db8:10::1:1/128")
    assert made.dst_ip_addrs == ("172.16.1.0/32", "2001:db8:10::1:0/128")
    assert Route("2001:db8:10::1:0/64", "2001:db8:10::1:0") in made.src_routes
    assert [str(one) for one in both.domain] == ["172.16.0.0/16", "2001:db8:10::/64"]


def test_the_domain_is_what_the_address_plan_says_where_it_says(router: RouterAddresses) -> None:
    router.lend("172.16.1.0/24", ["172.16.0.0/20", "10.7.0.0/16"])
    made = router.assign("a-0", NOTHING)
    assert [one.prefix for one in made.src_routes] == [
        "172.16.1.0/32", "172.16.1.0/24", "172.16.0.0/20", "10.7.0.0/16",
    ]  # fmt: skip


def test_nothing_stays_of_a_domain_that_has_moved(router: RouterAddresses) -> None:
    """Neither told ones nor those that upstream's rule makes."""
    router.lend("172.16.1.0/24", ["172.16.0.0/20"])
    before = router.assign("a-0", NOTHING)
    router.lend("10.7.3.0/24", ["10.7.0.0/16"])
    after = router.assign("a-0", before)
    assert after == IPContext(
        src_ip_addrs=("10.7.3.1/32",),
        dst_ip_addrs=("10.7.3.0/32",),
        src_routes=(
            Route("10.7.3.0/32", "10.7.3.0"),
            Route("10.7.3.0/24", "10.7.3.0"),
            Route("10.7.0.0/16", "10.7.3.0"),
        ),
        dst_routes=(Route("10.7.3.1/32"),),
    )
    assert router.ask(before).src_ip_addrs == ("10.7.3.0/32",)


def test_two_routers_tell_each_other_the_way_to_what_is_behind_them(
    router: RouterAddresses,
) -> None:
    """As client and server of one wire; neither hands the other an address."""
    other = RouterAddresses([4])
    other.lend("172.16.0.0/24")
    asked = router.ask(NOTHING)
    assert asked == IPContext(
        src_ip_addrs=("172.16.1.0/32",),
        dst_routes=(Route("172.16.1.0/32", "172.16.1.0"), Route("172.16.1.0/24", "172.16.1.0")),
    )
    made = other.assign("r-0", asked, router=True)
    assert made == IPContext(
        src_ip_addrs=("172.16.1.0/32",),
        dst_ip_addrs=("172.16.0.0/32",),
        src_routes=(Route("172.16.0.0/32", "172.16.0.0"), Route("172.16.0.0/24", "172.16.0.0")),
        dst_routes=asked.dst_routes,
    )
    assert other.assign("r-0", router.ask(made), router=True) == made
    assert other.members() == {}


def test_what_is_lent_to_us_is_behind_no_other_router(router: RouterAddresses) -> None:
    """Be it that it lies, or that it was there until a moment ago."""
    theirs = Route("172.16.2.0/24", "172.16.2.0")
    asked = IPContext(
        src_ip_addrs=("172.16.2.0/32", "172.16.1.7/32", "172.16.1.0/32"),
        dst_routes=(Route("172.16.1.5/32"), theirs, Route("172.16.1.0/25", "172.16.2.0")),
    )
    made = router.assign("r-0", asked, router=True)
    assert made.src_ip_addrs == ("172.16.2.0/32",)
    assert made.dst_routes == (theirs, Route("172.16.2.0/32"))


def test_nobody_puts_addresses_or_ways_of_other_places_into_our_namespace(
    router: RouterAddresses,
) -> None:
    """In a pod there is its way to the address plan, the manager and the registry, too."""
    theirs = (Route("172.16.2.0/24", "172.16.2.0"), Route("172.16.2.0/32"))
    asked = IPContext(
        src_ip_addrs=("172.16.2.0/32", "10.0.0.5/32", "fe80::5/128"),
        dst_ip_addrs=("10.0.0.5/32", "127.0.0.1/8"),
        dst_routes=(*theirs, *map(Route, ("10.0.0.0/8", "172.0.0.0/8", "0.0.0.0/0", "::/0"))),
    )
    router.lend("172.16.1.0/24", ["172.16.0.0/20"])
    for who, src, ways in (
        (router.assign("a-0", replace(asked, dst_routes=asked.dst_routes[2:])), "172.16.1.1/32",
         (Route("172.16.1.1/32"),)),
        (router.assign("r-0", asked, router=True), "172.16.2.0/32", theirs),
    ):  # fmt: skip
        assert who.src_ip_addrs == (src,)
        assert who.dst_ip_addrs == ("172.16.1.0/32",)
        assert who.dst_routes == ways
    assert router.ask(asked).src_ip_addrs == ("172.16.1.0/32",)


def test_a_refresh_changes_nothing(router: RouterAddresses) -> None:
    made = router.assign("a-0", NOTHING)
    assert router.assign("a-0", made) == made


def test_what_a_dead_router_gave_goes_and_what_is_the_members_alone_stays(
    router: RouterAddresses,
) -> None:
    came = IPContext(
        src_ip_addrs=("172.16.9.4/32", "10.0.0.7/32"),
        dst_ip_addrs=("172.16.9.0/32", "10.0.0.1/32"),
        src_routes=(Route("172.16.9.0/32", "172.16.9.0"), Route("172.16.9.0/16", "172.16.9.0"),
                    Route("10.0.0.1/32")),
        dst_routes=(Route("172.16.9.4/32"), Route("10.0.0.7/32")),
    )  # fmt: skip
    made = router.assign("a-0", came)
    assert made.src_ip_addrs == ("172.16.1.1/32",)
    assert made.dst_ip_addrs == ("172.16.1.0/32",)
    assert made.dst_routes == (Route("172.16.1.1/32"),)
    assert Route("10.0.0.1/32") in made.src_routes
    assert not any("172.16.9." in one.prefix or one.next_hop == "172.16.9.0"
                   for one in (*made.src_routes, *made.dst_routes))  # fmt: skip


def test_another_prefix_gives_every_member_another_address(router: RouterAddresses) -> None:
    made = router.assign("a-0", NOTHING)
    assert not router.lend("172.16.1.0/24")
    assert router.lend("172.16.7.0/24")
    again = router.assign("a-0", made)
    assert again.src_ip_addrs == ("172.16.7.1/32",)
    assert "172.16.1" not in str(again)


def test_after_a_restart_a_member_gets_back_what_it_carries(router: RouterAddresses) -> None:
    again = RouterAddresses([4])
    assert again.reserve(["172.16.1.5", "172.16.1.6"]) == 2
    again.lend("172.16.1.0/24")
    carried = IPContext(src_ip_addrs=("172.16.1.5/32",))
    assert [again.assign(f"n-{n}", NOTHING).src_ip_addrs for n in range(5)] == [
        (f"172.16.1.{n}/32",) for n in (1, 2, 3, 4, 7)
    ]
    assert again.assign("a-0", carried).src_ip_addrs == ("172.16.1.5/32",)
    again.unreserve()
    assert again.assign("n-9", NOTHING).src_ip_addrs == ("172.16.1.8/32",)  # that was nobody's
    assert again.assign("n-10", carried).src_ip_addrs == ("172.16.1.9/32",)  # it is a-0's


def test_what_a_member_excludes_it_does_not_get(router: RouterAddresses) -> None:
    made = router.assign("a-0", IPContext(excluded_prefixes=("172.16.1.0/28",)))
    assert made.src_ip_addrs == ("172.16.1.16/32",)
    moved = router.assign("a-0", IPContext(excluded_prefixes=("172.16.1.16/32",)))
    assert moved.src_ip_addrs == ("172.16.1.1/32",)


def test_a_full_router_says_what_would_help() -> None:
    small = RouterAddresses([4])
    small.lend("10.0.0.0/30")
    for name in "abc":
        small.assign(name, NOTHING)
    with pytest.raises(ExhaustedError, match=r"connection d in 10\.0\.0\.0/30, of which 3 members"):
        small.assign("d", NOTHING)
    small.release("b")
    assert small.assign("d", NOTHING).src_ip_addrs == ("10.0.0.2/32",)


@settings(max_examples=150)
@given(st.data())
def test_no_two_members_ever_have_the_same_address(data: st.DataObject) -> None:
    """Over any history of coming, asking again, leaving, and other prefixes."""
    router = RouterAddresses([4, 6])
    router.lend("10.0.0.0/28")
    router.lend("fd00::/124")
    known: dict[str, IPContext] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        who = data.draw(st.sampled_from([f"m-{n}" for n in range(12)]))
        match data.draw(st.sampled_from(["come", "come", "again", "steal", "leave", "lend"])):
            case "lend":
                router.lend(
                    data.draw(st.sampled_from(["10.0.0.0/28", "10.0.1.0/28", "fd00::/124"]))
                )
                known = {}  # they ask again and are told anew
            case "leave":
                router.release(who)
                known.pop(who, None)
            case kind:
                asked = known.get(who, NOTHING) if kind == "again" else NOTHING
                if kind == "steal" and known:
                    asked = known[data.draw(st.sampled_from(sorted(known)))]
                try:
                    known[who] = router.assign(who, asked)
                except ExhaustedError:
                    continue
        held = [address for mine in router.members().values() for address in mine]
        assert len(held) == len(set(held))
        for id_, made in known.items():
            mine = set(router.members().get(id_, ()))
            assert {text.partition("/")[0] for text in made.src_ip_addrs} == mine
            for one in (*made.src_ip_addrs, *made.dst_ip_addrs):
                address = ipaddress.ip_interface(one).ip
                assert any(address in ipaddress.ip_network(p) for p in router.prefixes)

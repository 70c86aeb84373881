"""Pools never give an address twice nor an excluded one, and give known clients the same."""

import ipaddress
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from nsm.errors import ExhaustedError, InvalidError
from nsm.ipam import MOST, Pair, Pools
from nsm.model import IPContext, Route


def test_the_first_client_gets_what_the_protocols_example_shows():
    context = Pools([["169.254.0.0/16"]]).assign("c-1", IPContext())
    assert context == IPContext(
        src_ip_addrs=("169.254.0.1/32",),
        dst_ip_addrs=("169.254.0.0/32",),
        src_routes=(Route("169.254.0.0/32"),),
        dst_routes=(Route("169.254.0.1/32"),),
    )


def test_two_groups_give_both_families_and_keep_the_order_of_the_groups():
    context = Pools([["10.0.0.0/24"], ["fd00::/64"]]).assign("c-1", IPContext())
    assert context.src_ip_addrs == ("10.0.0.1/32", "fd00::1/128")
    assert context.dst_ip_addrs == ("10.0.0.0/32", "fd00::/128")
    assert [route.prefix for route in context.src_routes] == ["10.0.0.0/32", "fd00::/128"]


def test_a_group_is_used_up_prefix_by_prefix():
    pools = Pools([["10.0.0.0/31", "10.1.0.0/31"]])
    assert pools.assign("a", IPContext()).src_ip_addrs == ("10.0.0.1/32",)
    assert pools.assign("b", IPContext()).src_ip_addrs == ("10.1.0.1/32",)


def test_a_full_group_says_its_prefixes_their_sizes_and_what_is_held():
    pools = Pools([["10.0.0.0/31", "10.1.0.0/31"]])
    pools.assign("a", IPContext())
    pools.assign("b", IPContext())
    with pytest.raises(ExhaustedError) as refused:
        pools.assign("c", IPContext(excluded_prefixes=("192.0.2.0/24",)))
    assert str(refused.value) == (
        "no two free addresses for connection c in 10.0.0.0/31 (2 addresses, 2 held) and"
        " 10.1.0.0/31 (2 addresses, 2 held) beside the 1 prefixes its request excludes;"
        " close wires to this endpoint, or give it a larger prefix (NSM_CIDR_PREFIX)"
    )


def test_a_full_second_group_gives_back_what_the_first_gave():
    pools = Pools([["10.0.0.0/24"], ["10.1.0.0/31"]])
    pools.assign("a", IPContext())
    with pytest.raises(ExhaustedError):
        pools.assign("b", IPContext())
    pools.release("a")
    assert pools.assign("c", IPContext()).src_ip_addrs == ("10.0.0.1/32", "10.1.0.1/32")


def test_a_refresh_changes_nothing():
    pools = Pools([["10.0.0.0/24"], ["fd00::/64"]])
    once = pools.assign("c", IPContext(excluded_prefixes=("10.0.0.0/30",)))
    assert pools.assign("c", once) == once
    assert once.dst_ip_addrs == ("10.0.0.4/32", "fd00::/128")


def test_a_refresh_that_comes_without_addresses_gets_the_same():
    pools = Pools([["10.0.0.0/24"]])
    assert pools.assign("c", IPContext()) == pools.assign("c", IPContext())
    assert pools.pairs("c") == (Pair("10.0.0.0/32", "10.0.0.1/32"),)


def test_addresses_excluded_later_are_replaced_with_their_routes():
    pools = Pools([["10.0.0.0/24"]])
    before = pools.assign("c", IPContext())
    after = pools.assign(
        "c",
        IPContext(
            src_ip_addrs=(*before.src_ip_addrs, "192.0.2.7/32"),
            dst_ip_addrs=before.dst_ip_addrs,
            src_routes=before.src_routes,
            dst_routes=(*before.dst_routes, Route("198.51.100.0/24")),
            excluded_prefixes=("10.0.0.0/28",),
        ),
    )
    assert after.src_ip_addrs == ("192.0.2.7/32", "10.0.0.17/32")
    assert after.dst_ip_addrs == ("10.0.0.16/32",)
    assert after.src_routes == (Route("10.0.0.16/32"),)
    assert after.dst_routes == (Route("198.51.100.0/24"), Route("10.0.0.17/32"))


def test_after_a_restart_a_client_gets_back_the_addresses_it_carries():
    context = Pools([["10.0.0.0/24"]]).assign("c", _carrying("10.0.0.9/32", "10.0.0.8/32"))
    assert context.src_ip_addrs == ("10.0.0.9/32",)
    assert context.dst_ip_addrs == ("10.0.0.8/32",)


def test_addresses_another_client_holds_are_not_given_back_and_do_not_stay():
    pools = Pools([["10.0.0.0/24"]])
    pools.assign("first", _carrying("10.0.0.9/32", "10.0.0.8/32"))
    second = pools.assign("second", _carrying("10.0.0.9/32", "10.0.0.8/32"))
    assert second.src_ip_addrs == ("10.0.0.1/32",)
    assert second.dst_ip_addrs == ("10.0.0.0/32",)
    assert second.src_routes == (Route("10.0.0.0/32"),)


def test_reserved_addresses_are_given_to_who_carries_them_only():
    pools = Pools([["10.0.0.0/29"]])
    assert pools.reserve(["10.0.0.0", "10.0.0.1/32", "192.0.2.1", "no address", "10.0.0.1"]) == 2
    assert pools.assign("new", IPContext()).src_ip_addrs == ("10.0.0.3/32",)
    carrying = _carrying("10.0.0.1/32", "10.0.0.0/32")
    assert pools.assign("old", carrying) == carrying
    pools.release("old")
    assert pools.assign("newer", IPContext()).src_ip_addrs == ("10.0.0.1/32",)


def test_what_nobody_came_back_for_can_be_had():
    pools = Pools([["10.0.0.0/31"]])
    pools.reserve(["10.0.0.1"])
    with pytest.raises(ExhaustedError):
        pools.assign("new", IPContext())
    pools.unreserve()
    assert pools.assign("new", IPContext()).src_ip_addrs == ("10.0.0.1/32",)


def test_excluded_addresses_are_not_given_back():
    pools = Pools([["10.0.0.0/24"]])
    context = pools.assign(
        "c",
        IPContext(
            src_ip_addrs=("10.0.0.9/32",),
            dst_ip_addrs=("10.0.0.8/32",),
            excluded_prefixes=("10.0.0.9/32",),
        ),
    )
    assert context.src_ip_addrs == ("10.0.0.1/32",)


def test_a_polite_endpoint_leaves_foreign_addresses_and_a_strict_one_takes_them_out():
    foreign = IPContext(
        src_ip_addrs=("192.0.2.1/32", "no address"),
        dst_ip_addrs=("192.0.2.0/32",),
        src_routes=(Route("192.0.2.0/32"), Route("198.51.100.0/24", "192.0.2.0")),
        dst_routes=(Route("192.0.2.1/32"),),
    )
    polite = Pools([["10.0.0.0/24"]]).assign("c", foreign)
    strict = Pools([["10.0.0.0/24"]], strict=True).assign("c", foreign)
    assert polite.src_ip_addrs == ("192.0.2.1/32", "no address", "10.0.0.1/32")
    assert polite.dst_routes == (Route("192.0.2.1/32"), Route("10.0.0.1/32"))
    assert strict.src_ip_addrs == ("10.0.0.1/32",)
    assert strict.dst_ip_addrs == ("10.0.0.0/32",)
    assert strict.src_routes == (Route("198.51.100.0/24", "192.0.2.0"), Route("10.0.0.0/32"))
    assert strict.dst_routes == (Route("10.0.0.1/32"),)


def test_releasing_an_unknown_connection_is_nothing():
    pools = Pools([["10.0.0.0/24"]])
    pools.release("never seen")
    assert len(pools) == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)])
def test_when_everybody_left_the_pool_is_in_one_piece_again(order):
    pools = Pools([["10.0.0.0/24"]])
    for name in range(3):
        pools.assign(f"c-{name}", IPContext())
    for name in order:
        pools.release(f"c-{name}")
    assert (pools._all[0].free._firsts, pools._all[0].held) == ([0x0A000000], 0)


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ([["10.0.0.0/33"]], "prefix '10.0.0.0/33' of NSM_CIDR_PREFIX is no prefix"),
        ([["10.0.0.0"]], "prefix '10.0.0.0' of NSM_CIDR_PREFIX is no prefix"),
        ([["10/8"]], "prefix '10/8' of NSM_CIDR_PREFIX is no prefix"),
        ([["10.0.0.1/32"]], "holds one address, and a wire needs two"),
        ([["10.0.0.0/8"], ["10.1.0.0/16"]], "prefixes 10.0.0.0/8 and 10.1.0.0/16"),
    ],
)
def test_prefixes_that_cannot_serve_are_refused_at_once(groups, sentence):
    with pytest.raises(InvalidError) as refused:
        Pools(groups)
    assert sentence in str(refused.value)


def test_a_request_may_not_exclude_what_is_no_prefix():
    pools = Pools([["10.0.0.0/24"]])
    with pytest.raises(InvalidError, match=r"excluded prefix 'x/y' of the request is no prefix"):
        pools.assign("c", IPContext(excluded_prefixes=("x/y",)))
    assert len(pools) == 0


def test_a_request_that_lists_too_much_is_refused_before_it_is_read():
    with pytest.raises(InvalidError, match=r"lists 1025 excluded prefixes; at most 1024"):
        Pools([["10.0.0.0/24"]]).assign("c", IPContext(excluded_prefixes=("x",) * (MOST + 1)))


def _carrying(src: str, dst: str) -> IPContext:
    return IPContext(
        src_ip_addrs=(src,),
        dst_ip_addrs=(dst,),
        src_routes=(Route(dst),),
        dst_routes=(Route(src),),
    )


ADDRESSES = st.integers(0, 63).map(lambda last: f"10.0.0.{last}/32")
EXCLUDED = st.lists(
    st.builds("10.0.0.{}/{}".format, st.integers(0, 40), st.integers(27, 32)), max_size=4
).map(tuple)


class AnyLife(RuleBasedStateMachine):
    """Requests, refreshes with other exclusions, restarts of clients and closes in any order."""

    clients = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.pools = Pools([["10.0.0.0/28", "10.0.0.16/29"], ["10.0.0.32/29"]])
        self.contexts: dict[str, IPContext] = {}
        self.count = 0

    @rule(target=clients, excluded=EXCLUDED, src=st.lists(ADDRESSES, max_size=3), dst=ADDRESSES)
    def arrive(self, excluded, src, dst):
        self.count += 1
        name = f"c-{self.count}"
        carried = IPContext(
            src_ip_addrs=tuple(src),
            dst_ip_addrs=(dst,),
            src_routes=(Route(dst),),
            dst_routes=tuple(map(Route, src)),
            excluded_prefixes=excluded,
        )
        self._ask(name, carried)
        return name

    @rule(name=clients, excluded=EXCLUDED)
    def refresh(self, name, excluded):
        before = self.contexts.get(name, IPContext())
        fields = {
            "src_ip_addrs": before.src_ip_addrs,
            "dst_ip_addrs": before.dst_ip_addrs,
            "src_routes": before.src_routes,
            "dst_routes": before.dst_routes,
        }
        known = self.pools.pairs(name)
        self._ask(name, IPContext(excluded_prefixes=excluded, **fields))
        for pair in known:
            hit = any(_inside(text, excluded) for text in (pair.src, pair.dst))
            if not hit:
                assert pair in self.pools.pairs(name), "a refresh moved an address for no reason"

    @rule(addresses=st.lists(ADDRESSES, max_size=6))
    def remember(self, addresses):
        self.pools.reserve(addresses)

    @rule()
    def forget(self):
        self.pools.unreserve()

    @rule(name=consumes(clients))
    def leave(self, name):
        self.pools.release(name)
        self.contexts.pop(name, None)

    def _ask(self, name, asked):
        before = self.pools.pairs(name)
        try:
            context = self.pools.assign(name, asked)
        except ExhaustedError:
            assert self.pools.pairs(name) == before, "a refusal changed what is held"
            return
        self.contexts[name] = context
        for pair in self.pools.pairs(name):
            assert not _inside(pair.src, asked.excluded_prefixes)
            assert not _inside(pair.dst, asked.excluded_prefixes)
            assert Route(pair.dst) in context.src_routes
            assert Route(pair.src) in context.dst_routes

    @invariant()
    def no_address_is_held_twice(self):
        given = Counter(
            text
            for name in self.contexts
            for pair in self.pools.pairs(name)
            for text in (pair.src, pair.dst)
        )
        assert all(times == 1 for times in given.values())

    @invariant()
    def what_clients_were_told_of_our_pools_is_exactly_what_they_hold(self):
        ours = ("10.0.0.0/28", "10.0.0.16/29", "10.0.0.32/29")
        for name, context in self.contexts.items():
            told = [*context.src_ip_addrs, *context.dst_ip_addrs]
            held = {text for pair in self.pools.pairs(name) for text in (pair.src, pair.dst)}
            assert {text for text in told if _inside(text, ours)} == held

    @invariant()
    def what_nobody_holds_can_be_had(self):
        taken = sum(2 * len(self.pools.pairs(name)) for name in self.contexts)
        free = sum(len(list(_free(pool))) for pool in self.pools._all)
        assert taken + free + len(self.pools._reserved) == 16 + 8 + 8


def _free(pool):
    return [number for number in range(pool.first, pool.last + 1) if number in pool.free]


def _inside(text, prefixes):
    address = ipaddress.ip_interface(text).ip
    return any(address in ipaddress.ip_network(one, strict=False) for one in prefixes)


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)

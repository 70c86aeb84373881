"""Which prefix is lent to whom: over any history no address is anybody else's too."""

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoints.ipam.plan import Lease, Plan, pool
from nsm.errors import (
    ExhaustedError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TakenError,
)

pytestmark = pytest.mark.unit
A, B = "spiffe://east.test/router/a", "spiffe://west.test/router/b"


def net(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text)


@pytest.fixture
def plan() -> Plan:
    return Plan([pool("orders", ["172.16.0.0/16", "2001:db8:10::/64"])])


def lent(plan: Plan, owner: str, holder: int = 1, **asked: object) -> str:
    asked.setdefault("now", 0)
    return str(plan.allocate("orders", owner, holder=holder, **asked)[0].prefix)  # type: ignore[arg-type]


def test_each_router_gets_the_lowest_free_part(plan: Plan) -> None:
    assert lent(plan, A) == "172.16.0.0/24"
    assert lent(plan, B) == "172.16.1.0/24"
    assert lent(plan, A, family=6) == "2001:db8:10::/112"
    assert lent(plan, B, family=6) == "2001:db8:10::1:0/112"


def test_what_is_wanted_is_given_where_it_is_free_and_else_the_next(plan: Plan) -> None:
    assert lent(plan, A, wanted="172.16.9.0/24") == "172.16.9.0/24"
    assert lent(plan, B, 2, wanted="172.16.9.0/24") == "172.16.0.0/24"
    assert lent(plan, B, 2, wanted="172.16.9.128/25") == "172.16.1.0/24"  # a part of A's
    assert lent(plan, B, 2, wanted="10.0.0.0/24") == "172.16.2.0/24"  # not of the pool
    assert lent(plan, B, 2, wanted="2001:db8:10::77/128") == "2001:db8:10::77/128"
    assert lent(plan, A, family=6) == "2001:db8:10::1:0/112"  # that one is B's


def test_what_is_excluded_is_stepped_over(plan: Plan) -> None:
    closed = ["172.16.0.0/23", "172.16.2.128/32", "10.0.0.0/8"]
    assert lent(plan, A, excluded=closed) == "172.16.3.0/24"
    assert lent(plan, A, wanted="172.16.1.0/24", excluded=closed) == "172.16.4.0/24"
    with pytest.raises(ExhaustedError, match=r"172\.16\.0\.0/16 .* excludes 1;"):
        lent(plan, A, family=4, excluded=["172.16.0.0/16"])


def test_who_comes_back_gets_what_it_had_until_the_lease_is_over(plan: Plan) -> None:
    lease, _ = plan.allocate("orders", A, holder=1, now=0)
    assert plan.leave(lease, until=100)
    assert lent(plan, B, 2, now=50) == "172.16.1.0/24"
    assert lent(plan, A, 3, now=99) == "172.16.0.0/24"
    assert plan.leave(Lease("orders", lease.prefix, A, holder=3), until=100)
    assert [one.owner for one in plan.expire(100)] == [A]
    assert lent(plan, B, 2, now=100, wanted="172.16.0.0/24") == "172.16.0.0/24"


def test_what_nobody_came_back_for_others_get_last_and_the_oldest_first() -> None:
    """Its router may live: what it cannot reach is us, and its members have its addresses."""
    plan = Plan([pool("orders", ["10.0.0.0/24"], ipv4=26)])
    for owner, until in ((A, 20), (B, 10), (A + "2", 30)):
        lease, _ = plan.allocate("orders", owner, holder=1, now=0)
        plan.leave(lease, until)
        lent(plan, owner, 2, wanted=str(lease.prefix))  # it came back, and was lost again
        plan.leave(Lease("orders", lease.prefix, owner, holder=2), until)
    for now in (10, 20, 30):
        plan.expire(now)
    assert plan.leases("orders") == []
    c = "spiffe://east.test/router/c"
    got = [lent(plan, c, now=40) for _ in range(4)]
    assert got == ["10.0.0.192/26", "10.0.0.64/26", "10.0.0.0/26", "10.0.0.128/26"]


def test_what_is_given_back_is_anybodys_at_once(plan: Plan) -> None:
    lease, _ = plan.allocate("orders", A, holder=1, now=0)
    assert plan.release(lease)
    assert lent(plan, B) == str(lease.prefix)


def test_a_broken_stream_nobody_noticed_does_not_take_from_the_one_that_came_after(
    plan: Plan,
) -> None:
    old, _ = plan.allocate("orders", A, holder=1, now=0)
    assert lent(plan, A, 2, wanted=str(old.prefix)) == str(old.prefix)
    assert plan.leave(old, until=1) is None
    assert not plan.release(old)
    assert plan.expire(1_000) == []
    assert lent(plan, A, 3) == "172.16.1.0/24"  # what it holds is not lent to itself again


def test_a_small_pool_is_lent_to_the_last_part_and_then_says_whose_it_is() -> None:
    plan = Plan([pool("orders", ["10.0.0.0/30"], ipv4=31)])
    assert [lent(plan, A), lent(plan, B)] == ["10.0.0.0/31", "10.0.0.2/31"]
    with pytest.raises(ExhaustedError, match=rf"10\.0\.0\.0/30 2 parts are lent, to {A}, {B}"):
        lent(plan, A)
    with pytest.raises(NotFoundError, match="no IPv6 prefix"):
        lent(plan, A, family=6)


def test_lengths_are_upstreams_where_there_is_room() -> None:
    assert pool("a", ["10.0.0.0/16", "fd00::/64"]).lengths == {4: 24, 6: 112}
    assert pool("a", ["10.0.0.0/24", "fd00::/120"]).lengths == {4: 28, 6: 124}
    assert pool("a", ["10.0.0.0/31"]).lengths == {4: 32}
    assert pool("a", ["10.0.0.0/24", "fd00::/64"], ipv4=24, ipv6=64).lengths == {4: 24, 6: 64}


@pytest.mark.parametrize(
    "prefix",
    [
        "0.0.0.0/0",
        "127.0.0.0/8",
        "224.1.0.0/16",
        "255.255.255.0/24",
        "::/0",
        "::1/128",
        "::ffff:172.16.0.0/112",
        "fe80::/64",
        "ff02::/16",
    ],
)
def test_addresses_that_nobody_can_have_are_in_no_pool(prefix: str) -> None:
    with pytest.raises(InvalidError, match="addresses, at which no member is reached"):
        pool("orders", ["169.254.0.0/16", prefix])


@pytest.mark.parametrize(
    ("prefixes", "ipv4", "says"),
    [
        ([], 0, "has 0 prefixes"),
        (["10.0.0.1/24"], 0, "10.0.0.1/24' is none"),
        (["10.0.0.0/24", "10.0.0.128/25"], 0, "overlap"),
        (["10.0.0.0/24"], 23, "a length from 24 to 32 fits"),
        (["nonsense"], 0, "as 172.16.0.0/16"),
    ],
)
def test_what_is_no_pool_is_refused_with_what_would_be(
    prefixes: list[str], ipv4: int, says: str
) -> None:
    with pytest.raises(InvalidError) as refusal:
        pool("a", prefixes, ipv4=ipv4)
    assert says in str(refusal.value)


def test_pools_share_no_address_and_no_name(plan: Plan) -> None:
    assert not plan.add(pool("orders", ["172.16.0.0/16", "2001:db8:10::/64"]))
    with pytest.raises(TakenError, match=r"is there with 172\.16\.0\.0/16"):
        plan.add(pool("orders", ["10.0.0.0/16"]))
    with pytest.raises(TakenError, match=r"172\.16\.3\.0/24 of pool 'b' overlaps 172\.16\.0\.0/16"):
        plan.add(pool("b", ["172.16.3.0/24"]))
    assert plan.add(pool("b", ["10.0.0.0/16"]))
    assert [one.name for one in plan.pools()] == ["b", "orders"]


def test_a_pool_goes_when_nobody_holds_a_part_of_it(plan: Plan) -> None:
    lease, _ = plan.allocate("orders", A, holder=1, now=0)
    with pytest.raises(PreconditionError, match=rf"{A} holds 172\.16\.0\.0/24"):
        plan.drop("orders")
    plan.leave(lease, until=9)
    assert plan.drop("orders")
    assert not plan.drop("orders")
    with pytest.raises(NotFoundError, match="has no pool 'orders'; it has none with a name"):
        lent(plan, A)


def test_no_router_gets_more_than_the_pool_lends_but_what_is_its_own(plan: Plan) -> None:
    assert lent(plan, A, wanted="172.16.0.0/16") == "172.16.0.0/24"
    assert lent(plan, A, wanted="2001:db8:10::/64") == "2001:db8:10::/112"
    shorter = Plan([pool("orders", ["172.16.0.0/16"], ipv4=28)])  # as it is set now
    assert shorter.load([Lease("orders", net("172.16.4.0/24"), A, ends=9)]) == []
    assert lent(shorter, B, wanted="172.16.4.0/24") == "172.16.0.0/28"
    assert lent(shorter, A, wanted="172.16.4.0/24") == "172.16.4.0/24"


def test_a_pool_that_was_made_otherwise_forgets_what_is_outside() -> None:
    inside, outside, old = (
        Lease("orders", net(prefix), A, ends=9)
        for prefix in ("10.1.0.0/24", "172.16.0.0/24", "fd00::/112")
    )
    plan = Plan([pool("orders", ["10.1.0.0/16"])])
    assert plan.load([inside, outside, old, Lease("gone", inside.prefix, A)]) == [outside, old]
    assert plan.leases("orders") == [inside]
    assert lent(plan, B, wanted="fd00::/112") == "10.1.1.0/24"  # of what there is


@settings(max_examples=150)
@given(st.data())
def test_no_two_ever_hold_the_same_address(data: st.DataObject) -> None:
    """Over any sequence of asking, giving back, leaving and time."""
    plan = Plan([pool("orders", ["10.0.0.0/26", "fd00::/122"], ipv4=29, ipv6=125)])
    held: dict[tuple[str, int], Lease] = {}
    now = 0
    for holder in range(data.draw(st.integers(1, 25))):
        owner = data.draw(st.sampled_from([A, B, A + "2"]))
        match data.draw(st.sampled_from(["ask", "want", "leave", "release", "wait"])):
            case "wait":
                now += data.draw(st.integers(1, 50))
            case "leave" if held:
                plan.leave(held.pop(data.draw(st.sampled_from(sorted(held)))), now + 30)
            case "release" if held:
                plan.release(held.pop(data.draw(st.sampled_from(sorted(held)))))
            case kind:
                wanted = data.draw(
                    st.sampled_from(["10.0.0.8/29", "10.0.0.9/32", "fd00::8/125", "10.1.0.0/29"])
                )
                excluded = data.draw(st.sampled_from([[], ["10.0.0.0/28"], ["fd00::/126"]]))
                try:
                    lease, _ = plan.allocate(
                        "orders", owner, holder=holder, excluded=excluded, now=now,
                        wanted=wanted if kind == "want" else "",
                    )  # fmt: skip
                except ExhaustedError:
                    continue
                assert not any(lease.prefix.overlaps(net(one)) for one in excluded
                               if net(one).version == lease.prefix.version)  # fmt: skip
                held = {k: v for k, v in held.items() if v.prefix != lease.prefix}
                held[owner, holder] = lease
        leases = plan.leases("orders")
        assert {(one.prefix, one.owner, one.holder) for one in held.values()} <= {
            (one.prefix, one.owner, one.holder) for one in leases
        }
        for place, one in enumerate(leases):
            assert any(
                one.prefix.subnet_of(whole)  # type: ignore[arg-type]
                for whole in plan.pools()[0].prefixes
                if whole.version == one.prefix.version
            )
            for other in leases[:place]:
                assert one.prefix.version != other.prefix.version or not one.prefix.overlaps(
                    other.prefix
                )

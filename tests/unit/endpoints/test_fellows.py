"""Who asks whom for a wire, who is a router at all, and the MTU they all keep to."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from endpoints.vl3.fellows import Fellows
from endpoints.vl3.mtu import Smallest
from nsm.model import Endpoint
from nsm.ondemand import ROLE, SUPPLIER


def router(name: str, registered: int | None = None, owner: str = "") -> Endpoint:
    ids = (f"spiffe://x/{owner or name}", "spiffe://x/nsmgr")
    return Endpoint(name, ("vL3",), registered=registered, path_ids=ids)


@given(st.dictionaries(st.sampled_from("abcdefgh"), st.none() | st.integers(0, 3)))
def test_of_each_two_routers_exactly_one_asks_the_other(times: dict[str, int | None]) -> None:
    all_ = [router(name, when) for name, when in times.items()]
    asks = {}
    for name in times:
        fellows = Fellows(name, "vL3")
        fellows.begin(all_)
        asks[name] = fellows.earlier()
    for one in times:
        for other in times:
            if one != other:
                assert (other in asks[one]) != (one in asks[other])


def test_nobody_is_asked_before_we_are_there_ourselves() -> None:
    fellows = Fellows("b", "vL3")
    fellows.begin([router("a", 1)])
    assert fellows.earlier() == frozenset()
    fellows.see(router("b", 2), deleted=False)
    assert fellows.earlier() == {"a"}
    fellows.see(router("a", 1), deleted=True)
    assert fellows.earlier() == frozenset()


def test_in_another_domain_we_are_found_under_its_name() -> None:
    fellows = Fellows("b", "vL3@far.test")
    fellows.begin([router("a@far.test", 1), router("b@far.test", 2), router("b@other", 1)])
    assert fellows.earlier() == {"a@far.test", "b@other"}


def test_who_is_missing_once_may_only_not_be_there_yet() -> None:
    fellows = Fellows("b", "vL3")
    assert not fellows.begin([router("a", 1), router("b", 2), router("c", 1)])
    assert fellows.begin([router("b", 2)])
    assert fellows.earlier() == {"a", "c"}
    assert not fellows.begin([router("b", 2), router("c", 1)])
    assert fellows.earlier() == {"c"}


def test_a_router_is_who_registered_one_and_nobody_else() -> None:
    fellows = Fellows("b", "vL3")
    fellows.begin([router("a", 1), router("b", 2)])
    assert fellows.are("spiffe://x/a")
    for other in ("spiffe://x/b", "spiffe://x/nsmgr", "spiffe://x/c", ""):
        assert not fellows.are(other), other


def test_who_starts_routers_is_none() -> None:
    fellows = Fellows("b", "vL3")
    supplier = replace(router("s", 1), labels={"vL3": {ROLE: SUPPLIER}})
    elsewhere = replace(router("c", 1), labels={"other": {ROLE: SUPPLIER}})
    fellows.begin([supplier, elsewhere, router("b", 2)])
    fellows.see(supplier, deleted=False)
    assert fellows.earlier() == {"c"}
    assert not fellows.are("spiffe://x/s")


def test_the_smallest_mtu_only_falls_and_never_below_what_ip_needs() -> None:
    least = Smallest()
    assert least.of(0) == 0
    assert [least.note(one) for one in (0, 9000, 1440, 1500, 1440, 1400)] == [
        False, True, True, False, False, True,
    ]  # fmt: skip
    assert (least.of(9000), least.of(0), least.of(1300)) == (1400, 1400, 1300)
    assert least.note(68, (4, 6))
    assert least.now == 1280
    assert least.note(1, (4,))
    assert least.now == 576

"""What a router knows of names, and that it does not matter who of several knows it."""

import ipaddress
from functools import reduce
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.names.zones import TTL, Answer, Record, Standing, Zone, merged, pointed

APEX, PREFIXES = "db", ("10.0.0.0/12", "2001:db8:10::/62")
NAMES = ["a.db", "b.db", "a.b.db", "c.a.b.db", "db", "x.other"]
ADDRESSES = ["10.0.0.1", "10.1.2.3/32", "2001:db8:10::1", "2001:db8:10:3::9/128", "192.0.2.1"]
KINDS = ["A", "AAAA", "PTR", "TXT", "ANY"]
ASKED = [
    *NAMES,
    *("z.db", "b.z.db", "other", "y.other", "elsewhere", "", "."),
    *(ipaddress.ip_interface(one).ip.reverse_pointer for one in ADDRESSES),
    *("0.10.in-addr.arpa", "9.9.0.10.in-addr.arpa", "10.in-addr.arpa", "0.1.0.0.8.b.d.ip6.arpa"),
]
members = st.dictionaries(
    st.sampled_from(["m1", "m2", "m3", "m4", ""]),
    st.tuples(
        st.lists(st.sampled_from(NAMES), max_size=3),
        st.lists(st.sampled_from(ADDRESSES), max_size=3),
    ),
    max_size=5,
)
Members = dict[str, tuple[list[str], list[str]]]


def zone(knows: Members) -> Zone:
    made = Zone([APEX, "other"], PREFIXES)
    for id_, (names, addresses) in knows.items():
        made.put(id_, names, addresses)
    return made


def answers() -> st.SearchStrategy[Answer]:
    def of(standing: Standing, data: list[str], where: str, ttl: int) -> Answer:
        good = standing == Standing.RECORDS
        records = tuple(sorted({Record("a.db", "A", one) for one in data})) if good else ()
        return Answer(standing, records, where, ttl)

    return st.builds(
        of,
        st.sampled_from(Standing),
        st.lists(st.sampled_from(ADDRESSES), min_size=1, max_size=3),
        st.sampled_from(["", "db", "x.db", "z.db"]),
        st.integers(0, 5),
    )


@given(answers(), answers(), answers())
def test_answers_merge_in_any_order_and_again_and_again(a: Answer, b: Answer, c: Answer) -> None:
    assert len({reduce(merged, some) for some in permutations((a, b, c))}) == 1
    assert merged(a, merged(b, c)) == merged(merged(a, b), c)
    assert merged(a, a) == a
    assert merged(merged(a, b), b) == merged(a, b)


@given(st.lists(members, min_size=1, max_size=3), st.sampled_from(ASKED), st.sampled_from(KINDS))
def test_routers_together_know_what_one_would_with_all_their_members(
    routers: list[Members], name: str, kind: str
) -> None:
    whole = zone(
        {f"{n}/{id_}": held for n, some in enumerate(routers) for id_, held in some.items()}
    )
    parts = [found for one in routers if (found := zone(one).answer(name, kind)) is not None]
    assert whole.answer(name, kind) == (reduce(merged, parts) if parts else None)


@given(members, members)
def test_who_leaves_leaves_nothing(stay: Members, leave: Members) -> None:
    made = zone(stay)
    for id_, held in leave.items():
        made.put(f"gone {id_}", *held)
        made.put(f"gone {id_}", list(reversed(held[0])), held[1][:1])
    for id_ in leave:
        made.drop(f"gone {id_}")
    for name in ASKED:
        for kind in KINDS:
            assert made.answer(name, kind) == zone(stay).answer(name, kind)
    assert vars(made) == vars(zone(stay))


def test_addresses_names_and_nothing_else() -> None:
    made = zone({"m": (["A.db."], ["10.1.2.3/32", "2001:db8:10::1/128"])})
    assert made.answer("a.DB.", "A") == Answer(
        Standing.RECORDS, (Record("a.db", "A", "10.1.2.3"),), "db", TTL
    )
    both = made.answer("a.db", "ANY")
    assert both
    assert {one.data for one in both.records} == {"10.1.2.3", "2001:db8:10::1"}
    for name, kind, standing, where in (
        ("a.db", "TXT", Standing.NODATA, "db"),
        ("db", "A", Standing.NODATA, "db"),
        ("b.db", "A", Standing.NXDOMAIN, "db"),
        ("b.a.db", "A", Standing.NXDOMAIN, "db"),
        ("3.2.1.10.in-addr.arpa", "A", Standing.NODATA, "1.10.in-addr.arpa"),
        ("4.2.1.10.in-addr.arpa", "PTR", Standing.NXDOMAIN, "1.10.in-addr.arpa"),
        ("2.1.10.in-addr.arpa", "PTR", Standing.NODATA, "1.10.in-addr.arpa"),
    ):
        found = made.answer(name, kind)
        assert found is not None, name
        assert (found.standing, found.zone, found.records) == (standing, where, ()), name
    for name in ("example", "adb", "4.2.0.192.in-addr.arpa", "x.in-addr.arpa", "cluster3", ""):
        assert made.answer(name, "A") is None, name
    ptr = made.answer("3.2.1.10.in-addr.arpa.", "PTR")
    assert ptr
    assert ptr.records == (Record("3.2.1.10.in-addr.arpa", "PTR", "a.db."),)


def test_nobody_is_called_what_a_template_could_not_fill_in() -> None:
    made = zone({"m": ([".db", ""], ["10.1.2.3"])})
    assert made.answer("3.2.1.10.in-addr.arpa", "PTR") == Answer(
        Standing.NXDOMAIN, zone="1.10.in-addr.arpa"
    )


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("1.2.0.10.in-addr.arpa.", "10.0.2.1/32"),
        ("10.IN-ADDR.arpa", "10.0.0.0/8"),
        ("in-addr.arpa", "0.0.0.0/0"),
        ("8.b.d.0.1.0.0.2.ip6.arpa", "2001:db8::/32"),
        ("300.10.in-addr.arpa", None),
        ("1.1.1.1.1.in-addr.arpa", None),
        ("x.ip6.arpa", None),
        ("10.ip6.arpa", None),
        ("a.xin-addr.arpa", None),
        ("-1.in-addr.arpa", None),
        ("a.db", None),
    ],
)
def test_what_a_reverse_name_stands_for(name: str, network: str | None) -> None:
    assert pointed(name) == (ipaddress.ip_network(network) if network else None)


@given(st.ip_addresses())
def test_every_address_is_found_by_its_reverse_name(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert pointed(address.reverse_pointer) == ipaddress.ip_network(address)


def test_that_nobody_could_say_is_more_than_that_there_is_none_and_less_than_a_name() -> None:
    none, failed, known = map(Answer, (Standing.NXDOMAIN, Standing.FAILED, Standing.NODATA))
    assert merged(none, failed) == failed
    assert merged(known, failed) == known
    records = Answer(Standing.RECORDS, (Record("a.db", "A", "10.0.0.1"),))
    assert merged(known, records) == records

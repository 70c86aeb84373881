"""Who offers what: matching, owners, expiry, watchers and bounds, as plain calls."""

import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import DeniedError, ExhaustedError, InvalidError
from nsm.model import SECOND, Destination, Endpoint, Found, Match, Service
from nsm.offers import Limits, Offers, endpoint_matches, service_matches

NOW = 1_790_000_000 * SECOND
A, B = "spiffe://td/a", "spiffe://td/b"


def endpoint(name: str = "nse-1", owner: str = A, **fields: object) -> Endpoint:
    return replace(Endpoint(name=name, services=("icmp",), path_ids=(owner, "r")), **fields)  # type: ignore[arg-type]


def service(name: str = "icmp", owner: str = A, **fields: object) -> Service:
    return replace(Service(name=name, path_ids=(owner, "r")), **fields)  # type: ignore[arg-type]


def put(offers: Offers, one: Endpoint, *, now: int = NOW, seconds: int = 60) -> Endpoint:
    return offers.register_endpoint(one, now=now, latest=now + seconds * SECOND)


# -- matching (wire.md §6.3)

STORED = Endpoint(
    name="nse-1",
    services=("icmp", "vpn"),
    labels={"icmp": {"app": "x", "zone": "1"}, "vpn": {}},
    url="tcp://10.0.0.5:5001",
    expires=NOW + 7,
)


@pytest.mark.parametrize(
    ("query", "answers"),
    [
        (Endpoint(), True),
        (Endpoint(name="nse-1"), True),
        (Endpoint(name="nse"), False),
        (Endpoint(name="nse-1*"), False),
        (Endpoint(services=("vpn",)), True),
        (Endpoint(services=("vpn", "icmp")), True),
        (Endpoint(services=("vpn", "dns")), False),
        (Endpoint(labels={"icmp": {"app": "x"}}), True),
        (Endpoint(labels={"icmp": {"app": "y"}}), False),
        (Endpoint(labels={"icmp": {"none": ""}}), False),
        (Endpoint(labels={"vpn": {}}), True),
        (Endpoint(labels={"dns": {}}), False),
        (Endpoint(url="10.0.0.5"), True),
        (Endpoint(url="tcp://10.0.0.5:5001"), True),
        (Endpoint(url="10.0.0.6"), False),
        (Endpoint(expires=NOW + 999_999_999), True),  # to the second
        (Endpoint(expires=NOW + SECOND), False),
        (Endpoint(path_ids=("whoever",)), True),
        (Endpoint(registered=5), True),
    ],
)
def test_an_endpoint_answers_a_query_that_asks_nothing_else(query: Endpoint, answers: bool) -> None:
    assert endpoint_matches(query, STORED) is answers


def test_a_network_service_answers_by_name_payload_and_equal_matches() -> None:
    rule = Match({"app": "x"}, (Destination({"zone": "1"}, 3),))
    stored = Service("icmp", "IP", (rule,))
    assert service_matches(Service(), stored)
    assert service_matches(Service("icmp", "IP", (rule,)), stored)
    assert not service_matches(Service("icm"), stored)
    assert not service_matches(Service(payload="ETHERNET"), stored)
    assert not service_matches(Service(matches=(Match({"app": "y"}),)), stored)


names = st.sampled_from(["a", "b", "c"])
endpoints = st.builds(
    Endpoint,
    name=st.sampled_from([f"e{n}" for n in range(6)]),
    services=st.lists(names, max_size=3, unique=True).map(tuple),
    url=st.sampled_from(["tcp://1", "tcp://2", ""]),
    path_ids=st.just((A,)),
)
queries = st.builds(
    Endpoint,
    name=st.sampled_from(["", "e1", "e9"]),
    services=st.lists(names, max_size=2, unique=True).map(tuple),
    url=st.sampled_from(["", "1"]),
)


@given(st.lists(st.tuples(st.booleans(), endpoints), max_size=30), queries)
def test_the_index_finds_exactly_what_looking_at_all_would(
    steps: list[tuple[bool, Endpoint]], query: Endpoint
) -> None:
    offers = Offers()
    for add, one in steps:
        if add:
            put(offers, one)
        else:
            offers.unregister_endpoint(one)
    everything = list(offers.endpoints)
    expected = {e.name for e in everything if endpoint_matches(query, e)}
    assert {e.name for e in offers.endpoints.find(query)} == expected


def test_finding_one_of_100_000_costs_what_finding_one_of_100_does() -> None:
    looks, times = {}, {}
    for count in (100, 100_000):
        offers = Offers(Limits(per_owner=count))
        for n in range(count):
            put(offers, endpoint(f"nse-{n}", services=(f"svc-{n // 10}",)))
        wanted = (Endpoint(services=("svc-5",)), Endpoint(name="nse-42"))
        before = offers.endpoints.examined
        assert [len(offers.endpoints.find(query)) for query in wanted] == [10, 1]
        looks[count] = offers.endpoints.examined - before
        began = time.perf_counter()
        for _ in range(2000):
            for query in wanted:
                offers.endpoints.find(query)
        times[count] = time.perf_counter() - began
    print(f"find with 100,000 / with 100: {times[100_000] / times[100]:.2f} in time, looks {looks}")
    assert looks[100_000] / looks[100] <= 1.2


# -- owners (wire.md §6.2)


def test_a_name_belongs_to_whoever_registered_it_first() -> None:
    offers = Offers()
    put(offers, endpoint())
    with pytest.raises(DeniedError) as taken:
        put(offers, endpoint(owner=B))
    text = str(taken.value)
    assert text.endswith("no sufficient privileges")
    assert all(part in text for part in ("'nse-1'", A, B, "another 60 s"))
    with pytest.raises(DeniedError):
        offers.unregister_endpoint(endpoint(owner=B))
    assert offers.endpoints.get("nse-1") is not None


def test_a_name_is_free_again_when_it_ends_or_is_given_up() -> None:
    offers = Offers()
    put(offers, endpoint())
    assert [e.name for e in offers.expire(NOW + 60 * SECOND)] == ["nse-1"]
    put(offers, endpoint(owner=B), now=NOW + 61 * SECOND)
    offers.unregister_endpoint(endpoint(owner=B))
    put(offers, endpoint(owner=A), now=NOW + 62 * SECOND)


def test_a_refresh_that_comes_in_time_keeps_the_name() -> None:
    offers = Offers()
    put(offers, endpoint())
    put(offers, endpoint(), now=NOW + 40 * SECOND)
    assert offers.expire(NOW + 61 * SECOND) == []
    assert [e.name for e in offers.expire(NOW + 100 * SECOND)] == ["nse-1"]


def test_the_same_network_service_from_another_identity_changes_nothing() -> None:
    offers = Offers()
    told: list[Found[Service]] = []
    offers.services.watch(Service(), told.append)
    first, new = offers.register_service(service())
    assert new
    assert first.payload == "IP"
    answer, new = offers.register_service(service(owner=B, payload="IP"))
    assert not new
    assert answer.path_ids[0] == B
    held = offers.services.get("icmp")
    assert held is not None
    assert held.path_ids[0] == A
    assert len(told) == 1


def test_other_content_of_a_network_service_needs_its_owner() -> None:
    offers = Offers()
    offers.register_service(service())
    with pytest.raises(DeniedError, match="payload 'IP' where 'ETHERNET'"):
        offers.register_service(service(owner=B, payload="ETHERNET"))
    with pytest.raises(DeniedError, match="other matches"):
        offers.register_service(service(owner=B, matches=(Match(),)))
    with pytest.raises(DeniedError, match=r"no sufficient privileges$"):
        offers.unregister_service(service(owner=B))
    held, _ = offers.register_service(service(payload="ETHERNET"))
    assert held.payload == "ETHERNET"


def test_network_services_never_end() -> None:
    offers = Offers()
    offers.register_service(service())
    offers.expire(NOW * 10)
    assert len(offers.services) == 1


def test_without_the_policy_anybody_may_take_a_name() -> None:
    offers = Offers()
    put(offers, endpoint())
    offers.register_endpoint(endpoint(owner=B), now=NOW, latest=NOW + SECOND, owned=False)
    assert (offers.held_by(A), offers.held_by(B)) == (0, 1)


def test_an_empty_name_is_refused_in_upstreams_words() -> None:
    offers = Offers()
    says = "^NetworkServiceEndpoint\\.Name can not be zero valued$"
    with pytest.raises(InvalidError, match=says):
        put(offers, endpoint(""))
    with pytest.raises(InvalidError, match=says):
        offers.unregister_endpoint(endpoint(""))
    says = "^NetworkService\\.Name can not be zero valued$"
    with pytest.raises(InvalidError, match=says):
        offers.register_service(service(""))
    with pytest.raises(InvalidError, match=says):
        offers.unregister_service(service(""))


# -- expiry (wire.md §6.6)


def test_an_endpoint_ends_when_asked_and_never_later_than_it_may() -> None:
    offers = Offers()
    assert put(offers, endpoint()).expires == NOW + 60 * SECOND
    sooner = endpoint(expires=NOW + 5 * SECOND)
    assert put(offers, sooner).expires == NOW + 5 * SECOND
    later = endpoint(expires=NOW + 500 * SECOND)
    assert put(offers, later).expires == NOW + 60 * SECOND


def test_an_end_in_the_past_is_refused_with_the_clocks_in_mind() -> None:
    with pytest.raises(InvalidError, match=r"'nse-1'.*2\.0 s ago.*clocks"):
        put(Offers(), endpoint(expires=NOW - 2 * SECOND))


def test_the_first_registration_time_stays_while_registered() -> None:
    offers = Offers()
    assert put(offers, endpoint(registered=7)).registered == NOW
    assert put(offers, endpoint(), now=NOW + SECOND).registered == NOW
    offers.expire(NOW + 100 * SECOND)
    assert put(offers, endpoint(), now=NOW + 200 * SECOND).registered == NOW + 200 * SECOND


def test_after_a_restart_nothing_ends_within_a_full_period() -> None:
    offers = Offers()
    old = endpoint(expires=NOW - 3600 * SECOND, registered=5)
    offers.load([old], [service()], grace_until=NOW + 60 * SECOND)
    held = offers.endpoints.get("nse-1")
    assert held is not None
    assert held.expires == NOW + 60 * SECOND
    assert offers.expire(NOW + 59 * SECOND) == []
    with pytest.raises(DeniedError):
        put(offers, endpoint(owner=B))
    assert put(offers, endpoint(), now=NOW + SECOND).registered == 5
    assert offers.expire(NOW + 60 * SECOND) == []


def test_after_a_restart_an_end_by_a_wrong_clock_counts_for_nothing() -> None:
    offers = Offers()
    old = endpoint(expires=NOW + 10**9 * SECOND)
    offers.load([old], [], grace_until=NOW + 60 * SECOND)
    assert offers.next_end() == NOW + 60 * SECOND


def test_ends_that_are_too_late_come_earlier_and_the_others_stay() -> None:
    offers = Offers()
    put(offers, endpoint(), seconds=600)
    put(offers, endpoint("nse-2"), seconds=6)
    heard: list[Found[Endpoint]] = []
    offers.endpoints.watch(Endpoint(), heard.append)
    offers.end_by(NOW + 60 * SECOND)
    assert [(f.item.name, f.item.expires) for f in heard] == [("nse-1", NOW + 60 * SECOND)]
    assert [e.name for e in offers.expire(NOW + 60 * SECOND)] == ["nse-2", "nse-1"]


def test_many_refreshes_leave_no_memory_behind() -> None:
    offers = Offers()
    for n in range(20_000):
        put(offers, endpoint(f"nse-{n % 10}"), now=NOW + n)
    assert len(offers._ends) <= 2048
    assert offers.next_end() is not None
    assert len(offers.expire(NOW + 90 * SECOND)) == 10
    assert offers.next_end() is None


# -- watching (wire.md §6.4)


def test_watchers_hear_what_they_asked_for_and_nothing_else() -> None:
    offers = Offers()
    heard: dict[str, list[tuple[str, bool]]] = {}
    for key, query in {
        "all": Endpoint(),
        "name": Endpoint(name="nse-1"),
        "other name": Endpoint(name="nse-2"),
        "service": Endpoint(services=("icmp",)),
        "other service": Endpoint(services=("vpn",)),
        "both": Endpoint(services=("icmp", "vpn")),
    }.items():
        heard[key] = []
        offers.endpoints.watch(
            query, lambda f, into=heard[key]: into.append((f.item.name, f.deleted))
        )
    put(offers, endpoint())
    put(offers, endpoint())  # unchanged: told all the same
    put(offers, endpoint(services=("vpn",)))
    offers.unregister_endpoint(endpoint())
    up, gone = ("nse-1", False), ("nse-1", True)
    assert heard == {
        "all": [up, up, up, gone],
        "name": [up, up, up, gone],
        "other name": [],
        "service": [up, up, gone],
        "other service": [up, gone],
        "both": [],
    }


def test_a_deletion_tells_the_whole_last_resource() -> None:
    offers = Offers()
    told: list[Found[Endpoint]] = []
    stored = put(offers, endpoint(url="tcp://1:2", labels={"icmp": {"a": "b"}}))
    offers.endpoints.watch(Endpoint(), told.append)
    offers.expire(NOW + 60 * SECOND)
    assert told == [Found(stored, deleted=True)]


def test_who_stopped_watching_hears_nothing() -> None:
    offers = Offers()
    told: list[Found[Endpoint]] = []
    watcher = offers.endpoints.watch(Endpoint(name="nse-1"), told.append)
    assert offers.endpoints.watching == 1
    offers.endpoints.unwatch(watcher)
    offers.endpoints.unwatch(watcher)
    put(offers, endpoint())
    assert told == []
    assert offers.endpoints.watching == 0
    assert offers.endpoints._watchers == {}


# -- bounds


def test_one_identity_holds_only_so_many_names() -> None:
    offers = Offers(Limits(per_owner=2))
    put(offers, endpoint("1"))
    offers.register_service(service("2"))
    with pytest.raises(ExhaustedError, match=r"spiffe://td/a holds 2 names"):
        put(offers, endpoint("3"))
    put(offers, endpoint("1"))  # a refresh is none more
    put(offers, endpoint("3", owner=B))
    offers.unregister_endpoint(endpoint("1"))
    put(offers, endpoint("4"))


def test_the_registry_holds_only_so_many_names() -> None:
    offers = Offers(Limits(total=1))
    put(offers, endpoint("1"))
    with pytest.raises(ExhaustedError, match="NSM_MAX_NAMES"):
        put(offers, endpoint("2", owner=B))


@pytest.mark.parametrize(
    "one",
    [
        endpoint("n" * 513),
        endpoint(url="u" * 4097),
        endpoint(services=tuple(f"s{n}" for n in range(257))),
        endpoint(services=("s" * 513,)),
        endpoint(labels={f"s{n}": {} for n in range(257)}),
        endpoint(labels={"icmp": {f"k{n}": "" for n in range(257)}}),
        endpoint(labels={"icmp": {"k": "v" * 4097}}),
    ],
)
def test_an_endpoint_beyond_the_bounds_is_refused(one: Endpoint) -> None:
    offers = Offers()
    with pytest.raises(InvalidError, match=r"has \d+ .*; at most \d+ are taken") as refused:
        put(offers, one)
    assert len(str(refused.value)) < 300
    assert len(offers.endpoints) == 0


@pytest.mark.parametrize(
    "one",
    [
        service("n" * 513),
        service(payload="p" * 513),
        service(matches=(Match(),) * 1025),
        service(matches=(Match(routes=(Destination(),) * 1025),)),
        service(matches=(Match({f"k{n}": "" for n in range(257)}),)),
        service(matches=(Match(metadata={"k": "v" * 5000}),)),
        service(matches=(Match(routes=(Destination({"k" * 5000: ""}),)),)),
    ],
)
def test_a_network_service_beyond_the_bounds_is_refused(one: Service) -> None:
    with pytest.raises(InvalidError, match=r"has \d+ .*; at most \d+ are taken"):
        Offers().register_service(one)


def test_a_change_that_could_not_be_kept_is_undone_unless_another_followed() -> None:
    offers = Offers()
    first = put(offers, endpoint())
    second = put(offers, endpoint(url="tcp://2:2"))
    offers.put_back_endpoint("nse-1", second, first)
    assert offers.endpoints.get("nse-1") is first
    offers.put_back_endpoint("nse-1", second, None)  # somebody replaced it since
    assert offers.endpoints.get("nse-1") is first
    offers.put_back_endpoint("nse-1", first, None)
    assert len(offers.endpoints) == 0
    assert offers.held_by(A) == 0

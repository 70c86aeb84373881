"""Names of other domains: taken apart, put together, and what DNS's answers come to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm import domains
from nsm.domains import Answer, Door
from nsm.errors import InvalidError
from nsm.model import Endpoint, Service

names = st.text(st.characters(codec="ascii", exclude_characters="@"), min_size=1, max_size=20)
domain = st.from_regex(r"[a-z][a-z0-9-]{0,10}[a-z0-9](\.[a-z]{2,5}){0,2}", fullmatch=True)


def test_a_name_is_split_at_its_first_at() -> None:
    assert domains.split("svc") == ("svc", "")
    assert domains.split("svc@c2") == ("svc", "c2")
    assert domains.split("svc@//10.0.0.1:5002") == ("svc", "//10.0.0.1:5002")
    assert domains.split("a@b@c") == ("a", "b@c")


@given(names, domain)
def test_what_is_split_is_joined_again(name: str, where: str) -> None:
    assert domains.split(domains.join(name, where)) == (name, where)
    assert domains.join(name, "") == name


@given(
    st.builds(
        Endpoint,
        name=names,
        services=st.lists(names, unique=True).map(tuple),
        labels=st.dictionaries(names, st.just({"a": "b"})),
        labels_unknown=st.dictionaries(names, st.just(b"x")),
    ),
    domain,
)
def test_an_endpoint_comes_back_as_it_left(endpoint: Endpoint, where: str) -> None:
    outside = domains.joined_endpoint(endpoint, where)
    assert domains.domain_of(outside) == where
    assert domains.is_foreign(outside)
    assert domains.stripped_endpoint(outside) == endpoint


def test_who_registers_a_name_goes_on_calling_it_so() -> None:
    asked = Endpoint("a", ("a@c2",), {"a@c2": {"x": "y"}})
    there = domains.stripped_endpoint(asked)
    assert there == Endpoint("a", ("a",), {"a": {"x": "y"}})
    assert domains.joined_endpoint(there, "c2", asked) == asked
    assert domains.joined_endpoint(there, "c2").name == "a@c2"
    held = Endpoint("a", ("a", "more"), {"a": {"x": "y"}})  # what its registry adds is of there
    assert domains.joined_endpoint(held, "c2", asked).services == ("a@c2", "more@c2")


@pytest.mark.parametrize(
    "asked",
    [
        Endpoint("nse@c2"),
        Endpoint("nse", ("svc@c2",)),
        Endpoint("", ("svc@c2",)),
        Endpoint("", (), {"svc@c2": {}}),
        Service("svc@c2"),
    ],
)
def test_an_at_anywhere_makes_it_another_domains(asked: Endpoint | Service) -> None:
    assert domains.is_foreign(asked)
    assert "@" in domains.foreign_name(asked)
    assert domains.domain_of(asked) == "c2"


def test_without_any_at_it_is_ours() -> None:
    assert not domains.is_foreign(Endpoint("nse", ("svc",), {"svc": {"mail": "a@b"}}))
    assert domains.domain_of(Service("svc")) == ""


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Endpoint("nse@c2", ("svc@c3",)), "'nse@c2' and 'svc@c3' are of two domains"),
        (Endpoint("", ("a@c2", "b")), "service 'b' is of this domain and 'a@c2' is not"),
        (Service("svc@"), "'svc@' says no domain"),
        (Service("@c2"), "'@c2' says no name"),
    ],
)
def test_a_wrong_name_is_a_sentence(asked: Endpoint | Service, says: str) -> None:
    with pytest.raises(InvalidError, match=says):
        domains.domain_of(asked)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("//10.0.0.1:5002", "tcp://10.0.0.1:5002"),
        ("tcp://10.0.0.1:5002", "tcp://10.0.0.1:5002"),
        ("//[fd00::1]:5002", "tcp://[fd00::1]:5002"),
        ("my.cluster2", ""),
        ("cluster2.", ""),
        ("_x", ""),
    ],
)
def test_a_domain_may_be_an_address(text: str, url: str) -> None:
    assert domains.direct(text) == url


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            ".",
            "a..b",
            "a b",
            "-a",
            "a-",
            "a/b",
            "a:5002",
            "x" * 64,
            "b\N{LATIN SMALL LETTER A WITH DIAERESIS}r",
        ),
        *("//host:5002", "//10.0.0.1", "//10.0.0.1:0", "//10.0.0.1:65536", "//fd00::1:5002"),
        *("//[10.0.0.1]:5002", "udp://10.0.0.1:5002", ".".join(["a" * 60] * 5), "a@b"),
    ],
)
def test_what_is_no_domain_is_refused(text: str) -> None:
    with pytest.raises(InvalidError, match="is no domain"):
        domains.direct(text)


def test_the_question_is_upstreams() -> None:
    assert domains.question(domains.REGISTRY, "my.cluster2") == "registry.nsm-system.my.cluster2."
    assert domains.question(domains.MANAGER_PROXY, "c2.") == "nsmgr-proxy.nsm-system.c2."


def test_doors_are_tried_by_priority_then_weight() -> None:
    late, light, heavy = Door(9, 0, 1, "a."), Door(1, 1, 2, "b."), Door(1, 5, 3, "c.")
    assert domains.in_turn([late, light, heavy]) == [heavy, light, late]
    assert domains.in_turn([Door(0, 0, 0, ".")]) == []  # RFC 2782: decidedly not there
    assert len(domains.in_turn([Door(0, 0, n, "a.") for n in range(99)])) == domains.MOST_URLS


def test_addresses_become_urls_once_each() -> None:
    some = ["10.0.0.1", "fd00::1", "10.0.0.1"]
    assert domains.urls(some, 5002) == ("tcp://10.0.0.1:5002", "tcp://[fd00::1]:5002")
    many = [f"10.0.{a}.{b}" for a in range(9) for b in range(99)]
    assert len(domains.urls(many, 1)) == domains.MOST_URLS


def test_what_one_family_lacks_the_other_may_have() -> None:
    four, six = Answer(("10.0.0.1",), 30.0), Answer(("fd00::1",), 20.0)
    none: Answer[str] = Answer(ttl=7.0, why="no AAAA")
    down: Answer[str] = Answer(why="no answer", failed=True)
    assert domains.merged(four, six) == Answer(("10.0.0.1", "fd00::1"), 20.0)
    assert domains.merged(four, none) == Answer(("10.0.0.1",), 7.0)
    assert domains.merged(none, none) == none
    half = domains.merged(four, down)
    assert (half.records, half.ttl, half.failed) == (("10.0.0.1",), domains.SOON, False)
    assert domains.merged(Answer(("10.0.0.1",), 1.0), down).ttl == 1.0
    for pair in ((none, down), (down, none), (down, down)):
        assert domains.merged(*pair) == Answer(why="no answer", failed=True)


@pytest.mark.parametrize(
    ("text", "server", "shown"),
    [
        ("10.0.0.53", ("10.0.0.53", 53), "10.0.0.53:53"),
        ("10.0.0.53:5353", ("10.0.0.53", 5353), "10.0.0.53:5353"),
        ("fd00::53", ("fd00::53", 53), "[fd00::53]:53"),
        ("[fd00::53]:5353", ("fd00::53", 5353), "[fd00::53]:5353"),
    ],
)
def test_a_dns_server_is_an_address(text: str, server: tuple[str, int], shown: str) -> None:
    assert domains.server(text) == server
    assert domains.show_server(server) == shown
    assert domains.server(shown) == server


@pytest.mark.parametrize(
    "text", ["", "dns.example", "10.0.0.53:0", "10.0.0.53:x", "[fd00::53", ":53", "[fd00::53]5"]
)
def test_what_is_no_dns_server_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - which text is wrong, its form adds
        domains.server(text)

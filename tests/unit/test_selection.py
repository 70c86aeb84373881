"""Matching labels to endpoints and forwarders, and taking turns among them."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.model import Destination, Endpoint, Match, Service
from nsm.selection import Candidate, Turns, match_endpoints, match_forwarders, render, subset

LABELS = {"nodeName": "n1", "a b": "sp", "x": "1", "é": "acc", "_u": "us"}


# What Go 1.24's text/template printed for these, given LABELS as map[string]string.
@pytest.mark.parametrize(
    ("template", "printed"),
    [
        ("{{.nodeName}}", "n1"),
        ("{{ .nodeName }}", "n1"),
        ("a-{{.nodeName}}-{{.x}}", "a-n1-1"),
        ("{{.missing}}", "<no value>"),
        ('{{index . "x"}}', "1"),
        ('{{ index . "missing" }}', ""),
        ('{{index .  "a b"}}', "sp"),
        ("{{index . `x`}}", "1"),
        ('{{ index\t.\n"x"}}', "1"),
        ("{{- .x -}}", "1"),
        (" a {{- .x -}} b", " a1b"),
        ("{{.é}}", "acc"),
        ("{{._u}}", "us"),
        ("{{/* c */}}z", "z"),
        ("{{.x }}y", "1y"),
        ("{{ $.x }}", "1"),
        ('{{index $ "x"}}', "1"),
        ("}}", "}}"),
        ("plain", "plain"),
    ],
)
def test_templates_print_what_go_prints(template, printed):
    assert render(template, LABELS) == printed


@pytest.mark.parametrize(
    "template",
    ["{{.app-name}}", "{{", "{{}}", "{{.x}} {{", '{{index ."x"}}', "{{-.x}}", "{{.x-}}"],
)
def test_what_go_cannot_parse_is_compared_as_it_is_written(template):
    assert render(template, LABELS) is None
    assert subset({"k": template}, {"k": template}, LABELS)
    assert not subset({"k": "1"}, {"k": template}, LABELS)


def test_a_selector_must_be_held_whole():
    assert subset({"a": "1", "b": "2"}, {"a": "1"}, {})
    assert not subset({"a": "1"}, {"a": "2"}, {})
    assert not subset({"a": "1"}, {"a": "1", "b": "2"}, {})


def test_a_key_that_is_absent_reads_as_empty():
    assert subset({"b": "2"}, {"a": ""}, {})
    assert subset({"b": "2"}, {"a": '{{index . "nothing"}}'}, {})
    assert not subset({}, {"a": ""}, {}), "fewer labels than the selector has"


def test_a_selector_may_refer_to_the_requests_labels():
    service = _service(Match(routes=(Destination({"nodeName": "{{.nodeName}}"}),)))
    here, there = _endpoint("here", nodeName="n1"), _endpoint("there", nodeName="n2")
    assert _names(service, {"nodeName": "n1"}, here, there) == ["here"]


def test_without_matches_every_endpoint_will_do():
    assert _names(_service(), {}, _endpoint("a"), _endpoint("b")) == ["a", "b"]


def test_the_first_match_for_the_requests_labels_counts():
    service = _service(
        Match({"app": "web"}, (Destination({"tier": "front"}),)),
        Match({}, (Destination({"tier": "back"}),)),
    )
    ends = _endpoint("f", tier="front"), _endpoint("b", tier="back")
    assert _names(service, {"app": "web"}, *ends) == ["f"]
    assert _names(service, {}, *ends) == ["b"]


def test_a_match_without_endpoints_is_final_unless_it_falls_through():
    first = Match({}, (Destination({"tier": "none"}),))
    second = Match({}, (Destination({"tier": "back"}),))
    end = _endpoint("b", tier="back")
    assert _names(_service(first, second), {}, end) == []
    falls = Match({}, (Destination({"tier": "none"}),), fallthrough=True)
    assert _names(_service(falls, second), {}, end) == ["b"]


def test_a_match_that_only_chooses_forwarders_takes_every_endpoint():
    assert _names(_service(Match(metadata={})), {}, _endpoint("a")) == ["a"]
    assert _names(_service(Match()), {}, _endpoint("a")) == []


def test_no_match_for_the_labels_means_nobody():
    assert _names(_service(Match({"app": "web"})), {}, _endpoint("a")) == []


def test_labels_count_only_for_the_service_asked_for():
    end = Endpoint("a", ("svc", "other"), {"other": {"tier": "x"}})
    assert _names(_service(Match(routes=(Destination({"tier": "x"}),))), {}, end) == []


def test_a_weight_is_the_routes_share_however_many_endpoints_it_has():
    service = _service(
        Match(routes=(Destination({"v": "1"}, weight=9), Destination({"v": "2"}, weight=1)))
    )
    ends = [_endpoint(f"stable-{n}", v="1") for n in range(3)] + [_endpoint("canary", v="2")]
    weights = {c.endpoint.name: c.weight for c in match_endpoints(service, {}, ends)}
    assert weights == {"stable-0": 9, "stable-1": 9, "stable-2": 9, "canary": 3}


def test_without_weights_all_endpoints_count_alike():
    service = _service(Match(routes=(Destination({"v": "1"}), Destination({"v": "2"}))))
    ends = [_endpoint(f"a-{n}", v="1") for n in range(3)] + [_endpoint("b", v="2")]
    assert {c.weight for c in match_endpoints(service, {}, ends)} == {1}


def test_three_to_one_is_spread_and_not_bunched():
    turns = Turns()
    candidates = [Candidate(_endpoint("a"), 3), Candidate(_endpoint("b"), 1)]
    first = [turns.order("svc", candidates)[0].name for _ in range(8)]
    assert first == list("aabaaaba")


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_over_one_round_each_gets_exactly_its_weight(weights):
    turns = Turns()
    candidates = [Candidate(_endpoint(str(n)), weight) for n, weight in enumerate(weights)]
    rounds = [turns.order("svc", candidates) for _ in range(sum(weights))]
    assert all(len(order) == len(weights) == len({e.name for e in order}) for order in rounds)
    firsts = Counter(order[0].name for order in rounds)
    assert firsts == {str(n): weight for n, weight in enumerate(weights)}


def test_an_endpoint_that_went_is_forgotten_and_a_new_one_joins():
    turns = Turns()
    a, b, c = (Candidate(_endpoint(name)) for name in "abc")
    turns.order("svc", [a, b])
    turns.order("svc", [b, c])
    assert set(turns._standing["svc"]) == {"b", "c"}


def test_what_turns_remember_is_bounded():
    turns = Turns(services=3)
    for n in range(10):
        turns.order(f"svc-{n}", [Candidate(_endpoint("a"))])
    assert list(turns._standing) == ["svc-7", "svc-8", "svc-9"]


def test_forwarders_must_have_the_labels_a_match_names():
    sriov, p2p = _forwarder("sriov", sriov="true"), _forwarder("p2p", p2p="true")
    service = _service(Match({"hw": "yes"}, metadata={"sriov": "true"}), Match())
    assert match_forwarders(service, {"hw": "yes"}, [sriov, p2p]) == (sriov,)
    assert match_forwarders(service, {}, [sriov, p2p]) == (p2p,)
    assert match_forwarders(_service(), {}, [sriov, p2p]) == (sriov, p2p)


@pytest.mark.parametrize("metadata", [None, {}])
def test_a_match_that_names_no_labels_needs_a_point_to_point_forwarder(metadata):
    both = [_forwarder("plain"), _forwarder("p2p", p2p="true")]
    assert match_forwarders(_service(Match(metadata=metadata)), {}, both) == (both[1],)


def test_forwarders_fall_through_to_the_next_match():
    p2p = _forwarder("p2p", p2p="true")
    wants = Match(metadata={"sriov": "true"})
    falls = Match(metadata={"sriov": "true"}, fallthrough=True)
    assert match_forwarders(_service(wants, Match()), {}, [p2p]) == ()
    assert match_forwarders(_service(falls, Match()), {}, [p2p]) == (p2p,)


def test_the_forwarder_a_wire_already_has_comes_first():
    all_ = [_forwarder(name) for name in "abc"]
    for name in "abc":
        found = match_forwarders(_service(), {}, all_, prefer=name)
        assert found[0].name == name
        assert {one.name for one in found} == set("abc")


def _service(*matches: Match) -> Service:
    return Service("svc", "IP", matches)


def _endpoint(name: str, **labels: str) -> Endpoint:
    return Endpoint(name, ("svc",), {"svc": labels})


def _forwarder(name: str, **labels: str) -> Endpoint:
    return Endpoint(name, ("forwarder",), {"forwarder": labels})


def _names(service: Service, labels: dict[str, str], *endpoints: Endpoint) -> list[str]:
    return list(
        itertools.chain(c.endpoint.name for c in match_endpoints(service, labels, endpoints))
    )


def test_a_flat_networks_members_get_their_own_nodes_router_while_there_is_one():
    def router(name, node, **more):
        labels = {"net": {"vwire-role": "router", "nodeName": node, **more}}
        return Endpoint(name, ("net",), labels)

    routers = [router("a", "n1"), router("b", "n2"), router("c", "n2", clusterName="west")]

    def chosen(labels, endpoints=routers, **service):
        found = match_endpoints(Service("net", "IP", **service), labels, endpoints)
        return [one.endpoint.name for one in found]

    assert chosen({"nodeName": "n2"}) == ["b"]
    assert chosen({"nodeName": "n2", "clusterName": "west"}) == ["c"]
    assert chosen({"nodeName": "n3"}) == chosen({}) == ["a", "b", "c"]
    assert chosen({"nodeName": "n2"}, routers[:1]) == ["a"]  # its own is dead, say
    every = (Match({}, (Destination({}),)),)
    assert chosen({"nodeName": "n2"}, matches=every) == ["a", "b", "c"]  # rules are rules
    others = [Endpoint("x", ("net",), {"net": {"nodeName": "n2"}}), routers[0]]
    assert chosen({"nodeName": "n2"}, others) == ["x", "a"]  # of routers only

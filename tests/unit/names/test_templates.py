"""What members are called by templates, and which templates are none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsm.errors import InvalidError
from nsm.model import Connection, Path, Segment
from nsm.names import templates

CONN = Connection(
    id="c-1",
    service="orders-db@my.cluster3",
    endpoint="router-1",
    labels={"podName": "App-1", "empty": ""},
    path=Path(segments=(Segment("app-1", "c-1"), Segment("nsmgr", "n"))),
)


@pytest.mark.parametrize(
    ("written", "called"),
    [
        ('{{ index .Labels "podName" }}.{{ target .NetworkService }}.', "app-1.orders-db"),
        (
            "{{.Labels.podName}}.{{ target .NetworkService }}.{{ domain .NetworkService }}.",
            "app-1.orders-db.my.cluster3",
        ),
        ("{{.Labels.podName}}.{{.NetworkService|target}}", "app-1.orders-db"),
        ("{{ target (.NetworkService) }}", "orders-db"),
        ("{{ index .Labels `podName` }}.db", "app-1.db"),
        ("{{- .NetworkServiceEndpointName -}} .x", "router-1.x"),
        ('{{ index (.Labels) ("podName") }}.x', "app-1.x"),
        ("{client}.orders-db", "app-1.orders-db"),
        ("{client}.{service}.{domain}", "app-1.orders-db.my.cluster3"),
        ('{{ index .Labels "empty" }}..{{ index .Labels "none" }}.db...x.', ".db.x"),
        ('{{ "a\\"" | domain }}plain', "plain"),
    ],
)
def test_a_member_is_called_as_the_template_says(written: str, called: str) -> None:
    assert templates.parse(written).name(CONN) == called


def test_upstreams_default_is_understood() -> None:
    plain = Connection(id="c", service="vl3-dns", labels={"podName": "alpine-1"})
    (template,) = templates.parse_all([templates.DEFAULT])
    assert template.name(plain) == "alpine-1.vl3-dns"
    assert templates.called([template, template], plain) == ("alpine-1.vl3-dns",)
    abroad = Connection(id="c", service="vl3-dns@meet", labels={"podName": "alpine-1"})
    assert template.name(abroad) == "alpine-1.vl3-dns"


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("{client}.a, {client}.b", ("{client}.a", "{client}.b")),
        ('{{ index .Labels "a,b" }}.x,y', ('{{ index .Labels "a,b" }}.x', "y")),
        ("{{ index .Labels `a,}}` }}.x,y", ("{{ index .Labels `a,}}` }}.x", "y")),
        ('{{ "a\\",}}" , }},y', ('{{ "a\\",}}" , }}', "y")),
        ('{{ "a,b', ('{{ "a', "b")),
        ("a,,b", ("a", "", "b")),
    ],
)
def test_a_comma_in_braces_is_none_of_the_list(written: str, parts: tuple[str, ...]) -> None:
    assert templates.listed(written) == parts


@given(st.text('{}`"\\,a', max_size=60))
def test_a_list_loses_nothing(written: str) -> None:
    assert ",".join(templates.listed(written)) == written


@pytest.mark.parametrize(
    ("written", "why"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("a" * 1025, "more than 1024"),
        ("{{ .NetworkService", "without }}"),
        ("{{ }}", "nothing between"),
        ("a}b", "single }"),
        ("{who}.x", "asks for {who}"),
        ("{{ .Context }}", "asks for .Context"),
        ("{{ .Labels }}", "has all labels"),
        ("{{ .Id.x }}", "asks for .Id.x"),
        ("{{ .Labels.a.b }}", "asks for .Labels.a.b"),
        ("{{ index .Labels }}", "index without"),
        ("{{ index .Id .Id }}", "index without"),
        ("{{ target }}", "without the one text"),
        ("{{ target .Labels }}", "without the one text"),
        ("{{ lower .Id }}", "calls 'lower'"),
        ("{{ .Id .Id }}", "side by side"),
        ("{{ .Id | .Id }}", "side by side"),
        ("{{ (.Id }}", "( without )"),
        ("{{ .Id ) }}", "where it cannot be"),
        ("{{ .Id § }}", "cannot be read from"),
        ("{{ " + "(" * 9 + ".Id" + ")" * 9 + " }}", "brackets in brackets"),
        ("a b", "'a b', which cannot be part"),
    ],
)
def test_a_bad_template_is_refused_with_what_is_wrong_and_what_is_possible(
    written: str, why: str
) -> None:
    with pytest.raises(InvalidError) as refused:
        templates.parse(written)
    assert why in str(refused.value)
    assert "NSM_DNS_TEMPLATES" in str(refused.value)
    assert '{{ index .Labels "KEY" }}' in str(refused.value)


def test_a_router_has_a_bounded_number_of_templates() -> None:
    with pytest.raises(InvalidError, match="0 templates"):
        templates.parse_all([])
    with pytest.raises(InvalidError, match="17 templates"):
        templates.parse_all(f"a{n}" for n in range(17))


@pytest.mark.parametrize("label", ["a b", "x@y", "é", "-a", "a" * 64, "a\n", "*"])
def test_what_dns_cannot_name_is_refused_with_whose_it_is(label: str) -> None:
    template = templates.parse("{{ .Labels.podName }}.x")
    with pytest.raises(InvalidError) as refused:
        template.name(Connection(id="c-9", service="db", labels={"podName": label}))
    assert "'c-9'" in str(refused.value)
    assert "cannot be part of a DNS name" in str(refused.value)


def test_a_name_has_up_to_253_characters() -> None:
    template = templates.parse("{{ .Labels.podName }}.x")
    longest = ".".join(["a" * 63] * 3 + ["b" * 59])
    assert template.name(Connection(labels={"podName": longest})) == f"{longest}.x"
    with pytest.raises(InvalidError, match="254 characters"):
        template.name(Connection(labels={"podName": f"{longest}c"}))


def test_search_domains_are_every_suffix_after_the_first_label() -> None:
    assert templates.search_domains(["a.vl3.my.cluster3", "a.b", "single", ".db.x"]) == (
        *("vl3.my.cluster3", "my.cluster3", "cluster3"),
        *("b", "db.x", "x"),
    )


@given(st.text(alphabet='{}-|().`"\\ .aLIdabelsindxtrg', max_size=60), st.text(max_size=40))
def test_nothing_but_a_refusal_comes_of_whatever_is_written(text: str, label: str) -> None:
    try:
        name = templates.parse(text).name(Connection(id="i", labels={"a": label}))
    except InvalidError:
        return
    assert ".." not in name
    assert len(name) <= 253
    assert not name.endswith(".")

"""What a router is told about names, and about the other routers."""

import pytest

from endpoints.vl3.config import Config
from nsm.liveness import Rhythm
from nsm.process.config import ConfigError, parse, resolved

LEAST = {"NSM_PREFIX_SERVER_URL": "tcp://ipam:5006", "NSM_NAME": "r-1"}


def config(**more: str) -> Config:
    return parse(Config, {**LEAST, **more})


def test_the_default_is_upstreams_and_names_interdomain_networks_too() -> None:
    made = config(NSM_SERVICE_NAMES="orders-db@meet", POD_NAME="pod-1")
    assert [str(one) for one in made.dns_templates] == [
        '{{ index .Labels "podName" }}.{{ target .NetworkService }}.'
    ]
    assert made.apexes == ("orders-db",)
    assert made.called == ("r-1.orders-db", "pod-1.orders-db")
    assert config().called == ("r-1.vL3",)


def test_a_list_has_templates_with_commas_in_their_braces() -> None:
    written = '{client}.db,{{ index .Labels "a,b" }}.{{ .NetworkService }}.x'
    made = config(NSM_DNS_TEMPLATES=written)
    assert len(made.dns_templates) == 2
    assert f"NSM_DNS_TEMPLATES={written}  #" in resolved(made, {"NSM_DNS_TEMPLATES": written})
    assert made.apexes == ("vl3", "db", "vl3.x")
    assert made.called == ("r-1.vL3", "r-1.db")


def test_a_domain_that_members_say_is_nobodys_before_they_do() -> None:
    written = "{client}.{{ .Labels.ns }}.svc,{client}-{{ .Id }}.a.b"
    assert config(NSM_DNS_TEMPLATES=written).apexes == ("vl3", "a.b")


def test_no_template_is_no_names() -> None:
    made = config(NSM_DNS_TEMPLATES="")
    assert made.dns_templates == ()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"NSM_DNS_TEMPLATES": "{who}.x"}, "asks for {who}"),
        ({"NSM_DNS_TEMPLATES": "a,,b"}, "is empty"),
        (
            {"NSM_DNS_TEMPLATES": "{{ .NetworkService }}", "NSM_SERVICE_NAMES": "a@b"},
            "cannot be part of a DNS name",
        ),
    ],
)
def test_what_can_name_nobody_is_refused_at_the_start(more: dict[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        config(**more)


def test_a_router_that_dns_cannot_name_is_one_all_the_same() -> None:
    assert config(NSM_NAME="r:1").called == ()


def test_other_routers_are_asked_as_often_as_upstreams_are() -> None:
    assert config().liveness == Rhythm(interval=1.2, timeout=1.0)
    told = config(NSM_LIVENESS_CHECK_INTERVAL="200ms", NSM_LIVENESS_CHECK_TIMEOUT="3s")
    assert told.liveness == Rhythm(interval=0.2, timeout=3.0)
    assert config(NSM_LIVENESS_CHECK_ENABLED="false").liveness is None

"""A file of network services: what it means, and the sentence for each mistake in it."""

import pytest

from nsm.errors import InvalidError
from nsm.model import Destination, Match, Service
from nsmctl.define import parse

TEXT = """\
apiVersion: networkservicemesh.io/v1
kind: NetworkService
metadata: {name: orders, namespace: ns-1}
spec:
  payload: ip
  matches:
    - source_selector: {tier: web}
      routes: [{destination_selector: {version: blue}, weight: 2}, {destination_selector: {}}]
      fallthrough: true
    - metadata: {labels: {can: special}}
      routes: [{destination_selector: {nodeName: "{{.nodeName}}"}}]
"""


def test_a_resource_of_upstreams_is_a_service_with_its_rules():
    assert parse(TEXT, "x") == (
        Service(
            name="orders",
            payload="IP",
            matches=(
                Match({"tier": "web"}, (Destination({"version": "blue"}, 2), Destination()), True),
                Match(
                    routes=(Destination({"nodeName": "{{.nodeName}}"}),),
                    metadata={"can": "special"},
                ),
            ),
        ),
    )


def test_several_are_in_one_file_and_what_is_not_said_is_as_upstream_has_it():
    least = "kind: NetworkService\nmetadata: {name: least}\n"
    assert [one.name for one in parse(f"{TEXT}---\n{least}", "x")] == ["orders", "least"]
    assert parse(least, "x") == (Service(name="least", payload="ETHERNET"),)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("kind: NetworkService", "kind: Pod", "x: kind is 'Pod', expected NetworkService"),
        ("name: orders, ", "", "x: metadata.name is missing"),
        ("payload: ip", "payload: frames", "x: orders: payload is FRAMES, expected ETHERNET or IP"),
        ("fallthrough: true", "fallthrough: 1", "x: orders: rule 1: fallthrough is neither"),
        ("weight: 2", "weight: -1", "x: orders: rule 1, route 1: weight is no whole number"),
        ("version: blue", "version: 1", "rule 1, route 1: destination_selector has a label"),
        ("source_selector", "sourceSelector", "x: orders: rule 1: unknown key 'sourceSelector'"),
        ("{can: special}", "[can]", "x: orders: rule 2: metadata: labels is no mapping"),
        ("spec:", "spec: [", "x:6: no YAML:"),
        (TEXT, "", "x: there is no NetworkService in it"),
        (TEXT, "[]", "x: it is no mapping of apiVersion"),
    ],
)
def test_each_mistake_is_told(old, new, says):
    assert old in TEXT
    with pytest.raises(InvalidError) as caught:
        parse(TEXT.replace(old, new, 1), "x")
    assert says in str(caught.value)

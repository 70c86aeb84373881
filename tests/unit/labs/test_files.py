"""Lab files: what they mean, and the sentence for each mistake in them."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from labs import lab, schema, units
from nsm.errors import InvalidError

GOOD = """\
name: x
topology:
  clusters: {east: {}}
  nodes:
    n1: {cluster: east}
    n2: {cluster: east}
    sw: {kind: switch}
  links:
    - {endpoints: ["n1:eth0", "sw:p1"]}
    - {endpoints: ["n2:eth0", "sw:p2"], mtu: 1400}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  y: {endpoints: {r: {on: n2, prefixes: [172.16.1.0/24]}}}
clients:
  app: {on: n1, connect: ["kernel://y/nsm-1?a=b"], labels: {tier: db, a: c}}
checks:
  - {name: all, ping: {from: "*", to: r}, expect: {lost: 0}}
"""


def wrong(old: str, new: str) -> str:
    assert old in GOOD
    with pytest.raises(InvalidError) as caught:
        lab.parse(GOOD.replace(old, new, 1), "labs/x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param(
            "connect: [", "conect: [",
            'labs/x.yaml:15: clients.app: unknown key "conect"; did you mean "connect"?',
            id="unknown key",
        ),
        pytest.param(
            "mtu: 1400", "mtu: five",
            'labs/x.yaml:10: topology.links[1].mtu: found "five", expected a whole number from',
            id="wrong kind of value",
        ),
        pytest.param(
            "on: n1,", "on: n3,",
            "labs/x.yaml:15: clients.app.on: no node 'n3'; there is n1, n2, sw",
            id="a node nobody has",
        ),
        pytest.param(
            "kernel://y/", "kernel://yy/",
            "labs/x.yaml:15: clients.app.connect[0]: nobody in east offers 'yy'",
            id="a service nobody offers",
        ),
        pytest.param(
            "kernel://y/nsm-1", "kernel://y/nsm-1234567890123",
            "labs/x.yaml:15: clients.app.connect[0]: interface name",
            id="an interface name too long",
        ),
        pytest.param(
            "services:", "faults: []\nservices:",
            "labs/x.yaml:12: faults: not yet: faults; what works: checks",
            id="a key of a later piece",
        ),
        pytest.param(
            "kind: switch", "kind: router",
            "labs/x.yaml:7: topology.nodes.sw.kind: kind: router is not yet there;"
            " what works: node and switch",
            id="a kind of a later piece",
        ),
        pytest.param(
            'sw:p2"', 'sw:p1"', "x.yaml:10: topology.links[1].endpoints[1]: sw:p1 has two cables",
            id="a port with two cables",
        ),
        pytest.param(
            "n2: {cluster: east}", "n2: {cluster: east, ipv4: 198.19.0.1}",
            "labs/x.yaml:6: topology.nodes.n2.ipv4: 198.19.0.1 is outside of 198.18.0.0/24",
            id="an address from elsewhere",
        ),
        pytest.param(
            "name: x", "name: x\nname: z", "labs/x.yaml:2: name: is there twice, first in line 1",
            id="a key twice",
        ),
        pytest.param("clients:", "clients: [", "no YAML:", id="no YAML"),
        pytest.param(
            "expect: {lost: 0}", "expect: {exit: 0}",
            "labs/x.yaml:17: checks[0].expect.exit: means nothing for ping; known: lost",
            id="an expectation of another check",
        ),
        pytest.param(
            'ping: {from: "*", to: r}', "tcp: {from: app, to: r, bytes: 50}",
            "labs/x.yaml:17: checks[0].tcp.bytes: found 50, expected text: How much: 64kB",
            id="no unit",
        ),
        pytest.param(
            'ping: {from: "*", to: r}', 'ping: {from: "*", to: rr}',
            "labs/x.yaml:17: checks[0].ping.to: nobody is called like 'rr'",
            id="a glob that means nobody",
        ),
        pytest.param(
            "198.18.0.0/24,", "198.18.0.0/32,",
            "labs/x.yaml:11: topology.underlay.ipv4: 198.18.0.0/32 has no address for 2 nodes",
            id="a prefix too small",
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_its_line_and_what_was_expected(old, new, says):
    assert says in wrong(old, new)


def test_all_mistakes_are_told_at_once_and_in_the_order_of_the_file():
    text = wrong("mtu: 1400}\n  underlay", "mtu: 1}\n  undrlay").splitlines()
    assert [line.split(":")[1] for line in text] == ["10", "11"]


def test_addresses_are_drawn_in_the_order_of_the_links_and_around_given_ones():
    x = lab.parse(GOOD.replace("n2: {cluster: east}", "n2: {cluster: east, ipv4: 198.18.0.1}"), "x")
    assert x.nodes["n1"].addresses == ("198.18.0.2/24", "fd00:18::1/64")
    assert x.nodes["n2"].addresses == ("198.18.0.1/24", "fd00:18::2/64")


def test_a_clients_labels_travel_in_its_urls_and_the_urls_own_win():
    assert lab.parse(GOOD, "x").clients["app"].connect == ("kernel://y/nsm-1?tier=db&a=b",)


def test_on_is_a_key_and_no_truth():
    assert lab.parse(GOOD, "x").clients["app"].on == "n1"


@pytest.mark.parametrize(
    "path", sorted(p for p in Path("labs").rglob("*.yaml") if p.name != "index.yaml"), ids=str
)
def test_every_shipped_lab_is_right(path):
    lab.read(path)


def test_the_schema_is_a_schema_and_knows_the_shipped_labs():
    jsonschema.Draft202012Validator.check_schema(schema.document())
    for path in lab.shipped_files():
        # asked of somebody who reads YAML 1.2's `on` as text: quoted, as an editor would
        data = yaml.load(path.read_text().replace(" on:", " 'on':").replace("{on:", "{'on':"),
                         yaml.SafeLoader)  # fmt: skip
        jsonschema.validate(json.loads(json.dumps(data)), schema.document())


def test_a_lab_that_is_nowhere_names_those_that_are():
    with pytest.raises(InvalidError, match='did you mean "one-node"'):
        lab.find("one-nod")
    with pytest.raises(InvalidError, match='did you mean "parity/ipv6/Kernel2Kernel"'):
        lab.find("parity/ipv6/Kernel2Kerne")


def test_labs_of_upstreams_examples_are_found_by_their_names():
    found = lab.find("parity/dual-stack/Kernel2Kernel")
    assert lab.read(found).name == "dual-kernel2kernel"
    with pytest.raises(InvalidError):
        lab.find("parity/index")


def test_an_alias_that_loops_is_refused():
    with pytest.raises(InvalidError, match=r"levels|YAML"):
        lab.parse("a: &a [*a]\n", "x")
    bomb = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + p] * 10)}]\n" for p, c in zip("abcde", "bcdef", strict=True)
    )
    with pytest.raises(InvalidError, match="more than"):
        lab.parse(bomb, "x")


@pytest.mark.parametrize(("text", "value"), [("64kB", 64_000), ("50MB", 50_000_000), ("1B", 1)])
def test_sizes_have_units(text, value):
    assert units.octets(text) == value


@pytest.mark.parametrize("text", ["50", "5 MB", "5Mb", "-1B", ""])
def test_sizes_without_one_are_refused(text):
    with pytest.raises(InvalidError):
        units.octets(text)

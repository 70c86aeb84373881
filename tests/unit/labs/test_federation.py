"""Clusters that know each other: what a file may say of that, and what is started for it."""

import pytest

from labs import engine, processes, seats, wires
from labs import lab as labfile
from labs.lab import Lab
from labs.paths import Paths
from labs.processes import Plan, Stage
from nsm.errors import InvalidError
from nsm.places import parse_map

BASE = """\
name: x
topology:
  clusters:
    east: {trust-domain: one.example}
    west: {}
    meet: {managers: false}
    lone: {}
  federation: [[east, west, meet]]
  discovery: static
  nodes:
    e1: {cluster: east}
    e2: {cluster: east}
    w1: {cluster: west}
    m1: {cluster: meet}
    l1: {cluster: lone}
    sw: {kind: switch}
  links:
    - {endpoints: ["e1:eth0", "sw:p1"]}
    - {endpoints: ["e2:eth0", "sw:p2"]}
    - {endpoints: ["w1:eth0", "sw:p3"]}
    - {endpoints: ["m1:eth0", "sw:p4"]}
    - {endpoints: ["l1:eth0", "sw:p5"]}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  direct: {endpoints: {there: {on: w1, prefixes: [172.16.1.0/24]}}}
  shared@meet: {endpoints: {floater: {on: w1, prefixes: [172.16.2.0/24]}}}
clients:
  app: {on: e1, connect: ["kernel://direct@west/nsm-1", "kernel://shared@meet/nsm-2"]}
  near: {on: w1, connect: ["kernel://direct/nsm-1", "kernel://direct@west/nsm-2"]}
  outsider: {on: m1, netns-only: true}
checks:
  - {name: a, ping: {from: app, to: there, service: direct@west}, expect: {lost: 0}}
"""


@pytest.fixture(scope="module")
def lab() -> Lab:
    return labfile.parse(BASE, "x.yaml")


@pytest.fixture(scope="module")
def plan(lab: Lab) -> Plan:
    return processes.plan(lab, Paths(lab.name))


def settings(plan: Plan, name: str) -> dict[str, str]:
    return dict(next(p for p in plan.processes if p.name == name).environment)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param(
            "[[east, west, meet]]", "[[east, wast, meet]]",
            "x.yaml:8: topology.federation[0][1]: no cluster 'wast'; did you mean \"west\"?",
            id="a cluster that is not there",
        ),
        pytest.param(
            "[[east, west, meet]]", "[[east, west, meet, east]]",
            "x.yaml:8: topology.federation[0][3]: east is there twice", id="one twice",
        ),
        pytest.param(
            "[[east, west, meet]]", "[[east, west, meet], [lone, meet], [west, east]]",
            "x.yaml:8: topology.federation[2][1]: west and east know each other already",
            id="a pair twice",
        ),
        pytest.param(
            "[[east, west, meet]]", "[[east]]",
            "x.yaml:8: topology.federation[0]: found a list of 1, expected 2 to 50 items",
            id="one alone",
        ),
        pytest.param(
            "[[east, west, meet]]", "[east, west]",
            'x.yaml:8: topology.federation[0]: found "east", expected a list', id="no list",
        ),
        pytest.param(
            "west: {}", "west: {underlay: ipv6}",
            "x.yaml:8: topology.federation[0][1]: east talks over ipv4 and west over ipv6:"
            " give both the same underlay", id="two families",
        ),
        pytest.param(
            "[[east, west, meet]]", "[[east, west]]",
            "x.yaml:6: topology.clusters.meet.managers: a floating domain is for clusters with"
            " managers that know it: name meet and them in topology.federation",
            id="a floating domain nobody knows",
        ),
        pytest.param(
            "managers: false", "managers: none",
            'x.yaml:6: topology.clusters.meet.managers: found "none", expected true or false',
            id="managers of another kind",
        ),
        pytest.param(
            "discovery: static", "discovery: mdns",
            'x.yaml:9: topology.discovery: found "mdns", expected static or dns',
            id="another discovery",
        ),
        pytest.param(
            "direct@west/nsm-1", "direct@wst/nsm-1",
            "x.yaml:28: clients.app.connect[0]: no cluster 'wst'; did you mean \"west\"?",
            id="a domain that is not there",
        ),
        pytest.param(
            "direct@west/nsm-1", "direct@/nsm-1",
            "x.yaml:28: clients.app.connect[0]: NSURL 'kernel://direct@/nsm-1' names no domain",
            id="a domain without a name",
        ),
        pytest.param(
            "direct@west/nsm-1", "direct@lone/nsm-1",
            "x.yaml:28: clients.app.connect[0]: east does not know lone: name both in"
            " topology.federation", id="a domain its cluster does not know",
        ),
        pytest.param(
            "direct@west/nsm-1", "dirct@west/nsm-1",
            "x.yaml:28: clients.app.connect[0]: nobody in west offers 'dirct'; did you mean"
            ' "direct"?', id="a service nobody offers there",
        ),
        pytest.param(
            "direct@west/nsm-1", "direct/nsm-1",
            "x.yaml:28: clients.app.connect[0]: nobody in east offers 'direct'; there is"
            " direct@west", id="without the domain that it is of",
        ),
        pytest.param(
            "shared@meet/nsm-2", "shared@west/nsm-2",
            "x.yaml:28: clients.app.connect[1]: nobody in west offers 'shared'; there is"
            " shared@meet", id="a floating service where it runs",
        ),
        pytest.param(
            "outsider: {on: m1, netns-only: true}",
            'outsider: {on: l1, connect: ["kernel://direct@lone/nsm-1"]}',
            "x.yaml:30: clients.outsider.connect[0]: lone knows no other domain: leave out @lone",
            id="its own name where no door is",
        ),
        pytest.param(
            "outsider: {on: m1, netns-only: true}",
            'outsider: {on: m1, connect: ["kernel://shared@meet/nsm-1"]}',
            "x.yaml:30: clients.outsider.on: m1 is of the floating domain meet: no wire begins or"
            " ends there", id="a client on a node without a manager",
        ),
        pytest.param(
            "floater: {on: w1", "floater: {on: m1",
            "x.yaml:26: services.shared@meet.endpoints.floater.on: m1 is of the floating domain"
            " meet: no wire begins or ends there; who offers SERVICE@meet is on a node of a"
            " cluster that knows it", id="an endpoint on a node without a manager",
        ),
        pytest.param(
            "floater: {on: w1", "floater: {on: l1",
            "x.yaml:26: services.shared@meet.endpoints.floater.on: lone does not know meet: name"
            " both in topology.federation", id="an endpoint of a cluster that does not know it",
        ),
        pytest.param(
            "shared@meet: {endpoints", "shared@mete: {endpoints",
            "x.yaml:26: services.shared@mete: no cluster 'mete'; did you mean \"meet\"?",
            id="a service of a domain that is not there",
        ),
        pytest.param(
            "direct: {endpoints: {there: {on: w1", "direct@east: {endpoints: {there: {on: w1",
            "x.yaml:25: services.direct@east.endpoints.there.on: w1 is of west, the service of"
            " east", id="a service of a cluster with managers runs there",
        ),
        pytest.param(
            "floater: {on: w1", "nsmgr-proxy: {on: w1", "need names of their own",
            id="a process's name",
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_its_line_and_what_was_expected(old: str, new: str, says: str):
    assert BASE.count(old) == 1
    with pytest.raises(InvalidError) as caught:
        labfile.parse(BASE.replace(old, new), "x.yaml")
    assert says in caught.value.message


def test_a_lab_that_is_to_be_red_may_ask_where_nobody_answers():
    red = 'must-be-red: {up: "why"}\n'
    text = BASE.replace("direct@west/nsm-1", "direct@nowhere/nsm-1") + red
    assert labfile.parse(text, "x").clients["app"].connect[0] == "kernel://direct@nowhere/nsm-1"


def test_who_knows_whom_is_mutual_and_nobody_elses(lab: Lab):
    knows = {name: set(cluster.knows) for name, cluster in lab.clusters.items()}
    assert knows == {
        "east": {"west", "meet"}, "west": {"east", "meet"}, "meet": {"east", "west"}, "lone": set(),
    }  # fmt: skip
    chain = BASE.replace("[[east, west, meet]]", "[[east, west], [west, lone], [east, meet]]")
    chain = chain.replace("floater: {on: w1", "floater: {on: e2")
    known = labfile.parse(chain, "x").clusters
    assert set(known["west"].knows) == {"east", "lone"}
    assert "west" not in known["meet"].knows


def test_only_clusters_with_managers_that_know_others_have_doors(lab: Lab, plan: Plan):
    names = [p.name for p in plan.processes]
    proxies = ("registry-proxy", "nsmgr-proxy")
    doors = {f"{node}/{proxy}" for node in ("e1", "w1") for proxy in proxies}
    assert {name for name in names if name.endswith("-proxy")} == doors
    assert [name for name in names if name.startswith("m1/")] == ["m1/issuer", "m1/registry"]
    registries = ("e1/registry", "w1/registry", "m1/registry", "l1/registry")
    told = ["NSM_PROXY_REGISTRY_URL" in settings(plan, name) for name in registries]
    assert told == [True, True, False, False]
    assert "NSM_FEDERATION_DIR" in settings(plan, "m1/issuer")
    assert "NSM_FEDERATION_DIR" not in settings(plan, "l1/issuer")


def test_each_hop_to_another_domain_is_told_the_next(lab: Lab, plan: Plan):
    registry, proxy, asker = (
        settings(plan, f"e1/{name}") for name in ("registry", "nsmgr-proxy", "registry-proxy")
    )
    assert registry["NSM_PROXY_REGISTRY_URL"] == proxy["NSM_LISTEN_ON"] == "tcp://198.18.0.1:5004"
    assert proxy["NSM_REGISTRY_URL"] == registry["NSM_LISTEN_ON"] == "tcp://198.18.0.1:5002"
    assert proxy["NSM_REGISTRY_PROXY_URL"] == asker["NSM_LISTEN_ON"] == "tcp://198.18.0.1:5005"
    paths = Paths(lab.name)
    assert asker["NSM_DOMAINS_PATH"] == paths.domains("east")
    own = [proxy[key] for key in ("NSM_MAP_IP_FILE_PATH", "NSM_CLUSTER_INFO_PATH")]
    assert all(path.startswith(paths.folder) for path in own)
    names = [settings(plan, f"{node}/nsmgr-proxy")["NSM_NAME"] for node in ("e1", "w1")]
    assert len(set(names)) == 2  # neighbours of one name would be one hop


def test_a_domain_is_told_where_those_it_knows_are_and_itself(lab: Lab):
    known = processes.domains_of(lab, lab.clusters["east"])
    assert known == {
        "east": {"registry": ["tcp://198.18.0.1:5002"], "nsmgr-proxy": ["tcp://198.18.0.1:5004"]},
        "west": {"registry": ["tcp://198.18.0.3:5002"], "nsmgr-proxy": ["tcp://198.18.0.3:5004"]},
        "meet": {"registry": ["tcp://198.18.0.4:5002"]},
    }
    six = BASE.replace("underlay: {ipv4: 198.18.0.0/24, ", "underlay: {")
    far = labfile.parse(six, "x")
    assert processes.domains_of(far, far.clusters["west"])["meet"]["registry"] == [
        "tcp://[fd00:18::4]:5002"
    ]


def test_what_is_offered_in_a_floating_domain_says_so_in_both_names(plan: Plan):
    floater, there = settings(plan, "w1/floater"), settings(plan, "w1/there")
    names = [(one["NSM_NAME"], one["NSM_SERVICE_NAMES"]) for one in (floater, there)]
    assert names == [("floater@meet", "shared@meet"), ("there", "direct")]


def test_every_door_has_an_identity_of_its_own_and_no_rights(plan: Plan):
    ids = {e.spiffe_id for e in plan.entries if e.cluster == "east"}
    assert {f"spiffe://one.example/node/e1/{p}" for p in ("nsmgr-proxy", "registry-proxy")} < ids
    keys = [(e.namespace, e.gid) for e in plan.entries]
    assert len(set(keys)) == len(keys)
    doors = [p for p in plan.processes if p.stage in (Stage.REGISTRY_PROXY, Stage.MANAGER_PROXY)]
    assert [p.privileged for p in doors] == [False] * 4


def test_before_anybody_starts_bundles_and_places_are_exchanged(tmp_path, lab: Lab):
    paths = Paths(lab.name, str(tmp_path))
    for folder in paths.folders(tuple(lab.nodes), tuple(lab.clusters)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    engine._introduce(lab, paths)

    def bundles(cluster: str) -> dict[str, str]:
        folder = tmp_path / paths.federation(cluster)
        return {file.name: file.read_text() for file in folder.iterdir()}

    east, west, meet = bundles("east"), bundles("west"), bundles("meet")
    assert east.keys() == {"west.test.pem", "meet.test.pem"}
    assert west.keys() == {"one.example.pem", "meet.test.pem"}
    assert meet.keys() == {"one.example.pem", "west.test.pem"}
    assert east["meet.test.pem"] == west["meet.test.pem"] != east["west.test.pem"]
    assert not (tmp_path / paths.federation("lone")).exists()
    assert not (tmp_path / paths.authority("lone")).exists()
    text = (tmp_path / paths.domains("west")).read_text()
    assert set(parse_map(text, "domains.yaml", lambda name: name)) == {"west", "east", "meet"}
    assert not (tmp_path / paths.domains("meet")).exists()


def test_on_a_node_without_a_manager_the_domains_registry_is_asked(lab: Lab):
    paths = Paths(lab.name)
    assert seats.of(lab, paths, "m1").manager == "tcp://198.18.0.4:5002"
    assert seats.of(lab, paths, "outsider").variables["NSM_CONNECT_TO"] == "tcp://198.18.0.4:5002"
    assert seats.of(lab, paths, "e1").manager.startswith("unix://")


@pytest.mark.parametrize(
    ("asked", "domain", "glob", "serves"),
    [
        ("direct@west", "west", "direct", True),
        ("direct@west", "west", "direct@west", True),
        ("direct@west", "west", "*@west", True),
        ("direct@west", "west", "direct@east", False),
        ("direct", "west", "direct@west", True),  # its own cluster's, asked without
        ("direct", "west", "direct@east", False),
        ("direct", "west", "dir*", True),
        ("direct", "west", "west", False),
    ],
)
def test_a_check_means_wires_by_service_or_by_service_and_domain(
    asked: str, domain: str, glob: str, serves: bool
):
    wire = wires.Wire(
        "app-0", "app", asked, domain, "there", ("e1", "w1"), "nsm-1", "", 0, (), (), 0
    )
    assert wire.serves(glob) is serves


def test_an_endpoint_is_the_labs_whatever_is_behind_its_name(lab: Lab):
    assert wires.whose(lab, "floater@meet") == wires.whose(lab, "floater-a1b2@meet") == "floater"
    assert wires.whose(lab, "there@west") == wires.whose(lab, "there") == "there"

"""Flat networks in a lab: what a file may say of them, and what is started for it."""

import pytest
import yaml

from endpoints.ipam.config import Config as PlanConfig
from endpoints.supplier import recipes
from endpoints.supplier.config import Config as SupplierConfig
from endpoints.vl3.config import Config as RouterConfig
from labs import alive, engine, processes, seats, state
from labs import lab as labfile
from labs.lab import Lab
from labs.paths import Paths
from labs.processes import Plan, Stage
from labs.wires import Way, Wire, outside, ways, whose
from nsm.errors import InvalidError
from nsm.process.client import Config as ClientConfig
from nsm.process.config import parse

BASE = """\
name: x
topology:
  clusters:
    east: {}
    west: {}
    meet: {managers: false}
    lone: {}
  federation: [[east, west, meet]]
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
  underlay: {ipv4: 198.18.0.0/24}
services:
  orders-db@meet:
    vl3: {prefixes: [172.16.0.0/16, "2001:db8::/64"], dns: "{client}.orders-db", routers: [e1, w1]}
  plain.net@east: {payload: ip, vl3: {prefixes: [172.17.0.0/16], routers: [e2]}}
  pair@east: {endpoints: {resp: {on: e2, prefixes: [169.254.10.0/24]}}}
clients:
  app-e: {on: e1, connect: ["kernel://orders-db@meet/nsm-1", "kernel://pair/nsm-2"]}
  app-w: {on: w1, connect: ["kernel://orders-db@meet/nsm-1", "kernel://plain.net@east/nsm-2"]}
  near: {on: e1, connect: ["kernel://plain.net/nsm-1"]}
  outsider: {on: w1, netns-only: true}
checks:
  - {name: a, ping: {from: "app-*", to: "app-*", service: orders-db@meet}, expect: {lost: 0}}
  - {name: b, ping: {from: "app-*", to: "{client}.orders-db", service: orders-db}}
"""


@pytest.fixture(scope="module")
def lab() -> Lab:
    return labfile.parse(BASE, "x.yaml")


LONG = "p" * 61
NETWORK = "services.orders-db@meet"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        pytest.param(
            "prefixes: [172.16", "prefixs: [172.16",
            f'x.yaml:25: {NETWORK}.vl3: unknown key "prefixs"; did you mean "prefixes"?',
            id="unknown key",
        ),
        pytest.param(
            ", routers: [e1, w1]", "", f'x.yaml:25: {NETWORK}.vl3: "routers" is missing',
            id="no routers",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: everywhere",
            f'x.yaml:25: {NETWORK}.vl3.routers: found "everywhere", expected a list of nodes',
            id="routers of another kind",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: [e1], idle: 15s",
            f"x.yaml:25: {NETWORK}.vl3.idle: is for routers: on-demand; these stay",
            id="an end for what stays",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: on-demand, idle: 99999999999999999min",
            f"x.yaml:25: {NETWORK}.vl3: '99999999999999999min' is no quantity",
            id="an idle time that is none",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: on-demand, idle: 61min",
            f"x.yaml:25: {NETWORK}.vl3: idle: found 61min, expected up to 60min",
            id="an idle time without end",
        ),
        pytest.param(
            "  pair@east:", f"  {LONG}@east: {{vl3: {{prefixes: [10.0.0.0/8], routers: [e1]}}}}\n"
            "  pair@east:", f"x.yaml:27: services.{LONG}@east.vl3.routers[0]: a router on e1 is"
            f" called {LONG}-e1, which has 64 characters and is part of its DNS name: at most 63",
            id="a router's name that is no DNS name",
        ),
        pytest.param(
            "routers: [e2]", "routers: on-demand",
            "x.yaml:30: clients.app-w.connect: plain.net@east has its routers on-demand, on nodes"
            " of east, and app-w is on one of west: give the network routers: [NODE, ...], or have"
            " it in a floating domain", id="on demand in another cluster",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: [e1, e1]", f"x.yaml:25: {NETWORK}.vl3.routers: found a"
            " list of 2, expected no item twice", id="two on one node",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: [e1, e3]",
            f"x.yaml:25: {NETWORK}.vl3.routers[1]: no node 'e3'; there is e1, e2, w1",
            id="a router on no node",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: [sw]",
            f"x.yaml:25: {NETWORK}.vl3.routers[0]: sw is a switch: nothing runs on it",
            id="a router on a switch",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: [m1]",
            f"x.yaml:25: {NETWORK}.vl3.routers[0]: m1 is of the floating domain meet: no wire"
            " begins or ends there", id="a router where no manager is",
        ),
        pytest.param(
            "routers: [e1, w1]", "routers: [l1]",
            f"x.yaml:25: {NETWORK}.vl3.routers[0]: lone does not know meet: name both in"
            " topology.federation", id="a router of a cluster that does not know it",
        ),
        pytest.param(
            "routers: [e2]", "routers: [w1]",
            "x.yaml:26: services.plain.net@east.vl3.routers[0]: w1 is of west, the service of east",
            id="a router in another cluster",
        ),
        pytest.param(
            "plain.net@east: {payload: ip", "plain.net@east: {payload: ethernet",
            "x.yaml:26: services.plain.net@east.payload: a flat network (vl3) carries ip",
            id="frames",
        ),
        pytest.param(
            "pair@east: {endpoints", "pair@east: {vl3: {prefixes: [10.0.0.0/8], routers: [e1]},"
            " endpoints", "x.yaml:27: services.pair@east: found endpoints and vl3, expected exactly"
            " one of endpoints, vl3", id="both",
        ),
        pytest.param(
            "{endpoints: {resp: {on: e2, prefixes: [169.254.10.0/24]}}}", "{}",
            "x.yaml:27: services.pair@east: found none, expected exactly one of endpoints, vl3",
            id="neither",
        ),
        pytest.param(
            "orders-db@meet:", "orders-db@mete:",
            "x.yaml:24: services.orders-db@mete: no cluster 'mete'; did you mean \"meet\"?",
            id="a cluster that is not there",
        ),
        pytest.param(
            "plain.net@east: {payload", "plain.net: {payload",
            "x.yaml:26: services.plain.net: whose? plain.net@east or plain.net@west or"
            " plain.net@meet or plain.net@lone", id="of no cluster",
        ),
        pytest.param(
            "plain.net@east: {payload: ip, vl3: {prefixes: [172.17",
            "pair@east: {payload: ip, vl3: {prefixes: [172.17", "is there twice", id="key twice",
        ),
        pytest.param(
            "pair@east: {endpoints", "pair: {vl3: {prefixes: [10.0.0.0/8], routers: [e1]}}\n"
            "  pair@east: {endpoints", "services.pair: whose?", id="of none, and there",
        ),
        pytest.param(
            "[172.16.0.0/16,", "[172.16.0.0/16, 172.16.8.0/24,",
            f"x.yaml:25: {NETWORK}.vl3.prefixes[1]: 172.16.8.0/24 overlaps 172.16.0.0/16",
            id="overlapping itself",
        ),
        pytest.param(
            "  pair@east:", "  more@meet: {vl3: {prefixes: [172.16.8.0/24], routers: [e2]}}\n"
            "  pair@east:", "x.yaml:27: services.more@meet.vl3.prefixes[0]: 172.16.8.0/24 overlaps"
            " 172.16.0.0/16 of orders-db@meet", id="overlapping another of its address plan",
        ),
        pytest.param(
            '"{client}.orders-db", r', '"{clinet}.orders-db", r',
            f"x.yaml:25: {NETWORK}.vl3.dns: ", id="names nobody has",
        ),
        pytest.param(
            "kernel://plain.net/", "kernel://plain/",
            "x.yaml:31: clients.near.connect[0]: nobody in east offers 'plain'; did you mean"
            ' "plain.net"?', id="a network that is not there",
        ),
        pytest.param(
            '{client}.orders-db", service: orders-db', '{client}.net", service: plain*',
            "x.yaml:35: checks[1].ping.to: no member has a name: give the flat network (vl3) that"
            " 'plain*' means dns", id="a check by names of a network without",
        ),
        pytest.param(
            'to: "{client}.orders-db"', 'to: "{cleint}.orders-db"',
            "x.yaml:35: checks[1].ping.to: '{cleint}.orders-db': what is filled in is {client}",
            id="a check by another word",
        ),
        pytest.param(
            "outsider: {on: w1", "orders-db-w1: {on: w1", "need names of their own",
            id="a router's name",
        ),
        pytest.param(
            "  pair@east:", "  plain-net@east: {vl3: {prefixes: [10.0.0.0/8], routers: [e2]}}\n"
            "  pair@east:", "x.yaml:27: services.plain-net@east.vl3.routers[0]: a router on e2 is"
            " called plain-net-e2, which is taken", id="another router's name",
        ),
        pytest.param(
            "outsider: {on: w1", "ipam: {on: w1", "need names of their own", id="a process's name",
        ),
    ],
)  # fmt: skip
def test_each_mistake_is_told_with_its_line_and_what_was_expected(old: str, new: str, says: str):
    assert BASE.count(old) == 1
    with pytest.raises(InvalidError) as caught:
        labfile.parse(BASE.replace(old, new), "x.yaml")
    assert says in caught.value.message


def test_a_network_is_of_the_cluster_behind_it_or_of_the_only_one(lab: Lab):
    assert list(lab.networks) == ["orders-db@meet", "plain.net@east"]
    floating, own = lab.networks.values()
    assert (floating.domain, own.domain) == ("meet", "")
    alone = """\
name: x
topology:
  clusters: {c: {}}
  nodes: {n: {cluster: c}, sw: {kind: switch}}
  links: [{endpoints: ["n:eth0", "sw:p"]}]
  underlay: {ipv4: 198.18.0.0/24}
services:
  net: {vl3: {prefixes: [10.0.0.0/8], routers: [n]}}
"""
    assert list(labfile.parse(alone, "x").networks) == ["net@c"]
    two = alone.replace("  net:", "  net@c: {vl3: {prefixes: [11.0.0.0/8], routers: [n]}}\n  net:")
    with pytest.raises(InvalidError, match=r"services\.net: there is a service net@c already"):
        labfile.parse(two, "x")
    other = "  net@c: {endpoints: {r: {on: n, prefixes: [11.0.0.0/8]}}}\n  net:"
    both = alone.replace("  net:", other)
    with pytest.raises(InvalidError, match=r"services\.net: there is a service net@c already"):
        labfile.parse(both, "x")


def test_a_router_is_a_place_of_its_node(lab: Lab):
    there = {name: (one.network, one.on) for name, one in lab.routers.items()}
    assert there == {
        "orders-db-e1": ("orders-db@meet", "e1"),
        "orders-db-w1": ("orders-db@meet", "w1"),
        "plain-net-e2": ("plain.net@east", "e2"),
    }
    assert set(there) < set(lab.places)
    assert lab.node_of("orders-db-w1").name == "w1"


def test_members_are_known_by_what_they_ask_for_and_named_where_the_network_has_names(lab: Lab):
    members = {name: [n.name for n in lab.networks_of(one)] for name, one in lab.clients.items()}
    assert members == {
        "app-e": ["orders-db@meet"],
        "app-w": ["orders-db@meet", "plain.net@east"],
        "near": ["plain.net@east"],
        "outsider": [],
    }
    assert [name for name, one in lab.clients.items() if lab.is_named(one)] == ["app-e", "app-w"]


def test_routers_on_demand_are_where_somebody_asks():
    text = BASE.replace("routers: [e1, w1]", "routers: on-demand, idle: 30s")
    lab = labfile.parse(text, "x")
    network = lab.networks["orders-db@meet"]
    assert (network.on_demand, network.idle) == (True, 30.0)
    there = [name for name, one in lab.routers.items() if one.network == network.name]
    assert there == ["orders-db-e1", "orders-db-w1"]
    assert processes.supplied(lab) == ["e1", "w1"]
    alone = text.replace(
        'app-w: {on: w1, connect: ["kernel://orders-db@meet/nsm-1", ', "app-w: {on: w1, connect: ["
    )
    assert processes.supplied(labfile.parse(alone, "x")) == ["e1"]


# -- what is started ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(lab: Lab) -> Plan:
    return processes.plan(lab, Paths(lab.name))


def test_an_address_plan_runs_where_a_cluster_with_networks_has_its_registry(plan: Plan):
    plans = {p.name: p.environment for p in plan.of(Stage.ADDRESS_PLAN)}
    assert list(plans) == ["e1/ipam", "m1/ipam"]
    meets = plans["m1/ipam"]
    assert meets["NSM_LISTEN_ON"] == "tcp://198.18.0.4:5006"
    assert meets["NSM_OPERATORS"] == "spiffe://meet.test/node/m1/nsmctl"
    assert meets["NSM_STORE"].startswith("/run/vwire/labs/x/cluster/meet/")


def test_a_network_is_defined_by_whom_the_address_plan_obeys_and_by_the_command_of_people(
    lab: Lab, plan: Plan
):
    errands = {p.name: p for p in plan.of(Stage.NETWORK)}
    assert list(errands) == ["m1/ipam.orders-db", "e1/ipam.plain.net"]
    one = errands["m1/ipam.orders-db"]
    assert (one.module, one.is_errand) == ("nsmctl", True)
    assert one.namespace == "x-m1"
    who = {(e.namespace, e.gid): e.spiffe_id for e in plan.entries}
    assert who[one.namespace, one.gid] == "spiffe://meet.test/node/m1/nsmctl"
    assert one.argv[:3] == ("vl3", "create", "orders-db")
    said = list(zip(one.argv[3::2], one.argv[4::2], strict=True))
    assert ("--manager", "tcp://198.18.0.4:5002") in said
    assert ("--address-plan", "tcp://198.18.0.4:5006") in said
    assert [v for k, v in said if k == "--prefix"] == [*lab.networks["orders-db@meet"].prefixes]


def test_a_router_runs_among_its_nodes_programs_and_its_wires_end_elsewhere(plan: Plan):
    routers = {p.name: p for p in plan.of(Stage.ROUTER)}
    assert list(routers) == ["e1/orders-db-e1", "w1/orders-db-w1", "e2/plain-net-e2"]
    floating = routers["w1/orders-db-w1"]
    assert (floating.namespace, floating.privileged) == ("x-w1", True)
    told = floating.environment
    assert told["NSM_NAMESPACE"] == "/run/netns/x-orders-db-w1"
    assert told["NSM_NAME"] == "orders-db-w1@meet"
    assert told["NSM_SERVICE_NAMES"] == "orders-db@meet"
    assert told["NSM_POOL"] == "orders-db"
    assert told["NSM_PREFIX_SERVER_URL"] == "tcp://198.18.0.4:5006"
    assert told["NSM_CONNECT_TO"] == "unix:///run/vwire/labs/x/node/w1/nsm.io.sock"
    assert told["NSM_DNS_TEMPLATES"] == "{client}.orders-db"
    own = routers["e2/plain-net-e2"].environment
    assert (own["NSM_NAME"], own["NSM_SERVICE_NAMES"]) == ("plain-net-e2", "plain.net")
    assert own["NSM_DNS_TEMPLATES"] == ""  # no names, rather than the default's


def test_a_routers_settings_are_what_the_router_takes(plan: Plan):
    for one in plan.of(Stage.ROUTER):
        parse(RouterConfig, one.environment)
    for one in plan.of(Stage.ADDRESS_PLAN):
        parse(PlanConfig, one.environment)
    for one in plan.of(Stage.CLIENT):
        parse(ClientConfig, one.environment)


def test_who_is_in_a_routers_namespace_is_that_router(lab: Lab, plan: Plan):
    entries = [e for e in plan.entries if e.spiffe_id == "spiffe://west.test/router/orders-db-w1"]
    assert [e.namespace for e in entries] == ["x-w1", "x-orders-db-w1"]
    assert len({e.gid for e in entries}) == 1
    assert seats.of(lab, Paths(lab.name), "orders-db-w1").gid == entries[0].gid
    keys = [(e.namespace, e.gid) for e in plan.entries]
    assert len(set(keys)) == len(keys)


def test_clients_have_a_resolv_conf_of_their_own_and_members_with_names_need_their_resolver(
    plan: Plan,
):
    told = {p.name: p.environment for p in plan.of(Stage.CLIENT)}
    paths = {name: one["NSM_RESOLV_CONF"] for name, one in told.items()}
    assert paths == {
        "e1/app-e": "/etc/netns/x-app-e/resolv.conf",
        "w1/app-w": "/etc/netns/x-app-w/resolv.conf",
        "e1/near": "/etc/netns/x-near/resolv.conf",
    }
    wanted = [name for name, one in told.items() if one.get("NSM_LOCAL_DNS_SERVER_ENABLED")]
    assert wanted == ["e1/app-e", "w1/app-w"]


# -- who reaches whom -----------------------------------------------------------------------------


def wire(client: str, service: str, network: str, own: str, far: str, mtu: int = 1400) -> Wire:
    return Wire(
        f"{client}-0", client, service, network.partition("@")[2], far, ("e1", "w1"), "nsm-1",
        "veth", mtu, (own,), ("10.0.0.1",), 0.0, network=network,
    )  # fmt: skip


def test_members_reach_each_other_by_their_addresses_and_by_the_mtu_of_their_own_wire():
    net = "orders-db@meet"
    there = [
        wire("a", net, net, "172.16.0.1", "orders-db-e1", 1300),
        wire("b", net, net, "172.16.1.1", "orders-db-w1"),
        wire("c", "other@meet", "other@meet", "172.20.0.1", "other-w1"),
    ]
    assert ways(there, "a", "b", "orders-db*") == [Way("b-0", ("172.16.1.1",), 1300)]
    assert ways(there, "a", "b", net) == ways(there, "a", "b", "*")
    assert ways(there, "a", "b", "other") == []
    assert ways(there, "a", "c", "*") == ways(there, "c", "a", "*") == []
    assert ways(there, "a", "a", "*") == []
    assert ways(there, "a", "orders-db-e1", "*") == [Way("a-0", ("10.0.0.1",), 1300)]
    assert outside(there, "b", "*") == [Way("b-0", ("172.16.1.1",), 1400)]


def test_a_wires_far_end_may_be_a_router(lab: Lab):
    assert (
        whose(lab, "orders-db-e1@meet") == whose(lab, "orders-db-e1-x9y8z@meet") == "orders-db-e1"
    )


def test_a_supplier_is_told_how_each_of_its_routers_is_started():
    lab = labfile.parse(BASE.replace("routers: [e1, w1]", "routers: on-demand"), "x")
    paths = Paths(lab.name)
    plan = processes.plan(lab, paths)
    suppliers = {p.name: p for p in plan.of(Stage.SUPPLIER)}
    assert list(suppliers) == ["e1/supplier", "w1/supplier"]
    one = suppliers["w1/supplier"]
    assert one.privileged
    parse(SupplierConfig, one.environment)
    assert one.environment["NSM_ROUTERS_FILE"] == processes.routers_of(paths, "w1")
    assert [p.name for p in plan.of(Stage.ROUTER)] == ["e2/plain-net-e2"]  # the others come later
    text = yaml.safe_dump(processes.recipes(plan, lab, "w1"))
    (recipe,) = recipes.parse(text, "routers.yaml")
    assert (recipe.service, recipe.name) == ("orders-db@meet", "orders-db-w1@meet")
    assert recipe.namespace == "/run/netns/x-orders-db-w1"
    assert recipe.environment["NSM_POOL"] == "orders-db"
    assert recipe.environment["NSM_IDLE_TIMEOUT"] == "15s"
    who = {(e.namespace, e.gid): e.spiffe_id for e in plan.entries}
    assert who["x-w1", recipe.gid] == "spiffe://west.test/router/orders-db-w1"
    (errand,) = (p for p in plan.of(Stage.NETWORK) if "orders-db" in p.argv)
    assert errand.argv[-1] == "--on-demand"


def test_whoever_takes_a_registration_back_is_stopped_before_the_mesh(tmp_path, monkeypatch):
    text = BASE.replace("routers: [e1, w1]", "routers: on-demand")
    lab, paths = labfile.parse(text, "x"), Paths("x", str(tmp_path))
    plan = processes.plan(lab, paths)
    monkeypatch.setattr(engine, "saved", lambda _: lab)
    monkeypatch.setattr(alive.Mark, "alive", True)
    children = {
        p.name: state.Born(p.name, alive.Mark(p.gid, 1), None, 0.0, None) for p in plan.processes
    }
    numbers = {p.gid: p.name for p in plan.processes}
    told = {
        what: [numbers[mark.pid] for mark in group]
        for what, group in engine._goodbyes(paths, children)
    }
    assert list(told) == ["clients", "endpoints", "routers", "the mesh"]
    assert told["endpoints"] == ["e2/resp"]
    assert set(told["routers"]) == {"e2/plain-net-e2", "e1/supplier", "w1/supplier"}
    assert {"e1/nsmgr", "m1/registry", "m1/ipam"} <= set(told["the mesh"])

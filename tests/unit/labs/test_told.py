"""What a lab tells its processes beyond who they are: addresses, routes, names, who knows whom."""

import json

import pytest
import yaml

from endpoints.responder.config import Config as Responder
from endpoints.responder.policies import parse as policies
from forwarder.config import Config as Forwarder
from labs import engine, lab, processes
from labs.paths import Paths
from nsm.errors import InvalidError
from nsm.model import Destination, Match, Service
from nsm.process.client import Config as Nsc
from nsm.process.config import parse
from nsmctl import define

TEXT = """\
name: x
topology:
  clusters: {c: {excluded-prefixes: [172.16.1.4/30]}}
  nodes:
    n1: {cluster: c}
    n2: {cluster: c, forwarders: {plain: {p2p: "true"}, special: {can: special}}}
    sw: {kind: switch}
  links: [{endpoints: ["n1:eth0", "sw:p1"]}, {endpoints: ["n2:eth0", "sw:p2"]}]
  underlay: {ipv4: 198.18.0.0/24}
services:
  y:
    endpoints:
      r:
        on: n1
        prefixes: [172.16.1.0/24]
        ipam: strict
        dns: [{servers: [172.16.1.0], domains: [my.service]}]
        policy-routes:
          - {from: 172.16.2.201/24, proto: 6, dstport: 6666,
             routes: [{prefix: 172.16.3.0/24, nexthop: 172.16.2.200}]}
          - {srcport: 1000-2000}
  z:
    payload: ip
    matches: [{routes: [{destination_selector: {a: b}}], metadata: {labels: {can: special}}}]
    endpoints: {s: {on: n2, prefixes: [172.16.1.0/24]}}
clients:
  app:
    on: n1
    connect: ["kernel://y/nsm-1", "kernel://z/nsm-2"]
    labels: {tier: db}
    awareness: [["kernel://y/nsm-1", "kernel://z/nsm-2"]]
  other: {on: n2, connect: ["kernel://z/nsm-1"]}
checks:
  - {name: moves, wire: {client: app, within: 2s}, expect: {endpoint: r}}
  - {name: ends, stop: {process: r}}
  - {name: some port, tcp: {from: app, to: r, port: 6666}}
"""


@pytest.fixture
def told(tmp_path):
    """Each process's settings, by its name behind its node's; and the lab's paths."""
    found = lab.parse(TEXT, "x")
    paths = Paths("x", str(tmp_path))
    plan = processes.plan(found, paths)
    return {one.name.partition("/")[2]: one.environment for one in plan.processes}, found, paths


def test_a_responder_reads_what_its_endpoint_is_told(told):
    settings, _, _ = told
    strict, polite = (parse(Responder, settings[name]) for name in ("r", "s"))
    assert (strict.ipam_policy, polite.ipam_policy) == ("strict", "polite")
    assert [(one.servers, one.search_domains) for one in strict.dns_configs] == [
        (("172.16.1.0",), ("my.service",))
    ]
    assert polite.dns_configs == ()


def test_files_are_where_they_are_looked_for_and_only_those_there_is_something_in(told):
    settings, found, paths = told
    for folder in paths.folders(tuple(found.nodes), tuple(found.clusters)):
        engine.os.makedirs(folder, exist_ok=True)
    engine._told_by_files(found, paths, processes.plan(found, paths))
    with open(settings["nsmgr"]["NSM_EXCLUDED_PREFIXES_PATH"]) as file:
        assert yaml.safe_load(file) == {"prefixes": ["172.16.1.4/30"]}
    with open(settings["r"]["NSM_PBR_CONFIG_PATH"]) as file:
        first, second = policies(file.read(), "x")
    assert (first.from_, first.proto, first.dst_port) == ("172.16.2.201/24", "6", "6666")
    assert [(one.prefix, one.next_hop) for one in first.routes] == [
        ("172.16.3.0/24", "172.16.2.200")
    ]
    assert second.src_port == "1000-2000"
    assert not engine.os.path.exists(settings["s"]["NSM_PBR_CONFIG_PATH"])


def test_a_service_with_rules_is_defined_by_the_lab_and_not_by_its_endpoints(told):
    settings, found, paths = told
    for folder in paths.folders(tuple(found.nodes), tuple(found.clusters)):
        engine.os.makedirs(folder, exist_ok=True)
    plan = processes.plan(found, paths)
    engine._told_by_files(found, paths, plan)
    (errand,) = plan.of(processes.Stage.NETWORK)
    assert errand.is_errand
    with open(errand.argv[1]) as file:
        (service,) = define.parse(file.read(), "x")
    assert service == Service(
        name="z",
        payload="IP",
        matches=(Match({}, (Destination({"a": "b"}),), False, {"can": "special"}),),
    )
    assert not parse(Responder, settings["s"]).register_service
    assert parse(Responder, settings["r"]).register_service


def test_a_node_has_one_forwarder_or_those_that_are_said(told):
    settings, _, _ = told
    labels = {name: parse(Forwarder, settings[name]).labels for name in ("forwarder", "special")}
    assert labels == {"forwarder": {"p2p": "true"}, "special": {"can": "special"}}
    names = [settings[name]["NSM_NAME"] for name in ("forwarder", "plain", "special")]
    assert names == ["forwarder-n1", "plain-n2", "special-n2"]


def test_a_client_is_told_groups_in_the_words_in_which_it_asks(told):
    settings, _, _ = told
    app, other = (parse(Nsc, settings[name]) for name in ("app", "other"))
    assert app.awareness_groups == (app.network_services,)
    assert app.network_services[0].labels == {"tier": "db"}
    assert other.awareness_groups == ()


def test_who_is_told_whom_to_ask_serves_names(told):
    _, found, _ = told
    assert found.is_named(found.clients["app"])
    assert not found.is_named(found.clients["other"])


def test_checks_have_their_port_their_endpoint_and_their_time(told):
    _, found, _ = told
    moves, ends, port = (one.what for one in found.checks)
    assert (moves.endpoint, moves.within) == ("r", 2.0)
    assert ends == lab.Stop("r")
    assert port.port == 6666


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('[["kernel://y/nsm-1", "kernel', '[["kernel://q/nsm-1", "kernel',
         "clients.app.awareness[0][0]: kernel://q/nsm-1 is not asked for"),
        ("from: 172.16.2.201/24", "from: nobody",
         "policy-routes[0].from: 'nobody' does not appear to be an IPv4 or IPv6"),
        ("nexthop: 172.16.2.200", "nexthop: 172.16.2.0/24", 'nexthop: found "172.16.2.0/24"'),
        ("servers: [172.16.1.0]", "servers: []", "dns[0].servers"),
        ("stop: {process: r}", "stop: {process: n1}", "stop.process: no process 'n1'"),
        ("expect: {endpoint: r}", "expect: {endpoint: app}", "no endpoint or router 'app'"),
        ("within: 2s", "within: 2h", "wire.within"),
        ("plain: {p2p", "sw: {p2p", "nodes.sw: nodes, forwarders, endpoints"),
        ("special: {can: special}}}", "s: {can: special}}}", "need names of their own"),
        ("ipam: strict", "ipam: stern", 'found "stern", expected polite or strict'),
    ],
)  # fmt: skip
def test_each_mistake_is_told(old, new, says):
    assert old in TEXT
    with pytest.raises(InvalidError) as caught:
        lab.parse(TEXT.replace(old, new, 1), "x")
    assert says in str(caught.value), json.dumps(str(caught.value))

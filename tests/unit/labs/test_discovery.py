"""A lab whose clusters find each other by DNS: what its server says, and who asks it."""

import shutil

import dns.zone
import pytest

from labs import engine, nameserver, processes
from labs import lab as labfile
from labs.paths import Paths
from labs.processes import Stage
from nsm.errors import InvalidError, UnsupportedError
from nsm.process.config import parse
from registry.proxy.config import Config

TEXT = """\
name: x
topology:
  clusters: {east: {}, west: {}, lone: {}, meet: {managers: false}}
  federation: [[east, west, meet]]
  discovery: dns
  nodes:
    e1: {cluster: east}
    w1: {cluster: west}
    l1: {cluster: lone}
    m1: {cluster: meet}
    sw: {kind: switch}
  links:
    - {endpoints: ["e1:eth0", "sw:p1"]}
    - {endpoints: ["w1:eth0", "sw:p2"]}
    - {endpoints: ["l1:eth0", "sw:p3"]}
    - {endpoints: ["m1:eth0", "sw:p4"]}
  underlay: UNDERLAY
"""
UNDERLAYS = ("{ipv4: 198.18.0.0/24}", '{ipv6: "fd00:18::/64"}')


@pytest.fixture(params=UNDERLAYS, ids=["IPv4", "IPv6"])
def lab(request: pytest.FixtureRequest) -> labfile.Lab:
    return labfile.parse(TEXT.replace("UNDERLAY", request.param), "x.yaml")


def test_each_domain_that_somebody_knows_has_a_zone_with_its_doors(lab: labfile.Lab):
    zones = nameserver.zones(processes.all_domains(lab))
    assert set(zones) == {"east", "west", "meet"}  # nobody looks for the lone one
    kind = "A" if "." in lab.nodes["e1"].addresses[0] else "AAAA"
    for name, doors in (("east", (5002, 5004)), ("meet", (5002,))):
        zone = dns.zone.from_text(zones[name], f"{name}.")
        own = next(n for n in lab.nodes.values() if n.cluster == name)
        found = {}
        for door, port in zip(("registry", "nsmgr-proxy"), doors, strict=False):
            (record,) = zone.find_rdataset(f"{door}.nsm-system", "SRV")
            (address,) = zone.find_rdataset(f"{door}.nsm-system", kind)
            found[door] = record.port, address.address
            assert (record.port, address.address) == (port, own.addresses[0].partition("/")[0])
        absent = {"registry", "nsmgr-proxy"} - found.keys()
        assert all(zone.get_node(f"{door}.nsm-system") is None for door in absent)


def test_the_server_is_on_the_floating_domains_node_and_every_registry_proxy_asks_it(
    lab: labfile.Lab,
):
    plan = processes.plan(lab, Paths(lab.name))
    (server,) = plan.of(Stage.NAMESERVER)
    assert (server.name, server.namespace, server.tcp) == ("m1/dns", "x-m1", 53)
    address = lab.nodes["m1"].addresses[0].partition("/")[0]
    proxies = plan.of(Stage.REGISTRY_PROXY)
    assert [p.name for p in proxies] == ["e1/registry-proxy", "w1/registry-proxy"]
    for proxy in proxies:
        config = parse(Config, proxy.environment)
        assert (config.domains_path, config.dns_servers) == ("", ((address, 53),))
    told = nameserver.configuration("/d", [address], ["east"])
    assert f"interface: {address}@53\n" in told
    assert 'zonefile: "/d/east.zone"' in told


def test_a_lab_in_which_nobody_knows_anybody_has_nothing_to_ask_it():
    alone = TEXT.replace("  federation: [[east, west, meet]]\n", "").replace(
        ", meet: {managers: false}", ""
    )
    alone = alone.replace("    m1: {cluster: meet}\n", "    m1: {cluster: east}\n")
    with pytest.raises(InvalidError, match=r"x.yaml:4: topology.discovery: nobody is looked for"):
        labfile.parse(alone.replace("UNDERLAY", UNDERLAYS[0]), "x.yaml")


def test_without_unbound_the_package_is_named(lab: labfile.Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(UnsupportedError, match="there is no unbound") as refused:
        engine.check_machine(lab)
    assert refused.value.hint.startswith("apt-get install unbound")

"""What client and responder read, and what `import nsm` costs and gives."""

import subprocess
import sys

import pytest

import nsm
from endpoints.responder.config import Config as Responder
from endpoints.responder.policies import LOOK_EVERY, PolicyFile, parse
from forwarder.config import Config as Forwarder
from nsm.errors import InvalidError
from nsm.model import DNSConfig, PolicyRoute, Route
from nsm.nsurl import NSURL
from nsm.process.client import Config as Client
from nsm.process.config import ConfigError
from nsm.process.config import parse as read
from nsm.process.workload import Endpoint, connect
from nsm.registration import SERVER_POLICIES
from nsmgr.config import Config as Manager
from registry.config import Config as Registry
from registry.proxy.config import Config as RegistryProxy


def test_upstreams_defaults_of_the_client():
    config = read(Client, {"NSM_NETWORK_SERVICES": "kernel://a/x,memif://b?k=v"})
    assert config.name == "nsc"
    assert config.connect_to == "unix:///var/lib/networkservicemesh/nsm.io.sock"
    assert (config.dial_timeout, config.request_timeout) == (5.0, 15.0)
    assert config.network_services == (
        NSURL("KERNEL", "a", "x"),
        NSURL("MEMIF", "b", None, {"k": "v"}),
    )
    assert config.lifetime == 600 * 10**9


def test_upstreams_defaults_of_the_responder():
    config = read(Responder, {})
    assert config.name == "icmp-server"
    assert config.service_names == ("icmp-responder",)
    assert config.payload == "ETHERNET"
    assert config.cidr_prefix == (("169.254.0.0/16",),)
    assert config.ipam_policy == "polite"
    assert config.register_service is True
    assert config.idle_timeout == 0


def test_upstreams_defaults_of_the_manager():
    config = read(Manager, {})
    assert config.name == "nmgr"
    assert config.listen_on == ("unix:///var/lib/networkservicemesh/nsm.io.sock",)
    assert config.registry_url == "tcp://localhost:5001"
    assert config.dial_timeout == 0.75
    assert config.forwarder_network_service_name == "forwarder"
    assert config.excluded_prefixes_path == (
        "/var/lib/networkservicemesh/config/excluded_prefixes.yaml"
    )
    assert config.labels == {}


def test_upstreams_defaults_of_the_forwarder():
    config = read(Forwarder, {})
    assert config.name == config.nsname == "forwarder"
    assert config.labels == {"p2p": "true"}
    assert config.connect_to == "unix:///connect.to.socket"
    assert config.listen_on == "unix:///listen.on.socket"
    assert config.dial_timeout == 0.75
    assert config.tunnel_ip == ""
    assert config.vxlan_port == 0
    assert config.mechanism_priority == ()


def test_upstreams_defaults_of_the_registry():
    config = read(Registry, {})
    assert config.listen_on == ("unix:///listen.on.socket",)
    assert config.proxy_registry_url == ""
    assert config.expire_period == 60.0
    assert config.registry_server_policies == (
        "etc/nsm/opa/common/.*.rego",
        "etc/nsm/opa/registry/.*.rego",
        "etc/nsm/opa/server/.*.rego",
    )


def test_the_registry_proxys_defaults_are_upstreams_and_the_systems():
    config = read(RegistryProxy, {})
    assert config.listen_on == ("unix:///listen.on.socket",)
    assert config.domains_path == ""
    assert config.dns_servers == ()
    assert config.policies == SERVER_POLICIES
    told = {"NSM_DNS_SERVERS": "10.0.0.53, [fd00::53]:5353"}
    assert read(RegistryProxy, told).dns_servers == (("10.0.0.53", 53), ("fd00::53", 5353))


EVERY = [
    pytest.param(Client, {"NSM_NETWORK_SERVICES": "kernel://a"}, id="client"),
    pytest.param(Responder, {}, id="responder"),
    pytest.param(Manager, {}, id="manager"),
    pytest.param(Forwarder, {}, id="forwarder"),
    pytest.param(Registry, {}, id="registry"),
    pytest.param(RegistryProxy, {}, id="registry proxy"),
]


@pytest.mark.parametrize(("kind", "least"), EVERY)
def test_what_upstreams_commands_have_in_common_is_common_here(kind, least):
    config = read(kind, least)
    assert config.log_level == "INFO"
    assert config.max_token_lifetime == 600.0


def test_upstreams_variables_that_are_not_of_the_mesh_are_read_too():
    told = {"POD_NAME": "p", "NODE_NAME": "n", "CLUSTER_NAME": "c"}
    assert read(Manager, told).labels == {"podName": "p", "nodeName": "n", "clusterName": "c"}
    for kind in (Client, Responder, Manager, Forwarder, Registry, RegistryProxy):
        least = {"NSM_NETWORK_SERVICES": "kernel://a", "SPIFFE_ENDPOINT_SOCKET": "unix:///s"}
        assert read(kind, least).spiffe_endpoint_socket == "unix:///s"


def test_everything_of_the_responder_can_be_set():
    config = read(
        Responder,
        {
            "NSM_CIDR_PREFIX": "[10.0.0.0/24,10.1.0.0/24],fd00::/64",
            "NSM_DNS_CONFIGS": '[{"dns_server_ips": ["10.0.0.9"], "search_domains": ["x.y"]}]',
            "NSM_LABELS": "app:x,tier:db",
            "POD_NAME": "pod-1",
        },
    )
    assert config.cidr_prefix == (("10.0.0.0/24", "10.1.0.0/24"), ("fd00::/64",))
    assert config.dns_configs == (DNSConfig(("10.0.0.9",), ("x.y",)),)
    assert config.labels == {"app": "x", "tier": "db"}
    assert config.told == {"podName": "pod-1"}


@pytest.mark.parametrize(
    ("kind", "variable", "value", "sentence"),
    [
        (Client, "NSM_NETWORK_SERVICES", "a", "names no mechanism"),
        (Client, "NSM_NETWORK_SERVICES", "", "names no wire"),
        (Client, "NSM_NETWORK_SERVICES", "kernel://a/x,kernel://b/x", "asks twice for interface"),
        (Client, "NSM_AWARENESS_GROUPS", "[kernel://a", "opens a bracket that it does not close"),
        (Responder, "NSM_CIDR_PREFIX", "10.0.0.0", "is no prefix"),
        (Responder, "NSM_DNS_CONFIGS", "{}", "it is no JSON array"),
        (Responder, "NSM_DNS_CONFIGS", "[", "expected JSON"),
        (Responder, "NSM_DNS_CONFIGS", '[{"x": 1}]', "no object of dns_server_ips"),
        (Responder, "NSM_DNS_CONFIGS", '[{"dns_server_ips": ["x"]}]', "is no IP address"),
        (Responder, "NSM_SERVICE_NAMES", "", "names no service"),
        (Responder, "NSM_LISTEN_ON", "tcp://:5000", "is met on its own node"),
        (Responder, "NSM_IPAM_POLICY", "kind", "one of polite, strict"),
        (
            RegistryProxy,
            "NSM_DNS_SERVERS",
            "dns.example",
            "expected a list, separated by commas, of: a DNS",
        ),
        (RegistryProxy, "NSM_REGISTRY_SERVER_POLICIES", "[", "is no pattern"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_wrong_in_it(kind, variable, value, sentence):
    settings = {"NSM_NETWORK_SERVICES": "kernel://a"} | {variable: value}
    with pytest.raises(ConfigError) as refused:
        read(kind, settings)
    assert variable in str(refused.value)
    assert sentence in str(refused.value)


RULES = """
- from: 172.16.2.201/24
  proto: 6
  dstport: 6666
  routes:
    - prefix: 172.16.3.0/24
      nexthop: 172.16.2.200
- proto: 17
  srcport: 1000-2000
"""


def test_policy_routes_are_read_by_upstreams_keys():
    assert parse(RULES, "pbr.yaml") == (
        PolicyRoute("172.16.2.201/24", "6", "6666", "", (Route("172.16.3.0/24", "172.16.2.200"),)),
        PolicyRoute("", "17", "", "1000-2000"),
    )
    assert parse("", "pbr.yaml") == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- from: [", "pbr.yaml:1: no YAML"),
        ("a: 1", "it is no list"),
        ("- 1", "rule 1: it is no mapping"),
        ("- dst_port: 1", "rule 1: unknown key 'dst_port'"),
        ("- from: x", "rule 1: from: 'x' is not an address or prefix"),
        ("- proto: tcp", "proto 'tcp' is no protocol number"),
        ("- dstport: 1-", "dstport '1-' is no port or first-last"),
        ("- srcport: 70000", "srcport '70000' is no port"),
        ("- routes: 1", "routes is no list"),
        ("- routes: [{prefix: x}]", "rule 1, route 1: 'x' is not a prefix"),
        ("- routes: [{prefix: 10.0.0.0/8, nexthop: y}]", "nexthop: 'y' is not an address"),
        ("- from: {a: 1}", "from is no text or number"),
    ],
)
def test_a_wrong_rule_is_named(text, sentence):
    with pytest.raises(InvalidError) as refused:
        parse(text, "pbr.yaml")
    assert sentence in str(refused.value)


async def test_a_policy_file_that_turns_bad_leaves_the_last_good_rules(tmp_path, monkeypatch):
    monkeypatch.setattr("endpoints.responder.policies.LOOK_EVERY", -1.0)
    assert LOOK_EVERY > 0
    path = tmp_path / "pbr.yaml"
    rules = PolicyFile(str(path))
    await rules.load()
    assert await rules() == ()
    path.write_text(RULES)
    assert len(await rules()) == 2
    path.write_text("- nonsense: 1")
    assert len(await rules()) == 2
    path.write_text("- proto: 1")
    assert len(await rules()) == 1
    path.unlink()
    assert await rules() == ()


def test_import_nsm_takes_nothing_with_it_and_each_name_is_there():
    code = (
        "import sys, nsm; taken = [m for m in sys.modules if m.startswith(('nsm.', 'grpclib',"
        " 'cryptography', 'asyncio', 'google'))]; print(taken)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert nsm.connect is connect
    assert nsm.Endpoint is Endpoint
    for name in nsm.__all__:
        assert getattr(nsm, name) is not None
        assert name in dir(nsm)
    with pytest.raises(AttributeError, match="module 'nsm' has no name 'nothing'"):
        _ = nsm.nothing

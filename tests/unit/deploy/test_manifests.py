"""What the manifests say of our programs is what our programs say."""

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from deploy.kubernetes import check
from deploy.kubernetes.check import VARIABLE, Object, containers, pod_of
from forwarder import rights
from nsm.identity import entries
from nsm.identity.authority import open_authority
from nsm.identity.spiffe import SpiffeId, check_trust_domain
from nsm.kernel import routing
from nsm.places import parse_map
from nsm.process import health, run, workload
from nsm.process.client import DNS_PORT
from nsm.process.config import parse, rows, strangers
from nsm.rpc import addresses
from nsmctl.start import MODULES, Program
from nsmgr import excluded
from nsmgr.proxy import addresses as proxy_addresses
from nsmgr.proxy import clusters
from tests.unit.test_house import ROOT

MADE = check.everything()
DOMAIN = MADE["examples/domains"]
ISSUER = [
    *check.render(check.HERE / "overlays/issuer", check.HERE / "components/domains"),
    *(one for one in DOMAIN if one["metadata"]["name"] == "domain"),  # what people make by hand
    *MADE["examples/icmp-responder"],
    *MADE["examples/vl3"],
]
# A supplier starts routers as processes of its node, each in a namespace made for it beforehand. In
# a cluster pods are started by Kubernetes, and so a network's routers are a Deployment.
ELSEWHERE = {"supplier"}
EVERY = [one for objects in MADE.values() for one in objects]
TOLD = {
    "metadata.name": "pod-x7k2p",
    "spec.nodeName": "node-1",
    "status.podIP": "192.0.2.7",
    "status.hostIP": "192.0.2.1",
}


@dataclass(frozen=True)
class Run:
    """A container that runs one of our programs."""

    owner: str
    program: Program
    spec: Object
    pod: Object
    told: Mapping[str, str]

    @property
    def config(self) -> Any:
        module = MODULES[self.program]
        where = {"nsm.process.client": module, "nsm.process.issuer": module}
        return import_module(where.get(module, f"{module}.config")).Config

    def variables(self, told: Mapping[str, str] | None = None) -> dict[str, str]:
        """Its environment, on the node and in the pod that told says."""
        told, found = told or self.told, {}
        for one in self.spec["env"]:
            if "value" in one:
                found[one["name"]] = VARIABLE.sub(lambda match: found[match[1]], one["value"])
            elif ref := one["valueFrom"].get("configMapKeyRef"):
                found[one["name"]] = config_map(ref["name"])[ref["key"]]
            else:
                found[one["name"]] = told[one["valueFrom"]["fieldRef"]["fieldPath"]]
        return found

    def settings(self) -> Any:
        return parse(self.config, self.variables())

    def listens(self) -> list[addresses.Unix | addresses.Tcp]:
        """Where it is met."""
        urls = getattr(self.settings(), "listen_on", ())
        return [addresses.parse(url) for url in ([urls] if isinstance(urls, str) else urls) if url]


def program_of(spec: Object) -> Program | None:
    """Which of our programs a container runs."""
    words = spec.get("args") or shlex.split(spec["command"][-1])[-1:]
    return Program(words[0]) if words[0] in list(Program) else None


def runs(objects: list[Object], told: Mapping[str, str] = TOLD) -> Iterator[Run]:
    for one in objects:
        if pod := pod_of(one):
            for spec in containers(pod):
                if program := program_of(spec):
                    yield Run(one["metadata"]["name"], program, spec, pod, told)


SIX = {**TOLD, "status.podIP": "2001:db8::7", "status.hostIP": "2001:db8::1"}
OVER_SIX = [*runs(MADE["overlays/spire with components/ipv6"], SIX)]
RUNS = [*runs(ISSUER), *OVER_SIX, *runs(MADE["overlays/spire with components/tun"])]
BY_PROGRAM = {one.program: one for one in runs(ISSUER)}
each_run = pytest.mark.parametrize("one", RUNS, ids=lambda one: str(one.program))


def test_every_program_of_a_mesh_is_in_the_manifests() -> None:
    assert set(BY_PROGRAM) == {one for one in Program if one not in ELSEWHERE}


@each_run
def test_every_variable_is_one_the_program_reads_and_has_a_value_it_takes(one: Run) -> None:
    environ = one.variables()
    parse(one.config, environ)
    assert strangers(one.config, environ) == ()
    known = {variable for variable, _, _ in rows(one.config)}
    used = {name for each in one.spec["env"] for name in VARIABLE.findall(each.get("value", ""))}
    assert set(environ) <= known | used


@each_run
def test_what_a_program_writes_is_on_a_volume_it_may_write(one: Run) -> None:
    settings = one.settings()
    paths = [address.path for address in one.listens() if isinstance(address, addresses.Unix)]
    written = ("health_file", "store", "issuer_dir", "bundle_file")
    paths += [getattr(settings, name, "") for name in written]
    for path in filter(None, paths):
        assert not mount_of(one, path).get("readOnly"), f"{one.program}: {path}"


@each_run
def test_what_a_program_reads_is_on_a_volume(one: Run) -> None:
    settings = one.settings()
    for name in ("connect_to", "spiffe_endpoint_socket"):
        if url := getattr(settings, name, ""):
            assert mount_of(one, urlsplit(url).path)
    for name in ("entries", "excluded_prefixes_path", "domains_path"):
        if path := getattr(settings, name, ""):
            mount = mount_of(one, path)
            assert Path(path).name in data_of(one, mount["name"])
    told = (check.HERE / "examples/domains/domain.yaml").read_text()
    for name in ("map_ip_file_path", "cluster_info_path"):  # which need not be there
        if path := getattr(settings, name, ""):
            assert data_of(one, mount_of(one, path)["name"]) is config_map("domain")
            assert f" {Path(path).name}: |\n" in told
    if folder := getattr(settings, "federation_dir", ""):
        volume = volume_of(one, mount_of(one, folder)["name"])
        assert volume["configMap"] == {"name": "federation", "optional": True}


def mount_of(one: Run, path: str) -> Object:
    """The mount of a container that a path is in."""
    for mount in one.spec["volumeMounts"]:
        if Path(path).is_relative_to(mount["mountPath"]):
            return dict(mount)
    raise AssertionError(f"{one.program}: {path} is on no volume")


def volume_of(one: Run, name: str) -> Object:
    (found,) = [volume for volume in one.pod["volumes"] if volume["name"] == name]
    return dict(found)


def data_of(one: Run, volume: str) -> Mapping[str, str]:
    return config_map(volume_of(one, volume)["configMap"]["name"])


def config_map(name: str) -> Mapping[str, str]:
    data: Mapping[str, str] = named("ConfigMap", name)["data"]
    return data


def named(kind: str, name: str) -> Object:
    """The object of that kind and name."""
    (found,) = [
        one for one in ISSUER if (one["kind"], one["metadata"]["name"]) == (kind, name)
    ]  # fmt: skip
    return found


def test_who_is_called_is_who_listens() -> None:
    nsmgr, forwarder = BY_PROGRAM[Program.nsmgr], BY_PROGRAM[Program.forwarder]
    own, public = nsmgr.settings().listen_on
    assert forwarder.settings().connect_to == own
    for program in (Program.responder, Program.client):
        assert BY_PROGRAM[program].settings().connect_to == own == workload.MANAGER
    assert public == "tcp://192.0.2.7:5001"  # the pod's address, which is the node's
    assert nsmgr.pod["hostNetwork"] is True
    agent = BY_PROGRAM[Program.issuer].settings().listen_on
    for one in RUNS:
        if one.program is not Program.issuer:
            assert one.settings().spiffe_endpoint_socket == agent == workload.AGENT


@pytest.mark.parametrize(
    ("caller", "setting", "called"),
    [
        (Program.nsmgr, "registry_url", Program.registry),
        (Program.registry, "proxy_registry_url", Program.nsmgr_proxy),
        (Program.nsmgr_proxy, "registry_url", Program.registry),
        (Program.nsmgr_proxy, "registry_proxy_url", Program.registry_proxy),
        (Program.vl3, "prefix_server_url", Program.ipam),
    ],
)
def test_who_is_called_by_a_services_name_listens_at_its_port(
    caller: Program, setting: str, called: Program
) -> None:
    one = getattr(BY_PROGRAM[caller].settings(), setting)
    (url,) = (one,) if isinstance(one, str) else one
    service = named("Service", urlsplit(url).hostname)
    (port,) = service["spec"]["ports"]
    assert url == f"tcp://{service['metadata']['name']}:{port['port']}"
    listening = BY_PROGRAM[called]
    assert listening.listens() == [addresses.Tcp("", port["port"])]
    (told,) = listening.spec["ports"]
    assert (told["name"], told["containerPort"]) == (port["targetPort"], port["port"])
    labels = named("Deployment", listening.owner)["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


@each_run
def test_what_a_program_listens_on_is_a_port_of_its_container(one: Run) -> None:
    ports = {address.port for address in one.listens() if isinstance(address, addresses.Tcp)}
    told = one.spec.get("ports", [])
    assert {port["containerPort"] for port in told} == ports
    if one.pod.get("hostNetwork"):
        assert all(port["hostPort"] == port["containerPort"] for port in told)


def test_over_ipv6_a_manager_listens_on_its_address() -> None:
    (nsmgr,) = [one for one in OVER_SIX if one.program is Program.nsmgr]
    assert addresses.Tcp("2001:db8::7", 5001) in nsmgr.listens()


def test_a_hop_has_the_same_name_after_an_update_and_another_on_each_node() -> None:
    for program in (Program.nsmgr, Program.forwarder):
        one = BY_PROGRAM[program]
        name = one.variables()["NSM_NAME"]
        later = one.variables({**TOLD, "metadata.name": "pod-qq9zt"})
        elsewhere = one.variables({**TOLD, "spec.nodeName": "node-2"})
        assert name == later["NSM_NAME"] == f"{program}-node-1"
        assert elsewhere["NSM_NAME"] == f"{program}-node-2"


def test_a_domains_door_has_the_same_name_after_an_update_and_another_in_each_domain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = BY_PROGRAM[Program.nsmgr_proxy]
    name = one.variables()["NSM_NAME"]
    moved = {**TOLD, "metadata.name": "pod-qq9zt", "spec.nodeName": "node-2"}
    assert name == one.variables(moved)["NSM_NAME"] == "nsmgr-proxy-cluster1"
    monkeypatch.setitem(config_map("domain"), "name", "cluster2")
    assert one.variables()["NSM_NAME"] == "nsmgr-proxy-cluster2"


@each_run
def test_a_program_may_end_in_order_before_it_is_killed(one: Run) -> None:
    longest = one.settings().stop_grace + run.PATIENCE
    assert one.pod["terminationGracePeriodSeconds"] > longest


@each_run
def test_probes_look_at_the_health_file_and_leave_it_time_to_be_written(one: Run) -> None:
    path = one.settings().health_file
    says = ["grep", "-qx", health.SERVING, path]
    probes = {name: probe for name, probe in one.spec.items() if name.endswith("Probe")}
    for name in ("startupProbe", "readinessProbe"):
        if name in probes:
            assert probes[name]["exec"]["command"] == says
    if alive := probes.get("livenessProbe"):
        shell, option, command = alive["exec"]["command"]
        assert (shell, option) == ("sh", "-c")
        found = re.fullmatch(r'test -n "\$\(find (\S+) -newermt "-(\d+) seconds"\)"', command)
        assert found
        assert found[1] == path
        assert int(found[2]) >= 10 * health.BEAT
    assert probes


def test_a_probe_has_time_for_a_command_where_all_processors_are_busy() -> None:
    for one in EVERY:
        for each in containers(pod) if (pod := pod_of(one)) else ():
            for name in (key for key in each if key.endswith("Probe")):
                probe = each[name]
                assert probe["timeoutSeconds"] >= 5, f"{one['metadata']['name']}: {name}"
                if name == "livenessProbe":  # several misses, none overlapping the next, end it
                    assert probe["timeoutSeconds"] < probe["periodSeconds"]
                    assert probe["failureThreshold"] >= 4


def test_what_every_node_needs_is_not_evicted_for_an_ordinary_pod() -> None:
    given = {
        one["metadata"]["name"]: (one["kind"], pod["priorityClassName"])
        for one in (*MADE["overlays/issuer"], *DOMAIN)
        if (pod := pod_of(one))
    }
    node = ("DaemonSet", "system-node-critical")
    assert given == {
        "nsmgr": node,
        "forwarder": node,
        "issuer": node,
        **dict.fromkeys(
            ("registry", "nsmgr-proxy", "registry-proxy"),
            ("Deployment", "system-cluster-critical"),
        ),
    }


def test_forwarders_and_routers_alone_have_capabilities_and_those_they_need() -> None:
    added = {
        (one["metadata"]["name"], each["name"]): each["securityContext"]["capabilities"]["add"]
        for one in EVERY
        if (pod := pod_of(one))
        for each in containers(pod)
        if "add" in each["securityContext"]["capabilities"]
    }
    assert sorted(added.pop(("forwarder", "forwarder"))) == sorted(
        name.removeprefix("CAP_") for name in rights.NEEDED
    )
    assert added.pop(("router", "router")) == ["NET_ADMIN"]
    # who prepares a directory of the host gives it away, who sets what a pod's namespace forwards
    # makes the files writable, and neither does anything else
    assert added == {
        ("nsmgr", "directory"): ["CHOWN"],
        ("issuer", "directory"): ["CHOWN"],
        ("router", "forwarding"): ["SYS_ADMIN", "NET_ADMIN"],
    }


def test_a_router_finds_the_settings_made_that_it_would_make(tmp_path: Path) -> None:
    (pod,) = [pod_of(one) for one in MADE["examples/vl3"] if one["metadata"]["name"] == "router"
              and one["kind"] == "Deployment"]  # fmt: skip
    assert pod
    (first,) = pod["initContainers"]
    shell, option, script = first["command"]
    assert script.startswith("mount -o remount,bind,rw /proc/sys\ncd /proc/sys/net\n")
    script = script.partition("\n")[2].replace("/proc/sys/net", str(tmp_path / "net"))
    for key, _ in routing.SETTINGS:
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([shell, option, script], check=True)
    made = {
        str(path.relative_to(tmp_path)): path.read_text().strip()
        for path in tmp_path.rglob("*") if path.is_file()
    }  # fmt: skip
    assert made == dict(routing.SETTINGS)
    four = [key for key in made if "ipv6" not in key]
    shutil.rmtree(tmp_path / "net")
    for key in four:  # a kernel without IPv6
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([shell, option, script], check=True)
    assert not (tmp_path / "net/ipv6").exists()


def test_names_of_a_network_are_served_without_a_right() -> None:
    (one,) = [one for one in runs(MADE["examples/vl3"]) if one.program is Program.client]
    settings = one.settings()
    _, port = settings.local_dns_server_address
    for owner in (one, BY_PROGRAM[Program.vl3]):
        sysctls = {each["name"]: each["value"] for each in owner.pod["securityContext"]["sysctls"]}
        assert int(sysctls["net.ipv4.ip_unprivileged_port_start"]) <= port == DNS_PORT
    led = mount_of(one, settings.resolv_conf)
    assert led["mountPath"] == settings.resolv_conf
    assert not led.get("readOnly")
    (app,) = one.pod["containers"]
    assert app["volumeMounts"] == [{**led, "readOnly": True}]
    copy, before = one.pod["initContainers"].index(one.spec), one.pod["initContainers"][0]
    assert copy > 0  # or there would be no file to mount
    (target,) = before["volumeMounts"]
    assert before["command"] == ["cp", settings.resolv_conf, f"{target['mountPath']}/"]
    assert (target["name"], Path(settings.resolv_conf).name) == (led["name"], led["subPath"])


def test_what_the_example_says_of_a_domain_is_what_programs_read() -> None:
    data = config_map("domain")
    places = parse_map(data["domains.yaml"], "domains.yaml", addresses.parse)
    (other,) = places.values()
    for urls, service in ((other.registry, "registry"), (other.manager_proxy, "nsmgr-proxy")):
        found = named("Service", service)["spec"]
        assert {urlsplit(url).port for url in urls} == {each["port"] for each in found["ports"]}
        assert found["type"] == "LoadBalancer"  # others come from outside
    assert clusters.parse(data["clusterinfo.yaml"]) == {"clusterName": data["name"]}
    text = (check.HERE / "examples/domains/domain.yaml").read_text()
    (shown,) = re.findall(r"^  # map-ip\.yaml: \|\n((?:  #   .*\n)+)", text, re.MULTILINE)
    lines = textwrap.dedent(shown.replace("  #", ""))
    assert proxy_addresses.parse(lines, "map-ip.yaml").outside("10.0.0.11") == "203.0.113.11"


def test_whoever_speaks_with_another_domain_gets_its_bundle_from_spire() -> None:
    (federated,) = [one["spec"] for one in DOMAIN if one["kind"] == "ClusterFederatedTrustDomain"]
    trusting = {
        one["metadata"]["name"]
        for one in DOMAIN
        if one["kind"] == "Deployment"
        for each in DOMAIN
        if each["kind"] == "ClusterSPIFFEID"
        and selects(each["spec"]["podSelector"], one["spec"]["template"]["metadata"]["labels"])
        and each["spec"].get("federatesWith") == [federated["trustDomain"]]
    }
    assert trusting == {"registry", "nsmgr-proxy", "registry-proxy"}


def test_no_tunnel_is_in_a_pod_because_its_applications_start_after_its_wires() -> None:
    assert BY_PROGRAM[Program.forwarder].settings().isolation == "hop"


def test_where_processes_of_wires_are_in_the_container_there_is_memory_for_them() -> None:
    def limit(objects: list[Object]) -> int:
        (one,) = (one for one in runs(objects) if one.program is Program.forwarder)
        number = one.spec["resources"]["limits"]["memory"]
        assert number.endswith("Mi")
        return int(number[:-2])

    with_them = limit(MADE["overlays/spire with components/tun"])
    # as many as inotify's instances let start by default, MiB of each
    assert with_them - limit(MADE["overlays/spire"]) >= 128 * 4


def test_without_a_volume_the_registry_has_its_file_in_the_pod() -> None:
    (one,) = (
        one for one in runs(MADE["overlays/spire with components/no-volume"])
        if one.program is Program.registry
    )  # fmt: skip
    volume = volume_of(one, mount_of(one, one.settings().store)["name"])
    assert volume == {"name": "store", "emptyDir": {"sizeLimit": "1Gi"}}


def test_every_container_has_as_little_as_it_can_do_with() -> None:
    for one in EVERY:
        if (pod := pod_of(one)) is None:
            continue
        name = one["metadata"]["name"]
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert ("hostPID" in pod) == (name in {"forwarder", "issuer"}), name
        assert ("hostNetwork" in pod) == (name in {"forwarder", "nsmgr", "nsmgr-proxy"}), name
        for each in containers(pod):
            own = {**pod["securityContext"], **each["securityContext"]}
            assert own["capabilities"]["drop"] == ["ALL"], name
            assert own["readOnlyRootFilesystem"] is True, name
            assert "privileged" not in own, name
            root = own["runAsUser"] == 0
            assert root == (each["name"] in {"forwarder", "directory", "forwarding", "router"}), (
                name
            )
            assert root or own["runAsNonRoot"] is True, name
            # with CAP_SYS_ADMIN the API calls a `false` here a contradiction
            mounts = each["name"] in {"forwarder", "forwarding"}
            assert ("allowPrivilegeEscalation" in own) == (not mounts), name
            assert own.get("allowPrivilegeEscalation", False) is False, name
            assert each["resources"]["requests"].keys() == {"cpu", "memory"}, name
            assert each["resources"]["limits"].keys() == {"memory"}, name


def test_nobody_asks_the_kubernetes_api_for_anything() -> None:
    assert not [one for one in EVERY if "rbac" in one["apiVersion"]]
    accounts = [one for one in EVERY if one["kind"] == "ServiceAccount"]
    assert accounts
    assert all(one["automountServiceAccountToken"] is False for one in accounts)
    locked = (ROOT / "deploy" / "requirements.lock").read_text()
    assert "kubernetes" not in locked


def test_every_container_is_of_our_image_and_version() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    images = {each["image"] for one in EVERY if (pod := pod_of(one)) for each in containers(pod)}
    assert images == {f"vwire:{version[1]}"}


def test_the_issuer_tells_our_programs_from_each_other() -> None:
    issuer = BY_PROGRAM[Program.issuer]
    settings = issuer.settings()
    text = data_of(issuer, mount_of(issuer, settings.entries)["name"])["entries.yaml"]
    given = entries.parse(text, settings.trust_domain, "entries")
    named = set()
    for one in runs(ISSUER):
        if one.program is Program.issuer:
            continue
        own = {**one.pod["securityContext"], **one.spec["securityContext"]}
        fitting = [
            entry for entry in given
            if entry.uid == own["runAsUser"] and entry.gid in (None, own["runAsGroup"])
        ]  # fmt: skip
        assert [entry.id.path for entry in fitting] == [f"/{one.owner}"]
        named.update(fitting)
    assert named == set(given)


def test_an_identity_of_spire_stays_when_a_pod_is_replaced() -> None:
    given = {
        "TrustDomain": "example.org",
        "PodMeta.Namespace": "nsm-system",
        "PodSpec.ServiceAccountName": "nsmgr",
        "PodSpec.NodeName": "node-1.example.org",
    }
    templates = [
        one["spec"]["spiffeIDTemplate"] for one in EVERY if one["kind"] == "ClusterSPIFFEID"
    ]
    assert templates
    for template in templates:
        text = re.sub(r"\{\{ \.([\w.]+) \}\}", lambda match: given[match[1]], template)
        assert SpiffeId.parse(text).path.startswith("/ns/nsm-system/sa/nsmgr")


def test_spire_gives_each_pod_of_ours_one_identity() -> None:
    objects = [*DOMAIN, *MADE["examples/icmp-responder"], *MADE["examples/vl3"]]
    identities = [one["spec"] for one in objects if one["kind"] == "ClusterSPIFFEID"]
    for one in objects:
        if pod_of(one) is None:
            continue
        labels = (one if one["kind"] == "Pod" else one["spec"]["template"])["metadata"]["labels"]
        space = {"kubernetes.io/metadata.name": one["metadata"]["namespace"]}
        fitting = [
            each for each in identities
            if selects(each["namespaceSelector"], space) and selects(each["podSelector"], labels)
        ]  # fmt: skip
        assert len(fitting) == 1, one["metadata"]["name"]


def selects(selector: Object, labels: Mapping[str, str]) -> bool:
    """Whether a label selector of the API fits."""
    for one in selector.get("matchExpressions", ()):
        is_in = labels.get(one["key"]) in one["values"]
        if is_in != {"In": True, "NotIn": False}[one["operator"]]:
            return False
    return bool(selector.get("matchLabels", {}).items() <= labels.items())


def test_the_excluded_prefixes_are_a_file_the_manager_reads() -> None:
    one = BY_PROGRAM[Program.nsmgr]
    path = one.settings().excluded_prefixes_path
    text = data_of(one, mount_of(one, path)["name"])[Path(path).name]
    assert excluded.parse(text) == ()
    assert "prefixes" in yaml.safe_load(text)


def test_the_definitions_are_those_the_protocol_names() -> None:
    page = (ROOT / "docs" / "wire.md").read_text().partition("### 12.1")[2]
    told = re.findall(r"^\| (\w+) \(list (\w+)\) \| (\w+) \| (\w+), (\w+) \|", page, re.MULTILINE)
    found = [one["spec"] for one in MADE["crds"]]
    assert [
        (names["kind"], names["listKind"], names["plural"], *names["shortNames"])
        for names in (one["names"] for one in found)
    ] == told
    for one in found:
        assert one["scope"] == "Namespaced"
        assert one["conversion"] == {"strategy": "None"}
        (version,) = one["versions"]
        assert version == {
            "name": "v1",
            "served": True,
            "storage": True,
            "schema": {
                "openAPIV3Schema": {
                    "type": "object",
                    "properties": {"spec": {"x-kubernetes-preserve-unknown-fields": True}},
                }
            },
        }


PAGE = (ROOT / "deploy" / "kubernetes" / "README.md").read_text()


def test_the_page_applies_what_is_there() -> None:
    applied = re.findall(r"kubectl apply -k deploy/kubernetes/(\S+)", PAGE)
    (copied, copy) = re.findall(r"cp -r deploy/kubernetes/(\S+) deploy/kubernetes/(\S+)", PAGE)[0]
    applied = [copied if name == copy else name for name in applied]
    assert set(applied) == set(check.ENTRIES) - {"crds", "crds/examples"}
    assert Path(copied).parent == Path(copy).parent  # or it would not find the rest from there
    told = set(re.findall(r"^\| `(\S+)` \|", PAGE, re.MULTILINE))
    assert told == {"base", "crds", *applied, *check.COMPONENTS}
    (version,) = {
        each["image"] for one in EVERY if (pod := pod_of(one)) for each in containers(pod)
    }
    assert f"--tag {version} ." in PAGE


def test_the_page_brings_an_issuers_bundle_to_where_the_other_domains_issuer_reads_it() -> None:
    issuer = BY_PROGRAM[Program.issuer]
    settings = issuer.settings()
    (block,) = re.findall(
        r"^    (kubectl .* cat .*)\n    (kubectl .* create configmap .*)\n", PAGE, re.MULTILINE
    )
    shows, keeps = map(shlex.split, block)
    assert shows[3:-1] == ["-n", "nsm-system", "exec", "daemonset/issuer", "--", "cat",
                           settings.bundle_file]  # fmt: skip
    file = shows[-1].removeprefix(">")
    volume = volume_of(issuer, mount_of(issuer, settings.federation_dir)["name"])
    assert keeps[3:] == ["-n", "nsm-system", "create", "configmap", volume["configMap"]["name"],
                         f"--from-file={file}"]  # fmt: skip
    assert check_trust_domain(file.removesuffix(".pem"))  # by which the issuer knows whose it is
    assert shows[2] != keeps[2]


@pytest.mark.parametrize("component", check.COMPONENTS)
def test_the_pages_overlay_of_ones_own_adds_a_component(component: str, tmp_path: Path) -> None:
    after = PAGE.partition("`mine/kustomization.yaml`")[2]
    shown = re.findall(r"((?:^ {6}\S.*\n)+)", after, re.MULTILINE)[0]
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    mine = tmp_path / "mine"
    mine.mkdir()
    text = textwrap.dedent(shown).replace("components/tun", component)
    (mine / "kustomization.yaml").write_text(text)
    assert check.render(mine) == MADE[f"overlays/spire with {component}"]


def test_the_pages_command_makes_an_authority_that_the_issuer_takes(tmp_path: Path) -> None:
    (block,) = re.findall(r"^    (docker run .*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    words = shlex.split(block)
    made, given = words[: words.index("|")], words[words.index("|") + 1 :]
    (image,) = {each["image"] for one in EVERY if (pod := pod_of(one)) for each in containers(pod)}
    assert made[:-1] == ["docker", "run", "--rm", "--entrypoint", "sh", image, "-ec"]
    assert ("Secret", given[2], given[6]) in check.BY_HAND
    file, source = given[7].removeprefix("--from-file=").split("=")
    assert source == "/dev/stdin"
    environ = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    pem = subprocess.run(["sh", "-ec", made[-1]], env=environ, check=True, capture_output=True)
    settings = BY_PROGRAM[Program.issuer].settings()
    state = tmp_path / "issuer"
    state.mkdir(mode=0o700)
    (state / file).touch(mode=0o600)
    (state / file).write_bytes(pem.stdout)
    assert open_authority(state, settings.trust_domain).bundle_pem() in pem.stdout

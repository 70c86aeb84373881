"""What the manifests say of our programs is what our programs say."""

import re
import shlex
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
from nsm.identity.spiffe import SpiffeId
from nsm.process import health, run, workload
from nsm.process.config import parse, rows, strangers
from nsm.rpc import addresses
from nsmctl.start import MODULES, Program
from nsmgr import excluded
from tests.unit.test_house import ROOT

MADE = check.everything()
ISSUER = [*MADE["overlays/issuer"], *MADE["examples/icmp-responder"]]
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
    assert set(BY_PROGRAM) == set(Program)


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
    paths += [getattr(settings, name, "") for name in ("health_file", "store", "issuer_dir")]
    for path in filter(None, paths):
        assert not mount_of(one, path).get("readOnly"), f"{one.program}: {path}"


@each_run
def test_what_a_program_reads_is_on_a_volume(one: Run) -> None:
    settings = one.settings()
    for name in ("connect_to", "spiffe_endpoint_socket"):
        if url := getattr(settings, name, ""):
            assert mount_of(one, urlsplit(url).path)
    for name in ("entries", "excluded_prefixes_path"):
        if path := getattr(settings, name, ""):
            mount = mount_of(one, path)
            assert Path(path).name in data_of(one, mount["name"])


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
    wanted = volume_of(one, volume)["configMap"]["name"]
    (found,) = [
        each for each in ISSUER if (each["kind"], each["metadata"]["name"]) == ("ConfigMap", wanted)
    ]
    return dict(found["data"])


def test_who_is_called_is_who_listens() -> None:
    nsmgr, forwarder = BY_PROGRAM[Program.nsmgr], BY_PROGRAM[Program.forwarder]
    own, public = nsmgr.settings().listen_on
    assert forwarder.settings().connect_to == own
    for program in (Program.responder, Program.client):
        assert BY_PROGRAM[program].settings().connect_to == own == workload.MANAGER
    assert public == "tcp://192.0.2.7:5001"  # the pod's address, which is the node's
    assert nsmgr.pod["hostNetwork"] is True
    (service,) = [each for each in ISSUER if each["kind"] == "Service"]
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert nsmgr.settings().registry_url == f"tcp://{name}:{port}"
    (listening,) = BY_PROGRAM[Program.registry].settings().listen_on
    assert addresses.parse(listening) == addresses.Tcp("", port)
    agent = BY_PROGRAM[Program.issuer].settings().listen_on
    for one in RUNS:
        if one.program is not Program.issuer:
            assert one.settings().spiffe_endpoint_socket == agent == workload.AGENT


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
        for one in (*MADE["overlays/issuer"], *MADE["overlays/spire"])
        if (pod := pod_of(one))
    }
    node = ("DaemonSet", "system-node-critical")
    assert given == {
        "nsmgr": node,
        "forwarder": node,
        "issuer": node,
        "registry": ("Deployment", "system-cluster-critical"),
    }


def test_the_forwarder_alone_has_capabilities_and_those_it_asks_for() -> None:
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
    # who prepares a directory of the host gives it away, and does nothing else
    assert added == {("nsmgr", "directory"): ["CHOWN"], ("issuer", "directory"): ["CHOWN"]}


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
        assert ("hostNetwork" in pod) == (name in {"forwarder", "nsmgr"}), name
        for each in containers(pod):
            own = {**pod["securityContext"], **each["securityContext"]}
            assert own["capabilities"]["drop"] == ["ALL"], name
            assert own["readOnlyRootFilesystem"] is True, name
            assert "privileged" not in own, name
            root = own["runAsUser"] == 0
            assert root == (each["name"] in {"forwarder", "directory"}), name
            assert root or own["runAsNonRoot"] is True, name
            # with CAP_SYS_ADMIN the API calls a `false` here a contradiction
            assert ("allowPrivilegeEscalation" in own) == (each["name"] != "forwarder"), name
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
    given = {
        entry.uid: entry.id.path for entry in entries.parse(text, settings.trust_domain, "entries")
    }
    users = {
        {**one.pod["securityContext"], **one.spec["securityContext"]}["runAsUser"]: one.owner
        for one in runs(ISSUER)
        if one.program is not Program.issuer
    }
    assert given == {uid: f"/{owner}" for uid, owner in users.items()}


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
    objects = [*MADE["overlays/spire"], *MADE["examples/icmp-responder"]]
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
    assert set(applied) == set(check.ENTRIES) - {"crds", "crds/examples"}
    told = set(re.findall(r"^\| `(\S+)` \|", PAGE, re.MULTILINE))
    assert told == {"base", "crds", *applied, *check.COMPONENTS}
    (version,) = {
        each["image"] for one in EVERY if (pod := pod_of(one)) for each in containers(pod)
    }
    assert f"--tag {version} ." in PAGE


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

"""What `make check` asks of the manifests, without a cluster and without a network.

- every file is named by a kustomization, and every name is a file's; patches find what they change;
- every object is what the Kubernetes API of the oldest and the newest version we know takes,
  by the API's own schemas, in which unknown fields are errors;
- custom resources are what the definitions here say, and in their `spec` has only what the
  registry's messages have;
- names, labels, volumes, accounts and config maps that objects give each other fit, and pods of
  a critical priority are in a namespace whose quota names it.

It reads of Kustomize what is used here, which is little, and refuses the rest by name.
`check.py --kubectl` compares with what `kubectl kustomize` makes of the same files.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from nsm.proto import registry_pb2

HERE = Path(__file__).resolve().parent
ENTRIES = (  # what people apply
    "overlays/spire",
    "overlays/issuer",
    "crds",
    "crds/examples",
    "examples/icmp-responder",
    "examples/domains",
    "examples/vl3",
)
COMPONENTS = (  # what people add to an overlay
    "components/domains",
    "components/ipv6",
    "components/tun",
    "components/no-volume",
)
VERSIONS = ("1.30", "1.37")  # since 1.30 appArmorProfile is a field; the newest we have schemas of
KINDS = {
    "Kustomization": ("resources", "components", "patches"),
    "Component": ("resources", "patches"),
}
MERGED_BY = {  # the API's own merge keys, of the lists that patches here touch
    "containers": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "volumes": "name",
}

MESSAGES = {  # what a custom resource's spec is, in JSON
    "NetworkService": registry_pb2.NetworkService,
    "NetworkServiceEndpoint": registry_pb2.NetworkServiceEndpoint,
}
SPIRE = "spire.spiffe.io/v1alpha1"  # whose objects have in their spec, of what SPIRE knows:
KNOWN = {
    "ClusterSPIFFEID": {
        "spiffeIDTemplate", "namespaceSelector", "podSelector", "dnsNameTemplates", "federatesWith",
        "className",
    },
    "ClusterFederatedTrustDomain": {
        "trustDomain", "bundleEndpointURL", "bundleEndpointProfile", "trustDomainBundle",
        "className",
    },
}  # fmt: skip
BY_HAND = {  # README.md says how
    ("Secret", "nsm-system", "issuer-authority"): (),
    ("ConfigMap", "nsm-system", "domain"): ("name", "domains.yaml"),
}
CRITICAL = "system-"  # what names of priority classes begin with that are not everybody's
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[KMGT]i?)?")
VARIABLE = re.compile(r"\$\((\w+)\)")

Object = dict[str, Any]


class WrongError(Exception):
    """What is wrong with a kustomization, in a sentence."""


def read(path: Path) -> list[Object]:
    """The objects of one file."""
    return _parsed(path.read_text())


@cache
def _parsed(text: str) -> list[Object]:
    return [one for one in yaml.safe_load_all(text) if one]


def kustomization(folder: Path) -> Object:
    """A folder's kustomization; raises WrongError for what this reader does not know."""
    path = folder / "kustomization.yaml"
    if not path.exists():
        raise WrongError(f"{_name(folder)} has no kustomization.yaml")
    (found,) = read(path)
    known = KINDS.get(found.get("kind", ""), ())
    for key in found:
        if key not in ("apiVersion", "kind", *known):
            raise WrongError(f"{_name(path)}: {key!r} is nothing check.py knows how to read")
    return found


def render(folder: Path, *components: Path) -> list[Object]:
    """The objects that applying folder makes, with components added to those it names."""
    told = kustomization(folder)
    found = _resources(folder, told)
    for component in (*(folder / name for name in told.get("components", ())), *components):
        path = component.resolve()
        more = kustomization(path)
        found += _resources(path, more)
        _patch(found, path, more)
    _patch(found, folder, told)
    return found


def _resources(folder: Path, told: Object) -> list[Object]:
    found: list[Object] = []
    for name in told.get("resources", ()):
        path = (folder / name).resolve()
        if path.is_dir():
            found += render(path)
        elif path.is_file():
            found += read(path)
        else:
            raise WrongError(f"{_name(folder)} names {name}, which is not there")
    return found


def _patch(found: list[Object], folder: Path, told: Object) -> None:
    for patch in told.get("patches", ()):
        (change,) = read(folder / patch["path"])
        same = [one for one in found if identity(one) == identity(change)]
        if len(same) != 1:
            raise WrongError(f"{_name(folder)}: the patch {patch['path']} changes nothing")
        found[found.index(same[0])] = merged(same[0], change)


def merged(value: Any, change: Any, key: str = "") -> Any:
    """value with change, as the API's strategic merge does it with what is used here."""
    if isinstance(value, dict) and isinstance(change, dict):
        kept = {one: old for one, old in value.items() if one not in change}
        return kept | {
            one: merged(value.get(one), more, one)
            for one, more in change.items()
            if more is not None  # which is how a patch takes something away
        }
    if isinstance(value, list) and key in MERGED_BY:
        by = MERGED_BY[key]
        old = {one[by]: one for one in value}
        # Kustomize's order: what a patch names comes first, and env is read in order
        return [merged(old.pop(one[by], {}), one) for one in change] + list(old.values())
    return change


def identity(one: Object) -> tuple[str, str, str, str]:
    """What tells an object from all others of a cluster."""
    meta = one.get("metadata", {})
    return one["apiVersion"], one["kind"], meta.get("namespace", ""), meta.get("name", "")


def _name(path: Path) -> str:
    return str(path.relative_to(HERE))


def everything() -> dict[str, list[Object]]:
    """What each entry makes, and the first overlay with each component, by name."""
    made = {entry: render(HERE / entry) for entry in ENTRIES}
    for one in COMPONENTS:
        made[f"{ENTRIES[0]} with {one}"] = render(HERE / ENTRIES[0], HERE / one)
    return made


# --- the checks ------------------------------------------------------------------------------


def unlisted() -> Iterator[str]:
    """Files that no kustomization names, and kustomizations nobody would find."""
    named: set[Path] = set()
    for path in HERE.rglob("kustomization.yaml"):
        named.add(path)
        found = kustomization(path.parent)
        names = [*found.get("resources", ()), *found.get("components", ())]
        names += [one["path"] for one in found.get("patches", ())]
        for name in names:
            target = (path.parent / name).resolve()
            if not target.exists():
                yield f"{_name(path)} names {name}, which is not there"
            named.add(target)
        folder = str(path.parent.relative_to(HERE))
        if folder not in (*ENTRIES, *COMPONENTS, "base"):
            yield f"{folder} is nothing check.py knows: name it in ENTRIES or COMPONENTS"
    for path in sorted({*HERE.rglob("*.yaml")} - named):
        yield f"{_name(path)} is named by no kustomization"


def twice(objects: list[Object]) -> Iterator[str]:
    """Two objects that are one to the API."""
    seen = set()
    for one in objects:
        if identity(one) in seen:
            yield f"{shown(one)} is there twice"
        seen.add(identity(one))


def unlike_the_api(objects: list[Object], definitions: Mapping[str, Object]) -> Iterator[str]:
    """What the API would refuse, by its schemas or by our own definitions."""
    for one in objects:
        api, kind, _, _ = identity(one)
        if api == SPIRE:
            for key in set(one["spec"]) - KNOWN.get(kind, set()):
                yield f"{shown(one)}: spec.{key} is nothing we use of SPIRE"
        elif f"{api} {kind}" in definitions:
            schema = definitions[f"{api} {kind}"]["schema"]["openAPIV3Schema"]
            for wrong in jsonschema.Draft202012Validator(schema).iter_errors(one):
                yield f"{shown(one)}: {wrong.json_path}: {wrong.message}"
            yield from (
                f"{shown(one)}: {wrong}"
                for wrong in unlike_the_message(one["spec"], MESSAGES[kind].DESCRIPTOR, "spec")
            )
        else:
            yield from (f"{shown(one)}: {wrong}" for wrong in _refused(json.dumps(one)))


@cache  # the base is in most entries
def _refused(text: str) -> list[str]:
    one, found = json.loads(text), []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(one, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            found.append(f"Kubernetes {version} has no {one['kind']} in {one['apiVersion']}")
        except kubernetes_validate.ValidationError as wrong:
            found.append(f"Kubernetes {version}: {wrong.json_path}: {wrong.message}")
    return found


def unlike_the_message(value: Any, message: Any, where: str) -> Iterator[str]:
    """Keys that are no fields of a protobuf message, by the names its .proto file has."""
    for key, inner in value.items():
        field = message.fields_by_name.get(key)
        if field is None:
            yield f"{where}.{key} is no field of {message.name}"
        elif (kind := field.message_type) and kind.GetOptions().map_entry:
            if (held := kind.fields_by_name["value"].message_type) is not None:
                for name, one in inner.items():
                    yield from unlike_the_message(one, held, f"{where}.{key}.{name}")
        elif kind:
            for one in inner if isinstance(inner, list) else [inner]:
                yield from unlike_the_message(one, kind, f"{where}.{key}")


def unfitting(objects: list[Object], elsewhere: list[Object]) -> Iterator[str]:
    """What objects say of each other and is not so; elsewhere are objects applied before."""
    there = {identity(one)[1:]: tuple(one.get("data", ())) for one in (*objects, *elsewhere)}
    there = BY_HAND | there
    for one in objects:
        _, kind, namespace, _ = identity(one)
        if namespace and ("Namespace", "", namespace) not in there:
            yield f"{shown(one)}: there is no namespace {namespace}"
        if kind == "Service" and not any(_selects(one["spec"], pod) for pod in objects):
            yield f"{shown(one)} leads to no pod and port"
        if (pod := pod_of(one)) is None:
            continue
        if kind != "Pod":
            wanted = one["spec"]["selector"]["matchLabels"]
            if not wanted.items() <= one["spec"]["template"]["metadata"]["labels"].items():
                yield f"{shown(one)}: its selector is not of its pods' labels"
        for wrong in (
            *_needs(pod, namespace, there),
            *_prior(pod, namespace, (*objects, *elsewhere)),
            *_containers(pod),
        ):
            yield f"{shown(one)}: {wrong}"


def pod_of(one: Object) -> Object | None:
    """The spec of the pods an object makes, if it makes any."""
    if one["kind"] == "Pod":
        return dict(one["spec"])
    return one["spec"].get("template", {}).get("spec") if "spec" in one else None


def containers(pod: Object) -> list[Object]:
    """All containers of a pod, those that run before the others first."""
    return [*pod.get("initContainers", ()), *pod["containers"]]


def _selects(service: Object, one: Object) -> bool:
    if (pod := pod_of(one)) is None or one["kind"] == "Pod":
        return False
    ports = {port["name"] for each in pod["containers"] for port in each.get("ports", ())}
    labels = one["spec"]["template"]["metadata"]["labels"]
    fits: bool = service["selector"].items() <= labels.items()
    return fits and all(port["targetPort"] in ports for port in service["ports"])


def _needs(
    pod: Object, namespace: str, there: Mapping[tuple[str, str, str], Sequence[str]]
) -> Iterator[str]:
    """What a pod does not start without; there has the keys of what has data."""
    for kind, name, key in _named(pod):
        if (keys := there.get((kind, namespace, name))) is None:
            yield f"there is no {kind} {namespace}/{name}"
        elif key and key not in keys:
            yield f"{kind} {namespace}/{name} has no {key}"


def _named(pod: Object) -> Iterator[tuple[str, str, str]]:
    """Kind and name of what a pod names, and the key in it, if it is one that it wants."""
    yield "ServiceAccount", pod.get("serviceAccountName", ""), ""
    for volume in pod.get("volumes", ()):
        match volume:
            case {"configMap": {"optional": True}}:
                pass
            case {"configMap": {"name": name}}:
                yield "ConfigMap", name, ""
            case {"secret": {"secretName": name}}:
                yield "Secret", name, ""
            case {"persistentVolumeClaim": {"claimName": name}}:
                yield "PersistentVolumeClaim", name, ""
    for variable in (one for each in containers(pod) for one in each.get("env", ())):
        match variable:
            case {"valueFrom": {"configMapKeyRef": {"name": name, "key": key}}}:
                yield "ConfigMap", name, key


def _prior(pod: Object, namespace: str, there: Iterable[Object]) -> Iterator[str]:
    """A critical priority that no quota of the namespace names: such pods are not made on GKE."""
    wanted = pod.get("priorityClassName", "")
    quotas = [
        one["spec"] for one in there
        if identity(one)[1:3] == ("ResourceQuota", namespace) and "pods" in one["spec"]["hard"]
    ]  # fmt: skip
    named = {
        name
        for quota in quotas
        for one in quota["scopeSelector"]["matchExpressions"]
        if (one["scopeName"], one["operator"]) == ("PriorityClass", "In")
        for name in one["values"]
    }
    if wanted.startswith(CRITICAL) and wanted not in named:
        yield f"no ResourceQuota of {namespace} names its priority class, {wanted}"


def _containers(pod: Object) -> Iterator[str]:
    volumes = {volume["name"] for volume in pod.get("volumes", ())}
    mounted = set()
    for each in containers(pod):
        mounts = {mount["name"] for mount in each.get("volumeMounts", ())}
        mounted |= mounts
        for name in mounts - volumes:
            yield f"container {each['name']} mounts {name}, which is no volume"
        known: set[str] = set()
        for variable in each.get("env", ()):
            for name in set(VARIABLE.findall(variable.get("value", ""))) - known:
                yield f"container {each['name']}: {variable['name']} uses {name} before it is set"
            if variable["name"] in known:
                yield f"container {each['name']} sets {variable['name']} twice"
            known.add(variable["name"])
        for part in each["resources"].values():
            for name, amount in part.items():
                if not QUANTITY.fullmatch(str(amount)):
                    yield f"container {each['name']}: {name} of {amount} is no quantity"
    for name in volumes - mounted:
        yield f"volume {name} is mounted nowhere"


def shown(one: Object) -> str:
    """An object's name, for people."""
    _, kind, namespace, name = identity(one)
    return f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}"


def unlike_kubectl(made: Mapping[str, list[Object]]) -> Iterator[str]:
    """Entries of which `kubectl kustomize` makes other objects than we read."""
    for entry, objects in made.items():
        overlay, _, component = entry.partition(" with ")
        with TemporaryDirectory(prefix="vwire-kustomize-") as folder:
            kinds = {"resources": [_from(folder, overlay)]}
            if component:
                kinds["components"] = [_from(folder, component)]
            Path(folder, "kustomization.yaml").write_text(yaml.safe_dump(kinds))
            done = subprocess.run(
                ["kubectl", "kustomize", folder], capture_output=True, text=True, check=False
            )
        theirs = {identity(one): one for one in yaml.safe_load_all(done.stdout) if one}
        ours = {identity(one): one for one in objects}
        odd = [one for one in {**theirs, **ours} if theirs.get(one) != ours.get(one)]
        if done.returncode or odd:
            names = ", ".join(shown(theirs.get(one) or ours[one]) for one in odd)
            yield f"{entry}: kubectl makes other objects: {names} {done.stderr.strip()}"


def _from(folder: str, entry: str) -> str:
    return os.path.relpath(HERE / entry, os.path.realpath(folder))


def problems() -> Iterator[str]:
    """Everything that is wrong, a sentence each."""
    try:
        yield from unlisted()
        made = everything()
    except WrongError as refused:
        yield str(refused)
        return
    definitions = {
        f"{one['spec']['group']}/{version['name']} {one['spec']['names']['kind']}": version
        for one in made["crds"]
        for version in one["spec"]["versions"]
    }
    for entry, objects in made.items():
        for wrong in (
            *twice(objects),
            *unlike_the_api(objects, definitions),
            *unfitting(objects, made[ENTRIES[0]]),
        ):
            yield f"{entry}: {wrong}"
    if sys.argv[1:] == ["--kubectl"]:
        yield from unlike_kubectl(made)


def main() -> int:
    """Print what is wrong, a line each; exit 1 if anything is."""
    wrong = list(problems())
    sys.stderr.write("".join(f"{line}\n" for line in wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

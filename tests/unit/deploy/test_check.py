"""`make check` refuses manifests that are wrong, and says where."""

import shutil
from pathlib import Path

import pytest

from deploy.kubernetes import check


@pytest.fixture
def manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "kubernetes"
    shutil.copytree(check.HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(check, "HERE", copy)
    return copy


def test_the_manifests_are_right() -> None:
    assert list(check.problems()) == []


FAULTS = {
    "a name that is no file's": (
        "base/kustomization.yaml", "nsmgr.yaml", "nsmgr.yml",
        "base names nsmgr.yml, which is not there",
    ),
    "a file nobody names": (
        "base/kustomization.yaml", "  - nsmgr.yaml\n", "",
        "base/nsmgr.yaml is named by no kustomization",
    ),
    "what is not read of Kustomize": (
        "overlays/spire/kustomization.yaml", "kind:", "namePrefix: my-\nkind:",
        "overlays/spire/kustomization.yaml: 'namePrefix' is nothing check.py knows how to read",
    ),
    "a patch of nothing": (
        "components/tun/forwarder.yaml", "name: forwarder\n", "name: forward\n",
        "components/tun: the patch forwarder.yaml changes nothing",
    ),
    "a patch of nothing, beside resources": (
        "examples/domains/trusted.yaml", "name: vwire-domain", "name: vwire-registry",
        "examples/domains: the patch trusted.yaml changes nothing",
    ),
    "a patch of nothing, by what the component brings itself": (
        "components/domains/registry.yaml", "name: registry\n", "name: registry-prxy\n",
        "components/domains: the patch registry.yaml changes nothing",
    ),
    "a field of a federation that SPIRE has not": (
        "examples/domains/federation.yaml", "bundleEndpointURL:", "bundleEndpointUrl:",
        "ClusterFederatedTrustDomain cluster2: spec.bundleEndpointUrl is nothing we use of SPIRE",
    ),
    "a field the API has not": (
        "base/nsmgr.yaml", "hostNetwork: true", "hostNetwrok: true",
        "nsmgr: Kubernetes 1.30: $.spec.template.spec: Additional properties are not allowed",
    ),
    "a value of another type": (
        "base/registry.yaml", "periodSeconds: 5", "periodSeconds: 5s",
        "containers[0].readinessProbe.periodSeconds: '5s' is not of type 'integer', 'null'",
    ),
    "a kind the API has not": (
        "base/accounts.yaml", "kind: ServiceAccount", "kind: ServiceAcount",
        "Kubernetes 1.30 has no ServiceAcount in v1",
    ),
    "a definition that is none": (
        "crds/network-services.yaml", "scope: Namespaced", "scoped: Namespaced",
        "CustomResourceDefinition networkservices.networkservicemesh.io: Kubernetes 1.30: $.spec:",
    ),
    "a resource that is not as defined": (
        "crds/examples/network-service.yaml", "spec:\n", "spec:\n  payloda: IP\n",
        "NetworkService nsm-system/icmp-responder: spec.payloda is no field of NetworkService",
    ),
    "a resource with a wrong field further down": (
        "crds/examples/network-service-endpoint.yaml", "nanos:", "nanoseconds:",
        "spec.expiration_time.nanoseconds is no field of Timestamp",
    ),
    "something SPIRE has not": (
        "overlays/spire/identities.yaml", "spiffeIDTemplate:", "spiffeIdTemplate:",
        "ClusterSPIFFEID vwire-domain: spec.spiffeIdTemplate is nothing we use of SPIRE",
    ),
    "one object twice": (
        "overlays/issuer/issuer.yaml", "  name: issuer\n", "  name: nsmgr\n",
        "overlays/issuer: ServiceAccount nsm-system/nsmgr is there twice",
    ),
    "a namespace that is not there": (
        "base/namespace.yaml", "name: nsm-system", "name: nsm",
        "DaemonSet nsm-system/nsmgr: there is no namespace nsm-system",
    ),
    "a selector of other pods": (
        "base/forwarder.yaml", "matchLabels: {app.kubernetes.io/name: forwarder",
        "matchLabels: {app.kubernetes.io/name: nsmgr",
        "DaemonSet nsm-system/forwarder: its selector is not of its pods' labels",
    ),
    "a service of no port": (
        "base/registry.yaml", "targetPort: grpc", "targetPort: http",
        "Service nsm-system/registry leads to no pod and port",
    ),
    "an account that is not there": (
        "base/forwarder.yaml", "serviceAccountName: forwarder", "serviceAccountName: forwarders",
        "there is no ServiceAccount nsm-system/forwarders",
    ),
    "a config map that is not there": (
        "base/nsmgr.yaml", "configMap: {name: excluded-prefixes}", "configMap: {name: prefixes}",
        "there is no ConfigMap nsm-system/prefixes",
    ),
    "a key that a config map has not": (
        "examples/domains/domain.yaml", "  name: cluster1", "  called: cluster1",
        "Deployment nsm-system/nsmgr-proxy: ConfigMap nsm-system/domain has no name",
    ),
    "a key that a config map made by hand has not": (
        "components/domains/nsmgr-proxy.yaml", "key: name}", "key: called}",
        "with components/domains: Deployment nsm-system/nsmgr-proxy: ConfigMap nsm-system/domain",
    ),
    "a config map that need not be there, of another kind": (
        "overlays/issuer/issuer.yaml", "optional: true", "optionl: true",
        "there is no ConfigMap nsm-system/federation",
    ),
    "a critical priority without a quota": (
        "base/quota.yaml", "values: [system-node-critical, ", "values: [",
        "no ResourceQuota of nsm-system names its priority class, system-node-critical",
    ),
    "a mount of no volume": (
        "base/registry.yaml", "{name: store, mountPath", "{name: stroe, mountPath",
        "container registry mounts stroe, which is no volume",
    ),
    "a volume nobody mounts": (
        "base/registry.yaml", "            - {name: store, mountPath: /var/lib/vwire}\n", "",
        "volume store is mounted nowhere",
    ),
    "a variable before it is set": (
        "base/nsmgr.yaml", "- name: POD_IP\n", "- name: POD_ADDRESS\n",
        "container nsmgr: NSM_LISTEN_ON uses POD_IP before it is set",
    ),
    "a patch that puts one before what it uses": (
        "components/ipv6/nsmgr.yaml", "- name: POD_IP", "- name: POD_IPS",
        "with components/ipv6: DaemonSet nsm-system/nsmgr: container nsmgr: NSM_LISTEN_ON uses",
    ),
    "no quantity": (
        "base/nsmgr.yaml", "memory: 64Mi", "memory: 64M B",
        "container directory: memory of 64M B is no quantity",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("file", "right", "wrong", "told"), FAULTS.values(), ids=FAULTS)
def test_each_fault_is_told(manifests: Path, file: str, right: str, wrong: str, told: str) -> None:
    path = manifests / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong, 1))
    found = list(check.problems())
    assert any(told in line for line in found), "\n".join(found)


def test_what_a_patch_calls_null_is_taken_away() -> None:
    volumes = {"volumes": [{"name": "store", "hostPath": {"path": "/x"}}, {"name": "run"}]}
    change = {"volumes": [{"name": "store", "hostPath": None, "emptyDir": {}}]}
    assert check.merged(volumes, change) == {
        "volumes": [{"name": "store", "emptyDir": {}}, {"name": "run"}]
    }


def test_a_patch_is_merged_as_kustomize_merges_it() -> None:
    object_ = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": ["x"]}
    change = {"env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}], "args": ["y"]}
    assert check.merged(object_, change) == {
        "env": [
            {"name": "B", "value": "3"},
            {"name": "C", "value": "4"},
            {"name": "A", "value": "1"},
        ],
        "args": ["y"],
    }

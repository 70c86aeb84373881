"""Which processes a lab has, as whom and told what."""

import pytest

from labs import lab as labfile
from labs import processes
from labs.lab import Lab
from labs.paths import Paths
from labs.processes import Stage


@pytest.fixture(scope="module")
def two() -> Lab:
    return labfile.read(labfile.find("two-nodes"))


def settings(lab: Lab, name: str) -> dict[str, str]:
    plan = processes.plan(lab, Paths(lab.name))
    return dict(next(p for p in plan.processes if p.name == name).environment)


def test_every_process_has_a_group_and_an_identity_of_its_own(two):
    plan = processes.plan(two, Paths(two.name))
    gids = [p.gid for p in plan.processes]
    assert len(set(gids)) == len(gids)
    ids = [e.spiffe_id for e in plan.entries]
    assert len(set(ids)) == len(ids)
    assert "spiffe://east.test/node/east-1/nsmgr" in ids
    assert "spiffe://six.test/client/far-six" in ids
    # the issuer itself needs none; each node and the outsider have one more, for nsmctl
    assert len(ids) == len(gids) - 2 + 4 + 1


def test_no_identity_is_given_to_two_groups_of_a_namespace(two):
    entries = processes.plan(two, Paths(two.name)).entries
    keys = [(e.namespace, e.gid) for e in entries]
    assert len(set(keys)) == len(keys)


def test_a_clusters_family_decides_what_its_parts_talk_over(two):
    assert settings(two, "east-1/forwarder")["NSM_TUNNEL_IP"] == "198.18.0.1"
    assert settings(two, "six-2/forwarder")["NSM_TUNNEL_IP"] == "fd00:18::4"
    manager = settings(two, "six-2/nsmgr")
    assert manager["NSM_LISTEN_ON"].endswith(",tcp://[fd00:18::4]:5001")
    assert manager["NSM_REGISTRY_URL"] == "tcp://[fd00:18::3]:5002"


def test_several_prefixes_of_an_endpoint_are_pools_of_their_own(two):
    pools = settings(two, "six-2/pong-six")["NSM_CIDR_PREFIX"]
    assert pools == "[172.16.6.0/24],[2001:db8:6::/64]"
    assert settings(two, "east-2/pong")["NSM_CIDR_PREFIX"] == "172.16.1.0/24"


def test_an_outsider_has_a_namespace_and_no_process(two):
    plan = processes.plan(two, Paths(two.name))
    assert "outsider" in two.places
    assert not [p for p in plan.processes if "outsider" in p.name]


def test_only_who_programs_the_kernel_or_looks_at_processes_keeps_its_rights(two):
    plan = processes.plan(two, Paths(two.name))
    privileged = {p.stage for p in plan.processes if p.privileged}
    assert privileged == {Stage.ISSUER, Stage.MANAGER, Stage.FORWARDER}


def test_socket_paths_fit_into_108_bytes_for_the_longest_names_allowed():
    text = f"""\
name: {"l" * 24}
topology:
  clusters: {{{"c" * 24}: {{}}}}
  nodes: {{{"n" * 24}: {{cluster: {"c" * 24}}}, sw: {{kind: switch}}}}
  links: [{{endpoints: ["{"n" * 24}:eth0", "sw:p1"]}}]
  underlay: {{ipv4: 198.18.0.0/24}}
"""
    lab = labfile.parse(text, "x")
    paths = Paths(lab.name)
    node, cluster = "n" * 24, "c" * 24
    longest = (
        paths.node(node, "nsm.io.sock"),
        paths.node(node, "forwarder.sock"),
        paths.node(node, "tmp", "tmpabcdefgh", "listen.on"),
        paths.cluster(cluster, "spiffe.sock"),
    )
    assert max(len(path) for path in longest) < 108

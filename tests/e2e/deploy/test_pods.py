"""The manifests make a mesh: nothing is set here that is not in them."""

import asyncio
import ipaddress
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deploy.kubernetes import check
from nsm.identity.authority import Authority
from tests.e2e.deploy.pods import UP, Cluster, Container, Node, Pod
from tests.support.pings import counted
from tests.support.spaces import Space, ip, space
from tests.support.wait import until, write

REGISTRY, PLAN = "10.77.0.100", "10.77.0.101"


FLAT = {"ipam": PLAN, "router-1": "10.77.0.102", "router-2": "10.77.0.103"}


@dataclass
class Mesh:
    cluster: Cluster
    nodes: dict[str, Node]
    daemons: dict[tuple[str, str], Pod]  # by program and node
    registry: Pod
    responder: Pod
    client: Pod
    workload: Space  # the client's
    endpoint: Space  # the responder's
    shared: Space  # the registry's
    flat: dict[str, Space]  # of who has addresses of its own in the flat network's example

    @property
    def containers(self) -> list[Container]:
        pods = [*self.daemons.values(), self.registry, self.responder, self.client]
        return [one for pod in pods for one in pod.running.values()]

    async def ready(self) -> None:
        for one in self.containers:
            await one.ready()

    def roll(self, program: str, node: str, name: str) -> Container:
        """Replace a program's pod by one of another name, as an update does."""
        self.daemons[program, node].stop()
        made = self.cluster.start(
            "DaemonSet", program, self.nodes[node], name=name, netns=self.nodes[node].netns
        )
        self.daemons[program, node] = made
        (container,) = made.running.values()
        return container

    def roll_registry(self) -> Container:
        """Replace the registry's pod, as an update does: the old one goes first."""
        self.registry.stop()
        self.registry = self.cluster.start(
            "Deployment", "registry", self.nodes["two"], name="registry-y",
            netns=self.shared.name, address=REGISTRY,
        )  # fmt: skip
        return self.registry.running["registry"]


@contextmanager
def lan(**addresses: str) -> Iterator[dict[str, Space]]:
    """Namespaces on one switch, with these addresses."""
    with ExitStack() as stack:
        switch = stack.enter_context(space("lan"))
        switch.do("link", "add", "br0", "type", "bridge")
        switch.do("link", "set", "br0", "up")
        made = {}
        for name, address in addresses.items():
            one = made[name] = stack.enter_context(space(name))
            peer = ("peer", "name", name, "netns", switch.name)
            one.do("link", "add", "eth0", "type", "veth", *peer)
            switch.do("link", "set", name, "master", "br0", "up")
            one.do("addr", "add", f"{address}/24", "dev", "eth0")
            one.do("link", "set", "eth0", "up")
            one.do("route", "add", "default", "via", "10.77.0.254")
        yield made


@contextmanager
def running(files: Path) -> Iterator[Mesh]:
    """Two nodes, everything started at once, as a cluster does it; all of it is ready."""
    authority = files / "authority.pem"
    Authority.create("example.org").save(authority)
    every = check.everything()
    cluster = Cluster(
        [
            *every["overlays/issuer"],
            *every["examples/icmp-responder"],
            *every["examples/vl3"],
        ],
        files,
        secrets={"issuer-authority": {"authority.pem": authority.read_text()}},
        hosts={"registry": REGISTRY, "ipam": PLAN},
    )
    with (
        lan(one="10.77.0.1", two="10.77.0.2", registry=REGISTRY, **FLAT) as spaces,
        space("pong") as pong,
        space("app") as app,
        closing(cluster),
    ):
        nodes = {}
        for name, address in (("one", "10.77.0.1"), ("two", "10.77.0.2")):
            (files / name).mkdir()
            nodes[name] = Node(name, address, spaces[name].name, files / name)
        daemons = {}
        for program in ("issuer", "nsmgr", "forwarder"):
            for node in nodes.values():
                own = spaces[node.name].name if program == "issuer" else ""
                daemons[program, node.name] = cluster.start(
                    "DaemonSet", program, node, name=f"{program}-{node.name}a", netns=own
                )
        registry = cluster.start(
            "Deployment", "registry", nodes["two"], name="registry-x",
            netns=spaces["registry"].name, address=REGISTRY,
        )  # fmt: skip
        responder = cluster.start(
            "Deployment", "icmp-responder", nodes["two"], name="pong-x", netns=pong.name
        )
        client = cluster.start("Pod", "client", nodes["one"], name="client", netns=app.name)
        mesh = Mesh(
            cluster, nodes, daemons, registry, responder, client, app, pong, spaces["registry"],
            {name: spaces[name] for name in FLAT},
        )  # fmt: skip
        asyncio.run(mesh.ready())
        yield mesh


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """For tests that leave every process as it is."""
    with running(tmp_path_factory.mktemp("pods")) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Mesh]:
    """For a test that replaces processes."""
    with running(tmp_path) as made:
        yield made


def pinging(mesh: Mesh, *options: str) -> "subprocess.Popen[str]":
    command = ["ip", "netns", "exec", mesh.workload.name, "ping", "-n", *options, "172.16.1.0"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def test_a_workload_gets_a_wire_by_the_manifests_alone(mesh: Mesh) -> None:
    said, _ = pinging(mesh, "-c", "3", "-i", "0.1").communicate(timeout=30)
    assert " 0% packet loss" in said
    (link,) = mesh.workload.ip("link", "show", "dev", "nsm-1")
    assert link["linkinfo"]["info_kind"] == "macvlan"  # the tunnel is on the node
    (tunnel,) = ip("-n", mesh.nodes["one"].netns, "link", "show", "type", "vxlan")
    assert tunnel["linkinfo"]["info_data"]["remote"] == "10.77.0.2"


async def test_each_process_has_the_rights_its_manifest_says_and_no_others(mesh: Mesh) -> None:
    held = {one.name: rights(one) for one in mesh.containers}
    forwarder = mask("NET_ADMIN", "SYS_ADMIN", "SYS_PTRACE", "NET_BROADCAST")
    assert held == {
        "issuer": (7800, 0),
        "nsmgr": (7802, 0),
        "forwarder": (0, forwarder),
        "registry": (7801, 0),
        "responder": (7811, 0),
        "wires": (7812, 0),
        "app": (7812, 0),
    }


def rights(one: Container) -> tuple[int, int]:
    """Whose a process is, and the capabilities it may ever get, says the kernel."""
    status = Path(f"/proc/{one.pid}/status").read_text()
    uid = re.search(r"^Uid:\s+(\d+)", status, re.MULTILINE)
    bounds = re.search(r"^CapBnd:\s+(\w+)", status, re.MULTILINE)
    assert uid
    assert bounds
    return int(uid[1]), int(bounds[1], 16)


def mask(*names: str) -> int:
    numbers = {"NET_BROADCAST": 11, "NET_ADMIN": 12, "SYS_PTRACE": 19, "SYS_ADMIN": 21}
    return sum(1 << numbers[name] for name in names)


async def test_a_program_that_hangs_is_told_by_its_liveness_probe(mesh: Mesh) -> None:
    watched = [one for one in mesh.containers if "livenessProbe" in one.spec]
    assert {one.name for one in watched} == {"issuer", "nsmgr", "forwarder", "registry"}
    assert all(one.probe("livenessProbe") for one in watched)
    for one in watched:
        one.signal(signal.SIGSTOP)
    try:
        hung = time.time() - 31
        for one in watched:
            os.utime(f"/proc/{one.pid}/root/run/vwire/health", (hung, hung))
        assert [one.name for one in watched if one.probe("livenessProbe")] == []
    finally:
        for one in watched:
            one.signal(signal.SIGCONT)
    for one in watched:
        await until(partial(one.probe, "livenessProbe"), f"{one.name}'s loop turns", bar=UP)


@pytest.mark.long
async def test_an_update_of_every_program_loses_no_packet(fresh: Mesh) -> None:
    (before,) = fresh.workload.ip("link", "show", "dev", "nsm-1")
    pings = pinging(fresh, "-i", "0.05")
    try:
        await fresh.roll_registry().ready()
        for program in ("issuer", "forwarder", "nsmgr"):
            for node in fresh.nodes:
                await fresh.roll(program, node, f"{program}-{node}b").ready()
        for node in fresh.nodes:
            (forwarder,) = fresh.daemons["forwarder", node].running.values()
            await until(partial(refreshed, forwarder), "the wire is refreshed", bar=UP)
    finally:
        pings.send_signal(signal.SIGINT)
        said, _ = pings.communicate(timeout=30)
    sent, answered = counted(said)
    assert answered == sent > 0, said
    (after,) = fresh.workload.ip("link", "show", "dev", "nsm-1")
    assert [after[key] for key in KEPT] == [before[key] for key in KEPT]


KEPT = ("ifindex", "link_netnsid", "address", "linkinfo")  # another device would have others


def refreshed(forwarder: Container) -> bool:
    """Whether that forwarder, which never made a wire, has been asked for one and has it."""
    return bool(re.search(r"NetworkService/Request.*OK", forwarder.said()))


@pytest.mark.long
async def test_a_new_registry_knows_from_its_volume_who_offered_what_to_the_old(
    fresh: Mesh,
) -> None:
    responder = fresh.responder.running["responder"]
    responder.signal(signal.SIGSTOP)  # or it might have registered again
    try:
        (before,) = offered(fresh)
        await fresh.roll_registry().ready()
        await until(partial(offered, fresh), "the new registry tells of it", bar=UP)
        (after,) = offered(fresh)
    finally:
        responder.signal(signal.SIGCONT)
    assert after.pop("expires") >= before.pop("expires")  # who is there may come and say so
    assert after == before


def offered(mesh: Mesh) -> list[dict[str, Any]]:
    """What the client's manager is told of the responder; nothing while nobody tells."""
    asked = mesh.client.running["wires"].run("nsmctl", "endpoints", "--json")
    told = json.loads(asked.stdout) if asked.returncode == 0 else []
    return [one for one in told if one["services"] == ["icmp-responder"]]


@pytest.mark.long
async def test_a_pod_that_is_deleted_has_closed_its_wire_before_it_is_gone(fresh: Mesh) -> None:
    start = time.monotonic()
    await asyncio.to_thread(fresh.client.stop)
    write("a deleted pod of the example", time.monotonic() - start, 5.0)
    assert time.monotonic() - start < fresh.client.spec["terminationGracePeriodSeconds"] / 2
    assert fresh.workload.ip("link", "show", "type", "macvlan") == []
    assert fresh.endpoint.ip("link", "show", "type", "macvlan") == []
    for node in fresh.nodes.values():
        assert ip("-n", node.netns, "link", "show", "type", "vxlan") == []


@pytest.fixture
def members(mesh: Mesh) -> Iterator[list[Pod]]:
    """The flat network's example: two routers, and who else is asks them in turn."""
    node = mesh.nodes["one"]  # all on one: this machine's kernel may have no WireGuard

    def start(kind: str, owner: str, name: str, own: Space) -> Pod:
        address = FLAT.get(name, "")
        return mesh.cluster.start(kind, owner, node, name=name, netns=own.name, address=address)

    with space("m0") as m0, space("m1") as m1:
        started = [start("Deployment", "ipam", "ipam", mesh.flat["ipam"])]
        for name in ("router-1", "router-2"):
            started.append(start("Deployment", "router", name, mesh.flat[name]))
        for pod in started:  # or there would be no turns to take
            for one in pod.running.values():
                asyncio.run(one.ready())
        for name, own in (("member-0", m0), ("member-1", m1)):
            started.append(start("StatefulSet", "member", name, own))
        yield started
        for pod in reversed(started):
            pod.stop()


async def test_members_of_a_flat_network_reach_each_other_by_name_over_two_routers(
    members: list[Pod],
) -> None:
    _, *routers, first, second = members
    for router in routers:
        assert rights(router.running["router"]) == (0, mask("NET_ADMIN"))
    for member in (first, second):
        for one in member.running.values():  # an application has no probe that says it runs
            await until(lambda one=one: rights(one) == (7815, 0), f"{one.name} has no more", bar=UP)
    app = first.running["app"]
    own, others = address(first), address(second)
    assert own.network != others.network  # each of another router
    said = app.run("getent", "ahostsv4", "member-1.orders")
    assert {line.split()[0] for line in said.stdout.splitlines()} == {str(others.ip)}
    # as root: this machine's ping may have a capability, which the image's has not
    there = ["nsenter", f"--target={app.pid}", "--mount", "--net", "--root"]
    ping = [*there, "ping", "-n", "-c", "3", "-i", "0.1", "member-1.orders"]
    done = subprocess.run(ping, capture_output=True, text=True, check=False)
    assert " 0% packet loss" in done.stdout, done.stdout + done.stderr


def address(member: Pod) -> ipaddress.IPv4Interface:
    """A member's address in the network, with the part of it that its router was lent."""
    (link,) = json.loads(
        member.running["app"].run("ip", "-j", "-4", "addr", "show", "nsm-1").stdout
    )
    (info,) = link["addr_info"]
    return ipaddress.IPv4Interface(f"{info['local']}/24")

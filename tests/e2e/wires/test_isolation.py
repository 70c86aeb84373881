"""Where a tunnel stands: in the workload's namespace, or out of the reach of one with rights."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.e2e.wires.nodes import Nodes, Program, addresses, far_end, flow, identity, link
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until

URL = "kernel://echo/nsm-1"
SHORT = {"NSM_MAX_TOKEN_LIFETIME": "6s", "NSM_REQUEST_TIMEOUT": "1500ms"}


@pytest.fixture
def places(nodes: Nodes):
    """The client's, its node's and the endpoint's namespace; afterwards they are as before."""
    client, node, endpoint = nodes.space("app"), nodes.space("one"), nodes.space("pong")
    before = kernel_state(client, endpoint), node.links()
    yield client, node, endpoint
    nodes.end_clients()
    assert (kernel_state(client, endpoint), node.links()) == before


def kind(space, name: str = "nsm-1") -> str:
    found: str = link(space, name)["linkinfo"]["info_kind"]
    return found


def below(node) -> set[str]:
    """The tunnels that stand on a node itself."""
    return {one["ifname"] for one in node.ip("link", "show", "type", "vxlan")}


@contextlib.contextmanager
def root(space: Space) -> Iterator[None]:
    """Somebody with all rights is in there for the block."""
    process = subprocess.Popen(["ip", "netns", "exec", space.name, "sleep", "600"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def told(nodes: Nodes, isolation: str) -> Iterator[None]:
    """Node one's forwarder with that setting, for the block."""
    nodes.now["one/forwarder"].end()
    nodes.start("one/forwarder", NSM_ISOLATION=isolation).ready()
    try:
        yield
    finally:
        nodes.now["one/forwarder"].end()
        nodes.start("one/forwarder").ready()


def granted(nodes: Nodes) -> int:
    wanted = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return sum(all(word in line for word in wanted) for line in nodes.now["one/nsmgr"].log)


async def test_a_workload_that_may_configure_devices_gets_frames_and_others_the_tunnel(
    nodes: Nodes, places
):
    client, node, endpoint = places
    plain = nodes.client("app", URL)
    assert kind(client) == "vxlan"
    assert below(node) == set()
    assert plain.end() == 0
    mighty = nodes.client("app", URL, privileged=True)
    assert kind(client) == "macvlan"
    (tunnel,) = below(node)
    assert kind(endpoint, far_end(client, "nsm-1", endpoint)["ifname"]) == "vxlan"
    here, there = link(node, tunnel), far_end(client, "nsm-1", endpoint)
    assert here["linkinfo"]["info_data"]["id"] == there["linkinfo"]["info_data"]["id"]
    assert link(client, "nsm-1")["mtu"] == here["mtu"] == there["mtu"]
    assert await client.pings("172.16.1.0")
    # On its own node there is no tunnel to misuse.
    near = nodes.client("near", URL, privileged=True)
    assert kind(nodes.space("near")) == "veth"
    assert near.end() == mighty.end() == 0
    assert below(node) == client.links() == set()


async def test_it_stays_where_it_stands_through_refreshes_and_a_forwarders_restart(
    nodes: Nodes, places
):
    client, node, endpoint = places
    app = nodes.client("app", URL, privileged=True, **SHORT)
    before = identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", endpoint))
    with flow(client, "172.16.1.0") as echoes:
        for number in (signal.SIGTERM, signal.SIGKILL):
            nodes.now["one/forwarder"].end(number)
            nodes.start("one/forwarder").ready()
            seen = granted(nodes)
            await until(lambda seen=seen: granted(nodes) > seen, "a refresh", bar=2)
    now = identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", endpoint))
    assert now == before
    assert echoes.received == echoes.sent > 10
    assert app.end() == 0
    assert below(node) == set()
    # And one that stands in a workload stays there whoever comes in later.
    plain = nodes.client("app", URL, **SHORT)
    before = identity(link(client, "nsm-1"))
    with root(client), flow(client, "172.16.1.0") as echoes:
        seen = granted(nodes)
        await until(lambda: granted(nodes) > seen + 1, "two refreshes", bar=3)
    assert identity(link(client, "nsm-1")) == before
    assert echoes.received == echoes.sent > 10
    assert plain.end() == 0


async def test_a_workload_with_rights_that_dies_leaves_no_tunnel(nodes: Nodes, places):
    _, node, endpoint = places
    nodes.end_clients()
    process = nodes.process
    nodes.process = lambda place: _mighty(process(place))  # type: ignore[method-assign]
    try:
        with nodes.alone("app", "mortal-root", NSM_NETWORK_SERVICES=URL) as app:
            assert len(below(node)) == 1
            app.end(signal.SIGKILL)
            await until(lambda: not below(node), "the tunnel of a dead workload", bar=0.5)
            await until(lambda: not endpoint.links(), "its far end", bar=0.5)
    finally:
        nodes.process = process  # type: ignore[method-assign]


@pytest.mark.parametrize(("isolation", "wanted"), [("hop", "macvlan"), ("in-place", "vxlan")])
async def test_what_the_node_was_told_counts_more_than_who_asks(
    nodes: Nodes, places, isolation: str, wanted: str
):
    client, node, _ = places
    with told(nodes, isolation):
        app: Program = nodes.client("app", URL, privileged=wanted == "vxlan")
        assert kind(client) == wanted
        assert bool(below(node)) == (wanted == "macvlan")
        assert addresses(client, "nsm-1")
        assert await client.pings("172.16.1.0")
        assert app.end() == 0


def wire(client: Space, node: Space, endpoint: Space) -> list[object]:
    """What the devices of the client's wire are, on both nodes."""
    tunnels = [identity(link(node, name)) for name in sorted(below(node))]
    return [identity(link(client, "nsm-1")), *tunnels, identity(far_end(client, "nsm-1", endpoint))]


@pytest.mark.parametrize(("isolation", "stands"), [("hop", "vxlan"), ("in-place", "macvlan")])
async def test_a_wire_that_stands_stays_as_it_is_when_the_node_is_told_otherwise(
    nodes: Nodes, places, isolation: str, stands: str
):
    client, node, endpoint = places
    app = nodes.client("app", URL, privileged=stands == "macvlan", **SHORT)
    assert kind(client) == stands
    before = wire(client, node, endpoint)
    with contextlib.ExitStack() as stack:
        with flow(client, "172.16.1.0") as echoes:
            stack.enter_context(told(nodes, isolation))
            seen = granted(nodes)
            await until(lambda: granted(nodes) > seen + 1, "two refreshes", bar=3)
        assert echoes.received == echoes.sent > 10
        assert wire(client, node, endpoint) == before
        # what is new is as it is told
        other = nodes.client("app", "kernel://echo/nsm-2", privileged=stands == "macvlan")
        assert kind(client, "nsm-2") == {"hop": "macvlan", "in-place": "vxlan"}[isolation]
        assert other.end() == 0
    assert app.end() == 0


FORGED = {  # what somebody in a workload can make who knows how a wire's device is marked
    "no tunnel": "ip link add {name} type bridge",
    "a tunnel of its own": "ip link add {name} type vxlan id 666 dstport 4789"
    " local 127.0.0.1 remote 127.0.0.2",
    "moved in from elsewhere": "ip -n {other} link add {name} netns {here} type vxlan"
    " id 666 dstport 4789 local 127.0.0.1 remote 127.0.0.2",
}


@pytest.mark.parametrize("how", FORGED)
async def test_what_a_workload_made_itself_is_not_believed_to_be_a_wire_of_before(
    nodes: Nodes, places, how: str
):
    """It would talk the forwarder out of keeping the tunnel from who is in there."""
    client, node, endpoint = places
    silent = "net.ipv4.icmp_echo_ignore_all"
    endpoint.run("sysctl", "-w", f"{silent}=1")  # or the client would have it made anew
    try:
        app = nodes.client("app", URL, privileged=True, **SHORT)
        before = link(client, "nsm-1")
        (tunnel,) = below(node)
        nodes.now["one/forwarder"].end()
        try:
            node.do("link", "del", tunnel)
            assert client.links() == set()
            order = FORGED[how].format(
                name="forged", other=nodes.space("near").name, here=client.name
            )
            done = client.run(*order.split())
            assert done.returncode == 0, done.stderr
            mark = ("group", str(before["group"]), "alias", before["ifalias"])
            client.do("link", "set", "forged", *mark)
        finally:
            seen = granted(nodes)
            nodes.start("one/forwarder").ready()
        await until(lambda: granted(nodes) > seen, "the wire anew", bar=2)
    finally:
        endpoint.run("sysctl", "-w", f"{silent}=0")
    assert client.links() == {"nsm-1"}
    assert link(client, "nsm-1")["ifalias"] == before["ifalias"]
    assert kind(client) == "macvlan"
    (tunnel,) = below(node)
    assert link(node, tunnel)["linkinfo"]["info_data"]["id"] != 666
    assert await client.pings("172.16.1.0")
    assert app.end() == 0


def _mighty(process):
    return replace(process, privileged=True)

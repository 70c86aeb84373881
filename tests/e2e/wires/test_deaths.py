"""A wire ends with the namespace of either end, and everybody is told."""

import os
import signal
import subprocess
import time

import pytest

from forwarder.farnodes import DEAD
from tests.e2e.wires.nodes import Nodes, addresses
from tests.support.spaces import Space, answers, kernel_state
from tests.support.wait import until

PLACES = ["app", pytest.param("near", marks=pytest.mark.long)]


def holders(inode: int) -> list[str]:
    """Every process that is in a network namespace or has it open."""
    link, found = f"net:[{inode}]", []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for folder in (f"/proc/{pid}/fd", f"/proc/{pid}/task"):
            try:
                entries = os.listdir(folder)
            except OSError:
                continue  # it ended meanwhile
            paths = [
                f"{folder}/{e}" + ("/ns/net" if folder.endswith("task") else "") for e in entries
            ]
            found += [path for path in paths if _target(path) == link]
    return found


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


async def known_to_answer(node: Space) -> None:
    """Wait for an echo it answers now: what it answered for earlier wires is forgotten."""
    so_far = answers(node)
    await until(lambda: answers(node) > so_far, "the node is known to answer", bar=0.5)


def tunnel_sockets(node: Space) -> int:
    return node.run("ss", "-Hlun").stdout.count(":4789")


@pytest.mark.parametrize(
    ("place", "node"), [("app", "one"), ("near", "two")], ids=["vxlan", "veth"]
)
async def test_a_client_whose_namespace_dies_leaves_no_device_and_no_address(
    nodes: Nodes, place: str, node: str
):
    single, here = nodes.space("single"), nodes.space(node)
    before = kernel_state(single), tunnel_sockets(here)
    urls = {"NSM_NETWORK_SERVICES": "kernel://pair/nsm-1"}
    with nodes.alone(place, "mortal", **urls) as app:
        inode = os.stat(f"/proc/{app.pid}/ns/net").st_ino
        inside = [entry for entry in holders(inode) if f"/{app.pid}/" not in entry]
        assert not inside, f"somebody else holds the workload's namespace: {inside}"
        assert len(single.links()) == 1
        assert tunnel_sockets(here) == (1 if place == "app" else 0)
        app.end(signal.SIGKILL)
        await until(lambda: not single.links(), f"the far end's death over {place}", bar=0.5)
        await until(lambda: not holders(inode), "the namespace's end", bar=0.5)
        await until(lambda: tunnel_sockets(here) == 0, "the tunnel's socket closed", bar=0.5)
    assert (kernel_state(single), tunnel_sockets(here)) == before
    # The pool has room for one wire, so its address was given back.
    again = nodes.client(place, "kernel://pair/nsm-1")
    assert addresses(nodes.space(place), "nsm-1") == ["172.16.2.1"]
    assert again.end() == 0


async def test_an_endpoint_whose_namespace_dies_is_registered_no_more(nodes: Nodes):
    serving = {"NSM_SERVICE_NAMES": "brief", "NSM_PAYLOAD": "ETHERNET"}

    def withdrawn() -> bool:
        words = '"method": "registry.NetworkServiceEndpointRegistry/Unregister"'
        return any(words in line and "two/nsmgr" in line for line in registry.log[known:])

    registry = nodes.now["one/registry"]
    with nodes.alone("pong", "brief", **serving, NSM_CIDR_PREFIX="172.16.9.0/24") as doomed:
        known = len(registry.log)
        doomed.end(signal.SIGKILL)
        await until(withdrawn, "its registration's end", bar=5)


@pytest.mark.parametrize("place", ["app", "near"], ids=["vxlan", "veth"])
async def test_a_client_whose_endpoints_namespace_dies_is_told_and_gets_another(
    nodes: Nodes, place: str
):
    client = nodes.space(place)
    before = kernel_state(client, nodes.space("pong"))
    service = f"mortal-{place}"
    serving = {"NSM_SERVICE_NAMES": service, "NSM_PAYLOAD": "ETHERNET"}
    first = {**serving, "NSM_CIDR_PREFIX": "172.16.7.0/24"}
    with nodes.alone("pong", f"first-{place}", **first) as doomed:
        app = nodes.client(place, f"kernel://{service}/nsm-1")
        assert addresses(client, "nsm-1") == ["172.16.7.1"]
        second = {**serving, "NSM_NAME": f"second-{place}", "NSM_CIDR_PREFIX": "172.16.8.0/24"}
        heir = nodes.bear(nodes.process("pong"), f"second-{place}", **second).ready()
        doomed.end(signal.SIGKILL)
        await until(
            lambda: client.links() and addresses(client, "nsm-1") == ["172.16.8.1"],
            f"another endpoint over {place}",
            bar=1.5,
        )
        assert await client.pings("172.16.8.0")
        await until(lambda: len(app.told) >= 3, "the client's word", bar=0.5)
        assert [one["event"] for one in app.told] == ["up", "down", "up"]
        assert [one["endpoint"] for one in app.told][::2] == [f"first-{place}", f"second-{place}"]
        assert app.end() == 0
        assert heir.end() == 0
    assert kernel_state(client, nodes.space("pong")) == before


@pytest.mark.parametrize("place", PLACES, ids=["vxlan", "veth"])
async def test_a_wire_that_nobody_refreshed_since_the_forwarders_were_killed_ends_as_any_other(
    nodes: Nodes, place: str
):
    single = nodes.space("single")
    before = kernel_state(single)
    with nodes.alone(place, "mortal", NSM_NETWORK_SERVICES="kernel://pair/nsm-1") as app:
        app.send(signal.SIGSTOP)
        for victim in ("one/forwarder", "two/forwarder"):
            nodes.now[victim].end(signal.SIGKILL)
            nodes.start(victim).ready()
        assert len(single.links()) == 1
        app.end(signal.SIGKILL)
        await until(lambda: not single.links(), f"the far end's death over {place}", bar=0.5)
    assert kernel_state(single) == before
    again = nodes.client(place, "kernel://pair/nsm-1")
    assert addresses(nodes.space(place), "nsm-1") == ["172.16.2.1"]
    assert again.end() == 0


@pytest.mark.parametrize("place", PLACES, ids=["vxlan", "veth"])
async def test_who_keeps_a_workloads_namespace_by_a_descriptor_keeps_no_wire(
    nodes: Nodes, place: str
):
    """And whose process ends while the namespace has a name keeps it, for the next one."""
    single, client = nodes.space("single"), nodes.space(place)
    before = kernel_state(single)
    named = nodes.client(place, "kernel://echo/stays", name="stays")
    named.end(signal.SIGKILL)
    with nodes.alone(place, "mortal", NSM_NETWORK_SERVICES="kernel://pair/nsm-1") as app:
        pin = os.open(f"/proc/{app.pid}/ns/net", os.O_RDONLY)
        try:
            assert len(single.links()) == 1
            app.end(signal.SIGKILL)
            await until(lambda: not single.links(), f"the far end's end over {place}", bar=5)
            inside = f"/proc/self/fd/{pin}"
            shown = subprocess.run(
                ["nsenter", f"--net={inside}", "ip", "-br", "link"],
                pass_fds=[pin], check=True, capture_output=True, text=True,
            )  # fmt: skip
            assert "nsm-1" not in shown.stdout
        finally:
            os.close(pin)
    assert kernel_state(single) == before
    again = nodes.client(place, "kernel://pair/nsm-1")
    assert addresses(client, "nsm-1") == ["172.16.2.1"]
    assert again.end() == 0
    assert client.links() == {"stays"}
    heir = nodes.client(place, "kernel://echo/stays", name="stays")
    assert heir.end() == 0
    assert client.links() == set()


async def test_a_node_that_dies_takes_its_wires_along_on_the_other_node_too(nodes: Nodes):
    """Its cable is pulled, which looks the same from there; what is on one node stays."""
    single, node, client = nodes.space("single"), nodes.space("one"), nodes.space("app")
    before = kernel_state(single)
    beside = nodes.client("near", "kernel://echo/beside", name="beside")
    app = nodes.client("app", "kernel://pair/nsm-1")
    assert addresses(client, "nsm-1") == ["172.16.2.1"]
    await known_to_answer(node)
    node.run("ip", "link", "set", "eth0", "down")
    try:
        await until(lambda: not single.links(), "the far end of a node that died", bar=5)
        assert kernel_state(single) == before
    finally:
        node.run("ip", "link", "set", "eth0", "up")
    await until(lambda: single.links() and client.links(), "the wire when the node is back", bar=5)
    await until(lambda: client.pings("172.16.2.0"), "packets", bar=1)
    assert addresses(client, "nsm-1") == ["172.16.2.1"]
    assert app.end() == 0
    assert nodes.space("near").links() == {"beside"}
    assert [one["event"] for one in beside.told] == ["up"]
    assert beside.end() == 0
    assert kernel_state(single) == before


async def test_a_node_whose_own_cable_is_out_takes_nobody_for_dead_and_has_its_wires_again(
    nodes: Nodes,
):
    """It hears nobody, for longer than any node may be silent; that is nobody's death."""
    single, switch, client = nodes.space("single"), nodes.space("lan"), nodes.space("app")
    before = kernel_state(single)
    app = nodes.client("app", "kernel://pair/nsm-1")
    wire = single.ip("link")
    await known_to_answer(nodes.space("one"))
    forwarder = nodes.now["two/forwarder"]
    since = forwarder.log_file.stat().st_size

    def said() -> list[str]:
        return [line["event"] for line in forwarder.after(since)]

    switch.run("ip", "link", "set", "p2", "down")
    began = time.monotonic()
    try:
        await until(lambda: "no far node is judged now" in said(), "the doubt", bar=1.5)
        await until(lambda: time.monotonic() - began > DEAD + 1.0, "its end", bar=6, record=False)
        assert "a node is gone" not in said()
    finally:
        switch.run("ip", "link", "set", "p2", "up")
    await until(lambda: client.pings("172.16.2.0"), "packets", bar=1.5)
    assert single.ip("link") == wire
    assert "a node is gone" not in said()
    assert app.end() == 0
    await until(lambda: kernel_state(single) == before, "its end", bar=0.5)

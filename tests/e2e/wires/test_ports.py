"""The UDP port of VXLAN is somebody else's: tunnels take another, or who has it is told."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.wires.nodes import Nodes, link
from tests.support.spaces import Space, kernel_state

HOLD = """\
import socket, sys
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("0.0.0.0", int(sys.argv[1])))
print("held", flush=True)
sys.stdin.read()
"""
ANOTHER = range(4790, 4806)  # the lowest that is free; the kernel frees one some time after its use
FIXED = {"NSM_VXLAN_PORT": "4789"}


@contextlib.contextmanager
def holder(space: Space, port: int = 4789) -> Iterator[int]:
    """A program on a node that has a UDP port; its pid."""
    command = ["ip", "netns", "exec", space.name, sys.executable, "-c", HOLD, str(port)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holding:
        assert holding.stdout
        assert holding.stdout.readline() == b"held\n"
        yield holding.pid
        holding.communicate()


@contextlib.contextmanager
def told(nodes: Nodes, name: str, **variables: str) -> Iterator[None]:
    """A node's forwarder with other settings, for the block."""
    nodes.now[name].end()
    nodes.start(name, **variables).ready()
    try:
        yield
    finally:
        nodes.now[name].end()
        nodes.start(name).ready()


def ports(*ends: tuple[Space, str]) -> set[int]:
    return {link(space, name)["linkinfo"]["info_data"]["port"] for space, name in ends}


def far(nodes: Nodes) -> tuple[Space, str]:
    (name,) = nodes.space("pong").links()
    return nodes.space("pong"), name


@pytest.mark.parametrize("taken", [["one"], ["two"], ["one", "two"]], ids="+".join)
async def test_where_a_program_has_the_port_both_nodes_take_another(nodes: Nodes, taken):
    client = nodes.space("app")
    before = kernel_state(client, nodes.space("pong"))
    with contextlib.ExitStack() as stack:
        for node in taken:
            stack.enter_context(holder(nodes.space(node)))
        app = nodes.client("app", "kernel://echo/nsm-1")
        (port,) = ports((client, "nsm-1"), far(nodes))
        assert port in ANOTHER
        assert await client.pings("172.16.1.0")
        number = link(client, "nsm-1")["ifindex"]
        for name in ("one/forwarder", "two/forwarder"):  # what stands says where
            nodes.now[name].end()
            nodes.start(name).ready()
        nodes.client("app", "kernel://echo/nsm-2").end()
        assert await client.pings("172.16.1.0")
        assert link(client, "nsm-1")["ifindex"] == number
        assert app.end() == 0
    assert kernel_state(client, nodes.space("pong")) == before


async def test_once_the_port_is_free_new_wires_have_it(nodes: Nodes):
    client = nodes.space("app")
    with holder(nodes.space("one")):
        nodes.client("app", "kernel://echo/nsm-1").end()
        (warning,) = [line for line in nodes.now["one/forwarder"].log if "another UDP port" in line]
        assert json.loads(warning)["port"] in ANOTHER
        assert "UDP port 4789" in json.loads(warning)["why"]
    app = nodes.client("app", "kernel://echo/nsm-1")
    assert ports((client, "nsm-1"), far(nodes)) == {4789}
    assert await client.pings("172.16.1.0")
    assert app.end() == 0


@pytest.mark.parametrize("node", ["one", "two"])
async def test_a_port_that_was_set_is_not_given_up_and_its_holder_is_told(nodes: Nodes, node):
    with (
        told(nodes, "one/forwarder", **FIXED),
        told(nodes, "two/forwarder", **FIXED),
        holder(nodes.space(node)) as pid,
    ):
        app = nodes.asks("app", "kernel://echo/nsm-1", NSM_PATIENCE="1s")
        assert app.ended() == 1
        said = " ".join(app.log)
        for word in ("UDP port 4789", f"(pid {pid})", "python", "NSM_VXLAN_PORT"):
            assert word in said, said
        assert "Traceback" not in said
    assert nodes.space("app").links() == set()


async def test_a_node_whose_port_was_set_and_one_that_takes_any_agree_on_it(nodes: Nodes):
    client = nodes.space("app")
    for name in ("one/forwarder", "two/forwarder"):
        with told(nodes, name, NSM_VXLAN_PORT="6789"):
            app = nodes.client("app", "kernel://echo/nsm-1")
            assert ports((client, "nsm-1"), far(nodes)) == {6789}
            assert await client.pings("172.16.1.0")
            assert app.end() == 0

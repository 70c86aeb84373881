"""A workload that may configure devices gets none that is a tunnel; the stock tools try to."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from nsm.kernel import namespaces, owner, sweep
from nsm.kernel.netlink import NameTakenError, Socket
from nsm.kernel.node import Kernel
from nsm.kernel.state import OWN, Hop, Interface, RemoteWire, VxlanTunnel
from nsm.undo import Undo
from tests.support.spaces import Space, kernel_state, workload
from tests.support.wait import until

pytestmark = pytest.mark.kernel
BELOW = owner.tunnel_name("id-1", "src")


class Nodes:
    """Two nodes with a cable; a workload on each, the near one behind a hop."""

    def __init__(self, near: Space, far: Space, client: Space, server: Space) -> None:
        self.near, self.far, self.client, self.server = near, far, client, server
        near.do("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far.name)
        for space, number in ((near, 1), (far, 2)):
            space.do("addr", "add", f"192.0.2.{number}/24", "dev", "eth0")
            space.do("link", "set", "eth0", "up")

    async def wires(self, kernel: Kernel) -> tuple[RemoteWire, RemoteWire]:
        ends = []
        for node, place, side, own in (
            (self.near, self.client, "src", 1),
            (self.far, self.server, "dst", 2),
        ):
            there = await kernel.namespace(path=place.path, name=side)
            underlay = await kernel.namespace(path=node.path, name=f"{side}'s node")
            far = 3 - own
            end = Interface(
                there,
                "nsm-1",
                mtu=1446,
                addresses=(
                    ip_interface(f"172.16.0.{own}/32"),
                    ip_interface(f"2001:db8::{own}/128"),
                ),
                routes=(
                    Hop(ip_network(f"172.16.0.{far}/32")),
                    Hop(ip_network(f"2001:db8::{far}/128")),
                ),
            )
            tunnel = VxlanTunnel(
                42, ip_address(f"192.0.2.{own}"), ip_address(f"192.0.2.{far}"), underlay
            )
            ends.append(RemoteWire("id-1", side, end, tunnel))
        return replace(ends[0], hop=True), ends[1]


@pytest.fixture
def nodes(make_space: Callable[[str], Space], client: Space, server: Space) -> Nodes:
    return Nodes(make_space("near"), make_space("far"), client, server)


async def ensured(kernel: Kernel, wire: RemoteWire) -> tuple[str, ...]:
    async with Undo() as undo:
        made = await kernel.ensure(wire, undo)
    return tuple(map(str, made.steps))


def link(space: Space, name: str) -> dict[str, object]:
    (found,) = space.ip("link", "show", name)
    return found


async def test_the_workload_has_frames_and_the_node_the_tunnel(
    kernel: Kernel, nodes: Nodes
) -> None:
    before = kernel_state(nodes.client)
    near, far = await nodes.wires(kernel)
    await ensured(kernel, near)
    await ensured(kernel, far)
    inside, below = link(nodes.client, "nsm-1"), link(nodes.near, BELOW)
    assert inside["linkinfo"]["info_kind"] == "macvlan"
    assert inside["linkinfo"]["info_data"]["mode"] == "passthru"
    assert below["linkinfo"]["info_data"]["id"] == 42
    assert inside["address"] == below["address"] == owner.mac("id-1", "src")
    assert inside["mtu"] == below["mtu"] == 1446
    assert (inside["ifalias"], below["ifalias"]) == ("nsm:id-1:src", "nsm:id-1:src:hop")
    assert int(inside["group"]) == int(below["group"]) == kernel.group
    # The node itself has nothing to say on it.
    assert [info for one in nodes.near.ip("addr", "show", BELOW) for info in one["addr_info"]] == []
    for address in ("172.16.0.2", "2001:db8::2"):
        assert await nodes.client.pings(address)
    for address in ("172.16.0.1", "2001:db8::1"):
        assert await nodes.server.pings(address)
    assert await nodes.client.pings("172.16.0.2", "-M", "do", "-s", str(1446 - 28))
    assert not await nodes.client.pings("172.16.0.2", "-M", "do", "-s", str(1446 - 27))
    assert await ensured(kernel, near) == ()
    assert await kernel.remove("id-1") == 3
    assert kernel_state(nodes.client) == before
    assert nodes.near.links() == {"eth0"}


async def test_what_a_powerful_workload_tries_reaches_no_tunnel(
    kernel: Kernel, nodes: Nodes
) -> None:
    near, far = await nodes.wires(kernel)
    await ensured(kernel, near)
    await ensured(kernel, far)
    tunnel = link(nodes.near, BELOW)["linkinfo"]
    table = nodes.near.run("bridge", "fdb", "show", "dev", BELOW).stdout
    assert "dst 192.0.2.2" in table
    for command in (
        "ip link set nsm-1 type vxlan remote 192.0.2.9",
        "ip link set nsm-1 type vxlan id 999",
        "bridge fdb add 02:00:00:00:00:99 dev nsm-1 dst 192.0.2.2 vni 999 port 9",
        "bridge fdb append 00:00:00:00:00:00 dev nsm-1 dst 192.0.2.2 vni 999",
        "bridge fdb del 00:00:00:00:00:00 dev nsm-1",
        "ip link set nsm-1 type macvlan mode bridge",
        "ip link set nsm-1 mtu 9000",
    ):
        nodes.client.run(*command.split())  # refused, or without effect on what counts
    assert link(nodes.near, BELOW)["linkinfo"] == tunnel
    assert nodes.near.run("bridge", "fdb", "show", "dev", BELOW).stdout == table
    assert link(nodes.near, BELOW)["mtu"] == 1446
    assert nodes.near.links() == {"eth0", BELOW}
    await ensured(kernel, near)
    assert await nodes.client.pings("172.16.0.2")


async def test_it_is_changed_in_place_and_mended_and_found_after_a_restart(
    kernel: Kernel, nodes: Nodes
) -> None:
    near, far = await nodes.wires(kernel)
    await ensured(kernel, near)
    await ensured(kernel, far)
    indexes = [link(nodes.client, "nsm-1")["ifindex"], link(nodes.near, BELOW)["ifindex"]]
    for mtu in (1300, 1440):
        wanted = replace(near, end=replace(near.end, mtu=mtu, mac="02:00:00:00:00:55"))
        await ensured(kernel, wanted)
        for space, name in ((nodes.client, "nsm-1"), (nodes.near, BELOW)):
            assert (link(space, name)["mtu"], link(space, name)["address"]) == (
                mtu,
                "02:00:00:00:00:55",
            )
    assert [link(nodes.client, "nsm-1")["ifindex"], link(nodes.near, BELOW)["ifindex"]] == indexes
    nodes.client.do("link", "del", "nsm-1")
    nodes.near.do("link", "set", BELOW, "down")
    assert await ensured(kernel, near) != ()
    assert await nodes.client.pings("172.16.0.2")
    nodes.near.do("link", "del", BELOW)
    assert nodes.client.links() == set()
    assert await ensured(kernel, near) != ()
    assert await nodes.client.pings("172.16.0.2")
    async with Kernel("test") as later:
        marks = {(one.mark.side, one.mark.hop) for one in await later.find() if one.mark}
        assert marks == {("src", False), ("src", True), ("dst", False)}
        assert await ensured(later, near) == ()
        assert await later.remove("id-1") == 3
    assert nodes.client.links() == set()
    assert nodes.near.links() == {"eth0"}


async def test_a_tunnel_goes_out_of_a_workload_and_back(kernel: Kernel, nodes: Nodes) -> None:
    near, far = await nodes.wires(kernel)
    await ensured(kernel, far)
    for wanted, kinds in ((False, "vxlan"), (True, "macvlan"), (False, "vxlan")):
        await ensured(kernel, replace(near, hop=wanted))
        assert link(nodes.client, "nsm-1")["linkinfo"]["info_kind"] == kinds
        assert nodes.near.links() == ({"eth0", BELOW} if wanted else {"eth0"})
        assert await nodes.client.pings("172.16.0.2")
    other = replace(near, tunnel=replace(near.tunnel, vni=44))
    await ensured(kernel, near)
    await ensured(kernel, other)
    assert link(nodes.near, BELOW)["linkinfo"]["info_data"]["id"] == 44
    assert await kernel.remove("id-1") == 3


async def test_a_refused_hop_leaves_nothing_and_a_later_failure_takes_it_back(
    kernel: Kernel, nodes: Nodes
) -> None:
    near, _ = await nodes.wires(kernel)
    before = (nodes.near.links(), kernel_state(nodes.client))
    nodes.client.do("link", "add", "nsm-1", "type", "bridge")
    with pytest.raises(NameTakenError, match="there is an interface nsm-1 in src already"):
        await ensured(kernel, near)
    nodes.client.do("link", "del", "nsm-1")
    assert (nodes.near.links(), kernel_state(nodes.client)) == before
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await kernel.ensure(near, undo)
            assert nodes.near.links() == {"eth0", BELOW}
            raise ZeroDivisionError
    assert (nodes.near.links(), kernel_state(nodes.client)) == before


async def test_a_workload_that_dies_leaves_a_tunnel_that_is_found_and_removed(
    kernel: Kernel, nodes: Nodes
) -> None:
    near, _ = await nodes.wires(kernel)
    with workload() as one:
        there = await kernel.namespace(pid=one.pid, name="mortal")
        await ensured(kernel, replace(near, end=replace(near.end, namespace=there)))
        one.kill()

        async def gone() -> bool:
            found = await kernel.find()
            return [one.mark.hop for one in found if one.mark] == [True]

        await until(gone, "the workload's device is gone and its tunnel is not", bar=0.5)
    assert await kernel.remove("id-1") == 1
    assert nodes.near.links() == {"eth0"}


async def test_a_tunnel_that_stands_on_this_node_says_so_by_the_nodes_own_number(
    make_space: Callable[[str], Space], client: Space
) -> None:
    """And no other tunnel there has that number, wherever it was made."""
    node, other = make_space("node"), make_space("other")
    to = f"netns {client.name}"
    made = "link add {} {} type vxlan id {} dstport 4789 local 127.0.0.1 remote 127.0.0.2"
    async with Kernel("test") as outside:
        there = await outside.namespace(path=node.path, name="node")

        def look() -> tuple[int, list[tuple[str, int, int | None]]]:
            with Socket.here() as own:
                fd = os.open(client.path, os.O_RDONLY)
                namespaces.number(own, fd, assign=True)
                os.close(fd)
            found = sweep.find(outside.group)
            with Socket.here() as own:
                itself = namespaces.own_number(own)
            return itself, [(one.device.name, one.place.nsid, one.device.far) for one in found]

        itself, _ = await outside.within(there, look)
        assert itself == OWN
        words = {"group": str(outside.group), "alias": "nsm:id-1:src"}
        node.do(*made.format("ours", to, 42).split())
        node.do("link", "add", "here", "type", "bridge")
        other.do(*made.format("moved", to, 43).split())
        client.do(*made.format("inside", "", 44).split())
        for space, name in (
            (client, "ours"),
            (client, "moved"),
            (client, "inside"),
            (node, "here"),
        ):
            space.do("link", "set", name, *(word for pair in words.items() for word in pair))
        await outside.within(there, look)  # that alone gives the node a number
        itself, found = await outside.within(there, look)
        assert itself != OWN
        told = {name: far for name, _, far in found}
        assert told["ours"] == itself
        assert told["moved"] not in (None, itself)
        assert told["inside"] is None
        # what is on the node is there once, though the node has a number by now
        assert [(name, nsid) for name, nsid, _ in found if name == "here"] == [("here", OWN)]


@contextlib.contextmanager
def inside(space: Space, *command: str) -> Iterator[None]:
    """A process in a namespace for the block."""
    words = ["ip", "netns", "exec", space.name, *command, "sh", "-c", "echo in; exec sleep 60"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ((), True),  # root as it is
        (("setpriv", "--bounding-set", "-net_admin"), False),
        (("setpriv", "--reuid=65534", "--clear-groups"), False),
        (("unshare", "-U", "-r"), False),  # root of a user namespace that does not own it
        (("unshare", "-U", "-r", "-n"), False),  # it is not in this namespace at all
    ],
    ids=["root", "root-without-net-admin", "nobody", "root-of-itself", "elsewhere"],
)
async def test_whoever_may_configure_devices_there_is_seen(
    kernel: Kernel, client: Space, command: tuple[str, ...], answer: bool
) -> None:
    there = await kernel.namespace(path=client.path, name="client")
    assert not await kernel.misusable(there)
    with inside(client, *command):
        assert await kernel.misusable(there) == answer
    assert not await kernel.misusable(there)


async def test_a_namespace_that_belongs_to_a_user_namespace_of_its_own_is_misusable(
    kernel: Kernel,
) -> None:
    process = await asyncio.create_subprocess_exec(
        *("unshare", "-U", "-r", "-n", "sh", "-c", "echo in; exec sleep 60"),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"in\n"
        there = await kernel.namespace(pid=process.pid, name="sandbox")
        assert await kernel.misusable(there)
    finally:
        process.kill()
        await process.wait()

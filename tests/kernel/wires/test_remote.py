"""A wire between two nodes: one VXLAN device on each, its socket left in the underlay."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from nsm.errors import PreconditionError, TakenError
from nsm.kernel.netlink import VniTakenError
from nsm.kernel.node import Kernel
from nsm.kernel.state import Hop, Interface, LocalWire, RemoteWire, VxlanTunnel
from nsm.undo import Undo
from tests.support.spaces import Space, ip, kernel_state

pytestmark = pytest.mark.kernel


@dataclass(frozen=True)
class Nodes:
    """Two underlay namespaces with a cable between them, and a workload on each."""

    near: Space
    far: Space
    client: Space
    server: Space


@pytest.fixture
def nodes(make_space: Callable[[str], Space], client: Space, server: Space) -> Nodes:
    near, far = make_space("near"), make_space("far")
    near.do("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far.name)
    for space, number in ((near, 1), (far, 2)):
        space.do("addr", "add", f"192.0.2.{number}/24", "dev", "eth0")
        space.do("addr", "add", f"2001:db8:ffff::{number}/64", "dev", "eth0", "nodad")
        space.do("link", "set", "eth0", "up")
    return Nodes(near, far, client, server)


async def halves(kernel: Kernel, nodes: Nodes, *, six: bool = False, vni: int = 42):
    near = await kernel.namespace(path=nodes.near.path, name="near")
    far = await kernel.namespace(path=nodes.far.path, name="far")
    client = await kernel.namespace(path=nodes.client.path, name="client")
    server = await kernel.namespace(path=nodes.server.path, name="server")
    here, there = (ip_address(f"2001:db8:ffff::{n}" if six else f"192.0.2.{n}") for n in (1, 2))
    mtu = 1500 - (74 if six else 54)
    return (
        RemoteWire(
            "id-1",
            "src",
            Interface(
                client,
                "nsm-1",
                mtu=mtu,
                addresses=(ip_interface("172.16.0.1/32"), ip_interface("2001:db8::1/128")),
                routes=(Hop(ip_network("172.16.0.0/32")), Hop(ip_network("2001:db8::/128"))),
            ),
            VxlanTunnel(vni, here, there, near),
        ),
        RemoteWire(
            "id-1",
            "dst",
            Interface(
                server,
                "nsm-1",
                mtu=mtu,
                addresses=(ip_interface("172.16.0.0/32"), ip_interface("2001:db8::/128")),
                routes=(Hop(ip_network("172.16.0.1/32")), Hop(ip_network("2001:db8::1/128"))),
            ),
            VxlanTunnel(vni, there, here, far),
        ),
    )


async def ensured(kernel: Kernel, wire: RemoteWire | LocalWire) -> tuple[str, ...]:
    async with Undo() as undo:
        made = await kernel.ensure(wire, undo)
    return tuple(map(str, made.steps))


@pytest.mark.parametrize("six", [False, True], ids=["over-ipv4", "over-ipv6"])
async def test_packets_flow_both_ways_and_a_full_one_fits(
    kernel: Kernel, nodes: Nodes, six: bool
) -> None:
    left, right = await halves(kernel, nodes, six=six)
    await ensured(kernel, left)
    await ensured(kernel, right)
    assert await nodes.client.pings("172.16.0.0")
    assert await nodes.server.pings("172.16.0.1")
    assert await nodes.client.pings("2001:db8::")
    full = left.end.mtu - 28
    assert await nodes.client.pings("172.16.0.0", "-M", "do", "-s", str(full))
    assert not await nodes.client.pings("172.16.0.0", "-M", "do", "-s", str(full + 1))
    (link,) = nodes.client.ip("link", "show", "nsm-1")
    data = link["linkinfo"]["info_data"]
    assert (data["id"], data["port"], data["learning"]) == (42, 4789, False)
    sockets = nodes.near.run("ss", "-Hlun").stdout
    assert ":4789" in sockets
    assert ":4789" not in nodes.client.run("ss", "-Hlun").stdout
    assert nodes.near.links() == {"eth0"}
    for wire in (left, right):
        assert await ensured(kernel, wire) == ()


async def test_a_moved_far_end_is_followed_in_place_and_another_vni_makes_a_new_device(
    kernel: Kernel, nodes: Nodes
) -> None:
    left, right = await halves(kernel, nodes)
    nodes.far.do("addr", "add", "192.0.2.3/24", "dev", "eth0")
    await ensured(kernel, left)
    await ensured(kernel, right)
    index = nodes.client.ip("link", "show", "nsm-1")[0]["ifindex"]
    moved = replace(left, tunnel=replace(left.tunnel, remote=ip_address("192.0.2.3")))
    assert await ensured(kernel, moved) == (
        "ip link set nsm-1 type vxlan local 192.0.2.1 remote 192.0.2.3",
    )
    back = replace(right, tunnel=replace(right.tunnel, local=ip_address("192.0.2.3")))
    await ensured(kernel, back)
    assert await nodes.client.pings("172.16.0.0")
    for half in (moved, back):
        await ensured(kernel, replace(half, tunnel=replace(half.tunnel, vni=44)))
    assert nodes.client.ip("link", "show", "nsm-1")[0]["ifindex"] == index
    assert nodes.client.ip("link", "show", "nsm-1")[0]["linkinfo"]["info_data"]["id"] == 44
    assert await nodes.client.pings("172.16.0.0")


async def test_behind_a_moved_far_end_the_same_address_is_another_device_at_once(
    kernel: Kernel, nodes: Nodes
) -> None:
    """The kernel believes a neighbour it has heard of for a minute: no ARP, no packet."""
    left, right = await halves(kernel, nodes)
    nodes.far.do("addr", "add", "192.0.2.3/24", "dev", "eth0")
    await ensured(kernel, left)
    await ensured(kernel, right)
    assert await nodes.client.pings("172.16.0.0")
    assert await nodes.client.pings("2001:db8::")
    somebodys = ("172.16.0.9", "lladdr", "02:00:00:00:00:09")
    nodes.client.do("neigh", "add", *somebodys, "dev", "nsm-1")
    back = replace(right, tunnel=replace(right.tunnel, local=ip_address("192.0.2.3")))
    await ensured(kernel, back)
    nodes.server.do("link", "set", "nsm-1", "address", "02:00:00:00:00:03")
    moved = replace(left, tunnel=replace(left.tunnel, remote=ip_address("192.0.2.3")))
    await ensured(kernel, moved)
    assert await nodes.client.pings("172.16.0.0")
    assert await nodes.client.pings("2001:db8::")
    assert "172.16.0.9" in str(nodes.client.ip("neigh", "show", "dev", "nsm-1"))


async def test_a_wire_may_change_from_remote_to_local(kernel: Kernel, nodes: Nodes) -> None:
    left, right = await halves(kernel, nodes)
    await ensured(kernel, left)
    local = LocalWire("id-1", left.end, right.end)
    await ensured(kernel, local)
    assert await nodes.client.pings("172.16.0.0")
    await ensured(kernel, left)
    await ensured(kernel, right)
    assert await nodes.client.pings("172.16.0.0")


async def test_a_vni_in_use_is_said_beforehand_and_refused_clearly_and_leaves_nothing(
    kernel: Kernel, nodes: Nodes
) -> None:
    left, _ = await halves(kernel, nodes)
    here, there, near = left.tunnel.local, left.tunnel.remote, left.tunnel.underlay
    assert await kernel.vni_free(42, here, there, underlay=near)
    await ensured(kernel, left)
    assert not await kernel.vni_free(42, here, there, underlay=near)
    assert await kernel.vni_free(42, here, there, underlay=near, port=4790)
    assert await kernel.vni_free(44, here, there, underlay=near)
    server = await kernel.namespace(path=nodes.server.path, name="server")
    other = replace(left, connection="id-2", end=replace(left.end, namespace=server))
    before = (nodes.near.links(), kernel_state(nodes.client, nodes.server))
    with pytest.raises(VniTakenError) as refused:
        await ensured(kernel, other)
    assert str(refused.value) == "VNI 42 is in use on UDP port 4789 in near; agree on another VNI"
    assert (nodes.near.links(), kernel_state(nodes.client, nodes.server)) == before
    async with Undo() as undo:  # agreeing on another one happens within one attempt
        taken = replace(other, end=replace(other.end, policies=()))
        with pytest.raises(VniTakenError):
            await kernel.ensure(taken, undo)
        assert (nodes.near.links(), kernel_state(nodes.client, nodes.server)) == before
        agreed = replace(taken, tunnel=replace(taken.tunnel, vni=46))
        await kernel.ensure(agreed, undo)
    assert nodes.server.links() == {"nsm-1"}
    nodes.near.do(
        *("link", "add", "vx", "type", "vxlan", "id", "77", "dstport", "4789"),
        *("local", "192.0.2.1", "remote", "192.0.2.2"),
    )
    assert not await kernel.vni_free(77, here, there, underlay=near)


async def test_a_udp_port_held_by_a_program_is_named(kernel: Kernel, nodes: Nodes) -> None:
    left, _ = await halves(kernel, nodes)

    def hold():
        import socket

        held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.bind(("0.0.0.0", 4789))
        return held

    with await kernel.within(left.tunnel.underlay, hold):
        before = (nodes.near.links(), kernel_state(nodes.client))
        with pytest.raises(TakenError, match=r"UDP port 4789 in near is held by \S+ \(pid \d+\)"):
            await ensured(kernel, left)
        assert (nodes.near.links(), kernel_state(nodes.client)) == before


async def test_the_underlay_tells_its_address_and_mtu(kernel: Kernel, nodes: Nodes) -> None:
    near = await kernel.namespace(path=nodes.near.path, name="near")
    nodes.near.do("link", "set", "eth0", "mtu", "1400")
    way = await kernel.way_to(ip_address("192.0.2.2"), underlay=near)
    assert (str(way.source), way.device, way.mtu) == ("192.0.2.1", "eth0", 1400)
    way = await kernel.way_to(ip_address("2001:db8:ffff::2"), underlay=near)
    assert (str(way.source), way.mtu) == ("2001:db8:ffff::1", 1400)
    for own in ("192.0.2.1", "2001:db8:ffff::1"):  # of the device, and not of the loopback
        way = await kernel.way_to(ip_address(own), underlay=near)
        assert (str(way.source), way.device, way.mtu) == (own, "eth0", 1400)
    with pytest.raises(PreconditionError, match="no route leads there"):
        await kernel.way_to(ip_address("198.51.100.1"), underlay=near)
    with pytest.raises(PreconditionError, match="no default route of IPv4"):
        await kernel.default_address(underlay=near)
    nodes.near.do("route", "add", "default", "via", "192.0.2.2")
    assert str(await kernel.default_address(underlay=near)) == "192.0.2.1"
    assert str((await kernel.way_to(ip_address("198.51.100.1"), underlay=near)).source) == (
        "192.0.2.1"
    )


async def test_the_underlay_tells_its_gateway_and_whether_its_cable_is_in(
    kernel: Kernel, nodes: Nodes
) -> None:
    near = await kernel.namespace(path=nodes.near.path, name="near")
    far, beyond = ip_address("192.0.2.2"), ip_address("198.51.100.1")
    assert await kernel.gateway(far, underlay=near) is None
    with pytest.raises(PreconditionError, match="no route leads there"):
        await kernel.gateway(beyond, underlay=near)
    nodes.near.do("route", "add", "default", "via", "192.0.2.9")
    assert str(await kernel.gateway(far, underlay=near)) == "192.0.2.9", "on the same device"
    nodes.near.do("route", "add", "198.51.100.0/24", "via", "192.0.2.8")
    assert str(await kernel.gateway(beyond, underlay=near)) == "192.0.2.8"
    assert await kernel.gateway(ip_address("2001:db8:ffff::2"), underlay=near) is None
    assert (await kernel.way_to(far, underlay=near)).carrier
    nodes.far.do("link", "set", "eth0", "down")
    assert not (await kernel.way_to(far, underlay=near)).carrier


async def test_our_own_underlay_tells_what_stock_ip_tells(kernel: Kernel) -> None:
    routes = [route for route in ip("route") if route["dst"] == "default"]
    if not routes:
        pytest.skip("this machine has no default route")
    assert str(await kernel.default_address()) in str(ip("addr", "show", routes[0]["dev"]))

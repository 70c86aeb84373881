"""Somebody else manages links: renames, takes down, empties and deletes what is ours.

NetworkManager, networkd and udev do so on purpose, people by mistake. The mesh runs on
meanwhile, and with the next refresh all is as it was asked for.
"""

import os
import subprocess

import pytest

from tests.e2e.wires.conftest import LAB
from tests.e2e.wires.nodes import Nodes, addresses, link
from tests.e2e.wires.test_refresh import SHORT, requests
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until

PACKETS = """\
  packets:
    payload: ip
    endpoints:
      wg: {on: two, prefixes: [172.16.3.0/24]}
clients:
"""
MEDDLING = {
    "down": "link set {} down",
    "rename": "link set {0} down name x-{0}",
    "delete": "link del {}",
    "addresses": "addr flush dev {}",
    "routes": "route flush dev {}",
    "mtu": "link set {} mtu 1280",
    "mac": "link set {} address 02:00:00:00:00:77",
    "alias": "link set {} alias mine",
}
MANAGERS = {"near": "two/nsmgr", "app": "one/nsmgr"}
KINDS = {  # by mechanism: whose wire, to which service, and the far end's address
    "veth": ("near", "echo", "172.16.1.0"),
    "vxlan": ("app", "echo", "172.16.1.0"),
    "wireguard": ("app", "packets", "172.16.3.0"),
}


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB.replace("clients:\n", PACKETS)


def shape(client: Space, name: str) -> object:
    """What a workload is promised of its interface, and whose that says it is; None without one."""
    if name not in client.links():
        return None
    try:
        found = link(client, name)
        routes = client.ip("route", "show", "dev", name)
    except subprocess.CalledProcessError:  # it is being made, or put right, at this moment
        return None
    ways = [(way["dst"], way.get("gateway")) for way in routes]
    said = found.get("address"), found.get("ifalias"), found["group"], found["mtu"]
    return "UP" in found["flags"], *said, addresses(client, name), sorted(ways)


@pytest.mark.parametrize("kind", KINDS)
async def test_what_somebody_does_to_a_wire_is_undone_by_the_next_refresh(nodes: Nodes, kind):
    place, service, _ = KINDS[kind]
    client = nodes.space(place)
    before = kernel_state(client)
    app = nodes.client(place, *(f"kernel://{service}/w-{what}" for what in MEDDLING), **SHORT)

    def shapes() -> dict[str, object]:
        return {what: shape(client, f"w-{what}") for what in MEDDLING}

    def numbers() -> dict[str, int]:
        return {what: link(client, f"w-{what}")["ifindex"] for what in MEDDLING}

    promised, numbered = shapes(), numbers()
    for what, order in MEDDLING.items():
        client.run("ip", *order.format(f"w-{what}").split())
    await until(lambda: shapes() == promised, "all is again as promised", bar=2)
    assert {what for what, number in numbers().items() if number != numbered[what]} == {"delete"}
    assert len(client.links()) == len(MEDDLING)
    assert app.end() == 0
    assert kernel_state(client) == before


# Told to end, it lets the order under way come to its end: nobody meddles once it is gone.
MEDDLER = """
trap exit TERM
while :; do
    for order in "$@"; do
        ip -n $NAMESPACE $order 2>/dev/null
    done
done
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
async def test_a_manager_of_links_that_does_not_rest_harms_nobody_and_leaves_nothing(
    nodes: Nodes, kind
):
    place, service, far = KINDS[kind]
    client = nodes.space(place)
    before = kernel_state(client)
    app = nodes.client(place, f"kernel://{service}/nsm-1", **SHORT)
    promised, granted = shape(client, "nsm-1"), requests(nodes, MANAGERS[place])
    orders = [order.format("nsm-1") for order in MEDDLING.values()]
    with subprocess.Popen(
        ["sh", "-c", MEDDLER, "sh", *orders], env={**os.environ, "NAMESPACE": client.name}
    ) as meddling:
        try:
            asked = lambda: requests(nodes, MANAGERS[place]) >= granted + 4  # noqa: E731
            await until(asked, "four refreshes beside a manager of links", bar=6)
        finally:
            meddling.terminate()
    await until(lambda: shape(client, "nsm-1") == promised, "peace", bar=2)
    assert await client.pings(far)
    assert app.end() == 0
    assert kernel_state(client) == before


async def test_a_tunnel_that_stands_on_the_node_is_put_right_as_well(nodes: Nodes):
    client, node = nodes.space("app"), nodes.space("one")
    before = kernel_state(client, node)
    app = nodes.client("app", "kernel://echo/nsm-1", privileged=True, **SHORT)
    (tunnel,) = node.links() - {"eth0"}
    stood = shape(node, tunnel)
    for order in ("link set {} down", "link set {} down name eth7", "link set {} mtu 1280"):
        node.do(*order.format(tunnel).split())
        await until(lambda: shape(node, tunnel) == stood, "the tunnel is as it was", bar=2)
    node.do("link", "del", tunnel)  # and the workload's device goes with it
    await until(lambda: shape(node, tunnel) == stood, "the tunnel is there again", bar=2)
    await until(lambda: client.links() == {"nsm-1"}, "the workload's device, too", bar=2)
    assert await client.pings("172.16.1.0")
    assert app.end() == 0
    assert kernel_state(client, node) == before


async def test_udev_leaves_every_mac_alone_because_each_was_given(nodes: Nodes):
    """MACAddressPolicy=persistent rewrites those that the kernel drew."""
    app = nodes.client("app", "kernel://echo/nsm-1", "kernel://packets/nsm-2", **SHORT)
    near = nodes.client("near", "kernel://echo/nsm-1", **SHORT)
    for place in nodes.lab.places:
        space = nodes.space(place)
        for device in space.ip("link"):
            if device["link_type"] == "ether":
                path = f"/sys/class/net/{device['ifname']}/addr_assign_type"
                said = space.run("cat", path).stdout.strip()
                assert said == "3", f"{device['ifname']} in {place}: {said} is not NET_ADDR_SET"
    assert (app.end(), near.end()) == (0, 0)

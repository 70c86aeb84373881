"""WireGuard by the kernel, where the line is bad: what our wires make of losses and delays."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from nsm.kernel.keys import Key
from nsm.kernel.node import Kernel
from nsm.kernel.state import Hop, Interface, RemoteWire, WireguardTunnel
from nsm.undo import Undo
from tests.support.spaces import Space, space
from tests.support.wait import write

ITS_OWN = 5.0  # seconds after which WireGuard itself says again what was lost
Places = dict[str, Space]


@pytest.fixture
def places() -> Iterator[Places]:
    """Two underlays with a cable between them, and a workload at each."""
    with ExitStack() as stack:
        made = {
            name: stack.enter_context(space(name)) for name in ("near", "far", "client", "server")
        }
        near, far = made["near"], made["far"]
        near.do("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", far.name)
        for number, end in enumerate((near, far), 1):
            end.do("address", "add", f"192.0.2.{number}/24", "dev", "eth0")
            end.do("link", "set", "eth0", "up")
        yield made


def disturb(places: Places, *how: str) -> None:
    """What leaves either end, so that an answer suffers as its question does."""
    for end in (places["near"], places["far"]):
        done = end.run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", *how)
        assert done.returncode == 0, done.stderr


async def halves(kernel: Kernel, places: Places, number: int) -> tuple[RemoteWire, RemoteWire]:
    """Both ends of a wire: the one that speaks first, and the one that is spoken to."""
    keys = Key.generate(), Key.generate()
    made = []
    for here, (side, under, at) in enumerate((("src", "near", "client"), ("dst", "far", "server"))):
        workload = await kernel.namespace(path=places[at].path, name=at)
        underlay = await kernel.namespace(path=places[under].path, name=under)
        ours, theirs = f"10.{number}.0.{here + 1}", f"10.{number}.0.{2 - here}"
        tunnel = WireguardTunnel(
            keys[here], keys[1 - here].public, ip_address(f"192.0.2.{here + 1}"),
            ip_address(f"192.0.2.{2 - here}"), 51820 + number, underlay, 51820 + number, "kernel",
            keepalive=0 if here else 25,
        )  # fmt: skip
        interface = Interface(
            workload, f"nsm-{number}", mtu=1420, addresses=(ip_interface(f"{ours}/32"),),
            routes=(Hop(ip_network(f"{theirs}/32")),),
        )  # fmt: skip
        made.append(RemoteWire(f"id-{number}", side, interface, tunnel))
    return made[0], made[1]


async def bring_up(kernel: Kernel, places: Places, number: int) -> float:
    """A wire, as forwarders make it; how many seconds its handshake took."""
    first, second = await halves(kernel, places, number)
    for half in (second, first):
        async with Undo() as undo:
            await kernel.ensure(half, undo)
    start = time.monotonic()
    await kernel.handshake(first, 30.0)
    return time.monotonic() - start


@pytest.mark.needs_kernel("wireguard", "netem")
async def test_a_line_that_is_longer_than_our_pauses_is_no_bad_line(places: Places) -> None:
    """What is said again too early makes void what was under way: pauses must grow."""
    disturb(places, "delay", "200ms")
    async with Kernel("test") as kernel:
        took = [await bring_up(kernel, places, number) for number in range(5)]
    for seconds in took:
        write("a handshake where 400 ms pass", seconds, 2.0)
    assert min(took) > 0.4
    assert max(took) < ITS_OWN / 2
    assert await places["client"].pings("10.0.0.2")

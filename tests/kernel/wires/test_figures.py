"""What a wire costs, against one raw netlink batch of the same messages in the same run."""

import os
import statistics
import struct
import time
from ipaddress import ip_interface

import pytest

from nsm.kernel import messages, owner
from nsm.kernel.ensure import Journal, Reach, ensure
from nsm.kernel.namespaces import Home
from nsm.kernel.node import Kernel
from nsm.kernel.state import Address, End, Hop, Interface, LocalWire, Namespace, Neighbour, Route
from nsm.undo import Undo
from tests.support.spaces import Space
from tests.support.wait import write

pytestmark = pytest.mark.kernel

ROUNDS = 60
BAR = 2.0


def wire(client: Namespace, server: Namespace, n: int) -> LocalWire:
    """What upstream asks for: a /32 and a route and a neighbour on each side."""
    near, far = (ip_interface(f"10.{n}.0.{side}/32") for side in (1, 2))
    id_ = f"0e2f9f4c-0000-4000-8000-{n:012}"
    return LocalWire(
        id_,
        Interface(
            client,
            f"c-{n}",
            addresses=(near,),
            routes=(Hop(far.network),),
            neighbours=((far.ip, owner.mac(id_, "dst")),),
        ),
        Interface(
            server,
            f"s-{n}",
            addresses=(far,),
            routes=(Hop(near.network),),
            neighbours=((near.ip, owner.mac(id_, "src")),),
        ),
    )


class Raw:
    """The same messages, built beforehand, and nothing else: two sockets, a batch each."""

    def __init__(self, home: Home, spaces: tuple[Space, Space], wanted: LocalWire) -> None:
        self.home = home
        self.spaces = spaces
        ends, self.batches = [], []
        for side, interface in wanted.sides:
            mark = str(owner.mark(wanted.connection, side))
            mac = owner.mac(wanted.connection, side)
            where = interface.namespace
            ends.append(End(where, interface.name, mac, 1500, owner.group("raw"), mark))
        indexes = [messages.fresh_index() for _ in ends]
        for end, (_, asked), index in zip(ends, wanted.sides, indexes, strict=True):
            where, link = end.namespace, end.name
            batch = [messages.set_link(index, None, end)]
            batch += [
                messages.address("add", Address(where, link, cidr), index)
                for cidr in asked.addresses
            ]
            batch += [
                messages.route("add", Route(where, link, hop.to), index) for hop in asked.routes
            ]
            batch += [
                messages.neighbour("add", Neighbour(where, link, ip, mac), index)
                for ip, mac in asked.neighbours
            ]
            self.batches.append([m for m in batch if m is not None])
        self.create = messages.create_veth(ends[0], indexes[0], ends[1], indexes[1], 0)
        self.far_fd = self.create.rindex(struct.pack("=HHI", 8, 28, 0)) + 4

    def run(self) -> float:
        start = time.perf_counter()
        a, b = (os.open(space.path, os.O_RDONLY) for space in self.spaces)
        struct.pack_into("=I", self.create, self.far_fd, b)
        with self.home.socket(a) as near, self.home.socket(b) as far:
            assert near.do([self.create, *self.batches[0]]) == [None] * (1 + len(self.batches[0]))
            assert far.do(self.batches[1]) == [None] * len(self.batches[1])
        os.close(a)
        os.close(b)
        return time.perf_counter() - start


async def test_programming_a_wire_costs_at_most_twice_its_raw_netlink_batch(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    times: dict[str, list[float]] = {"raw": [], "ensure": [], "awaited": [], "refresh": []}
    with Home() as home:
        for n in range(ROUNDS):
            raw = Raw(home, (client, server), wire(here, there, 200))
            times["raw"].append(raw.run())
            client.do("link", "del", "c-200")

            fds = {here: os.open(client.path, os.O_PATH), there: os.open(server.path, os.O_PATH)}
            wanted = wire(here, there, n % 200)
            start = time.perf_counter()
            with Reach(home, fds) as reach:
                ensure(reach, wanted, kernel.group, Journal())
            times["ensure"].append(time.perf_counter() - start)
            await kernel.remove(wanted.connection)

            start = time.perf_counter()
            async with Undo() as undo:
                await kernel.ensure(wanted, undo, fds=fds)
            times["awaited"].append(time.perf_counter() - start)
            start = time.perf_counter()
            async with Undo() as undo:
                assert not (await kernel.ensure(wanted, undo, fds=fds)).steps
            times["refresh"].append(time.perf_counter() - start)
            await kernel.remove(wanted.connection)
            for fd in fds.values():
                os.close(fd)
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratio = middle["ensure"] / middle["raw"]
    print(
        " ".join(f"{name} {value * 1e6:.0f} us" for name, value in middle.items()),
        f"ensure/raw {ratio:.2f} awaited/raw {middle['awaited'] / middle['raw']:.2f}",
    )
    write("kernel programming of one wire / its raw netlink batch", ratio, BAR)
    write("the same awaited from the loop", middle["awaited"] / middle["raw"], BAR)
    assert ratio < 10 * BAR


async def test_a_thousand_wires_beside_it_do_not_slow_a_wire(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")

    async def median(first: int) -> float:
        taken = []
        for n in range(first, first + 40):
            wanted = wire(here, there, n % 250)
            start = time.perf_counter()
            async with Undo() as undo:
                await kernel.ensure(wanted, undo)
            taken.append(time.perf_counter() - start)
        for n in range(first, first + 40):
            await kernel.remove(wire(here, there, n % 250).connection)
        return statistics.median(taken)

    few = await median(0)
    async with Undo() as undo:
        for n in range(1000):
            other = Interface(here, f"o{n}", ping=False), Interface(there, f"o{n}", ping=False)
            await kernel.ensure(LocalWire(f"other-{n}", *other), undo)
    many = await median(0)
    print(f"10 wires {few * 1e6:.0f} us, 1000 wires {many * 1e6:.0f} us: {many / few:.2f}")
    write("a wire with 1000 beside it / alone", many / few, 1.2)
    await kernel.remove_all()
    assert many / few < 12

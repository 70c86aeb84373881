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
from nsm.kernel.netlink import Socket
from nsm.kernel.node import Kernel
from nsm.kernel.state import Address, End, Hop, Interface, LocalWire, Namespace, Neighbour, Route
from nsm.undo import Undo
from tests.support.spaces import Space
from tests.support.wait import until, write

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
        self.index = indexes[0]
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


def index_of(own: Socket, space: Namespace, name: str) -> int:
    return messages.device(own.ask(messages.get_link(name=name, nsid=space.nsid))).index


def settled(*spaces: Space) -> bool:
    return not any(
        info.get("tentative")
        for space in spaces
        for link in space.ip("addr")
        for info in link["addr_info"]
    )


class Measured:
    """Raw batches and ensures by turns, in the same thread, with nothing else between them."""

    def __init__(self, kernel: Kernel, home: Home, spaces: tuple[Space, Space]) -> None:
        self.kernel = kernel
        self.home = home
        self.spaces = spaces
        self.raw: list[float] = []
        self.ensure: list[float] = []

    def turn(self, here: Namespace, there: Namespace, n: int) -> None:
        raw = Raw(self.home, self.spaces, wire(here, there, 200))
        wanted = wire(here, there, n)
        fds = {
            space: os.open(path.path, os.O_PATH)
            for space, path in zip((here, there), self.spaces, strict=True)
        }
        for which in ("raw", "ensure") if n % 2 else ("ensure", "raw"):
            if which == "raw":
                self.raw.append(raw.run())
            else:
                start = time.perf_counter()
                with Reach(self.home, fds) as reach:
                    ensure(reach, wanted, self.kernel.group, Journal())
                self.ensure.append(time.perf_counter() - start)
        # to its very end: `Kernel.remove` answers while the kernel still tidies up
        with Socket.here() as own:
            for index in (raw.index, index_of(own, here, wanted.src.name)):
                assert own.do([messages.delete_link(index, here.nsid)]) == [None]
        for fd in fds.values():
            os.close(fd)

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.raw), statistics.median(self.ensure)


async def test_programming_a_wire_costs_at_most_twice_its_raw_netlink_batch(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    awaited, refresh = [], []
    with Home() as home:
        measured = Measured(kernel, home, (client, server))
        for n in range(ROUNDS):
            measured.turn(here, there, n)
    fds = {here: os.open(client.path, os.O_PATH), there: os.open(server.path, os.O_PATH)}
    for n in range(ROUNDS):
        wanted = wire(here, there, n)
        start = time.perf_counter()
        async with Undo() as undo:
            await kernel.ensure(wanted, undo, fds=fds)
        awaited.append(time.perf_counter() - start)
        start = time.perf_counter()
        async with Undo() as undo:
            assert not (await kernel.ensure(wanted, undo, fds=fds)).steps
        refresh.append(time.perf_counter() - start)
        await kernel.remove(wanted.connection)
    for fd in fds.values():
        os.close(fd)
    raw, ours = measured.medians
    from_loop = statistics.median(awaited)
    print(
        f"raw {raw * 1e6:.0f} us, ensure {ours * 1e6:.0f} us, awaited {from_loop * 1e6:.0f} us,"
        f" refresh {statistics.median(refresh) * 1e6:.0f} us: ensure/raw {ours / raw:.2f},"
        f" awaited/raw {from_loop / raw:.2f}"
    )
    write("kernel programming of one wire / its raw netlink batch", ours / raw, BAR)
    write("the same awaited from the loop / its raw netlink batch", from_loop / raw, BAR)
    assert ours / raw < 10 * BAR


async def test_a_thousand_wires_beside_it_do_not_slow_a_wire(
    kernel: Kernel, client: Space, server: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    medians = []
    with Home() as home:
        for present in (10, 1000):
            async with Undo() as undo:
                for n in range(present):
                    near, far = (
                        Interface(
                            space,
                            f"o{n}",
                            addresses=(ip_interface(f"10.{220 + n // 250}.{n % 250}.{side}/32"),),
                            ping=False,
                        )
                        for side, space in ((1, here), (2, there))
                    )
                    await kernel.ensure(LocalWire(f"other-{n}", near, far), undo)
            # until then the kernel works on the link-local addresses, and holds the same lock
            await until(lambda: settled(client, server), f"{present} wires at rest", bar=5)
            measured = Measured(kernel, home, (client, server))
            for n in range(ROUNDS):
                measured.turn(here, there, n)
            medians.append(measured.medians)
    (raw_few, few), (raw_many, many) = medians
    print(
        f"with 10: {few * 1e6:.0f} us (raw {raw_few * 1e6:.0f}), with 1000: {many * 1e6:.0f} us"
        f" (raw {raw_many * 1e6:.0f}): {many / few:.2f}, the kernel's own {raw_many / raw_few:.2f}"
    )
    # bringing a device up makes the kernel walk the namespace's IPv6 routes, whoever asks
    growth = (many / few) / (raw_many / raw_few)
    write("a wire with 1000 beside it / with 10, over the kernel's own growth", growth, 1.2)
    await kernel.remove_all()
    assert growth < 12

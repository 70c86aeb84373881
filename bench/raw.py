"""One veth wire as one raw netlink batch a side, beside one as we make it.

The batch is the floor of programming a wire: the same messages, built
beforehand. What is timed of it is the kernel and the way there, and nothing of
how anybody decides.
"""

import os
import statistics
import struct
import time
from ipaddress import ip_interface

from nsm.kernel import messages, owner
from nsm.kernel.ensure import Journal, ensure
from nsm.kernel.namespaces import Home
from nsm.kernel.netlink import Socket
from nsm.kernel.reach import Reach
from nsm.kernel.state import Address, End, Hop, Interface, LocalWire, Namespace, Neighbour, Route


def wire(client: Namespace, server: Namespace, n: int) -> LocalWire:
    """A wire as endpoints ask for it: a /32, a route and a neighbour on each side."""
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
    """wanted as prepared messages, between the namespaces at two paths."""

    def __init__(self, home: Home, paths: tuple[str, str], wanted: LocalWire) -> None:
        self._home = home
        self._paths = paths
        ends: list[End] = []
        self._batches: list[list[bytearray]] = []
        for side, interface in wanted.sides:
            mark = str(owner.mark(wanted.connection, side))
            mac = owner.mac(wanted.connection, side)
            group = owner.group("raw")
            ends.append(End(interface.namespace, interface.name, mac, 1500, group, mark))
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
            self._batches.append([message for message in batch if message is not None])
        self._create = messages.create_veth(ends[0], indexes[0], ends[1], indexes[1], 0)
        self._far_fd = self._create.rindex(struct.pack("=HHI", 8, 28, 0)) + 4

    def run(self) -> float:
        """Make the wire; how many seconds that took. RuntimeError if the kernel refused."""
        start = time.perf_counter()
        near_fd, far_fd = (os.open(path, os.O_RDONLY) for path in self._paths)
        struct.pack_into("=I", self._create, self._far_fd, far_fd)
        with self._home.socket(near_fd) as near, self._home.socket(far_fd) as far:
            refused = [*near.do([self._create, *self._batches[0]]), *far.do(self._batches[1])]
        os.close(near_fd)
        os.close(far_fd)
        if any(refused):
            raise RuntimeError(f"the raw batch was refused: {refused}")
        return time.perf_counter() - start


class Measured:
    """Raw batches and ensures by turns, in the same thread, with nothing else between them."""

    def __init__(self, group: int, home: Home, paths: tuple[str, str]) -> None:
        self._group = group
        self._home = home
        self._paths = paths
        self._raw: list[float] = []
        self._ensure: list[float] = []

    def turn(self, here: Namespace, there: Namespace, n: int) -> None:
        """Make one wire either way, and take both away to the very end."""
        raw = Raw(self._home, self._paths, wire(here, there, 200))
        wanted = wire(here, there, n)
        fds = {
            space: os.open(path, os.O_PATH)
            for space, path in zip((here, there), self._paths, strict=True)
        }
        for which in ("raw", "ensure") if n % 2 else ("ensure", "raw"):
            if which == "raw":
                self._raw.append(raw.run())
            else:
                start = time.perf_counter()
                with Reach(self._home, fds) as reach:
                    ensure(reach, wanted, self._group, Journal())
                self._ensure.append(time.perf_counter() - start)
        # not `Kernel.remove`, which answers while the kernel still tidies up
        with Socket.here() as own:
            for index in (raw.index, _index_of(own, here, wanted.src.name)):
                own.do([messages.delete_link(index, here.nsid)])
        for fd in fds.values():
            os.close(fd)

    @property
    def medians(self) -> tuple[float, float]:
        """Seconds of a raw batch, and of an ensure."""
        return statistics.median(self._raw), statistics.median(self._ensure)


def _index_of(own: Socket, space: Namespace, name: str) -> int:
    return messages.device(own.ask(messages.get_link(name=name, nsid=space.nsid))).index

"""One wire as raw netlink batches, beside one as we make and close it.

The batches are the floor of programming a wire: the same messages, built beforehand. What is
timed of them is the kernel and the way there, and nothing of how anybody decides. The floor
of closing is one message: delete, and how long it takes until the devices are not there.
"""

import asyncio
import base64
import os
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_interface
from typing import Final

from bench.wires import UNDERLAY, Kind, Stage, shell
from nsm.kernel import messages, netlink, owner, wireguard, wireguard_netlink
from nsm.kernel.ensure import Journal, ensure
from nsm.kernel.keys import Key
from nsm.kernel.namespaces import Home
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.node import Kernel
from nsm.kernel.reach import Reach
from nsm.kernel.state import (
    Address,
    EngineName,
    Hop,
    Interface,
    LocalWire,
    Namespace,
    Neighbour,
    RemoteWire,
    Route,
    Veth,
    Vxlan,
    VxlanTunnel,
    Wire,
    Wireguard,
    WireguardTunnel,
    items,
)
from nsm.kernel.wireguard_go import Processes
from nsm.undo import Undo

Paths = Mapping[Namespace, str]

# All VXLANs of a port share its socket. Who opens it as the first, or closes it as the last, waits
# for all processors; with another one there, as there is on a node at work, neither of ours does.
OTHER: Final = """
ip -n {near} link add other type vxlan id 999 local {here} dstport 4789 nolearning
ip -n {near} link set other up
"""


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


def half(kind: Kind, client: Namespace, underlay: Namespace, n: int) -> RemoteWire:
    """What a node makes of a wire to another one, where both ends are to have the same."""
    local, remote = map(ip_address, UNDERLAY)
    tunnel: VxlanTunnel | WireguardTunnel = VxlanTunnel(1000 + n, local, remote, underlay)
    if kind != "vxlan":
        engine: EngineName = "kernel" if kind == "wireguard" else "userspace"
        key, peer, port = Key.generate(), Key.generate().public, 40000 + n
        tunnel = WireguardTunnel(key, peer, local, remote, port, underlay, port, engine)
    same = wire(client, client, n)
    return RemoteWire(same.connection, "src", replace(same.src, mtu=1400), tunnel)


class Raw:
    """wanted as prepared messages, to be sent in the namespaces at paths."""

    def __init__(self, home: Home, paths: Paths, wanted: Wire) -> None:
        self._home = home
        self._paths = paths
        made = items(wanted, owner.group("raw"))
        (link,) = (item for item in made if isinstance(item, Veth | Vxlan | Wireguard))
        self._indexes = {end.seat: messages.fresh_index() for end in link.ends}
        self._places = [(index, seat[0].nsid) for seat, index in self._indexes.items()]
        self._create, self._from, self._into = self._creation(link)
        self._hole = self._create.rindex(struct.pack("=HHI", 8, 28, 0)) + 4  # IFLA_NET_NS_FD
        self._batches: dict[Namespace, list[bytearray]] = {}
        for end in link.ends:
            up = messages.set_link(self._indexes[end.seat], None, end)
            assert up is not None
            self._batches[end.namespace] = [up]
        for kind in (Address, Route, Neighbour):
            for item in made:
                if isinstance(item, kind):
                    index = self._indexes[item.namespace, item.link]
                    self._batches[item.namespace].append(_member(item, index))
        self._told: bytearray | None = None
        if isinstance(link, Wireguard) and link.engine == "kernel":
            self._told = _heard(link, self._indexes[link.end.seat])

    def _creation(self, link: Veth | Vxlan | Wireguard) -> tuple[bytearray, Namespace, Namespace]:
        index, *others = self._indexes.values()
        match link:
            case Veth():
                made = messages.create_veth(link.src, index, link.dst, others[0], 0)
                return made, link.src.namespace, link.dst.namespace
            case Vxlan():
                return messages.create_vxlan(link, index, 0), link.underlay, link.end.namespace
            case Wireguard():
                made = messages.create_wireguard(link.end, index, 0)
                return made, link.underlay, link.end.namespace

    def run(self) -> float:
        """Make the wire; how many seconds that took. RuntimeError if the kernel refused."""
        start = time.perf_counter()
        with ExitStack() as stack:
            fds = {}
            for space in {self._from, *self._batches}:
                fds[space] = os.open(self._paths[space], os.O_RDONLY)
                stack.callback(os.close, fds[space])
            struct.pack_into("=I", self._create, self._hole, fds[self._into])
            sockets = {
                space: stack.enter_context(self._home.socket(fd)) for space, fd in fds.items()
            }
            first = [self._create]
            if self._told is None and self._from in self._batches:
                first += self._batches[self._from]
            refused = sockets[self._from].do(first)
            if self._told:
                generic = self._home.socket(fds[self._into], netlink.GENERIC)
                refused += stack.enter_context(generic).do([self._told])
            for space, batch in self._batches.items():
                if space is not self._from:
                    refused += sockets[space].do(batch)
        if any(refused):
            raise RuntimeError(f"the raw batch was refused: {refused}")
        return time.perf_counter() - start

    def away(self) -> float:
        """Delete the wire; seconds until nothing of it is there. Returns at the very end."""
        start = time.perf_counter()
        deleting = threading.Thread(target=self._delete)
        deleting.start()
        asked = [messages.get_link(index=index, nsid=nsid) for index, nsid in self._places]
        with Socket.here() as looking:
            while not all(isinstance(answer, Refusal) for answer in looking.ask_all(asked)):
                time.sleep(0.0002)
        took = time.perf_counter() - start
        deleting.join()
        return took

    def _delete(self) -> None:
        with Socket.here() as own:
            own.do([messages.delete_link(*self._places[0])])


class RawGo(Raw):
    """The same with wireguard-go: it is started, told once, and its device moved."""

    def __init__(self, home: Home, paths: Paths, wanted: Wire) -> None:
        super().__init__(home, paths, wanted)
        (link,) = (item for item in items(wanted, 0) if isinstance(item, Wireguard))
        assert link.key is not None
        self._name = f"raw{os.getpid() % 100000}"
        self._end = link.end
        peer = {
            "public_key": base64.b64decode(link.peer).hex(),
            "endpoint": link.far,
            "allowed_ip": "0.0.0.0/0\nallowed_ip=::/0",
        }
        settings = {"private_key": link.key.secret.hex(), "listen_port": link.port, **peer}
        self._words = "".join(f"{key}={value}\n" for key, value in settings.items())
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> float:
        """Make the wire; how many seconds that took."""
        start = time.perf_counter()
        space, index = self._into, self._indexes[self._end.seat]
        near, into = (os.open(self._paths[one], os.O_RDONLY) for one in (self._from, space))
        with self._home.inside(near):
            quiet = subprocess.DEVNULL
            command = ["wireguard-go", "-f", self._name]
            self._process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        with self._home.socket(near) as below, self._home.socket(into) as above:
            while not self._tell():
                time.sleep(0.0005)
            seen = messages.device(below.ask(messages.get_link(name=self._name)))
            move = messages.move_link(seen.index, into, self._end.name, index)
            refused = [*below.do([move]), *above.do(self._batches[space])]
        os.close(near)
        os.close(into)
        if any(refused):
            raise RuntimeError(f"the raw batch was refused: {refused}")
        return time.perf_counter() - start

    def _tell(self) -> bool:
        """Everything it is to have, once it hears."""
        with socket.socket(socket.AF_UNIX) as channel, suppress(OSError):
            channel.connect(f"/var/run/wireguard/{self._name}.sock")
            channel.sendall(f"set=1\n{self._words}\n".encode())
            return channel.recv(64) == b"errno=0\n\n"
        return False

    def _delete(self) -> None:
        """The same message; its process, which nothing is left for, is ended when it is gone."""
        super()._delete()
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        with suppress(FileNotFoundError):
            os.unlink(f"/var/run/wireguard/{self._name}.sock")


def raw_of(home: Home, paths: Paths, wanted: Wire) -> Raw:
    """What would be sent, and nothing else done, to have that wire."""
    tunnel = wanted.tunnel if isinstance(wanted, RemoteWire) else None
    goes = isinstance(tunnel, WireguardTunnel) and tunnel.engine == "userspace"
    return (RawGo if goes else Raw)(home, paths, wanted)


def _member(item: Address | Route | Neighbour, index: int) -> bytearray:
    match item:
        case Address():
            return messages.address("add", item, index)
        case Route():
            return messages.route("add", item, index)
        case Neighbour():
            return messages.neighbour("add", item, index)


class _Ear:
    """Hears what would be sent, in place of a socket of generic netlink."""

    def __init__(self, sock: Socket) -> None:
        self.ask = sock.ask
        self.heard: list[bytearray] = []

    def do(self, batch: list[bytearray]) -> list[None]:
        """Keep it."""
        self.heard += batch
        return [None] * len(batch)


def _heard(item: Wireguard, index: int) -> bytearray:
    """The one message that tells a device all it is to have."""
    with Socket.here(netlink.GENERIC) as sock:
        ear = _Ear(sock)
        wireguard_netlink.change(ear, index, wireguard.difference(item))  # type: ignore[arg-type]
    (message,) = ear.heard
    return message


@dataclass(slots=True)
class Times:
    """Seconds of each turn."""

    raw: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def medians(self) -> tuple[float, float]:
        """Raw, and ours."""
        return statistics.median(self.raw), statistics.median(self.ours)

    @property
    def ratios(self) -> Iterator[float]:
        """Ours ÷ raw, turn by turn."""
        return (ours / raw for raw, ours in zip(self.raw, self.ours, strict=True))


async def measured(kind: Kind, rounds: int, where: Stage) -> "Measured":
    """Turns of wires of that kind, or of a node's half of them, on a stage."""
    async with Kernel("bench") as kernel:
        spaces = {
            await kernel.namespace(path=f"/run/netns/{name}"): f"/run/netns/{name}"
            for name in (where.client, where.server, where.near)
        }
        client, server, near = spaces
        if kind == "vxlan":
            shell(OTHER.format(near=where.near, here=UNDERLAY[0]))

        def wanted(n: int) -> Wire:
            return wire(client, server, n) if kind == "veth" else half(kind, client, near, n)

        with Home() as home:
            turns = Measured(kernel, home, spaces, wanted)
            for n in range(rounds):
                await turns.turn(n)
    return turns


class Measured:
    """Raw batches and ensures by turns, in the same thread, with nothing else between them."""

    def __init__(
        self, kernel: Kernel, home: Home, paths: Paths, wanted: Callable[[int], Wire]
    ) -> None:
        """wanted is told a number, and makes a wire of it."""
        self._kernel = kernel
        self._home = home
        self._paths = paths
        self._wanted = wanted
        self._processes = Processes(kernel.group)
        self._processes.at(home.namespace.cookie)
        self.making = Times()
        self.closing = Times()

    async def turn(self, n: int) -> None:
        """Make one wire either way, and take both away to the very end."""
        raw, mine = raw_of(self._home, self._paths, self._wanted(200)), self._wanted(n)
        with ExitStack() as stack:
            fds = {}
            for space, path in self._paths.items():
                fds[space] = os.open(path, os.O_PATH)
                stack.callback(os.close, fds[space])
            await asyncio.to_thread(self._make, raw, mine, fds, first=n % 2)
            async with Undo() as undo:  # it gets to know it: as one that made it itself
                await self._kernel.ensure(mine, undo, fds=fds)
            await self._kernel.find()  # and the process, for which it would look all over
        for whose in ("raw", "ours")[:: 1 if n % 4 < 2 else -1]:
            if whose == "raw":
                self.closing.raw.append(await asyncio.to_thread(raw.away))
            else:
                start = time.perf_counter()
                await self._kernel.remove(mine.connection)
                self.closing.ours.append(time.perf_counter() - start)
                await asyncio.to_thread(self._until_idle, mine)

    def _until_idle(self, mine: Wire) -> None:
        """Until its process has ended too, and the kernel tidied up, holding the lock all need."""
        while self._kernel.has_engine(owner.Mark(mine.connection, "src")):
            time.sleep(0.001)
        _idle()

    def _make(self, raw: Raw, mine: Wire, fds: Mapping[Namespace, int], *, first: int) -> None:
        for whose in (first, 1 - first):
            if whose == 0:
                self.making.raw.append(raw.run())
                continue
            start = time.perf_counter()
            with Reach(self._home, fds, self._processes) as reach:
                ensure(reach, mine, self._kernel.group, Journal())
            self.making.ours.append(time.perf_counter() - start)
        self._processes.close()  # the kernel's owner finds them as those of an earlier life


def _idle() -> None:
    """Wait for the kernel's lock: to delete what is not there needs nothing else."""
    with Socket.here() as own:
        own.do([messages.delete_link(messages.fresh_index())])

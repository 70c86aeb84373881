"""A live wire goes over to another endpoint, and no packet is lost: make before break."""

import errno
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from forwarder.recovery import Recovery
from nsm.errors import NotFoundError
from nsm.kernel import netlink, swap
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.node import Kernel
from nsm.kernel.state import Hop, LocalWire, Policy, Selector, Wire
from nsm.undo import Undo
from tests.kernel.wires.test_local import wire as local_wire
from tests.kernel.wires.test_remote import Nodes as Cable
from tests.kernel.wires.test_remote import halves, nodes
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until

pytestmark = pytest.mark.kernel
_ = nodes  # a fixture of another module's
HERE, THERE = "172.16.0.1", "172.16.0.0"
LEG = "0a1b2c3d"


class Flow:
    """Numbered datagrams to an echo, 200 a second, from a socket that is bound to no device."""

    def __init__(self, sock: socket.socket, to: str) -> None:
        self.sock, self.to = sock, to
        self.sent = 0
        self.back: set[int] = set()
        self.refused: list[str] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._send, self._hear)]

    def __enter__(self) -> "Flow":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self.sock.close()

    def _send(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            due += 0.005
            try:
                self.sock.sendto(struct.pack("!Q", self.sent), (self.to, 7))
            except OSError as failure:
                self.refused.append(f"{self.sent}: {failure}")
            self.sent += 1

    def _hear(self) -> None:
        self.sock.settimeout(0.05)
        while not self._over.is_set():
            try:
                self.back.add(struct.unpack("!Q", self.sock.recv(64))[0])
            except TimeoutError:
                continue

    async def more(self, count: int = 100) -> None:
        """Wait until so many more have come back."""
        wanted = len(self.back) + count
        await until(lambda: len(self.back) >= wanted, f"{count} more datagrams are back", bar=1.0)

    async def whole(self) -> set[int]:
        """What of all that was sent so far did not come back, once it had time to."""
        wanted = set(range(self.sent))
        await until(lambda: self.sent > max(wanted) + 20, "later ones are sent", bar=1.0)
        return wanted - self.back


# A process of its own, before all others: being late to answer would look like a loss.
ECHO = """
import select, socket, sys, time
sock, late, owed = socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]), []
while True:
    left = max(0.0, owed[0][0] - time.monotonic()) if owed else None
    if select.select([sock], [], [], left)[0]:
        owed.append((time.monotonic() + late, *sock.recvfrom(64)))
    while owed and owed[0][0] <= time.monotonic():
        _, data, who = owed.pop(0)
        sock.sendto(data, who)
"""


@contextmanager
def echo(sock: socket.socket, late: float = 0.0) -> Iterator[None]:
    """Answers each datagram, so many seconds after it came, for the block."""
    words = ("nice", "-n", "-20", sys.executable, "-IS", "-c", ECHO, str(sock.fileno()), str(late))
    with sock:
        process = subprocess.Popen(words, pass_fds=[sock.fileno()], stderr=subprocess.PIPE)
    try:
        yield
        assert process.poll() is None, (process.communicate()[1] or b"").decode()
    finally:
        process.kill()
        process.communicate()


async def udp(kernel: Kernel, space: Space, address: str, port: int = 0) -> socket.socket:
    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, 15, 1)  # IP_FREEBIND: the wire comes later
        sock.bind((address, port))
        return sock

    return await kernel.within(await kernel.namespace(path=space.path, name=space.name), make)


async def stand(kernel: Kernel, *wires: Wire) -> None:
    for one in wires:
        async with Undo() as undo:
            await kernel.ensure(one, undo)


async def moved(kernel: Kernel, old: Wire, new: Wire) -> None:
    async with Undo() as undo:
        await kernel.ensure(swap.beside(new), undo)
        await kernel.replace(old.leg, new, undo)


def ways(wire: LocalWire) -> LocalWire:
    """The wire with what makes a change harder: a default route, a network, a policy."""
    src = replace(
        wire.src,
        addresses=(*wire.src.addresses, ip_interface("10.77.0.5/24"), ip_interface("fd77::5/64")),
        routes=(*wire.src.routes, Hop(ip_network("2001:db8:9::/48"), ip_address("2001:db8::"))),
        policies=(Policy(Selector(dst_port=(80, 80)), (Hop(ip_network("10.9.0.0/16")),)),),
    )
    return replace(wire, src=src)


async def going_over(
    kernel: Kernel,
    client: Space,
    server: Space,
    other: Space,
    dress: Callable[[LocalWire], LocalWire] = lambda wire: wire,
    name: str = "",
) -> tuple[LocalWire, LocalWire]:
    """A wire that stands, and the one to an endpoint in other that is to take its place; name is
    that endpoint's device's, where it is another than it was."""
    old = dress(await local_wire(kernel, client, server))
    there = await kernel.namespace(path=other.path, name="other")
    dst = replace(old.dst, namespace=there, name=name or old.dst.name)
    await stand(kernel, old)
    return old, replace(old, dst=dst, leg=LEG)


async def test_a_client_goes_from_one_endpoint_of_its_node_to_another(
    kernel: Kernel, client: Space, server: Space, make_space: Callable[[str], Space]
) -> None:
    other = make_space("other")
    old, new = await going_over(kernel, client, server, other, ways, name="nsm-7")
    client.do("route", "add", "10.200.0.0/16", "via", "10.77.0.9", "dev", "nsm-1")  # its own
    before = settled(client)
    with (
        echo(await udp(kernel, server, THERE, 7)),
        echo(await udp(kernel, other, THERE, 7)),
        Flow(await udp(kernel, client, HERE), THERE) as flow,
    ):
        await flow.more()
        await moved(kernel, old, new)
        await flow.more()
        assert await kernel.remove("id-1", leg="") == 2
        await flow.more()
        assert not flow.refused
        assert await flow.whole() == set()
    assert server.links() == set()
    assert other.links() == {"nsm-7"}
    assert settled(client) == before
    assert await kernel.ensure(new, Undo()) == await kernel.ensure(new, Undo())
    assert not (await kernel.ensure(new, Undo())).steps
    (found,) = [one for one in await kernel.find() if one.mark and one.mark.side == "src"]
    assert (found.device.name, found.mark.leg, found.mark.beside) == ("nsm-1", LEG, False)
    assert await kernel.remove("id-1") == 2
    assert not await kernel.find()


def settled(*spaces: Space) -> dict[str, list[str]]:
    """What a wire leaves in namespaces, but the link-local things that come in their own time."""
    state = kernel_state(*spaces)
    return {
        key: [
            str(one).replace(f":leg={LEG}", "")
            for one in found
            if not any(local in str(one) for local in ("fe80:", "ff00:", "anycast"))
        ]
        for key, found in state.items()
        if isinstance(found, list)
    }


async def test_a_client_goes_to_another_node_and_back(
    kernel: Kernel, nodes: Cable, make_space: Callable[[str], Space]
) -> None:
    beside = make_space("beside")
    near, far = await halves(kernel, nodes)
    there = await kernel.namespace(path=beside.path, name="beside")
    old = LocalWire("id-1", near.end, replace(far.end, namespace=there))
    new = replace(near, leg=LEG)
    back = replace(old, leg="00000001")
    await stand(kernel, old)
    with (
        echo(await udp(kernel, beside, THERE, 7)),
        echo(await udp(kernel, nodes.server, THERE, 7)),
        Flow(await udp(kernel, nodes.client, HERE), THERE) as flow,
    ):
        await flow.more()
        await stand(kernel, replace(far, connection="id-far"))
        await moved(kernel, old, new)
        await flow.more()
        await kernel.remove("id-1", leg="")
        await flow.more()
        await moved(kernel, new, back)
        await flow.more()
        await kernel.remove("id-1", leg=LEG)
        await kernel.remove("id-far")
        await flow.more()
        assert not flow.refused
        assert await flow.whole() == set()
    assert nodes.client.links() == {"nsm-1"}
    assert nodes.server.links() == set()
    await kernel.remove("id-1")


@pytest.mark.parametrize("when", ["beside", "placed"])
async def test_what_fails_on_the_way_is_taken_back(
    kernel: Kernel,
    client: Space,
    server: Space,
    make_space: Callable[[str], Space],
    when: str,
) -> None:
    other = make_space("other")
    old, new = await going_over(kernel, client, server, other, ways)
    client.do("route", "add", "10.200.0.0/16", "via", "10.77.0.9", "dev", "nsm-1")  # its own
    before = settled(client, server, other)

    async def failing() -> None:
        async with Undo() as undo:
            await kernel.ensure(swap.beside(new), undo)
            if when == "placed":
                await kernel.replace(old.leg, new, undo)
                await flow.more()
            raise InterruptedError

    with (
        echo(await udp(kernel, server, THERE, 7)),
        echo(await udp(kernel, other, THERE, 7)),
        Flow(await udp(kernel, client, HERE), THERE) as flow,
    ):
        await flow.more()
        with pytest.raises(InterruptedError):
            await failing()
        await flow.more()
        assert await flow.whole() == set()
    assert settled(client, server, other) == before
    assert not (await kernel.ensure(old, Undo())).steps
    await kernel.remove("id-1")


async def test_what_was_sent_over_a_wire_that_is_taken_back_is_answered_first(
    kernel: Kernel, client: Space, server: Space, make_space: Callable[[str], Space]
) -> None:
    other = make_space("other")
    old, new = await going_over(kernel, client, server, other)

    async def failing() -> None:
        async with Undo() as undo:
            await kernel.ensure(swap.beside(new), undo)
            await kernel.replace(old.leg, new, undo)
            await flow.more()
            raise InterruptedError

    with (
        echo(await udp(kernel, server, THERE, 7)),
        echo(await udp(kernel, other, THERE, 7), late=0.02),  # four of them are always under way
        Flow(await udp(kernel, client, HERE), THERE) as flow,
    ):
        await flow.more()
        with pytest.raises(InterruptedError):
            await failing()
        await flow.more()
        assert not flow.refused
        assert await flow.whole() == set()
    assert other.links() == set()
    await kernel.remove("id-1")


async def test_a_kernel_that_renames_no_device_that_is_up_has_it_down_for_that_moment(
    kernel: Kernel,
    client: Space,
    server: Space,
    make_space: Callable[[str], Space],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As before Linux 6.2. What may be lost there is what comes while the new device is down."""
    other = make_space("other")
    old, new = await going_over(kernel, client, server, other)
    do, refused = Socket.do, []

    def older(self: Socket, batch: list[bytearray]) -> list[Refusal | None]:
        """A name is refused with EBUSY, unless the same batch has a device down."""
        down = any(_kind(one) == netlink.NEWLINK and _flags(one) == (0, 1) for one in batch)
        busy = [one for one in batch if _kind(one) == netlink.NEWLINK and _names(one)]
        if down or not busy:
            return do(self, batch)
        refused.extend(busy)
        left = iter(do(self, [one for one in batch if one not in busy]))
        return [Refusal(errno.EBUSY) if one in busy else next(left) for one in batch]

    monkeypatch.setattr(Socket, "do", older)
    await moved(kernel, old, new)
    monkeypatch.undo()
    assert refused
    assert await kernel.remove("id-1", leg="") == 2
    assert await client.pings(THERE)
    assert not (await kernel.ensure(new, Undo())).steps
    await kernel.remove("id-1")


def _kind(message: bytearray) -> int:
    return int(struct.unpack_from("=H", message, 4)[0])


def _flags(message: bytearray) -> tuple[int, int]:
    flags, change = struct.unpack_from("=II", message, 24)
    return int(flags), int(change)


def _names(message: bytearray) -> bool:
    """Whether it gives a device that is there another name."""
    creates = struct.unpack_from("=H", message, 6)[0] & netlink.CREATE
    return not creates and 3 in netlink.table(memoryview(message), 32)


async def test_a_device_that_is_gone_takes_no_place(
    kernel: Kernel, client: Space, server: Space
) -> None:
    old = await local_wire(kernel, client, server)
    await stand(kernel, old)
    before = settled(client)
    with pytest.raises(NotFoundError, match="is gone"):
        await kernel.replace(old.leg, replace(old, leg=LEG), Undo())
    assert settled(client) == before
    await kernel.remove("id-1")


@pytest.mark.parametrize("placed", [False, True], ids=["beside", "in its place"])
async def test_after_a_kill_the_next_life_keeps_what_is_in_use_and_takes_the_other_away(
    kernel: Kernel, client: Space, server: Space, make_space: Callable[[str], Space], placed: bool
) -> None:
    other = make_space("other")
    old, new = await going_over(kernel, client, server, other)
    undo = Undo()  # of which nobody hears any more
    await kernel.ensure(swap.beside(new), undo)
    if placed:
        await kernel.replace(old.leg, new, undo)
    async with Kernel("test") as next_life:
        recovery = Recovery(next_life)
        assert await recovery.look() == 1
        assert recovery.leg("id-1") == (LEG if placed else "")
        assert client.links() == {"nsm-1"}
        assert (other if placed else server).links() == {"nsm-2"}
        assert (server if placed else other).links() == set()
        assert await client.pings(THERE)
        async with Undo() as undo:
            steps = (await next_life.ensure(new if placed else old, undo)).steps
        assert not steps
        await next_life.remove("id-1")

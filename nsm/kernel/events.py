"""Hearing what happens in the kernel: one socket for all namespaces, and nobody held by it.

The socket stands in this process's own namespace and listens for every namespace
that has a number here, so it hears a workload's death within milliseconds and
keeps none of them alive. When a namespace dies, NamespaceGone is all that comes: the
devices inside say nothing, only their far ends in other namespaces do.
"""

import asyncio
import errno
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

from nsm.errors import RightsError
from nsm.kernel import messages, netlink, owner
from nsm.kernel.netlink import SOL_NETLINK
from nsm.kernel.state import OWN

_ADD_MEMBERSHIP, _LISTEN_ALL_NSID, _RCVBUFFORCE = 1, 8, 33
_NEIGH, _LINK, _IPV4_ADDR, _IPV4_ROUTE, _IPV6_ADDR, _IPV6_ROUTE, _NSID = 3, 1, 5, 7, 9, 11, 28
_BUFFER = 4 << 20  # bytes: some thousand links at once; what still overflows is a Resync
_ANCILLARY = socket.CMSG_SPACE(4)
_MOST = 128  # datagrams in one turn of the loop
_LONGEST_QUEUE = 16_384


class Kind(Enum):
    """What a Watch hears: links and namespace deaths, or addresses, routes, neighbours too."""

    LINKS = (_LINK, _NSID)
    ALL = (_LINK, _NSID, _NEIGH, _IPV4_ADDR, _IPV6_ADDR, _IPV4_ROUTE, _IPV6_ROUTE)


@dataclass(frozen=True, slots=True)
class Resync:
    """Events were lost, or none came yet: what is known must be looked up again."""


@dataclass(frozen=True, slots=True)
class NamespaceGone:
    """The last thing that held a namespace let go; its number means nothing any more."""

    nsid: int


@dataclass(frozen=True, slots=True)
class LinkChanged:
    """A device appeared or changed (name, MTU, up or down, alias, group)."""

    nsid: int
    device: messages.Device
    mark: owner.Mark | None


@dataclass(frozen=True, slots=True)
class LinkGone:
    """A device was deleted, or moved to a namespace that is not heard here."""

    nsid: int
    device: messages.Device
    mark: owner.Mark | None


@dataclass(frozen=True, slots=True)
class AddressChanged:
    """An address came or went on a device."""

    nsid: int
    index: int
    gone: bool


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """A route came or went; index is 0 where it names no single device."""

    nsid: int
    index: int
    protocol: int
    gone: bool


@dataclass(frozen=True, slots=True)
class NeighbourChanged:
    """A neighbour came, changed or went on a device."""

    nsid: int
    index: int
    gone: bool


Event = (
    Resync
    | NamespaceGone
    | LinkChanged
    | LinkGone
    | AddressChanged
    | RouteChanged
    | NeighbourChanged
)


class Watch:
    """Events as they come, for one reader:

        async with Watch() as watch:
            async for event in watch: ...

    The first event is a Resync: what was there before is to be looked up now, and
    nothing that happens from here on is missed. A reader too slow for the kernel or for
    the queue gets a Resync in place of what was lost. Raises DeniedError without
    CAP_NET_BROADCAST.
    """

    def __init__(self, kinds: Kind = Kind.LINKS) -> None:
        self._kinds = kinds
        self._sock: socket.socket | None = None
        self._queue: deque[Event] = deque([Resync()])
        self._ready = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._sock = await asyncio.to_thread(_listening, self._kinds)
        self._ready.set()
        asyncio.get_running_loop().add_reader(self._sock, self._take)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock = None
            self._ready.set()

    async def __aiter__(self) -> AsyncIterator[Event]:
        while self._sock is not None:
            while self._queue:
                yield self._queue.popleft()
            self._ready.clear()
            await self._ready.wait()

    def _take(self) -> None:
        """Read what is there; never waits. A bounded number a turn, the loop has other guests."""
        if self._sock is None:
            return
        for _ in range(_MOST):
            try:
                data, ancillary, _, _ = self._sock.recvmsg(1 << 16, _ANCILLARY, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError as failure:
                if failure.errno != errno.ENOBUFS:
                    raise
                self._lost()
                continue
            nsid = next(
                (
                    struct.unpack("=i", value)[0]
                    for level, kind, value in ancillary
                    if (level, kind) == (SOL_NETLINK, _LISTEN_ALL_NSID)
                ),
                OWN,
            )
            self._queue.extend(read(memoryview(data), nsid))
        if len(self._queue) > _LONGEST_QUEUE:
            self._lost()
        if self._queue:
            self._ready.set()

    def _lost(self) -> None:
        # deaths are kept: a number that died cannot be looked up any more
        kept = [event for event in self._queue if isinstance(event, NamespaceGone)]
        self._queue = deque([*kept, Resync()])


def read(data: memoryview, nsid: int) -> Iterator[Event]:
    """The events one datagram holds that came from that namespace."""
    for kind, _, _, body in netlink.split(data):
        if kind == netlink.DELNSID:
            number = netlink.table(body, 4).get(1)
            # only our own namespace's numbers are ours; others tell of theirs on the same group
            if number is not None and nsid == OWN:
                yield NamespaceGone(netlink.signed(number))
        elif kind in (netlink.NEWLINK, netlink.DELLINK):
            device = messages.device(body)
            mark = owner.Mark.parse(device.alias) if owner.is_ours(device.group) else None
            event = LinkChanged if kind == netlink.NEWLINK else LinkGone
            yield event(nsid, device, mark)
        elif kind in (netlink.NEWADDR, netlink.DELADDR):
            (index,) = struct.unpack_from("=i", body, 4)
            yield AddressChanged(nsid, index, kind == netlink.DELADDR)
        elif kind in (netlink.NEWROUTE, netlink.DELROUTE):
            index, _ = messages.way(body)
            yield RouteChanged(nsid, index, body[5], kind == netlink.DELROUTE)
        elif kind in (netlink.NEWNEIGH, netlink.DELNEIGH):
            (index,) = struct.unpack_from("=i", body, 4)
            yield NeighbourChanged(nsid, index, kind == netlink.DELNEIGH)


def _listening(kinds: Kind) -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, _BUFFER)
        sock.setsockopt(SOL_NETLINK, _LISTEN_ALL_NSID, 1)
        # a port first: without one the socket counts as the sender of all the kernel says and
        # hears nothing, and binding later would drop the groups
        sock.bind((0, 0))
        for group in kinds.value:
            sock.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)
    except OSError as failure:
        sock.close()
        if failure.errno in (errno.EPERM, errno.EACCES):
            raise RightsError(
                "may not listen to the kernel's events of other namespaces",
                hint="it needs CAP_NET_BROADCAST and CAP_NET_ADMIN",
            ) from failure
        raise
    return sock

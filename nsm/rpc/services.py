"""The gRPC services every hop offers, on top of a Hop (`wire.md` §1.1)."""

import contextlib
from typing import Any

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from grpclib.server import Stream

from nsm.descriptors import INODE_URL, drop
from nsm.errors import ExhaustedError, InvalidError
from nsm.hop import Hop
from nsm.model import Connection as ConnectionValue
from nsm.model import Mechanism
from nsm.proto.connection_grpc import MonitorConnectionBase
from nsm.proto.connection_pb2 import Connection, ConnectionEvent, MonitorScopeSelector
from nsm.proto.networkservice_grpc import NetworkServiceBase
from nsm.proto.networkservice_pb2 import NetworkServiceRequest
from nsm.rpc import wire
from nsm.rpc.server import current_caller
from nsm.rpc.streams import send

LARGEST = 256 * 1024  # bytes of a Request or Close; between domains one has 20 KiB
HEALTHY = ("networkservice.NetworkService", "connection.MonitorConnection")  # `wire.md` §11.4


class NetworkServices(NetworkServiceBase):
    """Request and Close."""

    def __init__(self, hop: Hop[Any]) -> None:
        self._hop = hop

    async def Request(self, stream: "Stream[NetworkServiceRequest, Connection]") -> None:  # noqa: N802 - gRPC's name
        """Establish or refresh a connection."""
        message = await stream.recv_message()
        if message is None:
            raise InvalidError("a Request without a message")
        _bounded(message)
        asked, caller = wire.request(message), current_caller(stream)
        try:
            made = await self._hop.request(asked, caller)
            made = self._hop.tokens.answered(made, caller, self._hop.name)
        finally:
            await drop(caller.fds, _files(asked.connection, asked.preferences))
        await stream.send_message(wire.to_pb(made))

    async def Close(self, stream: "Stream[Connection, Empty]") -> None:  # noqa: N802 - gRPC's name
        """Take a connection down; OK if it is not there."""
        message = await stream.recv_message()
        if message is None:
            raise InvalidError("a Close without a message")
        _bounded(message)
        conn, caller = wire.connection(message), current_caller(stream)
        try:
            await self._hop.close(conn, caller)
        finally:
            await drop(caller.fds, _files(conn))
        await stream.send_message(Empty())


class Monitors(MonitorConnectionBase):
    """MonitorConnections: filtered to what the caller may see, never refused."""

    def __init__(self, hop: Hop[Any]) -> None:
        self._hop = hop

    async def MonitorConnections(  # noqa: N802 - gRPC's name
        self, stream: "Stream[MonitorScopeSelector, ConnectionEvent]"
    ) -> None:
        """The state of the caller's connections, and every change of it."""
        message = await stream.recv_message()
        if message is None:
            raise InvalidError("a MonitorConnections without a selector")
        seen = self._hop.events.watch(wire.selector(message), current_caller(stream).id)
        async with contextlib.aclosing(seen):
            async for event in seen:
                await send(stream, wire.to_pb(event))


def _bounded(message: Message) -> None:
    """Refuse what nobody honest sends: each hop of the path keeps it for as long as the wire."""
    if (size := message.ByteSize()) > LARGEST:
        raise ExhaustedError(
            f"a connection of {size} bytes; at most {LARGEST} are taken",
            hint="send data through the wire, not beside it",
        )


def _files(conn: ConnectionValue, preferences: tuple[Mechanism, ...] = ()) -> list[str]:
    """The URLs of the descriptors that come beside a call, of which none may outlive it."""
    named = (*preferences, *((conn.mechanism,) if conn.mechanism else ()))
    return [mechanism.get(INODE_URL) for mechanism in named]


def of(hop: Hop[Any]) -> list[NetworkServices | Monitors]:
    """Both services, for `nsm.rpc.server.serve`."""
    return [NetworkServices(hop), Monitors(hop)]

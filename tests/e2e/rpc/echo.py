"""A service for tests of the transport: what it does is a function given by the test."""
# ruff: noqa: N802 - methods have the protocol's names

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from cryptography.hazmat.primitives import serialization
from google.protobuf.empty_pb2 import Empty

from nsm.caller import Caller
from nsm.identity.source import Identity
from nsm.proto import connection_pb2, networkservice_pb2
from nsm.proto.connection_grpc import MonitorConnectionBase
from nsm.proto.networkservice_grpc import NetworkServiceBase
from nsm.rpc.server import current_caller

Connection = connection_pb2.Connection
Request = networkservice_pb2.NetworkServiceRequest
Event = connection_pb2.ConnectionEvent
Selector = connection_pb2.MonitorScopeSelector
LIFE = 600 * 10**9  # ns a token lives
METHOD = "/networkservice.NetworkService/Request"
HEADERS = [  # of a Request, for tests that speak HTTP/2 by hand
    (":method", "POST"),
    (":scheme", "https"),
    (":path", METHOD),
    (":authority", "localhost"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]


async def _same(caller: Caller, connection: Any) -> Any:
    return connection


class Echo(NetworkServiceBase):
    """Request answers what `do` makes of the connection; keeps the callers it had."""

    def __init__(self, do: Callable[[Caller, Any], Awaitable[Any]] = _same) -> None:
        self.do = do
        self.callers: list[Caller] = []

    async def Request(self, stream: Any) -> None:
        asked = await stream.recv_message()
        self.callers.append(current_caller(stream))
        await stream.send_message(await self.do(self.callers[-1], asked.connection))

    async def Close(self, stream: Any) -> None:
        await stream.recv_message()
        await stream.send_message(Empty())


class Monitor(MonitorConnectionBase):
    """Sends one empty event and then waits for `wait`, by default for ever."""

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self.wait = wait
        self.open = 0

    async def MonitorConnections(self, stream: Any) -> None:
        await stream.recv_message()
        self.open += 1
        try:
            await stream.send_message(Event())
            await self.wait()
        finally:
            self.open -= 1


def request(identifier: str = "c-1", **fields: Any) -> Any:
    """A request for a connection of that id."""
    return Request(connection=Connection(id=identifier, **fields))


def stock_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """What stock grpcio needs to show identity and to trust its authorities."""
    return grpc.ssl_channel_credentials(
        b"".join(a.public_bytes(serialization.Encoding.PEM) for a in identity.authorities),
        identity.svid.key_pem(),
        identity.svid.chain_pem(),
    )


def stock_options(name: str = "server.test") -> list[tuple[str, Any]]:
    """Let grpcio check the DNS name it insists on; no pool shared between tests."""
    return [
        ("grpc.ssl_target_name_override", name),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_send_message_length", -1),
    ]


def target(url: str) -> str:
    """The URL as grpcio wants it."""
    return url.removeprefix("tcp://")

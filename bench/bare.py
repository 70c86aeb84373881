"""The calls of a request with nothing of ours in them: stock grpclib and ssl, a process each.

The same messages go the same way, over unix sockets and mutual TLS. On one node: client,
manager, forwarder, which asks the manager twice, which asks the registry once; endpoint;
back. Between two, the far manager and forwarder are in between, which asks its manager once.
A close goes the same way, and nobody is asked anything.

    python -m bench.bare DIRECTORY NAME [NEXT [ASKED]]     be one of them, until input ends

NEXT is whom it passes a call on to, ASKED whom it asks before it passes a Request on.
"""

import asyncio
import ssl
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.protobuf.empty_pb2 import Empty
from grpclib.client import Channel
from grpclib.config import Configuration
from grpclib.server import Server

from nsm.identity.authority import Authority
from nsm.identity.spiffe import SpiffeId
from nsm.proto.connection_pb2 import Connection
from nsm.proto.networkservice_grpc import NetworkServiceBase, NetworkServiceStub

SHAPES = {  # who passes a call on to whom, and asks whom before
    "one node": (
        ("registry",),
        ("endpoint",),
        ("manager", "forwarder", "registry"),
        ("forwarder", "endpoint", "manager"),
    ),
    "two nodes": (
        ("registry",),
        ("endpoint",),
        ("manager", "forwarder", "registry"),
        ("forwarder", "far-manager", "manager"),
        ("far-manager", "far-forwarder"),
        ("far-forwarder", "endpoint", "far-manager"),
    ),
}
FINDS = {"forwarder": 2, "far-forwarder": 1}
LITTLE = (Connection(id="service"), Connection(id="endpoints"))


class Hop(NetworkServiceBase):
    """Passes on, and answers with what came."""

    def __init__(self, name: str, onward: Any, asked: Any) -> None:
        self._name, self._onward, self._asked = name, onward, asked

    async def Request(self, stream: Any) -> None:  # noqa: N802 - gRPC's name
        """Asked for a wire."""
        message = await stream.recv_message()
        if finds := FINDS.get(self._name):
            await asyncio.gather(*map(self._asked.Close, LITTLE[:finds]))
        made = await self._onward.Request(message) if self._onward else message.connection
        await stream.send_message(made)

    async def Close(self, stream: Any) -> None:  # noqa: N802 - gRPC's name
        """Asked to close; or something little, which stands for a Find."""
        message = await stream.recv_message()
        if message == LITTLE[1] and self._asked:
            await self._asked.Close(message)
        elif message not in LITTLE and self._onward:
            await self._onward.Close(message)
        await stream.send_message(Empty())


async def serve(directory: str, name: str, *others: str) -> None:
    """Answer until standard input ends."""
    channels = [_channel(directory, other) for other in others]
    stubs = [NetworkServiceStub(channel) for channel in channels]
    server = Server([Hop(name, *stubs, *[None] * (2 - len(stubs)))])
    context = _context(ssl.PROTOCOL_TLS_SERVER, f"{directory}/pem")
    await server.start(path=f"{directory}/{name}", ssl=context)
    await asyncio.to_thread(sys.stdin.read)
    for channel in channels:
        channel.close()
    server.close()
    await server.wait_closed()


@asynccontextmanager
async def asking(shape: str) -> AsyncIterator[NetworkServiceStub]:
    """A stub that asks the manager for a wire that nobody makes; the others run meanwhile."""
    with tempfile.TemporaryDirectory() as directory:
        Path(f"{directory}/pem").write_bytes(_credentials())  # noqa: ASYNC240 - alone here
        async with _others(directory, SHAPES[shape]):
            channel = _channel(directory, "manager")
            yield NetworkServiceStub(channel)
            channel.close()


def _channel(directory: str, name: str) -> Channel:
    told = Configuration(ssl_target_name_override="bench")  # asyncio wants a name
    context = _context(ssl.PROTOCOL_TLS_CLIENT, f"{directory}/pem")
    return Channel(path=f"{directory}/{name}", ssl=context, config=told)


@asynccontextmanager
async def _others(directory: str, chain: Sequence[Sequence[str]]) -> AsyncIterator[None]:
    started = []
    try:
        for words in chain:
            command = [sys.executable, "-m", "bench.bare", directory, *words]
            spawned = asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.PIPE)
            started.append(await spawned)
        missing = [Path(directory, name) for name, *_ in chain]
        while missing := [path for path in missing if not path.exists()]:
            if any(process.returncode is not None for process in started):
                raise RuntimeError("one of the bare processes ended")
            await asyncio.sleep(0.01)
        yield
    finally:
        for process in started:
            assert process.stdin is not None
            process.stdin.close()
        for process in started:
            await process.wait()


def _credentials() -> bytes:
    authority = Authority.create("bench")
    svid = authority.issue(SpiffeId("bench", "/both"))
    key = svid.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = [*svid.chain, *authority.certificates]
    return key + b"".join(one.public_bytes(Encoding.PEM) for one in chain)


def _context(kind: int, pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(pem)
    context.load_verify_locations(pem)
    context.set_alpn_protocols(["h2"])
    return context


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))

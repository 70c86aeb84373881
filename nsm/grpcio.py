"""Stock grpcio as a way into the mesh: a real `grpc.aio.Channel` to any SPIFFE server.

grpcio's client refuses a certificate whose only name is a SPIFFE id, and cannot
pass a file descriptor. So its channel ends at a door in this process: a private
unix socket behind which TLS is done as everywhere in the mesh, descriptors ride
along, and every call gets a token for the handshake it travels on. When our
certificate is replaced, the door connects anew and tells the channel with a
GOAWAY to make new calls there; running ones end where they began.
"""

import asyncio
import logging
import os
import shutil
import socket
import struct
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import Any

import grpc
import grpc.aio

from nsm.caller import TOKEN, TOKEN_EXPIRES
from nsm.errors import NsmError, UnavailableError
from nsm.identity.background import background
from nsm.identity.source import Handshake, Source
from nsm.identity.tokens import format_instant, issue
from nsm.model import SECOND
from nsm.process.config import parse
from nsm.process.workload import Surroundings
from nsm.rpc import addresses
from nsm.rpc.fds import CallFds, FdSocket, Received, connect, credentials_of
from nsm.rpc.peers import DIAL_TIMEOUT, bounded, cannot_connect
from nsm.rpc.sockets import watch_for_death
from nsm.rpc.status import status_of
from nsm.rpc.tls import Contexts, handshake_of, unproven

log = logging.getLogger(__name__)

_FRAME_HEADER = 9  # bytes: length (3), type, flags, stream
_GOAWAY = struct.pack(">HBBBIII", 0, 8, 7, 0, 0, 2**31 - 1, 0)  # "no new call here", no error
_PING = struct.pack(">HBBBI8s", 0, 8, 6, 0, 0, b"vwire-ok")
_PING_ACK = struct.pack(">HBBBI8s", 0, 8, 6, 1, 0, b"vwire-ok")
_PREFACE = 24  # bytes with which a client begins
_OBEY = 1.0  # seconds for the channel to read a GOAWAY
_FDS = 256  # descriptors that may wait, each way
_FD_AGE = 30.0  # seconds a received one is kept unclaimed


@asynccontextmanager
async def channel(
    url: str,
    source: Source | None = None,
    *,
    lifetime: int = 600 * SECOND,
    options: Sequence[tuple[str, Any]] = (),
    dial_timeout: float = DIAL_TIMEOUT,
) -> AsyncIterator[grpc.aio.Channel]:
    """A `grpc.aio.Channel` to url (`unix:///p`, `tcp://h:p`, `h:p`) as source's identity.

        async with nsm.grpcio.channel("unix:///run/nsm.io.sock") as channel:
            stub = NetworkServiceStub(channel)

    Without a source it is the identity SPIFFE_ENDPOINT_SOCKET has for this process.
    Every call carries a token of lifetime (ns). options are grpcio's. To pass file
    descriptors use `door`. Failures to connect are `grpc.aio.AioRpcError`s that say why.
    """
    async with door(
        url, source, lifetime=lifetime, options=options, dial_timeout=dial_timeout
    ) as made:
        yield made.channel


@asynccontextmanager
async def door(
    url: str,
    source: Source | None = None,
    *,
    lifetime: int = 600 * SECOND,
    options: Sequence[tuple[str, Any]] = (),
    dial_timeout: float = DIAL_TIMEOUT,
) -> AsyncIterator["Door"]:
    """As `channel`, with the descriptors of its connection."""
    async with (
        nullcontext(source) if source else parse(Surroundings).identity() as identity,
        _door(url, identity, lifetime, options, dial_timeout) as made,
    ):
        yield made


@asynccontextmanager
async def _door(
    url: str,
    source: Source,
    lifetime: int,
    options: Sequence[tuple[str, Any]],
    dial_timeout: float,
) -> AsyncIterator["Door"]:
    target = addresses.parse(url)
    contexts = Contexts(source, server=False)
    await contexts.build()
    room = await asyncio.to_thread(tempfile.mkdtemp, prefix="vwire-door-")  # 0700: ours alone
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path = os.path.join(room, "door")
        listener.setblocking(False)
        listener.bind(path)
        listener.listen(16)
        async with background() as tasks:
            made = Door(url, target, contexts, tasks, lifetime, dial_timeout)
            tasks.create_task(made.accept(listener), name=f"door to {url}")
            tasks.create_task(made.follow(), name=f"newest certificate for the door to {url}")
            async with grpc.aio.insecure_channel(
                f"unix:{path}",
                options=[*_OPTIONS, *options],
                interceptors=[each(made) for each in _INTERCEPTORS],
            ) as made.channel:
                yield made
    finally:
        listener.close()
        await asyncio.to_thread(shutil.rmtree, room, ignore_errors=True)


_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.default_authority", "localhost"),
    ("grpc.use_local_subchannel_pool", 1),  # another door's path may be the same one day
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
]


class _Upstream:
    """One TLS connection behind the door."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handshake: Handshake,
        sock: FdSocket | None,
        received: Received | None,
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.handshake = handshake
        self.sock = sock
        self.received = received
        self.local: asyncio.StreamWriter | None = None  # the channel's end
        self.obeyed = asyncio.Event()  # the channel has read our GOAWAY

    @property
    def alive(self) -> bool:
        return not self.writer.is_closing() and not self.reader.at_eof()

    async def goaway(self) -> None:
        """Have the channel make no new call here, and wait until it knows."""
        if self.local is not None:
            self.local.write(_GOAWAY + _PING)  # only whole frames are written there
            with suppress(TimeoutError):
                async with asyncio.timeout(_OBEY):
                    await self.obeyed.wait()


class Door:
    """Where a channel's calls leave: `.channel`, and the descriptors of its connection."""

    channel: grpc.aio.Channel

    def __init__(
        self,
        url: str,
        target: addresses.Unix | addresses.Tcp,
        contexts: Contexts,
        tasks: asyncio.TaskGroup,
        lifetime: int,
        dial_timeout: float,
    ) -> None:
        self.url = url
        self._target = target
        self._contexts = contexts
        self._tasks = tasks
        self._lifetime = lifetime
        self._dial_timeout = dial_timeout
        self._newest: _Upstream | None = None
        self._spare: _Upstream | None = None  # connected, not yet taken by the channel
        self._open: weakref.WeakSet[_Upstream] = weakref.WeakSet()
        self._connecting = asyncio.Lock()

    async def handshake(self) -> Handshake:
        """Who is behind the door, and what it was shown; connects if need be.

        Raises UnavailableError and UnauthenticatedError.
        """
        return (await self._current()).handshake

    async def metadata(self) -> list[tuple[str, str]]:
        """A fresh token for the connection that calls travel on now."""
        shown = await self.handshake()
        token = issue(
            shown.own,
            shown.peer_id,
            self._lifetime,
            peer_not_after=shown.peer_not_after,
            now=time.time_ns(),
        )
        return [(TOKEN, token.text), (TOKEN_EXPIRES, format_instant(token.expires))]

    async def send(self, fd: int) -> str:
        """Send a duplicate of fd beside the next call; returns its `inode://dev/ino`."""
        view = self._view(await self._current())
        try:
            return view.send(fd)
        finally:
            view.end()

    async def claim(self, url: str, patience: float = 2.0) -> int:
        """The descriptor that came for url, the caller's to close; see `nsm.caller.Fds`."""
        view = self._view(await self._current())
        try:
            return await view.claim(url, patience)
        finally:
            view.end()

    def _view(self, upstream: _Upstream) -> CallFds:
        if upstream.received is None or upstream.sock is None:
            raise UnavailableError(
                f"no file descriptor can travel to {self.url}", hint="use its unix socket"
            )
        return CallFds(upstream.received, upstream.sock, _FDS)

    # -- connections --------------------------------------------------------------------------

    async def _current(self) -> _Upstream:
        async with self._connecting:
            if self._newest is None or not self._newest.alive:
                self._newest = self._spare = await self._connect()
            return self._newest

    async def _connect(self) -> _Upstream:
        identity, context = self._contexts.newest
        sock: FdSocket | None = None
        received: Received | None = None
        how: dict[str, Any] = {
            "ssl": context,
            "server_hostname": "",
            "ssl_handshake_timeout": self._dial_timeout,
            "ssl_shutdown_timeout": 1.0,
        }
        try:
            async with bounded(self._dial_timeout, self.url):
                if isinstance(self._target, addresses.Unix):
                    sock = await connect(self._target.path)
                    received = Received(_FDS, _FD_AGE, self.url)
                    sock.arrived, sock.closed = received.arrive, received.close
                    reader, writer = await asyncio.open_connection(sock=sock, **how)
                else:
                    reader, writer = await asyncio.open_connection(
                        self._target.host or "localhost", self._target.port, **how
                    )
                    raw = writer.get_extra_info("socket")
                    if raw is not None:
                        watch_for_death(raw)
        except OSError as error:
            raise cannot_connect(error, self.url) from error
        try:
            shown = handshake_of(writer.get_extra_info("ssl_object"), identity)
        except NsmError:
            writer.transport.abort()
            raise
        if received is not None:
            received.admitted = True
        made = _Upstream(reader, writer, shown, sock, received)
        self._open.add(made)
        return made

    async def follow(self) -> None:
        """When our certificate is replaced, let new calls begin on a new connection."""
        while True:
            await self._contexts.replaced()
            old_ones = list(self._open)
            whys = await unproven([o.handshake for o in old_ones], self._contexts.newest[0])
            for one, why in zip(old_ones, whys, strict=True):
                if why is not None:
                    log.warning("connection to %s ends: %s", self.url, why)
                    one.writer.transport.abort()
            async with self._connecting:
                old = self._newest
                if old is None or not old.alive:
                    continue
                try:
                    self._newest = self._spare = await self._connect()
                except NsmError as error:
                    log.warning("%s; calls stay on the old connection", error)
                    continue
                await old.goaway()  # under the lock: no token is made meanwhile

    async def accept(self, listener: socket.socket) -> None:
        """Let the channel of this process in, and nobody else."""
        loop = asyncio.get_running_loop()
        while True:
            accepted, _ = await loop.sock_accept(listener)
            if credentials_of(accepted).pid != os.getpid():
                accepted.close()
                continue
            self._tasks.create_task(self._pass(accepted), name=f"door to {self.url}")

    async def _pass(self, accepted: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=accepted)
        upstream: _Upstream | None = None
        try:
            try:
                await self._current()
                upstream, self._spare = self._spare, None
                if upstream is None:
                    upstream = self._newest = await self._connect()
            except NsmError as error:
                log.warning("%s", error)
                return
            upstream.local = writer
            outward = self._tasks.create_task(_move_out(reader, upstream))
            inward = self._tasks.create_task(_move_in(upstream, writer))
            try:
                await asyncio.wait({outward, inward}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (outward, inward):
                    task.cancel()
        finally:
            writer.transport.abort()
            if upstream is not None:
                upstream.writer.close()


async def _move_out(reader: asyncio.StreamReader, upstream: _Upstream) -> None:
    """Move what the channel says, but for its answer to the door's own PING."""
    with suppress(OSError, asyncio.IncompleteReadError):
        upstream.writer.write(await reader.readexactly(_PREFACE))
        while True:
            frame = await _frame(reader)
            if frame == _PING_ACK:
                upstream.obeyed.set()
                continue
            upstream.writer.write(frame)
            await upstream.writer.drain()


async def _move_in(upstream: _Upstream, writer: asyncio.StreamWriter) -> None:
    """Move what the server says, in whole frames, so that a GOAWAY may come between two."""
    with suppress(OSError, asyncio.IncompleteReadError):
        while True:
            writer.write(await _frame(upstream.reader))
            await writer.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    header = await reader.readexactly(_FRAME_HEADER)
    return header + await reader.readexactly(int.from_bytes(header[:3], "big"))


# -- tokens -----------------------------------------------------------------------------------


class _Tokens:
    """Adds a token to a call, as late as grpcio allows."""

    def __init__(self, way: Door) -> None:
        self._way = way

    async def _with_token(self, details: Any) -> Any:
        try:
            token = await self._way.metadata()
        except NsmError as error:
            code, text = status_of(error)
            raise grpc.aio.AioRpcError(
                _CODES[code.value], grpc.aio.Metadata(), grpc.aio.Metadata(), text
            ) from error
        return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), *token))


_Go = Callable[[Any, Any], Awaitable[Any]]


class _UnaryUnary(_Tokens, grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_unary(self, go: _Go, details: Any, asked: Any) -> Any:
        return await go(await self._with_token(details), asked)


class _UnaryStream(_Tokens, grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[misc]
    async def intercept_unary_stream(self, go: _Go, details: Any, asked: Any) -> Any:
        return await go(await self._with_token(details), asked)


class _StreamUnary(_Tokens, grpc.aio.StreamUnaryClientInterceptor):  # type: ignore[misc]
    async def intercept_stream_unary(self, go: _Go, details: Any, asked: Any) -> Any:
        return await go(await self._with_token(details), asked)


class _StreamStream(_Tokens, grpc.aio.StreamStreamClientInterceptor):  # type: ignore[misc]
    async def intercept_stream_stream(self, go: _Go, details: Any, asked: Any) -> Any:
        return await go(await self._with_token(details), asked)


_INTERCEPTORS = (_UnaryUnary, _UnaryStream, _StreamUnary, _StreamStream)
_CODES = {code.value[0]: code for code in grpc.StatusCode}

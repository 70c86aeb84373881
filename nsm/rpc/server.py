"""Serving gRPC to the mesh: mutual TLS on every listener, unix sockets included.

A listener appears only when it can answer, its connections are bounded in every
way a peer could stretch them, and a stop tells open calls UNAVAILABLE, because
upstream takes CANCELLED for the end of the wire and heals on anything else.
What is known about a call's other end is `current_caller(stream)`.
"""

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpclib.server
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nsm import holders
from nsm.caller import TOKEN, TOKEN_EXPIRES, Caller
from nsm.errors import (
    Code,
    InvalidError,
    NsmError,
    PreconditionError,
    TakenError,
    UnauthenticatedError,
)
from nsm.identity.background import background
from nsm.identity.source import Source
from nsm.identity.spiffe import SpiffeId
from nsm.identity.tokens import parse_instant
from nsm.model import SECOND
from nsm.rpc import addresses
from nsm.rpc.fds import FdSocket, credentials_of, process_of
from nsm.rpc.grpclib_private import Limits, Method, ServerHttp2, method, stream_of
from nsm.rpc.sockets import watch_for_death
from nsm.rpc.status import expected, grpc_error, status_of
from nsm.rpc.tls import Contexts, Telling, secured, unproven

log = logging.getLogger(__name__)

_BACKLOG = 1024  # upstream dials anew for every Request: bursts must not be refused
_PART = 4  # no peer has more than one part in so many of all connections
_REFUSED_FOR = 5.0  # seconds in which a refused peer may read why
_CLOSING = 2.0  # seconds for a connection's last bytes to leave


@dataclass(frozen=True, slots=True)
class Call:
    """One finished call, for the one line that a log has about it."""

    method: str  # /package.Service/Method
    caller: SpiffeId
    code: Code
    ms: float
    text: str = ""  # of the status; empty if OK


def current_caller(stream: grpclib.server.Stream[Any, Any]) -> Caller:
    """Who makes the call that stream belongs to; its descriptors end with the call."""
    found = stream_of(stream).caller
    if found is None:
        raise RuntimeError("this stream is not one of nsm.rpc.server")
    return found


@asynccontextmanager
async def serve(
    listen: Sequence[str],
    handlers: Sequence[Any],
    source: Source,
    *,
    mode: int = 0o777,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    grace: float = 5.0,
    on_call: Callable[[Call], None] | None = None,
    variable: str = "NSM_LISTEN_ON",
    publish: bool = True,
) -> AsyncIterator["Server"]:
    """Serve handlers (generated `*Base` classes) on listen until the block ends.

    mode is a unix socket's (upstream: 0777; TLS decides who is let in). grace is
    what running calls get at the end, in seconds. variable is named in the error
    when an address is taken. Without publish nothing listens before
    `Server.publish()`. Raises InvalidError, TakenError, DeniedError.
    """
    contexts = Contexts(source, server=True)
    await contexts.build()
    async with background() as tasks:
        server = Server(listen, handlers, contexts, tasks, mode, limits, grace, on_call, variable)
        tasks.create_task(server.follow(), name="newest certificate for new connections")
        try:
            if publish:
                await server.publish()
            yield server
        finally:
            await server.stop()


@dataclass(slots=True, eq=False)
class _Running:
    task: "asyncio.Task[Any]"
    streaming: bool
    stopped: bool = False

    def stop(self) -> None:
        if not self.stopped:
            self.stopped = True
            self.task.cancel()


@dataclass(slots=True, eq=False)
class _Listener:
    sock: socket.socket
    url: str
    path: str = ""
    inode: int = 0
    paused: bool = field(default=True)


@dataclass(slots=True, eq=False)
class _Arrival:
    """An accepted connection whose handshake is not over."""

    raw: socket.socket
    whose: str
    source: object  # whom a share is taken from: the user's id on a unix socket, else the address
    begun: bool = False
    shed: str = ""  # why it was ended, if it was

    def end(self, why: str) -> None:
        """Let its handshake fail."""
        self.shed = why
        with suppress(OSError):  # the peer was quicker
            self.raw.shutdown(socket.SHUT_RDWR)


class Server:
    """What `serve` yields."""

    def __init__(
        self,
        listen: Sequence[str],
        handlers: Sequence[Any],
        contexts: Contexts,
        tasks: asyncio.TaskGroup,
        mode: int,
        limits: Limits,
        grace: float,
        on_call: Callable[[Call], None] | None,
        variable: str,
    ) -> None:
        self.refusing = ""
        self.methods: dict[str, Method] = {
            path: method(original, partial(self._serve, path, original))
            for handler in handlers
            for path, original in handler.__mapping__().items()
        }
        self._addresses = [(url, addresses.parse(url)) for url in listen]
        self._contexts = contexts
        self._tasks = tasks
        self._mode = mode
        self._limits = limits
        self._grace = grace
        self._on_call = on_call
        self._variable = variable
        self._listeners: list[_Listener] = []
        self._connections: set[ServerHttp2] = set()
        self._links: Counter[SpiffeId] = Counter()  # connections of each peer
        self._handshakes: dict[asyncio.Task[None], _Arrival] = {}  # the oldest first
        self._running: set[_Running] = set()
        self._closed = asyncio.Event()

    @property
    def urls(self) -> tuple[str, ...]:
        """Where it listens: ports chosen by the kernel are filled in."""
        return tuple(each.url for each in self._listeners)

    @property
    def connections(self) -> int:
        """How many peers are connected."""
        return len(self._connections)

    async def follow(self) -> None:
        """New connections show the newest certificate; accepted ones keep theirs, and stay
        as long as our bundles say who is at their other end."""
        while True:
            await self._contexts.replaced()
            await self._prove(list(self._connections))

    async def _prove(self, protocols: Sequence[ServerHttp2]) -> None:
        shown = [(p, p.connection.handshake) for p in protocols]
        known = [(p, handshake) for p, handshake in shown if handshake is not None]
        now = self._contexts.newest[0]
        for (protocol, _), why in zip(
            known, await unproven([handshake for _, handshake in known], now), strict=True
        ):
            if why is not None:
                self._dismiss(protocol, why, 0.0)

    def expired(self, protocol: ServerHttp2) -> None:
        """The certificate that a connection's peer showed holds no more."""
        shown = protocol.connection.handshake
        assert shown is not None
        self._dismiss(
            protocol,
            UnauthenticatedError(
                f"the certificate of {shown.peer_id} on this connection expired",
                hint="connect anew with a renewed one",
            ),
            self._grace,
        )

    def _dismiss(self, protocol: ServerHttp2, why: UnauthenticatedError, grace: float) -> None:
        """Take no call of this connection any more, and end it in so many seconds."""
        if protocol.refused or protocol.lost:
            return
        protocol.refused = why
        log.warning("connection of %s ends: %s", protocol.whose, why)
        protocol.connection.goaway()
        asyncio.get_running_loop().call_later(grace, protocol.connection.close)

    # -- listening ----------------------------------------------------------------------------

    async def publish(self) -> None:
        """Listen, on all addresses or on none."""
        try:
            for url, address in self._addresses:
                if isinstance(address, addresses.Unix):
                    made = await asyncio.to_thread(self._listen_unix, url, address.path)
                else:
                    made = await asyncio.to_thread(self._listen_tcp, url, address)
                self._listeners.append(made)
        except BaseException:
            await self._close_listeners()
            raise
        self._resume()

    def _listen_unix(self, url: str, path: str) -> _Listener:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise TakenError(
                    f"cannot listen on {url}: {path} is there and is no socket",
                    hint=f"move it away or set {self._variable} to another path",
                )
            self._refuse_if_alive(url, path)
        except FileNotFoundError:
            pass
        # made beside its place and moved there when it listens: nobody meets a socket that refuses
        early = path + "~" if len(path.encode()) < addresses.MAX_PATH else path
        with suppress(FileNotFoundError):
            os.unlink(early)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.bind(early)
            os.chmod(early, self._mode)
            sock.listen(_BACKLOG)
            if early != path:
                os.rename(early, path)
            inode = os.lstat(path).st_ino
        except OSError as error:
            sock.close()
            raise self._cannot_listen(url, error) from error
        return _Listener(sock, f"unix://{path}", path, inode)

    def _refuse_if_alive(self, url: str, path: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                return  # its owner is gone
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.ETIMEDOUT):  # those: alive and busy
                    raise self._cannot_listen(url, error) from error
            pid = credentials_of(probe).pid
        holder = holders.seen(pid) or holders.Process(pid, ()) if pid else None
        raise TakenError(
            f"cannot listen on {url}: {_told(holder)} answers there",
            hint=f"stop it or set {self._variable} to another path",
        )

    def _listen_tcp(self, url: str, address: addresses.Tcp) -> _Listener:
        sock: socket.socket | None = None
        try:
            family, where = _bindable(address)
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                only = 1 if address.host else 0  # no host: both families
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            sock.bind(where)
            sock.listen(_BACKLOG)
        except OSError as error:
            if sock is not None:
                sock.close()
            if error.errno == errno.EADDRINUSE:
                found = holders.of_port("tcp", address.port)
                holder = found[0].process if found else None
                who = "" if holder else f" (root sees which: ss -ltnp sport = :{address.port})"
                raise TakenError(
                    f"cannot listen on {url}: {_told(holder)} has port {address.port}",
                    hint=f"stop it{who} or set {self._variable} to another address",
                ) from error
            raise self._cannot_listen(url, error) from error
        port = sock.getsockname()[1]
        return _Listener(sock, addresses.tcp_url(address.host, port))

    def _cannot_listen(self, url: str, error: OSError) -> NsmError:
        # an address that is not there yet comes with the network, and the setting may be right
        kind = PreconditionError if error.errno == errno.EADDRNOTAVAIL else InvalidError
        return kind(
            f"cannot listen on {url}: {error.strerror or error}",
            hint=f"set {self._variable} to an address of this machine that this user may take",
        )

    async def _close_listeners(self) -> None:
        self._pause()
        for each in self._listeners:
            each.sock.close()
        await asyncio.to_thread(_unlink, [e for e in self._listeners if e.path])

    # -- accepting ----------------------------------------------------------------------------

    @property
    def _full(self) -> bool:
        return len(self._connections) + len(self._handshakes) >= self._limits.connections

    def _resume(self) -> None:
        if self.refusing or self._full:
            return
        loop = asyncio.get_running_loop()
        for each in self._listeners:
            if each.paused and each.sock.fileno() >= 0:
                each.paused = False
                loop.add_reader(each.sock.fileno(), self._accept, each)

    def _pause(self) -> None:
        loop = asyncio.get_running_loop()
        for each in self._listeners:
            if not each.paused and each.sock.fileno() >= 0:
                each.paused = True
                loop.remove_reader(each.sock.fileno())

    def _accept(self, listener: _Listener) -> None:
        for _ in range(16):  # then others have their turn
            if self._full:
                self._pause()
                return
            try:
                accepted, _address = listener.sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):  # no listening socket: a defect
                    raise
                log.warning("%s: cannot accept: %s; trying again", listener.url, error.strerror)
                self._pause()
                asyncio.get_running_loop().call_later(0.25, self._resume)
                return
            try:
                arrival = _arrived(accepted, listener)
            except OSError as error:  # it is gone already
                log.warning("a peer on %s: %s", listener.url, error.strerror)
                continue
            if len(self._handshakes) >= self._limits.handshakes:
                self._shed()
            handshake = self._tasks.create_task(
                self._handshake(arrival), name=f"handshake on {listener.url}"
            )
            self._handshakes[handshake] = arrival
            handshake.add_done_callback(partial(self._handshaken, arrival))

    def _shed(self) -> None:
        """Make room for a handshake: who has most unfinished ones loses the oldest of them.

        A peer that means well is done in some milliseconds; whoever fills all places
        with connections that say nothing is the one to lose them.
        """
        greediest, count = Counter(a.source for a in self._handshakes.values()).most_common(1)[0]
        task = next(t for t, a in self._handshakes.items() if a.source == greediest)
        self._handshakes.pop(task).end(f"{count} connections of its kind did not go on either")

    def _handshaken(self, arrival: _Arrival, task: "asyncio.Task[None]") -> None:
        self._handshakes.pop(task, None)
        if not arrival.begun:
            arrival.raw.close()
        self._resume()

    async def _handshake(self, arrival: _Arrival) -> None:
        arrival.begun = True
        identity, context = self._contexts.newest
        raw, whose = arrival.raw, arrival.whose
        try:
            make = partial(
                ServerHttp2,
                self,
                identity=identity,
                limits=self._limits,
                sock=raw if isinstance(raw, FdSocket) else None,
                whose=whose,
            )
            await secured(
                make,
                lambda layer: asyncio.get_running_loop().connect_accepted_socket(layer, raw),
                Telling(context, raw),
                server=True,
                patience=self._limits.handshake,
                shutdown=1.0,
            )
        except ssl.SSLCertVerificationError as error:
            log.warning(
                "refused %s: its certificate does not chain to any bundle here: %s",
                whose,
                error.verify_message,
            )
        except OSError as error:  # ssl.SSLError is one
            log.warning(
                "refused %s: TLS handshake failed: %s", whose, arrival.shed or _reason(error)
            )
        except Exception:  # whatever one peer does, the others are served
            log.exception("defect while letting in %s", whose)

    def made(self, protocol: ServerHttp2) -> None:
        """A connection finished its handshake."""
        self._connections.add(protocol)
        shown = protocol.connection.handshake
        if shown is not None:
            self._links[shown.peer_id] += 1
            most = max(1, self._limits.connections // _PART)
            left = (shown.peer_not_after - time.time_ns()) / SECOND
            protocol.expiry = asyncio.get_running_loop().call_later(left, self.expired, protocol)
            if protocol.identity is not self._contexts.newest[0]:  # replaced in the meantime
                self._tasks.create_task(self._prove([protocol]), name=f"proof of {protocol.whose}")
            if self._links[shown.peer_id] > most:
                log.warning("refused %s: it has %d connections already", protocol.whose, most)
                protocol.connection.close()
        if protocol.refused:
            log.warning("refused %s: %s", protocol.whose, protocol.refused)
            asyncio.get_running_loop().call_later(_REFUSED_FOR, protocol.connection.close)

    def gone(self, protocol: ServerHttp2) -> None:
        """A connection ended; that means nothing but that."""
        if protocol not in self._connections:
            return
        self._connections.discard(protocol)
        if protocol.expiry is not None:
            protocol.expiry.cancel()
        shown = protocol.connection.handshake
        if shown is not None:
            self._links[shown.peer_id] -= 1
            if not self._links[shown.peer_id]:
                del self._links[shown.peer_id]
        if not self._connections:
            self._closed.set()
        self._resume()

    # -- calls --------------------------------------------------------------------------------

    async def _serve(
        self, path: str, original: Method, stream: grpclib.server.Stream[Any, Any]
    ) -> None:
        """Every call's way through: who, what it came to, one line."""
        call = stream_of(stream)
        shown = call.connection.handshake
        task = asyncio.current_task()
        assert shown is not None  # others were answered in `CallHandler.accept`
        assert task is not None
        loop = asyncio.get_running_loop()
        start = loop.time()
        running = _Running(task, original.cardinality.server_streaming)
        call.fds = call.connection.call_fds(long=running.streaming)
        call.caller = _caller(stream, start)
        if not original.cardinality.client_streaming:
            call.inbox.until = start + self._limits.request
        self._running.add(running)
        code, text = Code.OK, ""
        try:
            await original.func(stream)
        except asyncio.CancelledError as error:
            if running.stopped:
                task.uncancel()
                code, text = Code.UNAVAILABLE, self.refusing
                if task.cancelling():  # its caller is gone as well
                    raise
                raise GRPCError(Status.UNAVAILABLE, text) from None
            late = call.caller.deadline is not None and loop.time() >= call.caller.deadline
            code, text = (Code.DEADLINE_EXCEEDED, "") if late else status_of(error)
            raise
        except Exception as error:
            code, text = status_of(error)
            if not expected(error):
                log.exception("defect in %s, called by %s", path, shown.peer_id)
            # At its deadline, or its caller is gone: nobody is answered. The task may not say so
            # any more: a call of its own that came to its end at the same moment took it for its.
            if task.cancelling() or call.cut:
                raise asyncio.CancelledError from error
            raise grpc_error(error) from None
        finally:
            self._running.discard(running)
            if call.fds:
                call.fds.end()
            if self._on_call:
                ms = (loop.time() - start) * 1000
                self._on_call(Call(path, shown.peer_id, code, ms, text))

    # -- stopping -----------------------------------------------------------------------------

    async def stop(self, grace: float | None = None) -> None:
        """Refuse what is new, let running calls end, tell the others UNAVAILABLE, close.

        grace in seconds, for unary calls; streams, which have no end of their own,
        are told at once. Harmless when called again.
        """
        if self.refusing:
            return
        grace = self._grace if grace is None else grace
        self.refusing = f"{self._contexts.newest[0].svid.id} is stopping; try again"
        await self._close_listeners()
        for task in list(self._handshakes):
            task.cancel()
        await self._ended(grace, streams_only=True)
        await self._ended(grace, streams_only=False)
        for protocol in list(self._connections):
            protocol.connection.goaway()
            protocol.connection.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING):
                while self._connections:
                    self._closed.clear()
                    await self._closed.wait()
        for protocol in list(self._connections):
            protocol.abort()

    async def _ended(self, grace: float, *, streams_only: bool) -> None:
        for running in self._running:
            if running.streaming or not streams_only:
                running.stop()
        if self._running:
            await asyncio.wait({r.task for r in self._running}, timeout=grace)


def _arrived(accepted: socket.socket, listener: _Listener) -> _Arrival:
    """What is known of an accepted connection at once. Raises OSError, and closes it then."""
    raw = accepted
    try:
        accepted.setblocking(False)
        if not listener.path:
            watch_for_death(accepted)
            whose, source = _peer_of(accepted)
            return _Arrival(accepted, whose, source)
        raw = sock = FdSocket(fileno=accepted.detach())
        sock.setblocking(False)
        sock.process = process_of(sock)  # now: later its number may be another's
    except BaseException:
        raw.close()
        raise
    return _Arrival(sock, f"pid {sock.process.pid} on {listener.url}", sock.process.uid)


def _unlink(listeners: Sequence[_Listener]) -> None:
    for each in listeners:
        with suppress(FileNotFoundError):
            if os.lstat(each.path).st_ino == each.inode:  # not another's by now
                os.unlink(each.path)


def _caller(stream: grpclib.server.Stream[Any, Any], now: float) -> Caller:
    call = stream_of(stream)
    wire = call.connection
    assert wire.handshake is not None
    given: Any = stream.metadata or {}
    single: dict[str, str] = {}
    for key in dict.fromkeys(given):
        values = given.getall(key) if hasattr(given, "getall") else [given[key]]
        if key in (TOKEN, TOKEN_EXPIRES) and len(values) > 1:
            log.warning("%s sent %s %d times: ignored", wire.handshake.peer_id, key, len(values))
        elif isinstance(values[-1], str):
            single[key] = values[-1]  # the last wins (`wire.md` §6.1)
    token, expires = single.pop(TOKEN, ""), single.pop(TOKEN_EXPIRES, "")
    return Caller(
        handshake=wire.handshake,
        token=token,
        token_expires=_instant(expires, wire.handshake.peer_id),
        unix=wire.sock is not None,
        process=wire.process,
        fds=call.fds,
        deadline=now + stream.deadline.time_remaining() if stream.deadline else None,
        metadata=single,
    )


def _instant(text: str, whose: SpiffeId) -> int | None:
    if not text:
        return None
    try:
        return parse_instant(text)
    except InvalidError as error:
        log.warning("%s sent an unreadable %s: %s", whose, TOKEN_EXPIRES, error)
        return None


def _bindable(address: addresses.Tcp) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    if not address.host:
        if socket.has_dualstack_ipv6():
            return socket.AF_INET6, ("::", address.port)
        return socket.AF_INET, ("0.0.0.0", address.port)  # noqa: S104 - an empty host says: all
    found = socket.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return found[0][0], found[0][4]


def _told(process: holders.Process | None) -> str:
    if process is None:
        return "another process"
    command = " ".join(process.argv)[:300]
    return f"process {process.pid} ({command})" if command else f"process {process.pid}"


def _peer_of(sock: socket.socket) -> tuple[str, str]:
    """A TCP peer's url and host."""
    host, port = sock.getpeername()[:2]
    return addresses.tcp_url(host, port), host


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return error.strerror or str(error) or type(error).__name__

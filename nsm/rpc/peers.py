"""Connections to other processes: shared, each bound to the certificates of its handshake.

Upstream dials anew for every call, so a token and the certificate it is checked
with are always of one age. Here connections are pooled, and one whose own
certificate was replaced, or whose peer's has lived half of what was left of it,
takes no new link: the next opens a new connection, and the old one closes when its
links are gone. That a connection ends means nothing: the next link dials again.

A peer that keeps received file descriptors as long as the connection (upstream
does) would pin every namespace we name, so calls with descriptors get a
connection per wire there, closed with `release`.
"""

import asyncio
import logging
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

from nsm.caller import TOKEN, TOKEN_EXPIRES, Fds, inode_url
from nsm.errors import InternalError, NsmError, UnauthenticatedError, UnavailableError
from nsm.identity.background import background
from nsm.identity.source import Handshake, Identity, Source
from nsm.identity.tokens import format_instant, issue
from nsm.model import SECOND
from nsm.rpc import addresses
from nsm.rpc.fds import CallFds, connect, key_of
from nsm.rpc.grpclib_private import ClientHttp2, Limits, LinkChannel
from nsm.rpc.sockets import LOOK, Silence, watch_for_death
from nsm.rpc.status import error_of, status_of
from nsm.rpc.tls import Contexts, secured, unproven

log = logging.getLogger(__name__)

DIAL_TIMEOUT = 0.75  # seconds, as upstream's manager and forwarder have it
_ATTEMPT_DELAY = 0.1  # seconds before the next address of a name is tried beside the first
_FIRST_PAUSE, _LONGEST_PAUSE = 0.01, 0.25  # seconds until a peer that left at once is dialled anew
_REMEMBERED = 4096  # places whose peer keeps descriptors
_OWN_FD = re.compile(r"/proc/self/fd/([0-9]+)", re.ASCII)
_SHORTEST = 1.0  # seconds a connection is used at least, however soon its peer's certificate ends
_SHUTDOWN = 1.0  # seconds a TLS goodbye may take


@dataclass(frozen=True, slots=True)
class _Where:
    """What a link asks for: by url in messages, by place in the pool."""

    url: str
    target: addresses.Unix | addresses.Tcp
    place: str


def _place(url: str, target: addresses.Unix | addresses.Tcp) -> str:
    """The number of a descriptor means another socket tomorrow, so its file is the place."""
    found = _OWN_FD.fullmatch(target.path) if isinstance(target, addresses.Unix) else None
    if found is None:
        return url
    try:
        return inode_url(*key_of(int(found[1])))
    except (OSError, OverflowError) as error:
        raise UnavailableError(f"cannot connect to {url}: no such descriptor is open") from error


class _Connection:
    """One dialled connection and the links on it."""

    def __init__(self, url: str, protocol: ClientHttp2, handshake: Handshake) -> None:
        self.url = url
        self.protocol = protocol
        self.handshake = handshake
        self.links = 0
        self.outdated = asyncio.Event()
        self.silence = Silence(protocol.tcp) if protocol.tcp else None
        self.half_life: asyncio.TimerHandle | None = None
        self.idle: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        return (
            not self.protocol.lost
            and not self.outdated.is_set()
            and self.links < self.protocol.stream_limit
        )

    def retire(self) -> None:
        self.outdated.set()
        if not self.links:
            self.close()

    def close(self) -> None:
        for timer in (self.half_life, self.idle):
            if timer is not None:
                timer.cancel()
        self.outdated.set()
        self.protocol.connection.close()


class Link:
    """One call's, or one long stream's, place on a connection."""

    def __init__(self, connection: _Connection, authority: str) -> None:
        self.url = connection.url
        self.handshake = connection.handshake
        self.channel = LinkChannel(connection.protocol, connection.url, authority)
        self._connection = connection
        self._fds: CallFds | None = None

    @property
    def unix(self) -> bool:
        """Whether descriptors can travel here."""
        return self.fds is not None

    @property
    def fds(self) -> Fds | None:
        """The descriptors that travel with this link's calls; None on TCP.

        Made when first asked for, because what came and nobody claimed is kept longer while
        a call runs that may ask for it: a stream that never does would pin its namespace.
        """
        if self._fds is None:
            self._fds = self._connection.protocol.connection.call_fds()
        return self._fds

    def metadata(self, lifetime: int) -> dict[str, str]:
        """A fresh token for the peer of this handshake, lifetime in ns (`wire.md` §4.2, §4.3)."""
        token = issue(
            self.handshake.own,
            self.handshake.peer_id,
            lifetime,
            peer_not_after=self.handshake.peer_not_after,
            now=time.time_ns(),
        )
        return {TOKEN: token.text, TOKEN_EXPIRES: format_instant(token.expires)}

    @contextmanager
    def errors(self) -> Iterator[None]:
        """What calls raise leaves this block as an NsmError that names the URL."""
        try:
            yield
        except NsmError:
            raise
        except Exception as error:
            protocol = self._connection.protocol
            if protocol.lost and protocol.refused:
                raise protocol.refused from error
            raise error_of(error, self.url) from error

    @property
    def outdated(self) -> bool:
        """Whether new links would get another connection."""
        return self._connection.outdated.is_set()

    async def outdating(self) -> None:
        """Wait until a long stream should move to a new link."""
        await self._connection.outdated.wait()

    def end(self) -> None:
        """The link is given back."""
        if self._fds:
            self._fds.end()


class Peers:
    """Every connection this process has dialled; an async context manager.

    dial_timeout is in seconds and covers everything until the peer's SETTINGS came.
    idle is how long a connection without links is kept, in seconds.
    """

    def __init__(
        self,
        source: Source,
        *,
        dial_timeout: float = DIAL_TIMEOUT,
        idle: float = 300.0,
        limits: Limits = Limits(),  # noqa: B008 - frozen
    ) -> None:
        self._contexts = Contexts(source, server=False)
        self._dial_timeout = dial_timeout
        self._idle = idle
        self._limits = limits
        self._pool: dict[tuple[str, str], list[_Connection]] = {}
        self._dials: dict[tuple[str, str], asyncio.Task[_Connection | NsmError]] = {}
        self._keeping: set[str] = set()  # places whose peer keeps descriptors
        self._stack = AsyncExitStack()
        self._tasks: asyncio.TaskGroup
        self._ending = False

    async def __aenter__(self) -> Self:
        await self._contexts.build()
        self._tasks = await self._stack.enter_async_context(background())
        self._tasks.create_task(self._follow(), name="newest certificate for new links")
        self._tasks.create_task(self._listen(), name="machines that fell silent")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending = True  # who loses a connection now may well dial again at once
        for connection in self._all():
            connection.close()
        await self._stack.__aexit__(kind, error, trace)
        for connection in self._all():
            connection.close()
        self._pool.clear()

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._all())

    @asynccontextmanager
    async def link(
        self, url: str, *, private: str = "", dial_timeout: float | None = None, whose: str = ""
    ) -> AsyncIterator[Link]:
        """A place on a connection to url for one call or one long stream.

        private is the connection id of a wire whose call carries file descriptors:
        unless the peer frees those, its calls have a connection of their own.
        whose says in messages who is meant to be there, as `forwarder fwd-1`.
        Raises InvalidError, UnavailableError and UnauthenticatedError.
        """
        target = addresses.parse(url)
        authority = "localhost" if isinstance(target, addresses.Unix) else _authority(target)
        where = _Where(f"{whose} at {url}" if whose else url, target, _place(url, target))
        connection = await self._get(where, private, dial_timeout or self._dial_timeout)
        link = Link(connection, authority)
        try:
            yield link
        finally:
            link.end()
            self._give_back(connection)

    async def release(self, private: str) -> None:
        """The wire of that connection id closed: so do the connections it had for itself."""
        for key in [k for k in self._pool if k[1] == private and private]:
            for connection in list(self._pool.get(key, ())):
                connection.retire()

    # -- choosing -----------------------------------------------------------------------------

    async def _get(self, where: "_Where", private: str, patience: float) -> _Connection:
        unix = isinstance(where.target, addresses.Unix)
        pause = _FIRST_PAUSE
        async with bounded(patience, where.url):
            while True:
                key = (where.place, private if unix and where.place in self._keeping else "")
                found = self._find(key, private if unix else "")
                if found is None:
                    result = await self._dialled(key, where, patience)
                    if isinstance(result, NsmError):
                        raise result
                    if private and unix and result.usable and not result.protocol.frees_fds:
                        found = self._take_private(result, where.place, private)
                    if found is None and result.outdated.is_set():
                        await asyncio.sleep(pause)  # who sends everybody away is not to be stormed
                        pause = min(pause * 2, _LONGEST_PAUSE)
                if found is not None:
                    found.links += 1
                    if found.idle:
                        found.idle.cancel()
                        found.idle = None
                    return found

    def _find(self, key: tuple[str, str], private: str) -> _Connection | None:
        """A connection with a free place; with fds on board, one that may carry them."""
        for connection in self._pool.get(key, ()):
            if connection.usable and (not private or key[1] or connection.protocol.frees_fds):
                return connection
        return None

    def _take_private(self, fresh: _Connection, place: str, private: str) -> _Connection | None:
        """Dialled for all, but the peer keeps descriptors: the first wire may have it whole."""
        self._keep(place)
        if fresh.links or fresh not in self._pool.get((place, ""), ()):
            return None
        self._forget((place, ""), fresh)
        self._pool.setdefault((place, private), []).append(fresh)
        fresh.protocol.on_lost = partial(self._lost, (place, private), fresh)
        return fresh

    async def _dialled(
        self, key: tuple[str, str], where: "_Where", patience: float
    ) -> _Connection | NsmError:
        """The result of one dial, shared by all who wait for the same."""
        stopping = UnavailableError(f"cannot reach {where.url}: this process is stopping")
        dial = self._dials.get(key)
        if dial is None and self._ending:
            return stopping
        if dial is None:
            dial = self._tasks.create_task(
                self._dial(key, where, patience), name=f"dial of {where.url}"
            )
            self._dials[key] = dial
            dial.add_done_callback(lambda _: self._dials.pop(key, None))
        await asyncio.wait({dial})
        if dial.cancelled():
            return stopping
        return dial.result()

    def _give_back(self, connection: _Connection) -> None:
        connection.links -= 1
        if connection.links or connection.protocol.lost:
            return
        if connection.outdated.is_set():
            connection.close()
        else:
            self._rest(connection)

    def _rest(self, connection: _Connection) -> None:
        """Nobody uses it now; if nobody does for a while, it goes."""
        loop = asyncio.get_running_loop()
        connection.idle = loop.call_later(self._idle, connection.retire)

    def _lost(self, key: tuple[str, str], connection: _Connection) -> None:
        connection.close()
        self._forget(key, connection)

    def _forget(self, key: tuple[str, str], connection: _Connection) -> None:
        some = self._pool.get(key, [])
        if connection in some:
            some.remove(connection)
        if not some:
            self._pool.pop(key, None)

    def _all(self) -> list[_Connection]:
        return [c for some in self._pool.values() for c in some]

    def _keep(self, place: str) -> None:
        if len(self._keeping) >= _REMEMBERED:
            self._keeping.clear()  # costs one dial more for each
        self._keeping.add(place)

    async def _follow(self) -> None:
        while True:
            await self._contexts.replaced()
            old = self._all()
            for connection in old:
                connection.retire()
            whys = await unproven([c.handshake for c in old], self._contexts.newest[0])
            for connection, why in zip(old, whys, strict=True):
                if why is not None:  # it does not wait for its links' end
                    connection.protocol.refused = why
                    connection.close()

    async def _listen(self) -> None:
        """End connections to machines that are gone, long before TCP itself would.

        Who waits for an answer over one would wait for its whole deadline.
        """
        while True:
            await asyncio.sleep(LOOK)
            now = time.monotonic()
            for connection in self._all():
                if connection.silence is None or not connection.links:
                    continue
                if (silent := connection.silence.lasts(now)) > connection.silence.bearable:
                    log.warning(
                        "%s: its machine acknowledges nothing for %.1f s; the connection is given"
                        " up",
                        connection.url,
                        silent,
                    )
                    connection.protocol.abort()

    # -- dialling -----------------------------------------------------------------------------

    async def _dial(
        self, key: tuple[str, str], where: "_Where", patience: float
    ) -> _Connection | NsmError:
        url = where.url
        try:
            async with bounded(patience, url):
                protocol = await dial(url, where.target, self._contexts, self._limits, patience)
        except NsmError as error:
            return error
        except Exception as error:
            log.exception("defect while dialling %s", url)
            return InternalError(f"cannot connect to {url}: {status_of(error)[1]}")
        shown = protocol.connection.handshake
        assert shown is not None
        connection = _Connection(url, protocol, shown)
        if protocol.lost:
            return UnavailableError(f"{url} ended the connection at once")
        if not protocol.stream_limit:
            connection.close()
            return UnavailableError(f"{url} takes no call (its MAX_CONCURRENT_STREAMS is 0)")
        protocol.on_lost = partial(self._lost, key, connection)
        protocol.on_goaway = connection.retire
        if protocol.frees_fds:
            self._keeping.discard(where.place)
        elif isinstance(where.target, addresses.Unix):
            self._keep(where.place)
        loop = asyncio.get_running_loop()
        half = (shown.peer_not_after - time.time_ns()) / SECOND / 2
        connection.half_life = loop.call_later(max(half, _SHORTEST), connection.retire)
        self._pool.setdefault(key, []).append(connection)
        self._rest(connection)
        if protocol.identity is not self._contexts.newest[0]:
            connection.retire()  # replaced while we dialled: who waits dials again
        return connection


async def dial(
    url: str,
    target: addresses.Unix | addresses.Tcp,
    contexts: Contexts,
    limits: Limits,
    patience: float,
) -> ClientHttp2:
    """A connection to url over which both sides have accepted each other.

    Raises UnavailableError and UnauthenticatedError.
    """
    identity, context = contexts.newest
    protocol: ClientHttp2 | None = None
    try:
        if isinstance(target, addresses.Unix):
            protocol = await _dial_unix(url, target.path, identity, context, limits, patience)
        else:
            protocol = await _dial_tcp(url, target, identity, context, limits, patience)
        await protocol.ready
    except OSError as error:  # ssl.SSLError and TimeoutError are such
        raise cannot_connect(error, url) from error
    except BaseException:
        if protocol is not None:
            protocol.abort()
        raise
    if protocol.refused:
        raise _named(protocol.refused, url)
    if protocol.lost:
        raise UnavailableError(f"{url} ended the connection before it took a call")
    return protocol


async def _dial_unix(
    url: str,
    path: str,
    identity: Identity,
    context: ssl.SSLContext,
    limits: Limits,
    patience: float,
) -> ClientHttp2:
    sock = await connect(path)
    make = partial(ClientHttp2, identity=identity, limits=limits, sock=sock, whose=url)
    protocol, _ = await secured(
        make,
        lambda layer: asyncio.get_running_loop().create_connection(layer, sock=sock),
        context,
        server=False,
        patience=patience,
        shutdown=_SHUTDOWN,
    )
    return protocol


async def _dial_tcp(
    url: str,
    target: addresses.Tcp,
    identity: Identity,
    context: ssl.SSLContext,
    limits: Limits,
    patience: float,
) -> ClientHttp2:
    make = partial(ClientHttp2, identity=identity, limits=limits, sock=None, whose=url)
    protocol, transport = await secured(
        make,
        lambda layer: asyncio.get_running_loop().create_connection(
            layer,
            target.host or "localhost",
            target.port,
            happy_eyeballs_delay=_ATTEMPT_DELAY,
        ),
        context,
        server=False,
        patience=patience,
        shutdown=_SHUTDOWN,
    )
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is not None:  # None, or an error: it ended already, and `ready` says so
        with suppress(OSError):
            watch_for_death(sock)
            protocol.tcp = sock
    return protocol


@asynccontextmanager
async def bounded(patience: float, url: str) -> AsyncIterator[None]:
    """Raises UnavailableError if the block, which connects to url, takes longer (seconds)."""
    try:
        async with asyncio.timeout(patience) as limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise UnavailableError(
            f"cannot connect to {url}: no answer within {patience:g} s",
            hint="is its process running, and not overloaded?",
        ) from error


def cannot_connect(error: OSError, url: str) -> NsmError:
    """Why a dial failed, as one of ours."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error_of(error, url)
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return UnauthenticatedError(
            f"the TLS handshake with {url} failed: {reason}",
            hint="every listener of the mesh wants mutual TLS 1.2 or newer",
        )
    if isinstance(error, socket.gaierror):
        return UnavailableError(f"cannot connect to {url}: its name is not known: {error.strerror}")
    why = os.strerror(error.errno) if error.errno else str(error)
    return UnavailableError(f"cannot connect to {url}: {why}", hint="is its process running?")


def _named(error: UnauthenticatedError, url: str) -> UnauthenticatedError:
    if url in error.message:
        return error
    return UnauthenticatedError(f"{url}: {error.message}", hint=error.hint)


def _authority(target: addresses.Tcp) -> str:
    return addresses.tcp_url(target.host or "localhost", target.port).removeprefix("tcp://")

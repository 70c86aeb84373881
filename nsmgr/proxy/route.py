"""The proxy's route: a request leaves for another domain, or enters this one (`wire.md` §9.3).

The endpoint's name says where it goes. Leaving, it keeps its `@domain`, and goes to
the other domain's proxy. Entering, it loses it: the endpoint is looked for in this
domain's registry, and the request goes to its manager; or, where the endpoint had
itself registered under that full name in a third domain (floating), to the manager
it registered through, with its name as it is. What comes back is as it was asked.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from time import time_ns

import structlog

from nsm import path
from nsm.caller import Caller
from nsm.connections import Held
from nsm.descriptors import Descriptors
from nsm.domains import join, split
from nsm.errors import (
    DeadlineError,
    InvalidError,
    NotFoundError,
    NsmError,
    PeerError,
    UnauthenticatedError,
    UnavailableError,
)
from nsm.hop import Established
from nsm.model import Connection, Context, Endpoint, IPContext, Mechanism, Path, Request, State
from nsm.rpc.calls import Calls
from nsm.rpc.registry import RegistryClient
from nsm.undo import Undo
from nsmgr.proxy import addresses
from nsmgr.proxy.addresses import AddressMap, Crossing
from nsmgr.proxy.names import Names
from nsmgr.proxy.registry import ProxyRegistry

log = structlog.get_logger(__name__)
LONGEST = 60.0  # seconds for a caller without a deadline
GOODBYE = 2.0  # seconds for a hop that a connection has left
WAIT, SPARE = 5.0, 2.0  # seconds for an endpoint to register again, and what is left after


@dataclass(frozen=True, slots=True)
class Way:
    """A next hop: home is one of this domain's managers; bare says that names lose `@domain`;
    domain is how it is written there, "" where as it came.
    """

    url: str
    home: bool
    bare: bool = False
    domain: str = ""


@dataclass(frozen=True, slots=True)
class Passage:
    """Where a connection goes on, and what was agreed on with the next hop."""

    endpoint: str
    way: Way
    outgoing: Mechanism | None


class ProxyRoute:
    """Passes connections on over a domain's border.

    local is this domain's registry, beyond the others'. addresses and labels are
    asked for each time: their files change.
    """

    def __init__(
        self,
        local: RegistryClient,
        beyond: ProxyRegistry,
        names: Names,
        calls: Calls,
        addresses: Callable[[], AddressMap],
        labels: Callable[[], Mapping[str, str]],
        dial_timeout: float,
    ) -> None:
        self._local = local
        self._beyond = beyond
        self._names = names
        self._calls = calls
        self._addresses = addresses
        self._labels = labels
        self._dial_timeout = dial_timeout

    async def establish(
        self, asked: Request, held: Held[Passage], caller: Caller, undo: Undo
    ) -> Established:
        """Ask the next hop, and the one the endpoint is met at now if it has moved."""
        conn = self._filled_in(asked.connection)
        asked = replace(asked, connection=conn)
        memory = held.memory
        known = memory if memory and memory.endpoint == conn.endpoint else None
        entering = _entering(_mechanisms(asked), caller)
        refused: list[tuple[Way, NsmError]] = []
        async with aclosing(self._ways(conn, entering, known, caller)) as ways:
            try:
                async for way in ways:
                    crossing = _crossing(way, entering)
                    try:
                        made = await self._try(way, crossing, asked, held, caller, undo)
                    except NsmError as reason:
                        refused.append((way, reason))
                        if isinstance(reason, DeadlineError):
                            break
                    else:
                        if memory and held.made and not _same(memory, conn, way):
                            await self._leave(held.made, memory, refused)
                        return Established(made, way.url)
            except NsmError as reason:  # it is met nowhere else, or nobody could say where
                if not refused:
                    raise
                log.info("no other way", endpoint=conn.endpoint, why=str(reason))
        raise refused[-1][1]

    async def withdraw(
        self, conn: Connection, memory: Passage | None, caller: Caller | None
    ) -> None:
        """Close it at the next hop; after a restart, at the one its endpoint's name leads to."""
        if caller is None:
            if memory:
                # Nobody waits for an answer, and the next hop's own lease ends soon after ours.
                await self._leave(conn, memory, ())
            return
        if memory is None and len(conn.segments) <= conn.index + 1:
            return  # it never went on
        entering = _entering((conn.mechanism,) if conn.mechanism else (), caller)
        async with aclosing(self._ways(conn, entering, memory, caller)) as ways:
            async for way in ways:
                agreed = memory.outgoing if memory and memory.way == way else None
                try:
                    await self._close(way.url, replace(_called(conn, way), mechanism=agreed))
                except UnavailableError as reason:
                    away = reason
                else:
                    return
        raise away

    # -- where to ------------------------------------------------------------------------------

    async def _ways(
        self,
        conn: Connection,
        entering: bool,
        known: Passage | None,
        caller: Caller,
    ) -> AsyncGenerator[Way, None]:
        """Next hops to try, each once, what is known before what has to be asked for.

        Raises NotFoundError, in upstream's words, where the endpoint is met nowhere.
        """
        if not conn.endpoint:
            raise InvalidError(
                f"connection {conn.id} to {conn.service!r} names no endpoint",
                hint="a forwarder chooses one before it asks another domain",
            )
        tried = set()
        if known:
            tried.add(known.way)
            yield known.way
        lately = None
        if url := self._names.registered(conn.endpoint):
            lately = self._home(conn.endpoint, url)
        elif (
            not entering
            and (url := self._names.found(conn.endpoint))
            and not await self._is_ourselves(url)
        ):
            lately = Way(url, home=False)
        if lately and lately not in tried:
            tried.add(lately)
            yield lately
        now = await self._asked(conn, caller, entering=entering)
        if now not in tried:
            yield now

    async def _asked(self, conn: Connection, caller: Caller, *, entering: bool) -> Way:
        """The way as the registries tell it now."""
        name, domain = split(conn.endpoint)
        gone = NotFoundError(
            f"network service endpoint {name} not found",
            hint=f"{self._local.url} does not hold it now: is it running?",
        )
        if entering or not domain:
            if url := await self._here(conn):
                return Way(url, home=True, bare=True)
            # Who comes in does not have us ask the world: but what registered through us before
            # a restart may not be here again yet.
            if not domain or (entering and not self._names.young):
                raise gone
        try:
            url = await self._beyond.ask(conn.endpoint, caller)
        except NsmError as reason:
            if entering:  # it came to us because it should be here
                raise gone from reason
            raise
        if url and not await self._is_ourselves(url):
            if entering:
                raise gone  # it left for another domain; we are on no way between two others
            return Way(url, home=False)
        if not entering and (url := await self._here(conn)):
            return Way(url, home=True, bare=True)
        # It is registered through us and we do not know by whom: we were restarted. Its
        # watch broke, so it registers again in a moment.
        if url := await self._names.comes(conn.endpoint, _patience(caller)):
            return self._home(conn.endpoint, url)
        raise gone

    def _home(self, endpoint: str, url: str) -> Way:
        """To the manager whose endpoint registered elsewhere, under the name that it knows."""
        return Way(url, home=True, domain=split(self._names.called(endpoint))[1])

    async def _is_ourselves(self, url: str) -> bool:
        """Whether who answers at url is us: others may know us by a URL that we do not."""
        try:
            async with self._calls.peers.link(url, dial_timeout=self._dial_timeout) as link:
                return link.handshake.peer_id == link.handshake.own.id
        except NsmError:
            return False  # the request will say why

    async def _here(self, conn: Connection) -> str:
        """The URL of the manager that this domain's registry has for the endpoint; "" if none."""
        name, service = split(conn.endpoint)[0], split(conn.service)[0]
        query = Endpoint(name=name, services=(service,) if service else ())
        for found in await self._local.find_endpoints(query):
            if found.name == name and (found.expires is None or found.expires > time_ns()):
                return found.url
        return ""

    # -- calling -------------------------------------------------------------------------------

    async def _try(
        self,
        way: Way,
        crossing: Crossing,
        asked: Request,
        held: Held[Passage],
        caller: Caller,
        undo: Undo,
    ) -> Connection:
        """Ask one next hop; on failure what is new there is taken back."""
        conn = asked.connection
        offered = _mechanisms(asked)
        known_addresses = self._addresses()
        onward = _called(conn, way)
        before = held.memory
        if before and not _same(before, conn, way):
            onward = path.end(onward)  # what lies behind belongs to the way it has left
        request = replace(
            asked,
            connection=replace(
                onward,
                mechanism=conn.mechanism
                and addresses.onward(conn.mechanism, crossing, known_addresses),
            ),
            preferences=tuple(
                addresses.onward(one, crossing, known_addresses) for one in asked.preferences
            ),
        )
        before_us = len(onward.segments) > onward.index + 1  # and we were restarted
        stands = _same(before, conn, way) if before else before_us
        known = [request.connection]
        async with Undo() as attempt:
            if not stands or conn.state == State.RESELECT_REQUESTED:
                # Before the call, not after: it may fail here and have worked there.
                what = f"close {conn.id} at {way.url}"
                attempt.add(what, self._take_back, way.url, known)
            answer = _held_to(request.connection, await self._ask(way, request, conn, caller), way)
            known.append(replace(request.connection, path=answer.path))
            made = path.measured(answer, **{path.BORDER: crossing.value})
            made = replace(made, service=conn.service, endpoint=conn.endpoint)
            if answer.mechanism:
                shown = addresses.back(answer.mechanism, crossing, offered, known_addresses)
                made = replace(made, mechanism=shown)
        undo.absorb(attempt)
        held.memory = Passage(conn.endpoint, way, answer.mechanism)
        undo.add("remember where it went before", _remember, held, before)
        return made

    async def _ask(
        self, way: Way, request: Request, conn: Connection, caller: Caller
    ) -> Connection:
        domain = split(conn.endpoint)[1]
        whose = (
            f"the manager of endpoint {request.connection.endpoint}"
            if way.home
            else f"the nsmgr-proxy of domain {domain!r}"
        )
        with Descriptors() as none:  # no file travels between nodes
            try:
                answer = await self._calls.request(
                    way.url,
                    request,
                    fds=none,
                    within=caller.left() or LONGEST,
                    dial_timeout=self._dial_timeout,
                    whose=whose,
                )
            except UnavailableError:
                self._names.lose(conn.endpoint, way.url)
                raise
            except UnauthenticatedError as unknown:
                if way.home:
                    raise
                raise UnauthenticatedError(
                    f"{whose} at {way.url} and we do not trust one another: {unknown.message}",
                    hint="exchange the bundles of both trust domains: each goes into the other"
                    " issuer's NSM_FEDERATION_DIR as TRUST-DOMAIN.pem",
                ) from unknown
            return answer.connection

    async def _leave(
        self, conn: Connection, before: Passage, refused: Sequence[tuple[Way, NsmError]]
    ) -> None:
        """Close conn where it went before; who cannot be told has its own lease."""
        if any(way == before.way and isinstance(why, UnavailableError) for way, why in refused):
            return
        told = replace(_called(conn, before.way), mechanism=before.outgoing)
        try:
            async with asyncio.timeout(GOODBYE):
                await self._close(before.way.url, told)
        except (NsmError, TimeoutError) as reason:
            log.warning("the hop before was not told", url=before.way.url, error=str(reason))

    async def _take_back(self, url: str, known: Sequence[Connection]) -> None:
        """Close by what was known last: upstream's hops find theirs by their own segment only."""
        await self._close(url, known[-1])

    async def _close(self, url: str, conn: Connection) -> None:
        with Descriptors() as none:
            await self._calls.close(url, conn, fds=none)

    def _filled_in(self, conn: Connection) -> Connection:
        """The cluster's labels over its own; a context for endpoints that take it as given."""
        context = conn.context or Context()
        return replace(
            conn,
            labels={**conn.labels, **self._labels()},
            context=replace(context, ip=context.ip or IPContext()),
        )


async def _remember(held: Held[Passage], before: Passage | None) -> None:
    held.memory = before


def _same(before: Passage, conn: Connection, way: Way) -> bool:
    """Whether conn goes where it went before: what it has behind there is not to be closed.

    Another domain has it by the same ids, by whichever URL that domain's proxy is met.
    """
    if before.endpoint != conn.endpoint:
        return before.way.url == way.url
    return before.way == way or not (before.way.home or way.home)


def _called(conn: Connection, way: Way) -> Connection:
    """The connection as the next hop calls it."""
    if not way.bare and not way.domain:
        return conn
    service, endpoint = (
        one and join(split(one)[0], way.domain) for one in (conn.service, conn.endpoint)
    )
    return replace(conn, service=service, endpoint=endpoint)


def _entering(offered: tuple[Mechanism, ...], caller: Caller) -> bool:
    """Whether the request comes from another domain: from one's proxy, or from a stranger."""
    ours = caller.id.trust_domain == caller.handshake.own.id.trust_domain
    return not ours or addresses.has_left(offered)


def _held_to(asked: Connection, answer: Connection, way: Way) -> Connection:
    """The answer, if it is one: about what was asked, and nobody left of us changed by it."""
    here = asked.index
    if answer.id != asked.id or answer.index != here or len(answer.segments) <= here:
        raise PeerError(
            f"{way.url} answered for connection {answer.id[:64]!r} when it was asked for"
            f" {asked.id}",
            code=InvalidError.code,
        )
    try:
        path.check(answer)  # or nobody left of us would take its next refresh, nor get it out again
    except InvalidError as wrong:
        raise PeerError(
            f"{way.url} answered for connection {asked.id} with {wrong.message}",
            code=InvalidError.code,
        ) from wrong
    # Our own has the token by which the next hop knows us: it links both sides of the path.
    own = replace(answer.segments[here], name=asked.segments[here].name, id=asked.id)
    segments = (*asked.segments[:here], own, *answer.segments[here + 1 :])
    return replace(answer, path=Path(segments, here))


def _crossing(way: Way, entering: bool) -> Crossing:
    if not way.home:
        return Crossing.LEAVING
    return Crossing.ENTERING if entering else Crossing.NONE


def _mechanisms(asked: Request) -> tuple[Mechanism, ...]:
    agreed = asked.connection.mechanism
    return (*((agreed,) if agreed else ()), *asked.preferences)


def _patience(caller: Caller) -> float:
    left = caller.left()
    return WAIT if left is None else max(0.0, min(WAIT, left - SPARE))

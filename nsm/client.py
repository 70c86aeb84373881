"""Getting wires: asking the node's manager for a network service, and keeping what it gives.

    async with Client("app", source=identity, manager=MANAGER) as client:
        async with client.connect("kernel://icmp-responder/nsm-1") as wire:
            print(wire.interface, wire.addresses)

A wire is refreshed for as long as its block lasts and closed at its end, also
when the block is cancelled. What the manager tells of it is followed: a wire it
lost is asked for again, at once and then with growing pauses. The kernel keeps
the wire meanwhile, so nothing here breaks what may still carry packets.
"""

import asyncio
import contextlib
import enum
import ipaddress
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import structlog

from nsm import exclusions, mechanisms, nsurl, path, policy
from nsm.caller import inode_url
from nsm.descriptors import Descriptors, opened
from nsm.errors import (
    Code,
    DeadlineError,
    ExhaustedError,
    InvalidError,
    NotFoundError,
    NsmError,
    PeerError,
    PreconditionError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)
from nsm.heal import Cause, Trouble
from nsm.identity.background import background
from nsm.identity.source import Source
from nsm.liveness import Liveness, Pulse, Rhythm
from nsm.mechanisms import INODE_URL, KERNEL, NAME
from nsm.model import (
    SECOND,
    Connection,
    Context,
    DNSConfig,
    Event,
    EventType,
    IPContext,
    Mechanism,
    Path,
    Request,
    Route,
    Segment,
    Selector,
    State,
)
from nsm.nsurl import NSURL
from nsm.path import earliest_expiry
from nsm.race import unless
from nsm.rpc.calls import Calls
from nsm.rpc.peers import Peers
from nsm.undo import Undo

log = structlog.get_logger(__name__)

OWN_NAMESPACE = "/proc/self/ns/net"
LIFETIME = 600 * SECOND  # of tokens
DIAL_TIMEOUT, REQUEST_TIMEOUT = 5.0, 15.0  # seconds, as upstream's client has them
CLOSE_WITHIN = 5.0  # seconds all tries to close a wire may take; then its lease ends it
PAUSES = (0.2, 0.3, 0.5, 0.8, 1.3, 2.0, 3.0, 5.0)  # seconds between tries; the last repeats
LEAST_REFRESH = 0.2  # seconds, whatever expiries a path claims
RESELECT_AFTER = 10.0  # seconds of "not found" after which another endpoint is asked for
LISTEN_AGAIN = 1.0  # seconds at most between tries to hear the manager, on this machine
ANSWER_WITHIN = 0.6  # seconds in which who is at the end of an earlier life's wire must answer
SETTLE = 0.05  # seconds in which a deletion may turn out to be a replacement

Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class Change(enum.StrEnum):
    """What became of a wire."""

    UP = "up"
    REFUSED = "refused"  # a try to get it; another may follow
    DOWN = "down"  # lost, or not refreshed; it is tried again
    CLOSED = "closed"


class Why(enum.IntEnum):
    """Why a wire should be asked for again, the graver the higher."""

    NOTHING = 0
    REFRESH = 1
    UNSURE = 2  # the monitor stream broke: nobody can say how it is
    LOST = 3  # the manager says it is down, or does not know it
    DELETED = 4
    SILENT = 5  # the far end does not answer pings any more; nobody else says so


class News:
    """What was heard of one wire and not acted upon yet."""

    def __init__(self) -> None:
        self.waiting = False  # between tries that fail
        self.hurried = False
        """Whether the last wait was ended by what was heard."""
        self._why = Why.NOTHING
        self._ours = False
        self._heard = asyncio.Event()
        self._silence = asyncio.Event()

    def add(self, why: Why) -> None:
        """Remember the gravest reason to ask again."""
        self._why = max(self._why, why)
        self._heard.set()

    def insist(self) -> None:
        """Ask again whatever the manager says: the reason is ours."""
        self._ours = True
        self._heard.set()

    def fell_silent(self) -> None:
        """The far end does not answer pings any more, whatever the manager says."""
        self._silence.set()
        self._heard.set()

    async def silence(self) -> None:
        """Wait until the far end falls silent."""
        await self._silence.wait()

    def heed_silence(self) -> None:
        """It is acted upon."""
        self._silence.clear()
        if not self._why and not self._ours:
            self._heard.clear()

    def clear(self) -> None:
        """All is well, as the manager says."""
        self._why = Why.NOTHING
        if not self._ours and not self._silence.is_set():
            self._heard.clear()

    async def wait(self, seconds: float, least: float = 0.0) -> Why:
        """Why to ask again; REFRESH after so many seconds without another reason.

        A reason is not acted upon before least seconds are over.
        """
        began = time.monotonic()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._heard.wait()
        self.hurried = self._heard.is_set()
        with contextlib.suppress(TimeoutError):  # unless it falls silent, which is no echo of ours
            async with asyncio.timeout(began + least - time.monotonic()):
                await self._silence.wait()
        if self._why == Why.DELETED:
            await asyncio.sleep(SETTLE)  # a manager that replaces it says UPDATE next
        why = Why.SILENT if self._silence.is_set() else self._why or Why.REFRESH
        self._ours = False
        self._silence.clear()
        self.clear()
        return why


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What else is asked for with a wire than its URL says.

    endpoint    the only one it may lead to; empty: whichever the mesh chooses
    shape       makes of the context, before each request, the one that is asked with
    on_answer   is told of every answer that is taken; must not block
    """

    endpoint: str = ""
    shape: Callable[[Context], Context] = lambda context: context
    on_answer: Callable[["Wire"], None] = lambda _: None


class Wire:
    """A wire of ours. What it says of itself is what the mesh last answered."""

    def __init__(self, id_: str, url: NSURL, name: str, wish: Wish | None = None) -> None:
        self.id = id_
        self.url = url
        self.interface = name
        self.wish = wish or Wish()
        self.left = False
        self.stages: dict[str, float] = {}
        """Milliseconds that setting it up took, by stage."""
        self.up = False
        self.trouble: Trouble | None = None
        """The last loss of it, and how it was healed; None if it was never lost. It is there
        before `Change.DOWN` is told, and complete before the `Change.UP` that ends it."""
        self.pulse: Pulse | None = None
        """Whether packets flow, by pings; None where nobody can tell."""
        self.made: Connection | None = None
        """The last answer; None before the first and after the end."""
        self.vouched = 0.0
        """Until when its tokens hold, by `time.monotonic()`, which nobody sets."""
        self.former: IPContext | None = None
        """What an endpoint before had said of itself, until it is taken away."""
        self.news = News()

    @property
    def silent(self) -> bool:
        """Whether the far end answered pings before and does so no more."""
        return self.pulse is not None and self.pulse.silent

    @property
    def connection(self) -> Connection:
        """The whole connection, at our own segment of its path."""
        if self.made is None:
            raise PreconditionError(f"wire {self.id} is not up")
        return self.made

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses of our end."""
        return tuple(map(ipaddress.ip_interface, self.connection.ip.src_ip_addrs))

    @property
    def peer_addresses(self) -> tuple[Address, ...]:
        """The addresses of the endpoint's end."""
        return tuple(map(ipaddress.ip_interface, self.connection.ip.dst_ip_addrs))

    @property
    def routes(self) -> tuple[Route, ...]:
        """What is routed into the wire at our end."""
        return self.connection.ip.src_routes

    @property
    def dns(self) -> tuple[DNSConfig, ...]:
        """What the endpoint says about names."""
        context = self.connection.context
        return context.dns.configs if context and context.dns else ()

    @property
    def mtu(self) -> int:
        """The MTU all hops agreed on, in bytes; 0 if none said one."""
        context = self.connection.context
        return context.mtu if context else 0

    @property
    def service(self) -> str:
        """The network service asked for."""
        return self.url.service

    @property
    def endpoint(self) -> str:
        """The endpoint at the other end."""
        return self.connection.endpoint

    def refresh(self) -> None:
        """Have it asked for again now: what its wish says has changed."""
        self.news.insist()

    def leave(self) -> None:
        """Have its block's end leave it as it is, for a next life with the same id."""
        self.left = True

    def __repr__(self) -> str:
        return f"<Wire {self.id} {self.url} {'up' if self.up else 'not up'}>"


OnChange = Callable[[Change, Wire, NsmError | None], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a client asks; times in seconds."""

    dial_timeout: float = DIAL_TIMEOUT
    request_timeout: float = REQUEST_TIMEOUT
    lifetime: int = LIFETIME  # of tokens, ns
    namespace: str = OWN_NAMESPACE  # where the interfaces shall be
    labels: Mapping[str, str] = field(default_factory=dict)  # for requests that lack them
    awareness: Sequence[Sequence[NSURL]] = ()  # see nsm.exclusions
    liveness: Rhythm | None = field(default_factory=Rhythm)  # of pings; None: none are sent
    on_change: OnChange = lambda *_: None  # told of every change; must not block


class Client:
    """One workload's wires: one identity, one manager, one monitor stream for all.

    name is the first segment's on every path; source the identity or a block that
    yields one; manager the URL of the node's
    manager, a unix socket, because a namespace's descriptor can travel on no
    other.
    """

    def __init__(
        self,
        name: str,
        *,
        source: Source | AbstractAsyncContextManager[Source],
        manager: str,
        settings: Settings = Settings(),
    ) -> None:
        if not manager.startswith("unix:"):
            raise InvalidError(
                f"the manager {manager!r} is not on a unix socket, and only there can this"
                " client show its network namespace",
                hint="set NSM_CONNECT_TO to the manager of this node: unix:///path",
            )
        self.name = name
        self.manager = manager
        self._settings = settings
        self._source = source
        self._peers: Peers
        self._calls: Calls
        self._wires: dict[str, Wire] = {}
        self._seen: dict[str, list[Connection]] = {}  # there may be a dead one of the same id
        self._looked = asyncio.Event()  # the stream said, once, which wires there are
        self._reachable = asyncio.Event()  # the manager answered a dial: open the stream now
        self._stack = contextlib.AsyncExitStack()
        self._unreachable = -CLOSE_WITHIN  # when a close last failed for good
        self._liveness: Liveness | None = None
        self.identified = 0.0
        """Milliseconds that getting an identity took."""

    @property
    def wires(self) -> tuple[Wire, ...]:
        """What is held now."""
        return tuple(self._wires.values())

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:  # closes what is open if a step fails
            began, source = time.monotonic(), self._source
            if isinstance(source, AbstractAsyncContextManager):
                source = await stack.enter_async_context(source)
            self.identified = _ms(began)
            self._peers = await stack.enter_async_context(
                Peers(source, dial_timeout=self._settings.dial_timeout)
            )
            self._calls = Calls(self._peers, self._settings.lifetime)
            tasks = await stack.enter_async_context(background())
            tasks.create_task(self._follow(), name=f"monitor of {self.manager}")
            ours = await asyncio.to_thread(_is_own, self._settings.namespace)
            if ours and self._settings.liveness:
                self._liveness = Liveness(self._settings.liveness)
                tasks.create_task(self._liveness.run(), name="pings through wires")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def connect(
        self,
        url: str | NSURL,
        *,
        id_: str = "",
        patience: float = 0.0,
        wish: Wish | None = None,
    ) -> AsyncIterator[Wire]:
        """Hold a wire for the block: made at its start, refreshed, closed at its end.

        With id_, or where the URL names the interface, a wire that an earlier
        life of this client left behind is taken over (`wire.md` §8.4). patience:
        for how many seconds a refusal that may pass, as "no endpoint yet", is
        tried again. Raises InvalidError for a URL that is none, UnsupportedError
        for another mechanism than kernel, and what the mesh refuses with.
        """
        url = nsurl.parse(url) if isinstance(url, str) else url
        if url.mechanism != KERNEL:
            raise UnsupportedError(
                f"mechanism {url.mechanism.lower()!r} of {url} is not one this client can use",
                hint="ask for kernel://",
            )
        wire = self._new(url, id_, wish)
        try:
            async with Undo(CLOSE_WITHIN) as undo:
                undo.add(f"close wire {wire.id}", self._close, wire)
                await self._establish(wire, patience, lasting=bool(id_ or url.interface))
                async with background() as tasks:
                    tasks.create_task(self._keep(wire), name=f"refresh of {wire.id}")
                    yield wire
                await self._close(wire)
        finally:
            self._unwatch(wire)
            self._wires.pop(wire.id, None)

    def _new(self, url: NSURL, id_: str, wish: Wish | None) -> Wire:
        name = url.interface or mechanisms.generate_name(url.service)
        wire = Wire(id_ or f"{self.name}-{url.interface or uuid4()}", url, name, wish)
        if wire.id in self._wires:
            raise TakenError(
                f"this client holds a wire {wire.id} already, to {self._wires[wire.id].service!r}",
                hint="name another interface, or give another id",
            )
        self._wires[wire.id] = wire
        return wire

    # --- getting and keeping ------------------------------------------------------

    async def _establish(self, wire: Wire, patience: float, *, lasting: bool) -> None:
        until = time.monotonic() + patience
        failures, left = 0, None
        while True:
            try:
                began = time.monotonic()
                async with self._peers.link(self.manager):
                    wire.stages["dial"] = _ms(began)
                    self._reachable.set()
                began = time.monotonic()
                left = wire.made = await self._left_behind(wire) if lasting else None
                wire.stages["identity"] = self.identified
                wire.stages["look"] = _ms(began)
                if left is None:
                    began = time.monotonic()
                    made = await self._ask(wire, self._first(wire))
                    wire.stages |= path.stages(made, _ms(began))
                else:
                    dead = await self._is_dead(left, tried=failures > 0)
                    wire.stages |= await self._ask_again(wire, left, elsewhere=dead) or {}
            except NsmError as error:
                if wire.made is left:
                    wire.made = None  # what an earlier life left stays: it may carry packets
                failures += 1
                pause = _pause(failures)
                self._changed(Change.REFUSED, wire, error)
                if not error.retry or time.monotonic() + pause > until:
                    raise
                await asyncio.sleep(_jittered(pause))
            else:
                self._seen.pop(wire.id, None)
                wire.up = True
                self._changed(Change.UP, wire)
                return

    async def _keep(self, wire: Wire) -> None:
        """Refresh in time, and ask again for what is lost; never ends by itself."""
        failures, hurried, gone, absent = 0, 0, False, 0.0
        self._watch(wire)
        while True:
            pause = _again_in(failures, 0.0 if gone or wire.silent else absent)
            # Because a try that fails makes news itself: it went well as far as it went.
            least = min(pause, _pause(hurried)) if hurried else 0.0
            why = await wire.news.wait(pause or _refresh_in(wire.connection), least)
            gone = gone or why == Why.DELETED
            if why >= Why.LOST:
                await self._lost(wire, why)
            conn = wire.connection
            if elsewhere := gone or wire.silent:
                wire.news.heed_silence()
            began, tries = time.monotonic(), failures + 1
            try:
                stages = await self._ask_again(wire, conn, elsewhere=elsewhere)
                if stages is None:
                    continue  # it fell silent meanwhile
            except NsmError as error:
                log.warning("wire is not refreshed", id=wire.id, why=str(error))
                failures += 1
                hurried = hurried + 1 if wire.news.hurried else 0
                wire.news.waiting = True
                missing = isinstance(error, NotFoundError)
                absent = (absent or time.monotonic()) if missing else 0.0
                if not elsewhere and (wire.silent or _long_absent(absent)):
                    gone, failures = not wire.silent, 1  # what is asked for now is not refused yet
                self._refused(wire, error)
            else:
                if failures:
                    log.info("wire is refreshed again", id=wire.id, tries=tries)
                failures, hurried, gone, absent, wire.news.waiting = 0, 0, False, 0.0, False
                self._watch(wire, anew=elsewhere)
                if not wire.up or wire.endpoint != conn.endpoint:  # or the mesh led it elsewhere
                    self._healed(wire, conn, began, {"tries": tries, "stages": stages})

    async def _ask_again(
        self, wire: Wire, conn: Connection, *, elsewhere: bool
    ) -> dict[str, float] | None:
        """Ask for the wire as it is, or for another endpoint; where the milliseconds went.

        None if it fell silent meanwhile: a request may take long, and what it asks for can be
        over long before.
        """
        began = time.monotonic()
        if not elsewhere:
            asked = _without(conn, wire.former) if wire.former else conn
            made = await unless(self._ask(wire, asked), wire.news.silence())
            if made is None:
                return None
            wire.former = None
            return path.stages(made, _ms(began))
        made = await self._ask(wire, _reselecting(conn, wire.wish.endpoint))
        stages = path.stages(made, _ms(began))
        if made.endpoint != conn.endpoint and _has_of(made.ip, conn.ip):
            wire.former = conn.ip
        if wire.former:
            began = time.monotonic()
            try:
                await self._ask(wire, _without(made, wire.former))
            except NsmError as error:  # the wire is there: it is not led elsewhere once more
                log.warning("what another endpoint said stays", id=wire.id, why=str(error))
                wire.refresh()
            else:
                wire.former = None
                stages["cleared"] = _ms(began)
        return stages

    async def _lost(self, wire: Wire, why: Why) -> None:
        """Say that it is lost. Whether packets flow all the same decides what is asked for."""
        noticed = time.monotonic()
        if why == Why.LOST and wire.up and wire.pulse:
            await wire.pulse.flows()
        causes = {Why.DELETED: Cause.DELETED, Why.SILENT: Cause.DATA}
        cause = causes.get(why, Cause.CONTROL)
        if wire.trouble and not wire.up and wire.trouble.flowed and wire.silent:
            wire.trouble = self._trouble(wire, cause, noticed)  # it is worse than it was
        self._down(wire, cause, None, noticed)

    def _refused(self, wire: Wire, error: NsmError) -> None:
        """Nobody there to ask, or nobody with time for us now, leaves the wire as it is, as long
        as its tokens last."""
        expired = wire.vouched < time.monotonic()
        if expired or not isinstance(error, UnavailableError | DeadlineError | ExhaustedError):
            cause = Cause.EXPIRED if expired else Cause.CONTROL
            self._down(wire, cause, error, time.monotonic())

    # --- whether packets flow -----------------------------------------------------

    def _watch(self, wire: Wire, *, anew: bool = False) -> None:
        """Watch the wire as it is now; anew: from the beginning, it leads elsewhere."""
        if self._liveness is None:
            return
        addresses = (wire.addresses, wire.peer_addresses)
        if wire.pulse and not anew and wire.pulse.addresses == addresses:
            wire.pulse.settle()
            return
        self._unwatch(wire)
        wire.news.heed_silence()  # fallen while we asked, it is of what was watched before
        wire.pulse = self._liveness.watch(*addresses, wire.news.fell_silent)

    def _unwatch(self, wire: Wire) -> None:
        if self._liveness and wire.pulse:
            self._liveness.forget(wire.pulse)
        wire.pulse = None

    def _first(self, wire: Wire) -> Connection:
        return Connection(
            id=wire.id,
            service=wire.url.service,
            context=Context(ip=IPContext()),
            labels={**self._settings.labels, **wire.url.labels},
            endpoint=wire.wish.endpoint,
            path=Path((Segment(self.name, wire.id),)),
        )

    async def _ask(self, wire: Wire, conn: Connection) -> Connection:
        """One Request; its answer is the wire's from now on.

        The descriptor of our namespace goes with each, because the manager may
        have been restarted since the last.
        """
        excluded = exclusions.excluded_for(
            wire.url,
            [(one.url, one.connection.ip) for one in self._others(wire)],
            self._settings.awareness,
        )
        own = conn.ip.excluded_prefixes
        context = wire.wish.shape(conn.context or Context())
        ip = replace(
            context.ip or IPContext(), excluded_prefixes=tuple(dict.fromkeys((*own, *excluded)))
        )
        with Descriptors() as fds:
            here = await self._namespace(fds)
            preference = wire.url.preference(here).with_(**{NAME: wire.interface})
            asked = replace(
                conn,
                context=replace(context, ip=ip),
                mechanism=conn.mechanism and conn.mechanism.with_(**{INODE_URL: here}),
            )
            answer = await self._calls.request(
                self.manager,
                Request(asked, (preference,)),
                fds=fds,
                within=self._settings.request_timeout,
            )
        made = answer.connection
        if wire.made is None:
            wire.made = made  # from here on there is something to close
        policy.admit_reply(made, answer.handshake)
        mechanism = self._checked(wire, made)
        exclusions.check(made.ip, excluded, whose=f"wire {wire.id} to {wire.service!r}")
        wire.interface = mechanism.get(NAME) or wire.interface
        context = made.context or Context()
        # Only what we excluded ourselves: the manager adds its own to each request anew.
        context = replace(context, ip=replace(made.ip, excluded_prefixes=own))
        wire.made = replace(made, context=context, state=State.UP)
        wire.vouched = time.monotonic() + (_least_expiry(made) - time.time_ns()) / SECOND
        wire.wish.on_answer(wire)
        return wire.made

    def _checked(self, wire: Wire, made: Connection) -> Mechanism:
        if made.id != wire.id or made.index != 0:
            raise PeerError(
                f"the manager {self.manager} answered for connection {made.id!r} instead of"
                f" {wire.id!r}",
                code=Code.INTERNAL,
            )
        if made.mechanism is None or made.mechanism.type != KERNEL:
            answered = made.mechanism.type if made.mechanism else "none"
            raise UnsupportedError(
                f"the mesh answered wire {wire.id} with mechanism {answered!r} instead of {KERNEL}"
            )
        return made.mechanism

    def _others(self, wire: Wire) -> list[Wire]:
        return [one for one in self._wires.values() if one is not wire and one.made is not None]

    async def _namespace(self, fds: Descriptors) -> str:
        """Our namespace's URL; its descriptor is in fds."""
        fd = await opened(_open, self._settings.namespace)
        facts = os.fstat(fd)
        url = inode_url(facts.st_dev, facts.st_ino)
        fds.adopt(url, fd)
        return url

    async def _close(self, wire: Wire) -> None:
        """Tell the manager that the wire is over; harmless if there is none."""
        conn = wire.made
        if conn is None or wire.left:
            return
        until = time.monotonic() + CLOSE_WITHIN * 0.8  # the rest is for one that hangs
        if self._unreachable > time.monotonic() - CLOSE_WITHIN:
            until = 0.0  # another wire has waited for this manager already: one try
        for pause in PAUSES:
            try:
                await self._say_close(conn, max(0.1, until - time.monotonic()))
                break
            except NsmError as error:
                if not isinstance(error, UnavailableError) or time.monotonic() + pause > until:
                    wire.made = None  # tried, and told
                    self._unreachable = time.monotonic()
                    raise PreconditionError(
                        f"wire {wire.id} could not be closed: {error.message}",
                        hint="it ends by itself when its tokens expire, in ten minutes at most",
                    ) from error
            await asyncio.sleep(pause)
        wire.made, wire.up = None, False
        self._changed(Change.CLOSED, wire)

    async def _say_close(self, conn: Connection, within: float) -> None:
        with Descriptors() as fds:
            if conn.mechanism:
                with contextlib.suppress(PreconditionError):  # it may be gone, and the wire with it
                    here = await self._namespace(fds)
                    conn = replace(conn, mechanism=conn.mechanism.with_(**{INODE_URL: here}))
            await self._calls.close(self.manager, conn, fds=fds, within=within)

    # --- what an earlier life left ------------------------------------------------

    async def _left_behind(self, wire: Wire) -> Connection | None:
        """The wire of this id that the manager has for us, at our own segment; None if none.

        One in another namespace is another workload's with our name and is left
        alone; one of ours that is not what is wanted now is closed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.request_timeout):
                await self._looked.wait()
        with Descriptors() as fds:
            here = await self._namespace(fds)
        found = next((one for one in self._seen.get(wire.id, ()) if _may_be_in(one, here)), None)
        if found is None:
            return None
        context = replace(found.context or Context(), ip=replace(found.ip, excluded_prefixes=()))
        path = replace(found.path or Path(), index=0)
        found = replace(found, id=wire.id, path=path, context=context)
        mechanism = found.mechanism or Mechanism()
        same = found.service == wire.url.service and mechanism.type == KERNEL
        same = same and wire.wish.endpoint in ("", found.endpoint)
        if same and (not wire.url.interface or mechanism.get(NAME) == wire.url.interface):
            log.info("wire of an earlier life is taken over", id=wire.id, service=found.service)
            wire.interface = mechanism.get(NAME) or wire.interface
            return found
        log.info("wire of an earlier life is closed", id=wire.id, service=found.service)
        await self._say_close(found, self._settings.request_timeout)
        self._seen.pop(wire.id, None)
        return None

    async def _is_dead(self, left: Connection, *, tried: bool) -> bool:
        """Whether what an earlier life left leads nowhere any more, so that somebody else is asked.

        Where the mesh says that it is down, or refused it when it was tried, pings decide;
        where there can be none, the mesh's word (`wire.md` §8.4).
        """
        down = left.state == State.DOWN
        if not (down or tried):
            return False
        own = tuple(map(ipaddress.ip_interface, left.ip.src_ip_addrs))
        others = tuple(map(ipaddress.ip_interface, left.ip.dst_ip_addrs))
        pulse = self._liveness.watch(own, others, lambda: None) if self._liveness else None
        if self._liveness is None or pulse is None:
            return down
        try:
            return not await pulse.answers(ANSWER_WITHIN)
        finally:
            self._liveness.forget(pulse)

    # --- what the manager tells ---------------------------------------------------

    async def _follow(self) -> None:
        """Read the manager's monitor stream, and open it again whenever it ends."""
        failures, purposely = 0, False
        while True:
            seen, why = False, "it ended"
            known = [] if purposely else [one for one in self._wires.values() if one.made]
            try:
                stream = self._calls.monitor(self.manager, Selector((Segment(self.name, ""),)))
                async with contextlib.aclosing(stream) as events:
                    async for event in events:
                        self._heard(event, known)
                        seen, failures, purposely = True, 0, False
            except NsmError as error:
                why = str(error)
                purposely = error.code == Code.CANCELLED  # then nothing is lost
                if not isinstance(error, UnavailableError):
                    self._looked.set()  # it will not say more next time
            if seen and not purposely:
                log.info("the manager's monitor stream ended", manager=self.manager, why=why)
                for wire in self._wires.values():
                    wire.news.add(Why.UNSURE)
            failures += 1
            self._reachable.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_jittered(min(_pause(failures), LISTEN_AGAIN))):
                    await self._reachable.wait()

    def _heard(self, event: Event, known: Sequence[Wire]) -> None:
        """Pass on what an event says; known are the wires there were when the stream was opened."""
        told = [
            (own, conn)
            for conn in event.connections.values()
            if (own := self._own_id(conn)) is not None
        ]
        if event.type == EventType.INITIAL_STATE_TRANSFER:
            self._seen = {}
            for id_, conn in told:
                self._seen.setdefault(id_, []).append(conn)
            self._looked.set()
            for wire in known:
                if not any(id_ == wire.id and _is_of(wire, conn) for id_, conn in told):
                    wire.news.add(Why.LOST)  # the manager was restarted
        for id_, conn in told:
            wire_ = self._wires.get(id_)
            if wire_ and _is_of(wire_, conn):
                _judge(wire_.news, event, conn)
            elif event.type == EventType.DELETE and id_ in self._seen:
                self._seen[id_] = [one for one in self._seen[id_] if one.id != conn.id]

    def _own_id(self, conn: Connection) -> str | None:
        """What we call the connection, if its event comes from the hop next to us."""
        before = conn.index - 1
        if 0 <= before < len(conn.segments) and conn.segments[before].name == self.name:
            return conn.segments[before].id
        return None

    def _down(self, wire: Wire, cause: Cause, error: NsmError | None, noticed: float) -> None:
        if wire.up:
            wire.up = False
            wire.trouble = self._trouble(wire, cause, noticed)
            self._changed(Change.DOWN, wire, error)

    def _trouble(self, wire: Wire, cause: Cause, noticed: float) -> Trouble:
        pulse = wire.pulse if wire.pulse and wire.pulse.answered else None
        return Trouble(
            cause=cause,
            began=min(noticed, pulse.heard) if pulse and pulse.silent else noticed,
            noticed=noticed,
            endpoint=wire.endpoint,
            flowed=not pulse.silent if pulse else None,
        )

    def _healed(self, wire: Wire, before: Connection, asked: float, how: Mapping[str, Any]) -> None:
        """It is up again, or leads elsewhere; asked is when the request began that did it."""
        now, trouble = time.monotonic(), wire.trouble
        if wire.up or trouble is None:  # the mesh led it elsewhere
            trouble = Trouble(
                cause=Cause.EDITED,
                began=asked,
                noticed=asked,
                endpoint=before.endpoint,
                flowed=True,
            )
        wire.trouble = trouble.ended(now, asked, **how)
        wire.up = True
        self._changed(Change.UP, wire)

    def _changed(self, what: Change, wire: Wire, error: NsmError | None = None) -> None:
        self._settings.on_change(what, wire, error)


def _reselecting(conn: Connection, wanted: str) -> Connection:
    """The same wire to whichever endpoint there is now, or the one wanted (`wire.md` §8.2).

    What was said of names is the old endpoint's, whose servers may be gone with it.
    """
    context = conn.context and replace(conn.context, dns=None)
    return replace(
        conn, context=context, mechanism=None, endpoint=wanted, state=State.RESELECT_REQUESTED
    )


def _without(conn: Connection, old: IPContext) -> Connection:
    """The connection without what another endpoint had said of addresses.

    The new one adds its own again at the next request, and what it cannot answer
    for would stay on the interface for ever.
    """
    context = replace(conn.context or Context(), ip=conn.ip.without(old))
    return replace(conn, context=context)


def _has_of(ip: IPContext, old: IPContext) -> bool:
    """Whether another endpoint left in what the one before had said of itself."""
    return not set(old.dst_ip_addrs).isdisjoint(ip.dst_ip_addrs)


def _is_of(wire: Wire, conn: Connection) -> bool:
    """Whether the manager speaks of this wire, and not of an earlier one with the same id.

    That one may have died with its namespace, and be there until its lease ends.
    """
    segments = wire.made.segments if wire.made else ()
    return len(segments) < 2 or segments[1].id == conn.id


def _may_be_in(conn: Connection, here: str) -> bool:
    """Whether a connection may end in the namespace here: those of others are told apart."""
    there = conn.mechanism.get(INODE_URL) if conn.mechanism else ""
    return there == here or not there.startswith("inode://")


def _judge(news: News, event: Event, conn: Connection) -> None:
    """What an event of a wire's connection means for it."""
    if event.type == EventType.DELETE:
        news.add(Why.DELETED)
    elif conn.state == State.DOWN:
        news.add(Why.LOST)
    elif conn.state == State.REFRESH_REQUESTED or news.waiting:
        news.add(Why.REFRESH)  # waiting: the mesh is back, so try now
    else:
        news.clear()


def _refresh_in(conn: Connection) -> float:
    """Seconds until a refresh is due (`wire.md` §3.8)."""
    segments = conn.segments
    share = 1 / 3 if len(segments) == 1 else 0.2 + 0.2 * conn.index / len(segments)
    return max(LEAST_REFRESH, (_least_expiry(conn) - time.time_ns()) / SECOND * share)


def _least_expiry(conn: Connection) -> int:
    """When the first hop stops to vouch, ns since 1970; 0 if none says."""
    return earliest_expiry(conn.segments) or 0


def _again_in(failures: int, absent: float) -> float:
    """Seconds until what was refused is tried again, 0 for nothing.

    Not past the moment at which another endpoint is asked for (see `_long_absent`).
    """
    pause = _jittered(_pause(failures)) if failures else 0.0
    left = absent + RESELECT_AFTER - time.monotonic() if absent else pause
    return min(pause, max(PAUSES[0], left))


def _long_absent(absent: float) -> bool:
    """Whether another endpoint is to be asked for, as ours is not found since absent.

    While the mesh restarts nobody is found either, and to choose anew may close a wire
    that carries packets: so time decides, where silence does not.
    """
    return absent > 0 and time.monotonic() - absent >= RESELECT_AFTER


def _pause(failures: int) -> float:
    return PAUSES[min(failures, len(PAUSES)) - 1]


def _is_own(namespace: str) -> bool:
    """Whether wires end in the namespace this process is in: others' hold no socket of ours."""
    try:
        return os.path.samefile(namespace, OWN_NAMESPACE)
    except OSError:
        return False  # whoever asks for a wire is told


def _open(namespace: str) -> int:
    try:
        return os.open(namespace, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionError(
            f"the network namespace {namespace} cannot be opened: {error.strerror}",
            hint="it must exist and be visible to this process",
        ) from error


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311 - so that many clients do not march in step


def _ms(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 3)

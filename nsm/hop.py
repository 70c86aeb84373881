"""A request's whole way through one hop, and a close's way back. START HERE.

Every process of the mesh answers both the same way. Only where the connection
goes next differs, and that is the hop's route:

    nsmgr/route.py        finds a forwarder and passes the request on
    forwarder/route.py    finds an endpoint, agrees on mechanisms, joins both sides in the kernel
    nsmgr/proxy/route.py  leads the request out of a domain, or into it
    nsm/endpoint.py       hands out addresses; the path ends there
    endpoints/supplier/route.py  starts an endpoint where there is none, and refuses: look again

Each line of `request` is one concern, and each concern one module beside this.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import structlog
from structlog.contextvars import bind_contextvars

from nsm import path, policy
from nsm.caller import Caller
from nsm.connections import Connections, Held
from nsm.errors import DeadlineError, InvalidError, NsmError
from nsm.events import Events, Sees
from nsm.leases import Leases
from nsm.limits import Bounds, Places, Ticket
from nsm.model import Connection, EventType, Path, Request, State
from nsm.undo import Undo, to_the_end
from nsm.watches import Monitor, Spawn, Watches

M = TypeVar("M")
LONGEST = 60.0  # seconds a request may take whose caller set no deadline
AGAIN = 30.0  # seconds until taking down is tried again that failed
CLOSES = 1024  # of one client that are here at once, and that wait: it may end all it has
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Established:
    """What a route made: the connection at this hop, and the next hop's URL ("": it ends here).

    called is what the next hop has as our id of it, where that is another than ours.
    """

    connection: Connection
    next_url: str = ""
    called: str = ""


class Route(Protocol[M]):
    """Where a connection goes from here.

    held.made is what is established so far (None: nothing); held.memory is the
    route's own and is set by it. A route adds to undo only what is new, before
    it does it, so that a failed refresh keeps the old connection.
    """

    async def establish(
        self, asked: Request, held: Held[M], caller: Caller, undo: Undo
    ) -> Established:
        """Make asked real, or bring what is there up to it. asked is at this hop."""

    async def withdraw(self, conn: Connection, memory: M | None, caller: Caller | None) -> None:
        """Take down whatever there is of conn, be it nothing.

        conn is at this hop; memory is None after a restart. caller is None when
        a lease ended. Raises what could not be taken down; may be repeated.
        """


class Keeper(Protocol[M]):
    """Remembers connections for the next life of the process. Neither call may block."""

    def begin(self, id_: str) -> None:
        """It is about to be made: what stands of it after a kill may be nobody's."""

    def keep(self, held: Held[M], ends: int) -> None:
        """What is held now, of which the lease ends then: ns since 1970."""

    def drop(self, id_: str) -> None:
        """It is held no more."""


class Hop(Generic[M]):
    """One process's handling of Request and Close.

    name is the path segment's; lifetime the tokens', in nanoseconds; spawn runs
    what this hop starts of itself (expired leases, watches) in a task of the
    process; monitor opens a stream to a next hop, None where the path ends;
    places bounds what is worked on at once; door says that who calls over a unix socket is a
    workload, of which no path is believed there (`policy.whose`). moves leaves to the route
    what stands where another endpoint is asked for (RESELECT_REQUESTED): it lets go of the old
    one itself, once there is a new one.
    """

    def __init__(
        self,
        name: str,
        route: Route[M],
        *,
        lifetime: int,
        spawn: Spawn,
        monitor: Monitor | None = None,
        observer: Sees = lambda _: False,
        on_established: Callable[[int], None] = lambda _: None,
        places: Places | None = None,
        keeper: Keeper[M] | None = None,
        moves: bool = False,
        door: bool = False,
    ) -> None:
        self.name = name
        self.route = route
        self.tokens = policy.Tokens(lifetime)
        self.connections: Connections[M] = Connections()
        self.places = places or Places(name)
        # Apart from requests: who has all its places waits for what only a Close can end.
        bounds = Bounds(self.places.bounds.at_once, CLOSES)
        self.closes = Places(name, bounds, "closes", variable="", queue=CLOSES)
        self.events = Events(self.connections, observer)
        self.leases = Leases(self._expired)
        self.watches = Watches(name, monitor, spawn, self._changed) if monitor else None
        self._spawn = spawn
        self._keeper = keeper
        self._moves = moves
        self._door = door
        self._on_established = on_established  # how many connections there are now

    async def request(self, asked: Request, caller: Caller) -> Connection:
        """Establish the connection, or refresh it: all of it, or none of what is new.

        The answer is at the caller's own segment (`wire.md` §3.1).
        """
        conn, back = path.enter(asked.connection, self.name)
        if asked.connection.segments and back == conn.index:
            raise InvalidError(
                f"{caller.id} and {caller.handshake.own.id}, whom it asks, are both called"
                f" {self.name!r}: on a path two neighbours of one name are one",
                hint="give one of them another name (NSM_NAME)",
            )
        _named(conn)
        began = time.monotonic()
        async with (
            self._in_time(conn, caller),
            self.places.entered(self._whose(conn, caller), conn.index) as ticket,
            self.connections.turn(conn.id) as held,
            self._place(held, ticket),
        ):
            policy.same_owner(held, conn, caller)
            conn = self.tokens.vouch(conn, caller)
            self.tokens.admit(conn, caller)
            conn = _onward(conn, held)
            followed = bool(self.watches and self.watches.follows(held.id))
            if held.made and conn.state == State.RESELECT_REQUESTED and not self._moves:
                await self._let_go(held, caller)
            held.again = False
            try:
                with self._begun(held), self.connections.interruptible(held):
                    async with Undo() as undo:
                        wanted = replace(asked, connection=conn)
                        done = await self.route.establish(wanted, held, caller, undo)
                        made = replace(done.connection, state=State.UP)
                        made = path.took(made, took_ms=time.monotonic() - began)
                        if not done.next_url:
                            made = path.end(made)
                        if made.index > 0:
                            self.leases.renew(made, self._remaining(caller))
            except BaseException:
                if held.made and followed:
                    self._down(held)
                raise
            held.made, held.previous = made, caller.handshake.peer_id
            held.ended = False
            held.origin = policy.origin(made)
            if self.watches and done.next_url:
                self.watches.follow(made.id, done.next_url, done.called)
            self.events.publish(EventType.UPDATE, made, held.previous)
            self._count()
            self._keep(held)
            if held.again:
                self._asked_again(held)
            return path.leave(made, back)

    @contextmanager
    def _begun(self, held: Held[M]) -> Iterator[None]:
        """For the next life: what stands of it, if this one ends meanwhile, was promised nobody."""
        if self._keeper is None or held.made:
            yield
            return
        self._keeper.begin(held.id)
        try:
            yield
        except BaseException:
            self._keeper.drop(held.id)
            raise

    @asynccontextmanager
    async def _place(self, held: Held[M], ticket: Ticket) -> AsyncIterator[None]:
        """A place to work on it, of which there are only so many; a Close ends the wait."""
        async with AsyncExitStack() as stack:
            with self.connections.interruptible(held):
                await stack.enter_async_context(self.places.place(ticket))
            yield

    async def close(self, asked: Connection, caller: Caller) -> None:
        """Take the connection down. Closing what is not there is not an error."""
        conn, _ = path.enter(asked, self.name)
        async with self.closes.entered(self._whose(conn, caller), conn.index) as ticket:
            if len(asked.segments) == conn.index and (mine := self._unanswered(conn, caller)):
                conn = mine
            _named(conn)
            conn = self.tokens.vouch(conn, caller)
            known = self.connections.get(conn.id)
            if known:
                policy.same_owner(known, conn, caller)
            self.tokens.admit_close(conn, caller, known)
            self.connections.interrupt(conn.id, str(caller.handshake.peer_id))
            async with self.connections.turn(conn.id) as held:
                # After a restart only the caller knows it. What is held here has the
                # truth of what was made; the caller's tokens are the fresh ones.
                conn = _onward(conn, held)
                made = replace(held.made, path=conn.path) if held.made else conn
                await to_the_end(self._closed(held, made, caller, ticket))

    async def expire(self, id_: str) -> None:
        """Take down a connection nobody refreshed in time."""

        async def unrefreshed(held: Held[M]) -> bool:
            return held.id not in self.leases

        await self.end(id_, unrefreshed)

    async def end(self, id_: str, still: Callable[[Held[M]], Awaitable[bool]]) -> None:
        """Take down a connection of our own accord, if the reason still holds at its turn."""
        async with self.connections.turn(id_, own=True) as held:
            if held.made and await still(held):
                _named(held.made)
                await to_the_end(self._take_down(held, held.made, None))

    async def lost(self, id_: str, still: Callable[[Held[M]], Awaitable[bool]]) -> None:
        """Tell whoever asked for a connection that it carries nothing, if that still holds at
        its turn: being asked for again is what makes it anew."""
        async with self.connections.turn(id_, own=True) as held:
            if held.made and await still(held):
                self._down(held)

    async def want_again(
        self, id_: str, which: Callable[[Connection], bool] = lambda _: True
    ) -> None:
        """Have whoever asked for a connection ask again, if it is one of which then.

        In its turn: what is under way may have been answered before.
        """
        async with self.connections.turn(id_, own=True) as held:
            if held.made and held.made.state == State.UP and which(held.made):
                self._asked_again(held)

    def adopt(self, held: Held[M], ends: int, next_url: str = "", called: str = "") -> None:
        """Hold again what an earlier life made: its lease ends then, and it is followed there."""
        self.connections.adopt(held)
        self.leases.until(held.id, ends)
        if self.watches and next_url:
            self.watches.follow(held.id, next_url, called)
        self._count()

    def stop(self) -> None:
        """Forget timers and streams; the kernel keeps every wire."""
        self.leases.stop()
        self.events.stop()
        if self.watches:
            self.watches.stop()

    def _whose(self, conn: Connection, caller: Caller) -> tuple[str, str]:
        return policy.whose(conn, caller, door=self._door)

    async def _closed(
        self, held: Held[M], conn: Connection, caller: Caller, ticket: Ticket
    ) -> None:
        async with self.closes.place(ticket):
            await self._take_down(held, conn, caller)

    async def _take_down(self, held: Held[M], conn: Connection, caller: Caller | None) -> None:
        self.leases.release(held.id)
        if self.watches:
            self.watches.release(held.id)
        known, previous = held.made is not None, held.previous
        try:
            await self.route.withdraw(conn, held.memory, caller)
        except BaseException:
            if known:  # whatever is left is still held, and tried again
                self._down(held)
                self.leases.again(held.id, AGAIN)
            raise
        held.forget()
        if self._keeper:
            self._keeper.drop(held.id)
        if known:
            self.events.publish(EventType.DELETE, conn, previous)
            self._count()

    async def _let_go(self, held: Held[M], caller: Caller) -> None:
        """Before another endpoint is chosen, what leads to the old one is closed (§3.6).

        One that cannot be told is often why another is asked for; its lease ends by itself.
        """
        assert held.made is not None
        if self.watches:
            self.watches.release(held.id)
        try:
            await to_the_end(self.route.withdraw(held.made, held.memory, caller))
        except NsmError as reason:
            log.warning("the next hop was not told of a reselect", why=str(reason))
        finally:
            held.memory = None

    def _unanswered(self, conn: Connection, caller: Caller) -> Connection | None:
        """conn by the id we gave it, where the hop before never got our answer that has it.

        It takes back a Request it could not wait for. Its own id of the connection tells
        which: hops draw theirs, a workload may choose it, so workloads are not asked.
        """
        before = conn.segments[conn.index - 1]
        if conn.index < 2:
            return None
        for held in self.connections.established():
            made = held.made
            if (
                made
                and made.index == conn.index
                and made.segments[made.index - 1].id == before.id
                and held.previous == caller.handshake.peer_id
            ):
                segments = (*conn.segments[: conn.index], *made.segments[conn.index :])
                return replace(conn, id=held.id, path=Path(segments, conn.index))
        return None

    def _expired(self, id_: str) -> None:
        self._spawn(self.expire(id_), f"expiry of {id_}")

    def _changed(self, id_: str, conn: Connection | None, *, ended: bool = False) -> None:
        """What the next hop says of a connection of ours; None: gone, or nobody knows."""
        held = self.connections.get(id_)
        if held and held.running and conn and conn.state == State.REFRESH_REQUESTED:
            held.again = True  # said once, when what is under way is done
            return
        if held is None or held.made is None:
            return
        if conn is None:
            held.ended |= ended
            self._down(held)
            return
        try:
            path.check(conn)  # or nobody left of us would take it with the next refresh
        except InvalidError as wrong:
            log.warning("the next hop's news are no connection", why=wrong.message)
            return
        made = held.made
        told = path.onward(made, conn.segments[made.index + 1 :])
        news = (conn.state, conn.context, [s.id for s in told.segments])
        if news == (made.state, made.context, [s.id for s in made.segments]):
            return
        held.made = replace(told, state=conn.state, context=conn.context)
        self._keep(held)
        self.events.publish(EventType.UPDATE, held.made, held.previous)

    def _asked_again(self, held: Held[M]) -> None:
        assert held.made is not None
        held.made = replace(held.made, state=State.REFRESH_REQUESTED)
        self.events.publish(EventType.UPDATE, held.made, held.previous)

    def _down(self, held: Held[M]) -> None:
        assert held.made is not None
        if held.made.state != State.DOWN:
            held.made = replace(held.made, state=State.DOWN)
            self.events.publish(EventType.UPDATE, held.made, held.previous)

    def _in_time(self, conn: Connection, caller: Caller) -> "_InTime":
        return _InTime(conn, min(self._remaining(caller) or LONGEST, LONGEST))

    def _remaining(self, caller: Caller) -> float:
        """Seconds the call has left; 0 if its caller set no deadline."""
        if caller.deadline is None:
            return 0.0
        return max(0.001, caller.deadline - asyncio.get_running_loop().time())

    def _keep(self, held: Held[M]) -> None:
        if self._keeper:
            self._keeper.keep(held, self.leases.ends(held.id))

    def _count(self) -> None:
        self._on_established(len(self.connections.established()))


def _onward(conn: Connection, held: Held[Any]) -> Connection:
    """conn, its way behind this hop as it is held here, where it is held.

    A caller's word of it may be old, or name another's connection further on.
    """
    if held.made is None:
        return conn
    return path.onward(conn, held.made.segments[held.made.index + 1 :])


def _named(conn: Connection) -> None:
    """Put the connection on every line logged from here on in this task."""
    bind_contextvars(connection=conn.id, service=conn.service)


class _InTime:
    """Ends the block at the caller's deadline, with a sentence instead of a bare timeout."""

    def __init__(self, conn: Connection, seconds: float) -> None:
        self._conn = conn
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *raised: Any) -> None:
        try:
            await self._timeout.__aexit__(*raised)
        except TimeoutError as late:
            raise DeadlineError(
                f"connection {self._conn.id} of {self._conn.service!r} was not there"
                f" after {self._seconds:.1f} s",
                hint="see the next hop's log, or ask with a longer deadline",
            ) from late

"""A registry at work: offers kept, found, watched, and forgotten in time (`wire.md` §6).

What a registry serves, and a manager that has no registry. Changes are decided
at once on the loop's thread (`nsm.offers`); where there is a keeper, the answer
waits until the change is kept, so that what was answered survives a crash.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import structlog

from nsm.caller import Caller
from nsm.domains import foreign_name
from nsm.errors import ExhaustedError, NsmError, UnsupportedError
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.offers import Offers, Shelf
from nsm.registration import CLIENT_ALLOWED, Registration, RegistrationPath, trim

T = TypeVar("T", Endpoint, Service)
PERIOD = 60 * SECOND  # how long an endpoint holds that says nothing itself (`wire.md` §6.6)
BEHIND = 1024  # names a watcher may be behind in any case
ROOM = 1_000_000  # names all watchers together may be behind beyond that: some 200 MB
_SLICE = 512  # records looked at before others get a turn
_LOOK = 5.0  # seconds at most between two looks at the wall clock, which may be set
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gone:
    """A name that is no longer registered; of is what kind it was."""

    of: type[Endpoint] | type[Service]
    name: str


Change = Endpoint | Service | Gone


class Keeper(Protocol):
    """Where registrations survive their process."""

    async def keep(self, *changes: Change) -> None:
        """Return when all changes are kept, after all that were asked for earlier.

        Raises UnavailableError if they are not.
        """


class Registrar:
    """Registers, finds and forgets what is of this domain. period in ns; behind and room in names.

    Whoever knows somebody to ask about other domains does not come here with their names.
    """

    def __init__(
        self,
        offers: Offers,
        *,
        period: int = PERIOD,
        keeper: Keeper | None = None,
        behind: int = BEHIND,
        room: int = ROOM,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.offers = offers
        self._period = period
        self._keeper = keeper
        self._behind = behind
        self._room = _Room(room)
        self.watchers = Watchers(offers.limits.watchers, offers.limits.watchers_per_id)
        self._clock = clock
        self._ahead = self._clock_ahead()
        self._pending: dict[tuple[type[Endpoint] | type[Service], str], _Pending[Any]] = {}
        self._sooner = asyncio.Event()
        self._waits_for: int | None = None

    async def run(self) -> NoReturn:
        """Forget endpoints when their time has come; for a task of the process."""
        while True:
            self._waits_for = self.offers.next_end()
            self._sooner.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause()):
                    await self._sooner.wait()
            self._mind_the_clock()
            if gone := self.offers.expire(self._clock()):
                log.info("endpoints expired", names=[e.name for e in gone[:10]], count=len(gone))
                if self._keeper is None:
                    continue
                try:
                    await self._keeper.keep(*(Gone(Endpoint, e.name) for e in gone))
                except NsmError as trouble:  # they come back with the next start, and expire then
                    log.warning("expired endpoints stay in the store", error=str(trouble))

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register or refresh; the endpoint as held, and the path it came over."""
        _ours("endpoint", asked)
        asked = replace(asked, path_ids=by.ids)
        before = self.offers.endpoints.get(asked.name)
        now = self._clock()
        latest = min(by.expires, now + self._period)
        stored = self.offers.register_endpoint(asked, now=now, latest=latest, owned=_owned(by))
        if self._waits_for is None or (stored.expires or 0) < self._waits_for:
            self._sooner.set()
        await self._kept(Endpoint, asked.name, before, stored, self.offers.put_back_endpoint)
        return stored, trim(by.path)

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Forget; OK if it is not there."""
        _ours("endpoint", asked)
        asked = replace(asked, path_ids=by.ids)
        if before := self.offers.unregister_endpoint(asked, owned=_owned(by)):
            await self._kept(Endpoint, asked.name, before, None, self.offers.put_back_endpoint)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What answers query now, and with watch every later change of that."""
        _ours("endpoint", query)
        async with contextlib.aclosing(
            self._find(self.offers.endpoints, query, watch, caller)
        ) as found:
            async for one in found:
                yield one

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register; identical content from another identity changes nothing."""
        _ours("network service", asked)
        asked = replace(asked, path_ids=by.ids)
        before = self.offers.services.get(asked.name)
        stored, new = self.offers.register_service(asked, owned=_owned(by))
        if new:
            await self._kept(Service, asked.name, before, stored, self.offers.put_back_service)
        return stored, trim(by.path)

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Forget; OK if it is not there."""
        _ours("network service", asked)
        asked = replace(asked, path_ids=by.ids)
        if before := self.offers.unregister_service(asked, owned=_owned(by)):
            await self._kept(Service, asked.name, before, None, self.offers.put_back_service)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What answers query now, and with watch every later change of that."""
        _ours("network service", query)
        async with contextlib.aclosing(
            self._find(self.offers.services, query, watch, caller)
        ) as found:
            async for one in found:
                yield one

    async def _find(
        self, shelf: Shelf[T], query: T, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[T], None]:
        with self._watching(shelf, query, caller) if watch else nullcontext() as feed:
            for place, one in enumerate(shelf.candidates(query), 1):
                if shelf.matches(query, one):
                    yield Found(one)
                if not place % _SLICE:
                    await asyncio.sleep(0)  # others' calls: a listing may be long
            while feed is not None:
                yield await feed.next()

    @contextmanager
    def _watching(self, shelf: Shelf[T], query: T, caller: Caller) -> Iterator["_Feed[T]"]:
        """A feed of all later changes, for the block. Raises ExhaustedError if there are too many.

        To be opened before looking at what is there: no gap between.
        """
        feed: _Feed[T] = _Feed(self._behind, self._room)
        with self.watchers.one(caller.id):
            watcher = shelf.watch(query, feed.put)
            try:
                yield feed
            finally:
                shelf.unwatch(watcher)
                feed.clear()

    async def _kept(
        self,
        of: type[T],
        name: str,
        before: T | None,
        after: T | None,
        put_back: Callable[[str, T | None, T | None], None],
    ) -> None:
        """Return when the change of name from before to after is kept.

        What cannot be kept is undone: back to what was kept last, which is not
        before where before is a moment old and cannot be kept either. So the last
        of those under way for a name undoes.
        """
        if self._keeper is None:
            return
        pending: _Pending[T] = self._pending.setdefault((of, name), _Pending(before))
        pending.under_way += 1
        pending.newest = after
        lost = False  # nor is it if the caller gives up meanwhile: the keeper does not
        try:
            await self._keeper.keep(Gone(of, name) if after is None else after)
        except NsmError:
            lost = True
            raise
        finally:
            pending.under_way -= 1
            if not lost:
                pending.kept = after
            if not pending.under_way:
                del self._pending[of, name]
                if pending.newest is not pending.kept:
                    put_back(name, pending.newest, pending.kept)

    def _mind_the_clock(self) -> None:
        """Where the wall clock was set back, nothing holds for longer than it would have."""
        ahead = self._clock_ahead()
        if ahead < self._ahead - SECOND:
            log.warning("the clock was set back", seconds=(self._ahead - ahead) / SECOND)
            self.offers.end_by(self._clock() + self._period)
            self._ahead = ahead
        self._ahead = max(ahead, self._ahead)

    def _clock_ahead(self) -> int:
        return self._clock() - time.monotonic_ns()

    def _pause(self) -> float:
        if self._waits_for is None:
            return _LOOK
        return min(_LOOK, max(0.0, (self._waits_for - self._clock()) / SECOND))


class Watchers:
    """Counts open watch streams: total altogether, and per_id of one identity, are the most."""

    def __init__(self, total: int, per_id: int) -> None:
        self._total = total
        self._per_id = per_id
        self._open: Counter[SpiffeId] = Counter()

    @contextmanager
    def one(self, who: SpiffeId) -> Iterator[None]:
        """One more of who's, for the block. Raises ExhaustedError if there are too many."""
        if (count := self._open.total()) >= self._total:
            raise ExhaustedError(
                f"{count} watch streams are open here, which is the most",
                hint="close some, or raise NSM_MAX_WATCHERS of the registry",
            )
        if (count := self._open[who]) >= self._per_id:
            raise ExhaustedError(
                f"{who} has {count} watch streams open here, which is the most one identity may",
                hint="close some, or raise NSM_MAX_WATCHERS_PER_ID of the registry",
            )
        self._open[who] += 1
        try:
            yield
        finally:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]


@dataclass(slots=True)
class _Pending(Generic[T]):
    """The changes of one name that are being kept: what was kept last, and what came last."""

    kept: T | None
    newest: T | None = None
    under_way: int = 0


@dataclass(slots=True)
class _Room:
    """How many names all watchers together may still be behind, beyond what each may."""

    left: int


class _Feed(Generic[T]):
    """Changes on their way to one watcher: the newest of each name, in the order they began.

    Bounded, so that a slow watcher harms nobody else: by most names and, beyond
    them, by the room that all share. A watcher of many names that is still being
    told what is there falls behind by as many, and is not slow.
    """

    def __init__(self, most: int, room: _Room) -> None:
        self._most = most
        self._room = room
        self._waiting: dict[str, Found[T]] = {}
        self._missed = 0
        self._ready = asyncio.Event()

    def put(self, change: Found[T]) -> None:
        """Have change waiting; too many names, and all are dropped and the stream will end."""
        name = change.item.name
        if self._missed:
            return
        if name not in self._waiting and len(self._waiting) >= self._most:
            if not self._room.left:
                self._missed = len(self._waiting) + 1
                self.clear()
                self._ready.set()
                return
            self._room.left -= 1
        self._waiting[name] = change
        self._ready.set()

    async def next(self) -> Found[T]:
        """The oldest change not yet taken. Raises ExhaustedError if some were dropped."""
        while not self._waiting and not self._missed:
            self._ready.clear()
            await self._ready.wait()
        if self._missed:
            raise ExhaustedError(
                f"watcher too slow: {self._missed} names behind", hint="watch again"
            )
        if len(self._waiting) > self._most:
            self._room.left += 1
        return self._waiting.pop(next(iter(self._waiting)))

    def clear(self) -> None:
        """Have nothing waiting."""
        self._room.left += max(0, len(self._waiting) - self._most)
        self._waiting.clear()


def _ours(kind: str, asked: Endpoint | Service) -> None:
    if name := foreign_name(asked):
        raise UnsupportedError(
            f"{kind} {name[:256]!r} is of another domain, and this registry has nobody"
            " to ask there",
            hint="use a name of this domain, without @ (NSM_PROXY_REGISTRY_URL is not set)",
        )


def _owned(by: Registration) -> bool:
    return CLIENT_ALLOWED in by.policies

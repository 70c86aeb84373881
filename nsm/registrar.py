"""A registry at work: offers kept, found, watched, and forgotten in time (`wire.md` §6).

What a registry serves, and a manager that has no registry. Changes are decided
at once on the loop's thread (`nsm.offers`); where there is a keeper, the answer
waits until the change is kept, so that what was answered survives a crash.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Generic, NoReturn, Protocol, TypeVar

import structlog

from nsm.caller import Caller
from nsm.errors import ExhaustedError, NsmError, UnsupportedError
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.offers import Offers, Shelf
from nsm.registration import CLIENT_ALLOWED, Registration, RegistrationPath, trim

T = TypeVar("T", Endpoint, Service)
PERIOD = 60 * SECOND  # how long an endpoint holds that says nothing itself (`wire.md` §6.6)
BEHIND = 1024  # updates a watcher may be behind
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
    """Registers, finds and forgets. period in ns; behind in updates.

    proxy is the URL of whoever resolves names of other domains; empty if nobody does.
    """

    def __init__(
        self,
        offers: Offers,
        *,
        period: int = PERIOD,
        keeper: Keeper | None = None,
        proxy: str = "",
        behind: int = BEHIND,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.offers = offers
        self._period = period
        self._keeper = keeper
        self._proxy = proxy
        self._behind = behind
        self._clock = clock
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
            if gone := self.offers.expire(self._clock()):
                log.info("endpoints expired", names=[e.name for e in gone[:10]], count=len(gone))
                try:
                    await self._keep(*(Gone(Endpoint, e.name) for e in gone))
                except NsmError as trouble:  # they come back with the next start, and expire then
                    log.warning("expired endpoints stay in the store", error=str(trouble))

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register or refresh; the endpoint as held, and the path it came over."""
        self._ours("endpoint", asked.name, *asked.services)
        asked = replace(asked, path_ids=by.ids)
        before = self.offers.endpoints.get(asked.name)
        now = self._clock()
        latest = min(by.expires, now + self._period)
        stored = self.offers.register_endpoint(asked, now=now, latest=latest, owned=_owned(by))
        if self._waits_for is None or (stored.expires or 0) < self._waits_for:
            self._sooner.set()
        try:
            await self._keep(stored)
        except NsmError:
            self.offers.put_back_endpoint(asked.name, stored, before)
            raise
        return stored, trim(by.path)

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Forget; OK if it is not there."""
        self._ours("endpoint", asked.name, *asked.services)
        asked = replace(asked, path_ids=by.ids)
        if before := self.offers.unregister_endpoint(asked, owned=_owned(by)):
            try:
                await self._keep(Gone(Endpoint, asked.name))
            except NsmError:
                self.offers.put_back_endpoint(asked.name, None, before)
                raise

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What answers query now, and with watch every later change of that."""
        self._ours("endpoint", query.name, *query.services)
        async with contextlib.aclosing(self._find(self.offers.endpoints, query, watch)) as found:
            async for one in found:
                yield one

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register; identical content from another identity changes nothing."""
        self._ours("network service", asked.name)
        asked = replace(asked, path_ids=by.ids)
        before = self.offers.services.get(asked.name)
        stored, new = self.offers.register_service(asked, owned=_owned(by))
        if new:
            try:
                await self._keep(stored)
            except NsmError:
                self.offers.put_back_service(asked.name, stored, before)
                raise
        return stored, trim(by.path)

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Forget; OK if it is not there."""
        self._ours("network service", asked.name)
        asked = replace(asked, path_ids=by.ids)
        if before := self.offers.unregister_service(asked, owned=_owned(by)):
            try:
                await self._keep(Gone(Service, asked.name))
            except NsmError:
                self.offers.put_back_service(asked.name, None, before)
                raise

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What answers query now, and with watch every later change of that."""
        self._ours("network service", query.name)
        async with contextlib.aclosing(self._find(self.offers.services, query, watch)) as found:
            async for one in found:
                yield one

    async def _find(self, shelf: Shelf[T], query: T, watch: bool) -> AsyncGenerator[Found[T], None]:
        if watch and shelf.watching >= self.offers.limits.watchers:
            raise ExhaustedError(
                f"{shelf.watching} watch streams are open here, which is the most",
                hint="close some, or raise NSM_MAX_WATCHERS of the registry",
            )
        feed: _Feed[T] = _Feed(self._behind)
        watcher = shelf.watch(query, feed.put) if watch else None  # before looking: no gap between
        try:
            for place, one in enumerate(shelf.candidates(query), 1):
                if shelf.matches(query, one):
                    yield Found(one)
                if not place % _SLICE:
                    await asyncio.sleep(0)  # others' calls: a listing may be long
            if watcher is not None:
                while True:
                    yield await feed.next()
        finally:
            if watcher is not None:
                shelf.unwatch(watcher)

    async def _keep(self, *changes: Change) -> None:
        if self._keeper is not None:
            await self._keeper.keep(*changes)

    def _pause(self) -> float:
        if self._waits_for is None:
            return _LOOK
        return min(_LOOK, max(0.0, (self._waits_for - self._clock()) / SECOND))

    def _ours(self, kind: str, *names: str) -> None:
        for name in names:
            if "@" not in name:
                continue
            if self._proxy:
                raise UnsupportedError(
                    f"{kind} {name[:256]!r} is of another domain, and passing that on to"
                    f" {self._proxy} is not yet there",
                    hint="use a name of this domain, without @",
                )
            raise UnsupportedError(
                f"{kind} {name[:256]!r} is of another domain, and this registry has nobody"
                " to ask there",
                hint="use a name of this domain, without @ (NSM_PROXY_REGISTRY_URL is not set)",
            )


class _Feed(Generic[T]):
    """Updates on their way to one watcher: bounded, so that a slow one harms nobody else."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Found[T]] = deque()
        self._missed = 0
        self._ready = asyncio.Event()

    def put(self, change: Found[T]) -> None:
        """Queue change; too many, and all are dropped and the stream will end."""
        if self._missed:
            self._missed += 1
        elif len(self._waiting) >= self._most:
            self._missed = len(self._waiting) + 1
            self._waiting.clear()
        else:
            self._waiting.append(change)
        self._ready.set()

    async def next(self) -> Found[T]:
        """The oldest update not yet taken. Raises ExhaustedError if some were dropped."""
        while not self._waiting and not self._missed:
            self._ready.clear()
            await self._ready.wait()
        if self._missed:
            raise ExhaustedError(
                f"watcher too slow: {self._missed} updates behind", hint="watch again"
            )
        return self._waiting.popleft()


def _owned(by: Registration) -> bool:
    return CLIENT_ALLOWED in by.policies

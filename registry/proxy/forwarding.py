"""Other domains' registries as one: names are taken off their domain, asked there, put on again.

A domain's registry may be met at several addresses, which are tried in turn, the
one that answered last first; what was tried is in the error if none answers. Its
nsmgr-proxy may be, too: who asks for endpoints is told of one that answers now.
Nothing is remembered of what a registry said: each question is asked again.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import NoReturn, TypeVar

import structlog

from nsm import domains
from nsm.caller import Caller
from nsm.errors import (
    DeadlineError,
    InvalidError,
    NotFoundError,
    NsmError,
    UnauthenticatedError,
    UnavailableError,
)
from nsm.model import Endpoint, Found, Service
from nsm.race import up_to
from nsm.registrar import Watchers
from nsm.registration import Registration, RegistrationPath
from nsm.resolve import Domains
from nsm.rpc.passing import admit, said_by, watch_ended
from nsm.rpc.registry import CALL_TIMEOUT, Registered, RegistryClient
from nsm.rpc.registry_services import Store

T = TypeVar("T", Endpoint, Service)
R = TypeVar("R")
REMEMBERED = 10_000  # domains whose addresses that answered last are known
FRESH = 1.0  # seconds for which all that a Find tells is met at the same door
LEAST = 2.0  # seconds a registry may take to answer, however many addresses there are
LOOK = 5.0  # seconds between two looks at whether a watched domain is still where it was
log = structlog.get_logger(__name__)


class Forwarding(Store):
    """Asks the registry of each domain; connect makes a client of the registry at a URL.

    reach raises UnavailableError or UnauthenticatedError where nobody answers at a URL.
    """

    def __init__(
        self,
        found: Domains,
        connect: Callable[[str], RegistryClient],
        reach: Callable[[str], Awaitable[None]],
        watchers: Watchers,
    ) -> None:
        self._domains = found
        self._connect = connect
        self._reach = reach
        self._watchers = watchers
        self._answered: OrderedDict[str, str] = OrderedDict()
        self._entered: OrderedDict[str, str] = OrderedDict()

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register in the domain that its names say."""
        domain = _domain(asked, by.caller)
        there = domains.stripped_endpoint(asked)

        async def register(client: RegistryClient, until: float) -> Registered[Endpoint]:
            return await client.register_endpoint(there, by.path, deadline=until)

        done = await self._in_turn(domain, register, by.caller)
        return domains.joined_endpoint(done.item, domain, asked), done.path

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Take it from the domain that its names say."""
        there = domains.stripped_endpoint(asked)

        async def unregister(client: RegistryClient, until: float) -> None:
            await client.unregister_endpoint(there, by.path, deadline=until)

        await self._in_turn(_domain(asked, by.caller), unregister, by.caller)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What the domain knows, each to be met at the domain's nsmgr-proxy if it has one."""
        domain = _domain(query, caller)
        there = domains.stripped_endpoint(query)
        with self._watchers.one(caller.id) if watch else nullcontext():
            if watch:
                seen = self._watched(domain, lambda client: client.watch_endpoints(there))
            else:
                seen = self._found(
                    domain,
                    lambda client, until: client.find_endpoints(there, deadline=until),
                    caller,
                )
            door, looked = "", -FRESH
            async with aclosing(seen):
                async for found in seen:
                    if _misnamed(found.item, domain):
                        continue
                    now = asyncio.get_running_loop().time()
                    if now - looked >= FRESH:
                        door, looked = await self._met_at(domain), now
                    joined = domains.joined_endpoint(found.item, domain)
                    yield replace(found, item=replace(joined, url=door or joined.url))

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register in the domain that its name says."""
        domain = _domain(asked, by.caller)
        there = domains.stripped_service(asked)

        async def register(client: RegistryClient, until: float) -> Registered[Service]:
            return await client.register_service(there, by.path, deadline=until)

        done = await self._in_turn(domain, register, by.caller)
        return domains.joined_service(done.item, domain), done.path

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Take it from the domain that its name says."""
        there = domains.stripped_service(asked)

        async def unregister(client: RegistryClient, until: float) -> None:
            await client.unregister_service(there, by.path, deadline=until)

        await self._in_turn(_domain(asked, by.caller), unregister, by.caller)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What the domain knows."""
        domain = _domain(query, caller)
        there = domains.stripped_service(query)
        with self._watchers.one(caller.id) if watch else nullcontext():
            if watch:
                seen = self._watched(domain, lambda client: client.watch_services(there))
            else:
                seen = self._found(
                    domain,
                    lambda client, until: client.find_services(there, deadline=until),
                    caller,
                )
            async with aclosing(seen):
                async for found in seen:
                    if not _misnamed(found.item, domain):
                        yield replace(found, item=domains.joined_service(found.item, domain))

    # -- one domain

    async def _met_at(self, domain: str) -> str:
        """The first URL of the domain's nsmgr-proxy where somebody answers whom we believe, else
        the first; "" for a floating domain, which has none.
        """
        tried: set[str] = set()
        for _ in range(2):
            try:
                urls = await self._domains.manager_proxy(domain)
            except NotFoundError:
                return ""
            new = [url for url in urls if url not in tried]
            for url in _in_order(new, self._entered.get(domain)):
                tried.add(url)
                try:
                    await self._reach(url)
                except (UnavailableError, UnauthenticatedError) as why:
                    log.info("nsmgr-proxy not met", domain=domain, url=url, why=why.message)
                else:
                    _remember(self._entered, domain, url)
                    return url
            self._domains.doubt(domain)  # it may have moved, whatever the answer's age
        return urls[0]  # whoever goes there is told why

    async def _found(
        self,
        domain: str,
        find: Callable[[RegistryClient, float], Awaitable[list[T]]],
        caller: Caller,
    ) -> AsyncGenerator[Found[T], None]:
        for one in await self._in_turn(domain, find, caller):
            yield Found(one)

    async def _in_turn(
        self,
        domain: str,
        call: Callable[[RegistryClient, float], Awaitable[R]],
        caller: Caller,
    ) -> R:
        """What the first registry of the domain says that can be reached and believed.

        One that takes a call and does not answer has its share of the time, and no more.
        """
        trying = _Trying(domain)
        urls = await self._addresses(domain)
        for place, url in enumerate(urls):
            with trying.at(url):
                now, left = asyncio.get_running_loop().time(), caller.left()
                whole = CALL_TIMEOUT if left is None else min(CALL_TIMEOUT, left)
                share = max(whole / (len(urls) - place), min(whole, LEAST))
                answer = await call(self._connect(url), now + share)
                _remember(self._answered, domain, url)
                return answer
        raise self._unreached(trying)

    async def _watched(
        self, domain: str, watch: Callable[[RegistryClient], AsyncGenerator[Found[T], None]]
    ) -> AsyncGenerator[Found[T], None]:
        """A watch in the domain. It ends with an error: whoever watches is not to wait for ever."""
        trying = _Trying(domain)
        for url in await self._addresses(domain):
            told = False
            with trying.at(url):
                changes = up_to(watch(self._connect(url)), self._moved(domain, url))
                async with aclosing(changes):
                    async for change in changes:
                        if not told:
                            _remember(self._answered, domain, url)
                        told = trying.over = True  # another address would begin anew
                        yield change
                raise watch_ended()
        raise self._unreached(trying)

    async def _moved(self, domain: str, url: str) -> NoReturn:
        """Raises UnavailableError once the domain's registry is no longer to be met at url."""
        while True:
            await asyncio.sleep(LOOK)
            now: tuple[str, ...] = ()
            try:
                now = await self._domains.registry(domain)
            except NotFoundError:
                pass
            except NsmError:  # nobody says so: the watch goes on as long as it does
                continue
            if url not in now:
                raise UnavailableError(
                    f"{url} is no longer where its registry is", hint="watch again"
                )

    async def _addresses(self, domain: str) -> list[str]:
        urls = await self._domains.registry(domain)
        return _in_order(urls, self._answered.get(domain))

    def _unreached(self, trying: "_Trying") -> NsmError:
        self._domains.doubt(trying.domain)  # it may have moved, whatever the answer's age
        return trying.error()


class _Trying:
    """A domain's addresses being tried; over: one has answered, so what it says is the end."""

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.over = False
        self._errors: list[NsmError] = []

    @contextlib.contextmanager
    def at(self, url: str) -> Iterator[None]:
        """Try url in the block, and end the block where it cannot be reached or believed."""
        try:
            with said_by(f"the registry of domain {self.domain!r} at {url}"):
                yield
        except (UnavailableError, UnauthenticatedError, DeadlineError) as error:
            if self.over:
                raise
            self._errors.append(error)

    def error(self) -> NsmError:
        """What was tried."""
        if len(self._errors) == 1:
            return self._errors[0]
        kind: type[NsmError] = UnavailableError
        if all(isinstance(error, UnauthenticatedError) for error in self._errors):
            kind = UnauthenticatedError
        return kind(
            f"no registry of domain {self.domain!r} answers; tried: "
            + "; ".join(error.message for error in self._errors)
        )


def _in_order(urls: Sequence[str], first: str | None) -> list[str]:
    return sorted(urls, key=lambda url: url != first)


def _remember(urls: OrderedDict[str, str], domain: str, url: str) -> None:
    urls[domain] = url
    urls.move_to_end(domain)
    if len(urls) > REMEMBERED:
        urls.popitem(last=False)


def _misnamed(said: Endpoint | Service, domain: str) -> bool:
    """Whether a registry tells of what is not its own: it speaks for its domain only."""
    if name := domains.foreign_name(said):
        log.warning("not believed: a name of another domain", domain=domain, name=name[:256])
    return bool(name)


def _domain(asked: Endpoint | Service, caller: Caller) -> str:
    admit(caller, asked)
    if domain := domains.domain_of(asked):
        return domain
    raise InvalidError(
        f"domain cannot be empty: {asked.name[:256]!r} is asked of the proxy for other domains",
        hint="a name of another domain is written NAME@DOMAIN; for ours ask our registry",
    )

"""Other domains' registries as one: names are taken off their domain, asked there, put on again.

A domain's registry may be met at several addresses, which are tried in turn, the
one that answered last first; what was tried is in the error if none answers.
Nothing is remembered of what a registry said: each question is asked again.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, nullcontext
from dataclasses import replace
from typing import NoReturn, TypeVar

from nsm import domains
from nsm.caller import Caller
from nsm.errors import InvalidError, NotFoundError, NsmError, UnauthenticatedError, UnavailableError
from nsm.model import Endpoint, Found, Service
from nsm.race import up_to
from nsm.registrar import Watchers
from nsm.registration import Registration, RegistrationPath
from nsm.resolve import Domains
from nsm.rpc.passing import said_by, watch_ended
from nsm.rpc.registry import Registered, RegistryClient
from nsm.rpc.registry_services import Store

T = TypeVar("T", Endpoint, Service)
R = TypeVar("R")
REMEMBERED = 10_000  # domains whose address that answered last is known
FRESH = 1.0  # seconds for which all that a Find tells is met at the same door
LOOK = 5.0  # seconds between two looks at whether a watched domain is still where it was


class Forwarding(Store):
    """Asks the registry of each domain; connect makes a client of the registry at a URL."""

    def __init__(
        self, found: Domains, connect: Callable[[str], RegistryClient], watchers: Watchers
    ) -> None:
        self._domains = found
        self._connect = connect
        self._watchers = watchers
        self._answered: OrderedDict[str, str] = OrderedDict()

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register in the domain that its names say."""
        domain = _domain(asked)
        there = domains.stripped_endpoint(asked)

        async def register(client: RegistryClient) -> Registered[Endpoint]:
            return await client.register_endpoint(there, by.path, deadline=by.caller.deadline)

        done = await self._in_turn(domain, register)
        return domains.joined_endpoint(done.item, domain, asked), done.path

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Take it from the domain that its names say."""
        there = domains.stripped_endpoint(asked)

        async def unregister(client: RegistryClient) -> None:
            await client.unregister_endpoint(there, by.path, deadline=by.caller.deadline)

        await self._in_turn(_domain(asked), unregister)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What the domain knows, each to be met at the domain's nsmgr-proxy if it has one."""
        domain = _domain(query)
        there = domains.stripped_endpoint(query)
        with self._watchers.one(caller.id) if watch else nullcontext():
            if watch:
                seen = self._watched(domain, lambda client: client.watch_endpoints(there))
            else:
                seen = self._found(
                    domain, lambda client: client.find_endpoints(there, deadline=caller.deadline)
                )
            door, looked = "", -FRESH
            async with aclosing(seen):
                async for found in seen:
                    now = asyncio.get_running_loop().time()
                    if now - looked >= FRESH:
                        door, looked = await self._met_at(domain), now
                    joined = domains.joined_endpoint(found.item, domain)
                    yield replace(found, item=replace(joined, url=door or joined.url))

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register in the domain that its name says."""
        domain = _domain(asked)
        there = domains.stripped_service(asked)

        async def register(client: RegistryClient) -> Registered[Service]:
            return await client.register_service(there, by.path, deadline=by.caller.deadline)

        done = await self._in_turn(domain, register)
        return domains.joined_service(done.item, domain), done.path

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Take it from the domain that its name says."""
        there = domains.stripped_service(asked)

        async def unregister(client: RegistryClient) -> None:
            await client.unregister_service(there, by.path, deadline=by.caller.deadline)

        await self._in_turn(_domain(asked), unregister)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What the domain knows."""
        domain = _domain(query)
        there = domains.stripped_service(query)
        with self._watchers.one(caller.id) if watch else nullcontext():
            if watch:
                seen = self._watched(domain, lambda client: client.watch_services(there))
            else:
                seen = self._found(
                    domain, lambda client: client.find_services(there, deadline=caller.deadline)
                )
            async with aclosing(seen):
                async for found in seen:
                    yield replace(found, item=domains.joined_service(found.item, domain))

    # -- one domain

    async def _met_at(self, domain: str) -> str:
        """The URL of the domain's nsmgr-proxy; "" for a floating domain, which has none."""
        try:
            return (await self._domains.manager_proxy(domain))[0]
        except NotFoundError:
            return ""

    async def _found(
        self, domain: str, find: Callable[[RegistryClient], Awaitable[list[T]]]
    ) -> AsyncGenerator[Found[T], None]:
        for one in await self._in_turn(domain, find):
            yield Found(one)

    async def _in_turn(self, domain: str, call: Callable[[RegistryClient], Awaitable[R]]) -> R:
        """What the first registry of the domain says that can be reached and believed."""
        trying = _Trying(domain)
        for url in await self._addresses(domain):
            with trying.at(url):
                answer = await call(self._connect(url))
                self._heard(domain, url)
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
                            self._heard(domain, url)
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
        return sorted(urls, key=lambda url: url != self._answered.get(domain))

    def _heard(self, domain: str, url: str) -> None:
        self._answered[domain] = url
        self._answered.move_to_end(domain)
        if len(self._answered) > REMEMBERED:
            self._answered.popitem(last=False)

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
        except (UnavailableError, UnauthenticatedError) as error:
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


def _domain(asked: Endpoint | Service) -> str:
    if domain := domains.domain_of(asked):
        return domain
    raise InvalidError(
        f"domain cannot be empty: {asked.name[:256]!r} is asked of the proxy for other domains",
        hint="a name of another domain is written NAME@DOMAIN; for ours ask our registry",
    )

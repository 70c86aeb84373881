"""The domain's registry as the manager's own store of names: every question goes there.

But for one: which service is meant. Services are few, change rarely, and are asked
for twice by every request, so they are watched, and answered from what was seen
last. What the watch has not told yet, or no longer does, is asked for.
"""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import NoReturn

import structlog

from nsm.caller import Caller
from nsm.errors import NsmError
from nsm.model import Endpoint, Found, Service
from nsm.registration import Registration, RegistrationPath
from nsm.rpc.registry import RegistryClient

log = structlog.get_logger(__name__)
MOST = 10_000  # services kept; a domain with more is asked each time
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries to watch; the last repeats


class RemoteRegistry:
    """Passes registrations on with the path they came by, and finds what is there."""

    def __init__(self, client: RegistryClient) -> None:
        self._client = client
        self._services: dict[str, Service] = {}

    async def follow(self) -> NoReturn:
        """Watch the domain's services, for a task of the process."""
        failures = 0
        while True:
            try:
                async with aclosing(self._client.watch_services()) as changes:
                    async for found in changes:
                        failures = 0
                        self._heard(found)
            except NsmError as error:
                if not failures:
                    log.warning("the registry's services are not watched now", why=str(error))
            finally:
                self._services.clear()
            pause = PAUSES[min(failures, len(PAUSES) - 1)]
            failures += 1
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    def _heard(self, found: Found[Service]) -> None:
        if found.deleted:
            self._services.pop(found.item.name, None)
        elif len(self._services) < MOST or found.item.name in self._services:
            self._services[found.item.name] = found.item

    def _known(self, query: Service) -> Service | None:
        """What the watch told of the one service query names, if that is all it asks."""
        known = self._services.get(query.name)
        if known is None or query.matches or query.payload not in ("", known.payload):
            return None
        return known

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register in the domain; the path comes back at our own index."""
        done = await self._client.register_endpoint(asked, by.path, deadline=by.caller.deadline)
        return done.item, done.path

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Take it from the domain."""
        await self._client.unregister_endpoint(asked, by.path, deadline=by.caller.deadline)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What the domain knows, and with watch every change of it."""
        if watch:
            async with aclosing(self._client.watch_endpoints(query)) as changes:
                async for found in changes:
                    yield found
            return
        for endpoint in await self._client.find_endpoints(query, deadline=caller.deadline):
            yield Found(endpoint)

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register in the domain; the path comes back at our own index."""
        done = await self._client.register_service(asked, by.path, deadline=by.caller.deadline)
        return done.item, done.path

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Take it from the domain."""
        await self._client.unregister_service(asked, by.path, deadline=by.caller.deadline)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What the domain knows, and with watch every change of it."""
        if watch:
            async with aclosing(self._client.watch_services(query)) as changes:
                async for found in changes:
                    yield found
            return
        if known := self._known(query):
            yield Found(known)
            return
        for service in await self._client.find_services(query, deadline=caller.deadline):
            yield Found(service)

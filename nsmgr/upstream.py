"""The domain's registry as the manager's own store of names: every question goes there."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from nsm.caller import Caller
from nsm.model import Endpoint, Found, Service
from nsm.registration import Registration, RegistrationPath
from nsm.rpc.registry import RegistryClient


class RemoteRegistry:
    """Passes registrations on with the path they came by, and finds what is there."""

    def __init__(self, client: RegistryClient) -> None:
        self._client = client

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
        for service in await self._client.find_services(query, deadline=caller.deadline):
            yield Found(service)

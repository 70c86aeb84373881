"""A hop of the registration path that keeps nothing: whoever is next, decides (`wire.md` §6.1).

What is registered goes on with the path it came by, which the next hop steps onto,
and the path that comes back is handed back whole. What fails there says who said it.
"""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

from nsm.caller import Caller
from nsm.domains import foreign_name
from nsm.errors import NsmError, UnavailableError
from nsm.model import Endpoint, Found, Service
from nsm.registration import Registration, RegistrationPath, denied
from nsm.rpc.registry import RegistryClient
from nsm.rpc.status import error_of_status


class Passing:
    """A store (`nsm.rpc.registry_services.Store`) that asks the next hop.

    whose says in messages who that is, as `the nsmgr-proxy`.
    """

    def __init__(self, client: RegistryClient, whose: str) -> None:
        self._client = client
        self._whose = f"{whose} at {client.url}"

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register there; the path comes back at our own index."""
        with said_by(self._whose):
            done = await self._client.register_endpoint(asked, by.path, deadline=by.caller.deadline)
        return done.item, done.path

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Forget it there."""
        with said_by(self._whose):
            await self._client.unregister_endpoint(asked, by.path, deadline=by.caller.deadline)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What is known there, and with watch every change, until that ends: UnavailableError."""
        with said_by(self._whose):
            if not watch:
                for one in await self._client.find_endpoints(query, deadline=caller.deadline):
                    yield Found(one)
                return
            async with aclosing(self._client.watch_endpoints(query)) as changes:
                async for change in changes:
                    yield change
            raise watch_ended()

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register there; the path comes back at our own index."""
        with said_by(self._whose):
            done = await self._client.register_service(asked, by.path, deadline=by.caller.deadline)
        return done.item, done.path

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Forget it there."""
        with said_by(self._whose):
            await self._client.unregister_service(asked, by.path, deadline=by.caller.deadline)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What is known there, and with watch every change, until that ends: UnavailableError."""
        with said_by(self._whose):
            if not watch:
                for one in await self._client.find_services(query, deadline=caller.deadline):
                    yield Found(one)
                return
            async with aclosing(self._client.watch_services(query)) as changes:
                async for change in changes:
                    yield change
            raise watch_ended()


def admit(caller: Caller, asked: Endpoint | Service) -> None:
    """Refuse who is of another domain to ask through us for what is of a third.

    It would have us look up names, and connect to addresses, of its choosing. Raises DeniedError.
    """
    if is_stranger(caller):
        raise denied(
            f"{caller.id} asks for {foreign_name(asked)[:256]!r}",
            f"who is not of the trust domain {caller.handshake.own.id.trust_domain} asks here for"
            " what is of this domain only; ask a registry of your own",
        )


def is_stranger(caller: Caller) -> bool:
    """Whether it is of another trust domain than we."""
    return caller.id.trust_domain != caller.handshake.own.id.trust_domain


def watch_ended() -> UnavailableError:
    """A watch that ended without a word, there or with our certificate: who watches is to know."""
    return UnavailableError("the watch ended", hint="watch again")


@contextmanager
def said_by(whose: str) -> Iterator[None]:
    """What is raised in the block says who said it, and stays the kind of error it is."""
    try:
        yield
    except NsmError as error:
        told = error_of_status(error.code, f"{whose}: {error.message}")
        told.hint = error.hint
        raise told from error

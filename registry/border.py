"""What is of this domain and what is not: names with an `@` go to whoever knows theirs (§6.8).

The registry is a hop of such a registration as a manager is: it keeps nothing of it,
and the path is handed on and back.
"""

from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, nullcontext

from nsm.caller import Caller
from nsm.domains import is_foreign
from nsm.model import Endpoint, Found, Service
from nsm.registrar import Watchers
from nsm.registration import Registration, RegistrationPath, denied
from nsm.rpc.passing import admit, is_stranger
from nsm.rpc.registry_services import Store


class Border(Store):
    """Asks ours for names of this domain, and beyond for those of others.

    watchers counts the watch streams that go beyond. strangers says whether who is of another
    trust domain may register here: what they offer, clients of this domain would be led to.
    """

    def __init__(
        self, ours: Store, beyond: Store, watchers: Watchers, *, strangers: bool = False
    ) -> None:
        self._ours = ours
        self._beyond = beyond
        self._watchers = watchers
        self._strangers = strangers

    def _of(self, asked: Endpoint | Service, caller: Caller) -> Store:
        if not is_foreign(asked):
            return self._ours
        admit(caller, asked)
        return self._beyond

    def _for(self, asked: Endpoint | Service, caller: Caller) -> Store:
        """Where to register it. Raises DeniedError."""
        store = self._of(asked, caller)
        if store is self._ours and is_stranger(caller) and not self._strangers:
            raise denied(
                f"{caller.id} registers {asked.name[:256]!r} here",
                "names of this domain are for its own trust domain,"
                f" {caller.handshake.own.id.trust_domain}, unless this registry has"
                " NSM_REGISTER_STRANGERS",
            )
        return store

    def _counted(
        self, asked: Endpoint | Service, watch: bool, caller: Caller
    ) -> AbstractContextManager[None]:
        if watch and is_foreign(asked):
            return self._watchers.one(caller.id)
        return nullcontext()

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register it where it belongs."""
        return await self._for(asked, by.caller).register_endpoint(asked, by)

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Forget it where it belongs."""
        await self._of(asked, by.caller).unregister_endpoint(asked, by)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What is known where the names belong."""
        with self._counted(query, watch, caller):
            store = self._of(query, caller)
            async with aclosing(store.find_endpoints(query, watch, caller)) as found:
                async for one in found:
                    yield one

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Register it where it belongs."""
        return await self._for(asked, by.caller).register_service(asked, by)

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Forget it where it belongs."""
        await self._of(asked, by.caller).unregister_service(asked, by)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What is known where the name belongs."""
        with self._counted(query, watch, caller):
            store = self._of(query, caller)
            async with aclosing(store.find_services(query, watch, caller)) as found:
                async for one in found:
                    yield one

"""A client's wires say names; its workload's programs find them.

    async with Naming(None, "/etc/resolv.conf", ("127.0.0.1", 53)).running() as naming:
        naming.tell(wire)        # on each answer
        await naming.settled()   # programs may ask

Unless it is asked for, nothing is served before a wire says names, and what stands in the way
is no failure: a workload that needs no names loses nothing.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING

import structlog

from nsm.client import Wire
from nsm.errors import NsmError
from nsm.identity.background import background
from nsm.model import Context
from nsm.names import resolvconf

if TYPE_CHECKING:
    from nsm.names.resolver import Resolver

AGAIN = 10.0  # seconds until what stood in the way is tried again
log = structlog.get_logger(__name__)


class Naming:
    """The resolver of one workload: wanted (True), never (False), or where it can be (None)."""

    def __init__(self, wanted: bool | None, path: str, address: tuple[str, int]) -> None:
        self._wanted = wanted
        self._path = path
        self._address = address
        self._said: dict[str, Context] = {}
        self._some = asyncio.Event()
        self._settled = asyncio.Event()
        self._failure: NsmError | OSError | None = None
        self._resolver: Resolver | None = None

    def tell(self, wire: Wire) -> None:
        """What the wire says of names, from now on; for `Wish.on_answer`."""
        context = wire.connection.context or Context()
        if self._resolver:
            self._resolver.tell(wire.id, context)
        self._said[wire.id] = context
        if wire.dns:
            self._some.set()

    def forget(self, wire: Wire) -> None:
        """The wire is gone."""
        self._said.pop(wire.id, None)
        if self._resolver:
            self._resolver.forget(wire.id)

    async def settled(self) -> None:
        """Wait until programs find what wires said so far, or cannot.

        Raises what stood in the way where names are wanted.
        """
        if self._wanted is False or not (self._wanted or self._some.is_set()):
            return
        await self._settled.wait()
        if self._wanted and self._failure:
            raise self._failure

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Naming"]:
        """Serve for as long as the block lasts. What a killed life left is brought back first."""
        await asyncio.to_thread(resolvconf.recover, self._path, self._address)
        async with background() as tasks:
            if self._wanted is not False:
                tasks.create_task(self._serve(), name="names of wires")
            if self._wanted:
                await self.settled()
            yield self

    async def _serve(self) -> None:
        if not self._wanted:
            await self._some.wait()
        while True:
            try:
                if self._wanted is None:
                    await asyncio.to_thread(resolvconf.check_given, self._path)
                # in a thread, and no sooner: most clients have no names, and dnspython is large
                names = await asyncio.to_thread(import_module, "nsm.names.resolver")
                async with names.local_names(self._path, self._address) as resolver:
                    self._resolver = resolver
                    for id_, context in self._said.items():
                        resolver.tell(id_, context)
                    log.info("names of wires resolve", file=self._path or "none")
                    self._settled.set()
                    await asyncio.Event().wait()
            except (NsmError, OSError) as error:
                if str(error) != str(self._failure):
                    log.warning("names of wires do not resolve here", why=str(error))
                self._failure = error
                self._settled.set()
            finally:
                self._resolver = None
            await asyncio.sleep(AGAIN)

"""Wires to the other routers of the domain: those that were there before us are asked for one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import structlog

from endpoints.vl3.fellows import Fellows
from nsm.client import Client, Wire, Wish
from nsm.errors import NsmError
from nsm.identity.background import background
from nsm.model import Endpoint
from nsm.nsurl import NSURL
from nsm.rpc.registry import RegistryClient

LOOK_AGAIN = 60.0  # seconds of a watch; then what it may have missed is looked for
MISSING = 5.0  # seconds after which somebody missing is looked for once more
PAUSE = 2.0  # seconds before a registry that cannot be asked is asked again
PATIENCE = float("inf")
log = structlog.get_logger(__name__)


class Joins:
    """Follows the domain's routers, and holds a wire to each that was there before us.

    on_left is called with the id of a wire that is held no longer.
    """

    def __init__(
        self,
        fellows: Fellows,
        client: Client,
        registry: RegistryClient,
        url: NSURL,
        wish: Wish,
        on_left: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.wires: dict[str, Wire] = {}
        self._fellows = fellows
        self._client = client
        self._registry = registry
        self._url = url
        self._wish = wish
        self._on_left = on_left
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def held(self, ready: Callable[[], bool]) -> AsyncIterator[None]:
        """Hold them for the block. None is asked for before ready; `look` says when to look."""
        async with background() as tasks:
            tasks.create_task(self._follow(), name="watch of the domain's routers")
            tasks.create_task(self._join(ready), name="wires to the domain's routers")
            yield

    def look(self) -> None:
        """Who is to be joined may have changed."""
        self._changed.set()

    def refresh(self, which: Callable[[Wire], bool] = lambda _: True) -> None:
        """Have them asked for again: we would say something else of us."""
        for wire in filter(which, self.wires.values()):
            wire.refresh()

    def leave(self) -> None:
        """Leave them as they are when the block ends."""
        for wire in self.wires.values():
            wire.leave()

    async def _follow(self) -> None:
        query = Endpoint(services=(self._url.service,))
        while True:
            try:
                found = await self._registry.find_endpoints(query)
                missing = self._fellows.begin(found)
                self.look()
                async with (
                    asyncio.timeout(MISSING if missing else LOOK_AGAIN),
                    contextlib.aclosing(self._registry.watch_endpoints(query)) as seen,
                ):
                    async for one in seen:
                        self._fellows.see(one.item, deleted=one.deleted)
                        self.look()
                continue
            except TimeoutError:
                continue
            except NsmError as error:
                log.warning("the domain's routers cannot be watched now", why=str(error))
            await asyncio.sleep(PAUSE)

    async def _join(self, ready: Callable[[], bool]) -> None:
        holding: dict[str, asyncio.Task[None]] = {}
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._changed.wait()
                self._changed.clear()
                wanted = self._fellows.earlier() if ready() else frozenset(holding)
                for name in holding.keys() - wanted:
                    log.info("router has left", router=name)
                    holding.pop(name).cancel()
                for name in sorted(wanted - holding.keys()):
                    holding[name] = tasks.create_task(self._hold(name), name=f"wire to {name}")

    async def _hold(self, name: str) -> None:
        """A wire to that router until this is cancelled, which closes it."""
        wish = Wish(endpoint=name, shape=self._wish.shape, on_answer=self._wish.on_answer)
        id_ = f"{self._client.name}-{name}"
        while True:
            try:
                asking = self._client.connect(self._url, id_=id_, patience=PATIENCE, wish=wish)
                async with asking as wire:
                    self.wires[name] = wire
                    log.info("router joined", router=name, interface=wire.interface)
                    await asyncio.Event().wait()
            except NsmError as error:
                log.warning("router is not joined", router=name, why=str(error))
            finally:
                self.wires.pop(name, None)
                self._on_left(id_)
            await asyncio.sleep(PAUSE)

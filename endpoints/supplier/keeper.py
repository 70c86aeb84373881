"""The one router of a service on this node: started when it is asked for, never twice.

Whoever asks waits until it is ready and registered, or hears why it is not. When it ends
because it was idle, the next who asks has it started again. One that ended otherwise had members
whose wires still stand: it is started again at once.
"""

import asyncio
import contextlib
import time
from enum import Enum, auto
from typing import Final, NoReturn

import structlog

from endpoints.supplier.house import Child, House
from endpoints.supplier.recipes import Recipe
from nsm.errors import NsmError, UnavailableError
from nsm.model import Endpoint
from nsm.race import unless
from nsm.rpc.registry import RegistryClient

PAUSES: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds after a failure, and the next
STEADY: Final = 10.0  # seconds a router has to run for its failures to be forgotten
LOOK, GROWTH, LONGEST_LOOK = 0.02, 1.1, 0.5  # seconds between looks at whether a router serves
AGAIN: Final = 0.2  # seconds until the registry is asked again that did not answer
log = structlog.get_logger(__name__)


class State(Enum):
    """What there is of the router."""

    ABSENT = auto()
    STARTING = auto()
    THERE = auto()


class Keeper:
    """Keeps the router of a recipe. `run` is for a task of the process."""

    def __init__(self, recipe: Recipe, house: House, registry: RegistryClient) -> None:
        self.recipe = recipe
        self.state = State.ABSENT
        self._house = house
        self._registry = registry
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()
        self._failure: NsmError | None = None
        self._child: Child | None = None
        self._failures = 0
        self._due = 0.0  # when it may be started again
        self._began = 0.0

    async def there(self) -> None:
        """Return when the router is ready and registered; have it started if it is not there.

        Raises UnavailableError with the router's last words where it could not be started, and
        is not to be again yet.
        """
        while True:
            changed = self._changed
            if self.state is State.THERE and self._child:
                if await unless(self._serves(self._child), changed.wait()):
                    return
                continue
            if self.state is State.ABSENT:
                left = self._due - time.monotonic()
                if self._failure and left > 0:
                    raise UnavailableError(
                        self._failure.message,
                        hint=f"{self._failure.hint}; it is started again in {left:.1f} s at the"
                        " earliest, if somebody asks",
                    )
                self._asked.set()
            await changed.wait()
            if self.state is State.THERE:
                return  # it was looked at for all who wait; each for itself asks the registry

    def waiting(self) -> str:
        """Why it is not there, in words for whoever cannot wait longer."""
        if not self._began:
            return f"whether router {self.recipe.name} runs is not known yet"
        took = time.monotonic() - self._began
        return f"router {self.recipe.name} was started {took:.1f} s ago and is not ready"

    async def run(self) -> NoReturn:
        """Start it whenever it is asked for, and notice its end."""
        child, noted = await asyncio.to_thread(self._house.find, self.recipe)
        if child:
            log.info("router of an earlier life is taken over", **self._who(child))
        elif noted and not await self._left():
            self._asked.set()
        while True:
            if child is None:
                await self._asked.wait()
                await asyncio.sleep(max(0.0, self._due - time.monotonic()))
                child = await self._start()
                if child is None:
                    continue
            self._child = child
            try:
                await self._follow(child)
            finally:
                child.release()
            self._child = child = None

    async def _start(self) -> Child | None:
        self._asked.clear()
        self._failure, self._began = None, time.monotonic()
        self._become(State.STARTING)
        try:
            child = await asyncio.to_thread(self._house.start, self.recipe)
        except NsmError as error:
            self._failed(error)
            return None
        log.info("router is started", **self._who(child))
        return child

    async def _follow(self, child: Child) -> None:
        """Until it has ended."""
        self._asked.clear()
        self._began = time.monotonic()
        self._become(State.STARTING)
        code = await unless(child.ended(), self._coming(child))
        was_there = self.state is State.THERE
        await asyncio.to_thread(self._house.forget, self.recipe)
        lasted = time.monotonic() - self._began
        if was_there and lasted > STEADY:
            self._failures = 0
        in_order = await self._left() if code is None else code == 0
        if was_there and in_order:
            log.info("router has ended", router=self.recipe.name, after=round(lasted, 3))
            self._failures, self._due = 0, 0.0
            self._become(State.ABSENT)
            return
        words = await asyncio.to_thread(child.words)
        how = "ended" if code is None else f"ended with {code}" if code >= 0 else f"died of {-code}"
        self._failed(
            UnavailableError(
                f"router {self.recipe.name} of {self.recipe.service} {how} after {lasted:.1f} s;"
                f" its log ends: {words}",
                hint=f"see {child.log} on this node, and {self.recipe.where}",
            )
        )
        if was_there:
            self._asked.set()

    async def _coming(self, child: Child) -> NoReturn:
        """Note when it is there; this is for as long as it runs."""
        await self._serves(child)
        took = round(time.monotonic() - self._began, 3)
        log.info("router is there", seconds=took, **self._who(child))
        self._failure = None
        self._become(State.THERE)
        while True:
            await asyncio.Event().wait()

    async def _serves(self, child: Child) -> bool:
        """Wait until it serves, and the registry has it."""
        pause = LOOK
        while not await asyncio.to_thread(child.serving):
            await asyncio.sleep(pause)
            pause = min(pause * GROWTH, LONGEST_LOOK)
        await self._registered()
        return True

    async def _registered(self) -> None:
        """Wait until the registry has it."""
        query = Endpoint(name=self.recipe.name)
        while True:
            try:
                async with contextlib.aclosing(self._registry.watch_endpoints(query)) as seen:
                    async for found in seen:
                        if found.item.name == self.recipe.name and not found.deleted:
                            return
            except NsmError as error:
                log.warning("it is not known whether a router is registered", why=str(error))
            await asyncio.sleep(AGAIN)

    async def _left(self) -> bool:
        """Whether it took its registration back, as one does that ends in order."""
        try:
            found = await self._registry.find_endpoints(Endpoint(name=self.recipe.name))
        except NsmError as error:
            log.warning("it is not known how a router ended", why=str(error))
            return False
        return not any(one.name == self.recipe.name for one in found)

    def _failed(self, why: NsmError) -> None:
        self._due = time.monotonic() + PAUSES[min(self._failures, len(PAUSES) - 1)]
        self._failures += 1
        self._failure = why
        log.warning("router is not there", router=self.recipe.name, why=str(why))
        self._become(State.ABSENT)

    def _become(self, state: State) -> None:
        self.state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _who(self, child: Child) -> dict[str, object]:
        return {"router": self.recipe.name, "service": self.recipe.service, "pid": child.mark.pid}

"""The connections a hop holds, and whose turn it is with each.

One operation at a time per connection id, in the order they came. A Close may
overtake a Request that is under way: the Request is interrupted, takes back
what it did, and ends in an error, because answering it OK after the Close would
promise a wire that is gone (`wire.md` §3.6).
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from nsm.errors import AbortedError, ExhaustedError
from nsm.identity.spiffe import SpiffeId
from nsm.model import Connection

M = TypeVar("M")
MAX_WAITING = 16  # operations queued for one connection; a client sends one or two


@dataclass(slots=True, eq=False)
class Held(Generic[M]):
    """What is remembered of one connection.

    made is the connection as established, at this hop (own id, own index), or
    None before the first success. previous is who asked for it; origin is whom
    its first segment's token named. memory is the route's own. again is set where what is
    under way has to be asked for once more: it may have been answered before that was said.
    ended is whether the next hop has it no more, until it is asked for again.
    """

    id: str
    made: Connection | None = None
    previous: SpiffeId | None = None
    origin: str = ""
    memory: M | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    running: "Interruptible | None" = None
    again: bool = False
    ended: bool = False

    def forget(self) -> None:
        """Remember nothing; the id is free as soon as nobody waits for it."""
        self.made = self.previous = self.memory = None
        self.origin = ""


class Interruptible:
    """One Request under way, which a Close may cut short."""

    def __init__(self, task: "asyncio.Task[object]") -> None:
        self._task = task
        self._cancelling = task.cancelling()
        self.by = ""

    def interrupt(self, by: str) -> None:
        """End it with AbortedError saying who did; harmless the second time."""
        if not self.by:
            self.by = by
            self._task.cancel()

    def was_only_us(self) -> bool:
        """Whether our interruption, and nobody's cancellation, ended the task's wait."""
        return bool(self.by) and self._task.uncancel() <= self._cancelling


class Connections(Generic[M]):
    """Hands out each connection to one task at a time, first come first served."""

    def __init__(self, limit: int = 20_000) -> None:
        self._held: dict[str, Held[M]] = {}
        self._limit = limit

    @asynccontextmanager
    async def turn(self, id_: str, *, own: bool = False) -> AsyncIterator[Held[M]]:
        """Wait for the connection's turn and have it for the block.

        own: it is of our own accord, which no queue of others' may keep out.
        """
        held = self._held.get(id_)
        if held is None:
            if len(self._held) >= self._limit:
                raise ExhaustedError(
                    f"connection {id_} would be the {self._limit + 1}th here",
                    hint="close connections, or start a second manager and forwarder",
                )
            held = self._held[id_] = Held(id_)
        if held.waiting >= MAX_WAITING and not own:
            raise ExhaustedError(
                f"{held.waiting} operations on connection {id_} wait for one another",
                hint="wait for the answer before asking again",
            )
        held.waiting += 1
        try:
            async with held.turn:
                yield held
        finally:
            held.waiting -= 1
            if held.made is None and not held.waiting:
                self._held.pop(id_, None)

    def adopt(self, held: Held[M]) -> None:
        """Hold what an earlier life of this process made; before anybody is served."""
        self._held[held.id] = held

    @contextmanager
    def interruptible(self, held: Held[M]) -> Iterator[None]:
        """Let `interrupt` end the block with AbortedError."""
        task = asyncio.current_task()
        assert task is not None
        running = held.running = Interruptible(task)
        try:
            yield
        except asyncio.CancelledError:
            if running.was_only_us():
                raise AbortedError(
                    f"connection {held.id} was closed by {running.by} while it was being made",
                    hint="ask again if it is still wanted",
                ) from None
            raise
        finally:
            held.running = None

    def interrupt(self, id_: str, by: str) -> None:
        """Cut short the Request that is under way for id_, if one is."""
        held = self._held.get(id_)
        if held and held.running:
            held.running.interrupt(by)

    def get(self, id_: str) -> Held[M] | None:
        """What is held of id_, without waiting for its turn: to look, not to change."""
        return self._held.get(id_)

    def established(self) -> list[Held[M]]:
        """Every connection that is up, or was at its last refresh."""
        return [held for held in self._held.values() if held.made is not None]

    def ids(self) -> list[str]:
        """Every connection that is here or being made."""
        return list(self._held)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._held

    def __len__(self) -> int:
        return len(self._held)

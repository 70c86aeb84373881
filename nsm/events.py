"""Telling those upstream what became of their connections (`wire.md` §8.1).

A watcher that reads slowly gets the newest state of each connection and misses
the states between, so what waits for it is bounded by what is held here; ends
of connections are bounded by their number, beyond which its stream is cut.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from nsm.connections import Connections
from nsm.errors import ExhaustedError, UnavailableError
from nsm.identity.spiffe import SpiffeId
from nsm.model import Connection, Event, EventType, Segment, Selector, State

Sees = Callable[[SpiffeId], bool]
GOOD_NEWS = 0.01  # seconds it may wait: who asked is told by the answer, which must not wait for it
MAX_BEHIND = 4096  # connections that are gone again, whose end a watcher has not read


class _Watcher:
    def __init__(self, selector: Selector, caller: SpiffeId) -> None:
        self.selector = selector
        self.caller = caller
        self.pending: dict[str, tuple[EventType, Connection]] = {}
        self.ready = asyncio.Event()
        self.ended = False
        self.late = False


class Events:
    """The monitor streams of one hop.

    A caller sees the connections of which it is the previous hop; observer says
    who sees all. Whatever a caller may not see is absent, not refused, because
    upstream's clients take an error of this stream for a dead data path.
    """

    def __init__(self, connections: Connections[Any], observer: Sees = lambda _: False) -> None:
        self._connections = connections
        self._observer = observer
        self._watchers: set[_Watcher] = set()

    def publish(self, kind: EventType, conn: Connection, previous: SpiffeId | None) -> None:
        """Tell every watcher that may see conn, which previous asked for."""
        for watcher in self._watchers:
            if not watcher.late and self._visible(watcher, conn, previous):
                watcher.pending.pop(conn.id, None)
                watcher.pending[conn.id] = (kind, conn)
                watcher.late = len(watcher.pending) > len(self._connections) + MAX_BEHIND
                if kind == EventType.UPDATE and conn.state == State.UP:
                    asyncio.get_running_loop().call_later(GOOD_NEWS, watcher.ready.set)
                else:
                    watcher.ready.set()

    async def watch(self, selector: Selector, caller: SpiffeId) -> AsyncGenerator[Event, None]:
        """The initial transfer, even when empty, and then every change, until `stop`.

        Raises UnavailableError when the hop stops.
        """
        watcher = _Watcher(selector, caller)
        self._watchers.add(watcher)
        try:
            yield Event(
                EventType.INITIAL_STATE_TRANSFER,
                {
                    held.id: held.made
                    for held in self._connections.established()
                    if held.made and self._visible(watcher, held.made, held.previous)
                },
            )
            while True:
                await watcher.ready.wait()
                watcher.ready.clear()
                if watcher.late:
                    raise ExhaustedError(
                        f"watcher too slow: {len(watcher.pending)} changes behind",
                        hint="watch again",
                    )
                changes, watcher.pending = watcher.pending, {}
                for kind, conn in changes.values():
                    yield Event(kind, {conn.id: conn})
                if watcher.ended:
                    raise UnavailableError(
                        "this process stops; its wires stay", hint="watch again in a moment"
                    )
        finally:
            self._watchers.discard(watcher)

    def stop(self) -> None:
        """End all streams, so that those who watch come back to our next life."""
        for watcher in self._watchers:
            watcher.ended = True
            watcher.ready.set()

    def __len__(self) -> int:
        return len(self._watchers)

    def _visible(self, watcher: _Watcher, conn: Connection, previous: SpiffeId | None) -> bool:
        may = previous == watcher.caller or self._observer(watcher.caller)
        return may and selects(watcher.selector, conn)


def selects(selector: Selector, conn: Connection) -> bool:
    """Whether conn is what selector asks for.

    No services and no segments select everything; segments select by any
    contiguous run of the path whose non-empty names, ids and tokens agree.
    """
    if selector.services and conn.service not in selector.services:
        return False
    wanted = selector.segments
    if not wanted:
        return True
    runs = range(len(conn.segments) - len(wanted) + 1)
    return any(
        all(_agrees(want, have) for want, have in zip(wanted, conn.segments[start:], strict=False))
        for start in runs
    )


def _agrees(want: Segment, have: Segment) -> bool:
    return (
        want.name in ("", have.name) and want.id in ("", have.id) and want.token in ("", have.token)
    )

"""Following connections downstream: one monitor stream to each next hop (`wire.md` §8.1).

One stream carries the events of every connection that goes through the same
next hop, told apart by our own segment. A stream that ends is opened again with
growing pauses for as long as somebody is followed there; meanwhile each of its
connections is reported lost once, because nobody can say how it is.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol

from nsm.errors import NsmError
from nsm.model import Connection, Event, EventType, Segment, Selector, State

PAUSES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries; the last repeats


class Monitor(Protocol):
    """Opens a monitor stream: `nsm.rpc.calls.Calls.monitor`."""

    def __call__(self, url: str, selector: Selector) -> AsyncIterator[Event]: ...


class Changes(Protocol):
    """Told of every change; must not block. conn is None when it is lost or deleted.

    ended: the next hop says itself that it has it no more, and is not only silent.
    """

    def __call__(self, id_: str, conn: Connection | None, *, ended: bool = False) -> None: ...


Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class Watches:
    """Who is followed where; name is our own segment's."""

    def __init__(self, name: str, monitor: Monitor, spawn: Spawn, on_change: Changes) -> None:
        self._name = name
        self._monitor = monitor
        self._spawn = spawn
        self._on_change = on_change
        self._where: dict[str, str] = {}
        self._called: dict[str, str] = {}  # by what the next hop has as our id: what it is here
        self._followed: dict[str, set[str]] = {}
        self._streams: dict[str, asyncio.Task[None]] = {}

    def follow(self, id_: str, url: str, called: str = "") -> None:
        """Report what becomes of the connection we call id_ at the next hop url.

        called is what that hop has as our id of it, if that is another.
        """
        for name in [one for one, ours in self._called.items() if ours == id_ and one != called]:
            del self._called[name]
        if called and called != id_:
            self._called[called] = id_
        if self._where.get(id_) == url:
            return
        self._leave(id_)
        self._where[id_] = url
        self._followed.setdefault(url, set()).add(id_)
        if url not in self._streams:
            self._streams[url] = self._spawn(self._run(url), f"monitor of {url}")

    def release(self, id_: str) -> None:
        """Report nothing more of id_."""
        for name in [one for one, ours in self._called.items() if ours == id_]:
            del self._called[name]
        self._leave(id_)

    def _leave(self, id_: str) -> None:
        url = self._where.pop(id_, None)
        if url is None:
            return
        followed = self._followed[url]
        followed.discard(id_)
        if not followed:
            del self._followed[url]
            if stream := self._streams.pop(url, None):
                stream.cancel()

    def follows(self, id_: str) -> bool:
        """Whether id_ is followed anywhere."""
        return id_ in self._where

    def stop(self) -> None:
        """End all streams."""
        for id_ in list(self._where):
            self.release(id_)

    async def _run(self, url: str) -> None:
        failures = 0
        while True:
            asked = frozenset(self._followed.get(url, ()))
            try:
                async for event in self._monitor(url, Selector((Segment(self._name, ""),))):
                    failures = 0
                    self._report(url, event, asked)
            except NsmError:
                pass  # reported as lost below; the peer's own log has the cause
            for id_ in list(self._followed.get(url, ())):
                self._on_change(id_, None)
            pause = PAUSES[min(failures, len(PAUSES) - 1)]
            failures += 1
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    def _report(self, url: str, event: Event, asked: frozenset[str]) -> None:
        """asked: whom we followed when the stream was opened; who came later is told later."""
        followed = self._followed.get(url, set())
        told = set()
        for conn in event.connections.values():
            own = self._ours(self._own_id(conn))
            if own in followed:
                told.add(own)
                ended = event.type == EventType.DELETE
                self._on_change(own, None if ended else conn, ended=ended)
            elif own and conn.state == State.REFRESH_REQUESTED:  # its answer is still on the way
                self._on_change(own, conn)
        if event.type == EventType.INITIAL_STATE_TRANSFER:
            for id_ in (followed & asked) - told:  # it was restarted and knows nothing of them
                self._on_change(id_, None, ended=True)

    def _ours(self, said: str) -> str:
        """What is called that at the next hop; nothing of what has another name there by now."""
        if said in self._called.values():
            return ""
        return self._called.get(said, said)

    def _own_id(self, conn: Connection) -> str:
        before = conn.index - 1
        if 0 <= before < len(conn.segments) and conn.segments[before].name == self._name:
            return conn.segments[before].id
        return ""

"""Wires end with the namespace of either end, and those they led through are told.

The kernel has taken the devices already when it says that a namespace is gone;
what is left is to close the connection on both sides: towards the endpoint, so
that it frees addresses, and towards the client, so that it asks for another.

A namespace that nobody is in any more, and that is mounted nowhere, is as good as gone though
somebody's descriptor keeps it: then its devices are taken away. A process that ends while
others are there, or while its namespace has a name, is no death: another will take its wire.

A wire's wireguard-go may end by itself, killed for its memory for example. Its namespaces
are there, so the client is told that the wire is down: it asks again and keeps its addresses.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from forwarder.crossing import Crossing
from nsm.connections import Held
from nsm.hop import Hop
from nsm.kernel.events import NamespaceGone, Resync, Watch
from nsm.kernel.inhabitants import Inhabitants
from nsm.kernel.node import Kernel
from nsm.kernel.owner import Mark
from nsm.watches import Spawn

log = structlog.get_logger(__name__)
LOOK_EVERY = 1.0  # seconds between looks at who is in the namespaces of our wires
UNSEEN_EVERY = 10  # looks, of which one is for those that nobody was ever seen in
DESERTED = 1.9  # seconds that nobody is seen in one that was inhabited, until it counts as gone
Lost = Callable[[Held[Crossing]], Awaitable[bool]]


class Deaths:
    """Hears of engines that end; and of namespaces that go, for as long as `follow` runs."""

    def __init__(self, hop: Hop[Crossing], kernel: Kernel, spawn: Spawn) -> None:
        self._hop = hop
        self._kernel = kernel
        self._spawn = spawn
        self._inhabitants = Inhabitants()
        self._inhabited: set[int] = set()  # inodes of namespaces somebody is in, if we are right
        self._unseen: set[int] = set()  # those in which nobody was when we looked
        self._deserted: dict[int, float] = {}  # since when nobody is
        kernel.on_engine_end = self._engine_ended

    async def follow(self) -> None:
        """Close every connection whose namespace goes, until cancelled."""
        async with Watch() as watch:
            async for event in watch:
                if isinstance(event, NamespaceGone):
                    lost = in_namespace(event.nsid)
                    for held in self._hop.connections.established():
                        if await lost(held):
                            self._end(held, lost, f"namespace {event.nsid} is gone")
                elif isinstance(event, Resync):  # deaths may have gone unheard
                    await self._compare()

    async def look_around(self) -> NoReturn:
        """Close every connection whose namespace nobody is in any more, until cancelled."""
        turn = 0
        while True:
            await asyncio.sleep(LOOK_EVERY)
            turn += 1
            await self._look(unseen=turn % UNSEEN_EVERY == 1)

    async def _look(self, *, unseen: bool) -> None:
        of = self._by_inode()
        self._inhabited &= of.keys()
        if not of:
            return
        if await asyncio.to_thread(self._inhabitants.sees_all):
            self._inhabited |= of.keys()
        # Else who is in a namespace that we never saw anybody in may be beyond our PID
        # namespace: nothing is concluded, and it is looked for less often.
        new = of.keys() - self._inhabited
        wanted = [*self._inhabited, *(new if unseen or self._fresh(new) else ())]
        if not wanted:
            return
        seen = await asyncio.to_thread(self._inhabitants.look, wanted)
        self._inhabited |= seen.kept
        if not seen.whole:
            self._deserted.clear()
            return
        now = time.monotonic()
        left = self._inhabited - seen.kept
        self._deserted = {inode: self._deserted.get(inode, now) for inode in left}
        for inode, since in self._deserted.items():
            if now - since >= DESERTED:
                still = self._deserted_by_all(inode)
                for held in of.get(inode, ()):
                    self._end(held, still, f"nobody is in namespace net:[{inode}] any more")

    def _by_inode(self) -> dict[int, list[Held[Crossing]]]:
        """The wires that have an end in each namespace."""
        of: dict[int, list[Held[Crossing]]] = {}
        for held in self._hop.connections.established():
            for space in held.memory.namespaces if held.memory else ():
                if space.inode and not space.own:
                    of.setdefault(space.inode, []).append(held)
        return of

    def _fresh(self, new: "set[int]") -> bool:
        """Whether there are some among them that were never looked for."""
        fresh = not new <= self._unseen
        self._unseen = set(new)
        return fresh

    def _deserted_by_all(self, inode: int) -> Lost:
        async def is_deserted(held: Held[Crossing]) -> bool:
            crossing = held.memory
            if crossing is None or all(one.inode != inode for one in crossing.namespaces):
                return False
            seen = await asyncio.to_thread(Inhabitants().look, (inode,))
            return seen.whole and inode not in seen.kept

        return is_deserted

    async def _compare(self) -> None:
        known = self._hop.connections.established()  # what is made while we look is not judged
        if not known:
            return
        standing = await self._standing()
        for held in known:
            if held.id not in standing:
                self._end(held, self._is_gone, "its devices are gone")

    async def _is_gone(self, held: Held[Crossing]) -> bool:
        return held.id not in await self._standing()

    async def _standing(self) -> set[str]:
        marks = [one.mark for one in await self._kernel.find() if one.mark]
        return {mark.connection for mark in marks if not mark.hop}  # that one outlives its wire

    def _engine_ended(self, mark: Mark) -> None:
        async def still(_: Held[Crossing]) -> bool:
            return not self._kernel.has_engine(mark)

        id_ = mark.connection
        if id_ in self._hop.connections:
            log.warning("a wire's wireguard-go ended", connection=id_, side=mark.side)
            self._spawn(self._hop.lost(id_, still), f"loss of {id_}")

    def _end(self, held: Held[Crossing], still: Lost, why: str) -> None:
        log.info("a wire ended with its namespace", connection=held.id, why=why)
        self._spawn(self._hop.end(held.id, still), f"end of {held.id}")


def in_namespace(nsid: int) -> Lost:
    """Whether a connection's wire has an end in the namespace of that number."""

    async def has_end(held: Held[Crossing]) -> bool:
        crossing = held.memory
        return crossing is not None and any(one.nsid == nsid for one in crossing.namespaces)

    return has_end

"""Wires end with the namespace of either end, and those they led through are told.

The kernel has taken the devices already when it says that a namespace is gone;
what is left is to close the connection on both sides: towards the endpoint, so
that it frees addresses, and towards the client, so that it asks for another.

A wire's wireguard-go may end by itself, killed for its memory for example. Its namespaces
are there, so the client is told that the wire is down: it asks again and keeps its addresses.
"""

from collections.abc import Awaitable, Callable

import structlog

from forwarder.route import Crossing
from nsm.connections import Held
from nsm.hop import Hop
from nsm.kernel.events import NamespaceGone, Resync, Watch
from nsm.kernel.node import Kernel
from nsm.kernel.owner import Mark
from nsm.watches import Spawn

log = structlog.get_logger(__name__)
Lost = Callable[[Held[Crossing]], Awaitable[bool]]


class Deaths:
    """Hears of engines that end; and of namespaces that go, for as long as `follow` runs."""

    def __init__(self, hop: Hop[Crossing], kernel: Kernel, spawn: Spawn) -> None:
        self._hop = hop
        self._kernel = kernel
        self._spawn = spawn
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

"""Wires end with the namespace of either end, and those they led through are told.

The kernel has taken the devices already when it says that a namespace is gone;
what is left is to close the connection on both sides: towards the endpoint, so
that it frees addresses, and towards the client, so that it asks for another.
"""

from collections.abc import Callable

import structlog

from forwarder.route import Crossing
from nsm.connections import Held
from nsm.hop import Hop
from nsm.kernel.events import NamespaceGone, Resync, Watch
from nsm.kernel.node import Kernel
from nsm.watches import Spawn

log = structlog.get_logger(__name__)


class Deaths:
    """Listens for namespaces that go, for as long as `follow` runs."""

    def __init__(self, hop: Hop[Crossing], kernel: Kernel, spawn: Spawn) -> None:
        self._hop = hop
        self._kernel = kernel
        self._spawn = spawn

    async def follow(self) -> None:
        """Close every connection whose namespace goes, until cancelled."""
        async with Watch() as watch:
            async for event in watch:
                if isinstance(event, NamespaceGone):
                    self._close(in_namespace(event.nsid), f"namespace {event.nsid} is gone")
                elif isinstance(event, Resync):  # deaths may have gone unheard
                    await self._compare()

    async def _compare(self) -> None:
        if not self._hop.connections.established():
            return
        standing = {one.mark.connection for one in await self._kernel.find() if one.mark}
        self._close(lambda held: held.id not in standing, "its devices are gone")

    def _close(self, lost: Callable[[Held[Crossing]], bool], why: str) -> None:
        for held in self._hop.connections.established():
            if lost(held):
                log.info("a wire ended with its namespace", connection=held.id, why=why)
                self._spawn(self._hop.end(held.id, lost), f"end of {held.id}")


def in_namespace(nsid: int) -> Callable[[Held[Crossing]], bool]:
    """Whether a connection's wire has an end in the namespace of that number."""

    def has_end(held: Held[Crossing]) -> bool:
        crossing = held.memory
        return crossing is not None and any(
            interface.namespace.nsid == nsid for _, interface in crossing.wire.sides
        )

    return has_end

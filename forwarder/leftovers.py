"""What carries our mark and belongs to no connection, looked for every minute and taken away.

Nothing should leave any. What did was killed at the wrong moment, or is a defect: so it is
logged. Not judged are connections that are held, are being made, or are of an earlier life
whose time is not over (`forwarder.recovery`), and devices where a held wire's were seen last,
whatever somebody in the workload made of their marks.
"""

import asyncio
from typing import Any, NoReturn

import structlog

from forwarder.recovery import Recovery
from nsm.connections import Connections
from nsm.kernel.node import Kernel
from nsm.kernel.owner import SIDES
from nsm.kernel.sweep import Found

log = structlog.get_logger(__name__)
EVERY = 60.0  # seconds


class Leftovers:
    """Sweeps, for as long as `follow` runs."""

    def __init__(self, kernel: Kernel, connections: Connections[Any], recovery: Recovery) -> None:
        self._kernel = kernel
        self._connections = connections
        self._recovery = recovery
        self._unmarked: set[Found] = set()

    async def follow(self) -> NoReturn:
        """Sweep every minute; the start has its own look (`Recovery.look`)."""
        while True:
            await asyncio.sleep(EVERY)
            await self.sweep()

    async def sweep(self) -> int:
        """Take away what nobody holds; how many devices that was."""
        held = set(self._connections.ids())  # before the look: what comes meanwhile is not judged
        found = await self._kernel.find()
        held.update(self._connections.ids())
        known = {
            place for id_ in held for side in SIDES for place in self._kernel.places(id_, side)
        }
        judged = [one for one in found if one.place not in known]
        # between the message that makes a device and the one that marks it is a moment
        unmarked = {one for one in judged if one.mark is None}
        lost = list(unmarked & self._unmarked)
        self._unmarked = unmarked
        await self._kernel.remove_found(lost)
        for one in judged:
            if one.mark is None or one.mark.connection in held:
                continue
            id_ = one.mark.connection
            if self._recovery.knows(id_):
                continue
            async with self._connections.turn(id_, own=True) as now:
                if now.made is None:  # and nobody is making it: that would be its turn
                    await self._kernel.remove_found([one])
                    lost.append(one)
        for one in lost:
            log.warning(
                "removed what nobody holds",
                device=one.device.name,
                namespace=one.place.nsid,
                connection=one.mark.connection if one.mark else "",
            )
        return len(lost)

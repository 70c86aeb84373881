"""What carries our mark and belongs to no connection, looked for every minute and taken away.

Nothing should leave any. What did was killed at the wrong moment, or is a defect: so it is
logged. Not judged are connections that are held, are being made, or are of an earlier life
whose time is not over (`forwarder.recovery`), and devices where a held wire's were seen last,
whatever somebody in the workload made of their marks.

A connection that is held has one wire, and in the moment of going over two. Any other of its
wires is left over: of a forwarder killed between a swap and its store's write the next life holds
the wire before, and makes that anew where the other one's device is, but not where its tunnel is.
"""

import asyncio
from collections.abc import Container
from typing import NoReturn

import structlog

from forwarder.crossing import Crossing
from forwarder.recovery import Recovery
from nsm.connections import Connections, Held
from nsm.kernel.node import Kernel
from nsm.kernel.owner import SIDES, Mark
from nsm.kernel.sweep import Found

log = structlog.get_logger(__name__)
EVERY = 60.0  # seconds


class Leftovers:
    """Sweeps, for as long as `follow` runs."""

    def __init__(
        self,
        kernel: Kernel,
        connections: Connections[Crossing],
        recovery: Recovery,
        leaving: Container[str] = (),
    ) -> None:
        """leaving are wires that are taken away in a moment (`owner.Mark.wire`)."""
        self._kernel = kernel
        self._connections = connections
        self._recovery = recovery
        self._leaving = leaving
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
            place
            for id_ in held
            for side in SIDES
            for place in self._kernel.places(id_, side, leg=_leg(self._connections.get(id_)))
        }
        judged = [one for one in found if one.place not in known]
        # between the message that makes a device and the one that marks it is a moment
        unmarked = {one for one in judged if one.mark is None}
        lost = list(unmarked & self._unmarked)
        self._unmarked = unmarked
        await self._kernel.remove_found(lost)
        for one in judged:
            if one.mark is None or self._recovery.knows(id_ := one.mark.connection):
                continue
            if id_ in held and not self._left_over(self._connections.get(id_), one.mark):
                continue
            async with self._connections.turn(id_, own=True) as now:
                # at its turn: nobody is making it, or has it go over
                if now.made is None or self._left_over(now, one.mark):
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

    def _left_over(self, held: Held[Crossing] | None, mark: Mark) -> bool:
        """Whether that is another wire of the connection's than the one that is held."""
        leg = _leg(held)
        return leg is not None and mark.leg != leg and mark.wire not in self._leaving


def _leg(held: Held[Crossing] | None) -> str | None:
    """Which wire is held; None where that is not known for certain.

    What an earlier life wrote down may be the wire before, until it is asked for again.
    """
    memory = held.memory if held else None
    return memory.leg if memory and memory.wire else None

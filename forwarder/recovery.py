"""What an earlier life of this forwarder left in the kernel, and what becomes of it.

Wires outlive the forwarder. Those that its store knows are held again at once
(`forwarder.adoption`). Any other is adopted when it is refreshed, found by its
mark; one that nobody refreshed for as long as a token can live belongs to
nobody any more and is removed. A device whose maker died before it was marked
never was a wire.
"""

import asyncio
from collections.abc import Collection, Iterable
from typing import Any

import structlog

from nsm.connections import Connections
from nsm.kernel.node import Kernel
from nsm.kernel.state import OWN, Namespace
from nsm.kernel.sweep import Found

log = structlog.get_logger(__name__)
RETURN = 10.0  # seconds in which whoever was told of a wire asks for it again: its stream broke
SPARE = 30.0  # seconds beyond a token's life: a refresh may be on its way


class Recovery:
    """Knows the wires of before by connection id, until they are refreshed or closed."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._before: dict[str, list[Found]] = {}
        self._node = OWN  # the number by which our own namespace is known here, once it has one

    async def look(self) -> int:
        """Find what is ours in every namespace; return how many wires that is."""
        found = await self._kernel.find()
        self._node = await self._kernel.own_number()
        beside = _beside(found)
        await self._kernel.remove_found(
            [one for one in found if one.mark is None or one.mark.wire in beside]
        )
        for one in found:
            if one.mark and one.mark.wire not in beside:
                self._before.setdefault(one.mark.connection, []).append(one)
        return len(self._before)

    def hop(self, connection: str, where: Namespace, *, encrypted: bool) -> bool | None:
        """Whether a connection's tunnel of before stands here, below a device of that workload's.

        None where there is none, or it cannot be told: of an encrypted one that is not here,
        because a wireguard-go's device is in the workload either way, and one the workload made
        itself looks like ours.
        """
        found = self._before.get(connection, ())
        if any(map(_apart, found)):
            return True
        if not encrypted and any(self._in_place(one, where) for one in found):
            return False
        return None

    def leg(self, connection: str) -> str:
        """Which wire of the connection's it is that stands; "" also if none does."""
        found = self._before.get(connection, ())
        return next((one.mark.leg for one in found if one.mark and one.mark.leg), "")

    def vxlan(self, connection: str, where: Namespace, hop: bool, leg: str = "") -> tuple[int, int]:
        """Network identifier and UDP port of that wire's VXLAN of before; zeros without one.

        hop where it stands here: then what is in the workload is not believed at all.
        """
        for one in self._before.get(connection, ()):
            if one.mark is None or one.mark.leg != leg:
                continue
            if one.device.vni and (_apart(one) or (not hop and self._in_place(one, where))):
                return one.device.vni, one.device.port
        return 0, 0

    def _in_place(self, one: Found, where: Namespace) -> bool:
        """Whether that is a VXLAN of this node's in that workload.

        Its mark does not say so, which anybody with rights in there can write: a tunnel that
        stands on this node does. Whoever may make one there needs none of ours.
        """
        if not one.device.vni or one.place.nsid != where.nsid:
            return False
        if one.device.far is None:  # it stands where it is
            return where.own
        return self._node != OWN and one.device.far == self._node

    def settled(self, connection: str) -> None:
        """The connection was refreshed or closed: what stands is known again."""
        self._before.pop(connection, None)

    def knows(self, connection: str) -> bool:
        """Whether it is of before, and nobody has said yet what becomes of it."""
        return connection in self._before

    async def forget(
        self, lifetime: float, connections: Connections[Any], begun: Collection[str] = ()
    ) -> None:
        """Remove the wires of before that nobody holds, after lifetime seconds; those that were
        being made when we ended, of which most likely nobody was told, a while after the start."""
        soon = min(RETURN, lifetime + SPARE)
        await asyncio.sleep(soon)
        await self._remove([one for one in self._before if one in begun], connections)
        await asyncio.sleep(lifetime + SPARE - soon)
        await self._remove(list(self._before), connections)

    async def _remove(self, before: Iterable[str], connections: Connections[Any]) -> None:
        for connection in before:
            # At its turn, because a late refresh may be adopting it just now.
            async with connections.turn(connection, own=True) as held:
                if held.made is None and connection in self._before:
                    devices = await self._kernel.remove(connection)
                    log.info(
                        "removed a wire nobody refreshed", connection=connection, devices=devices
                    )
                self.settled(connection)


def _apart(one: Found) -> bool:
    return one.place.nsid == OWN and one.mark is not None and one.mark.hop


def _beside(found: Iterable[Found]) -> set[str]:
    """The wires that are not in use: not yet, or not any more. Their device in the client's
    namespace says so, and there is none of the same wire's that does not.

    Whoever has rights in a workload can write what he likes on a device of its own, and would
    take away another's wire by that: one that has such a device elsewhere, or ends on this node
    and begins on another.
    """
    marked: set[str] = set()
    in_use: set[str] = set()
    for one in found:
        mark = one.mark
        if mark is None:
            continue
        if mark.side == "src" and not mark.role:
            (marked if mark.beside else in_use).add(mark.wire)
        elif mark.side == "dst" and (mark.role or one.device.kind != "veth"):
            in_use.add(mark.wire)
    return marked - in_use

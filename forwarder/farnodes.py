"""Wires that come from another node end here when that node dies.

No kernel says so here: the tunnel stands, and nothing comes through it any more. Each such node
is asked for an echo, once for all its wires. One that answered before and has been silent for
`DEAD` seconds, while none of its wires received anything, is taken for dead: the endpoint is
told and has its addresses again. A node that never answered is never judged, and a loop that did
not run when it should have judges nobody (`nsm.liveness`). That a node answered is known to the
next life too: it may die together with this process.

Only the side that was asked ends wires. What a partition of the network cuts off looks the same;
the client's side keeps its interface, and when its client asks again it gets the same addresses.
"""

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import structlog

from forwarder.crossing import Crossing
from forwarder.mechanisms import ends
from forwarder.store import Store, Way
from nsm import mechanisms
from nsm.connections import Held
from nsm.errors import InvalidError
from nsm.hop import Hop
from nsm.kernel import pings
from nsm.kernel.ensure import Place
from nsm.kernel.node import Kernel
from nsm.liveness import Liveness, Pulse, Rhythm
from nsm.watches import Spawn

log = structlog.get_logger(__name__)
LOOK_EVERY = 1.0  # seconds between looks at which nodes wires come from
BREATH = 0.02  # seconds: connections that are made at once are looked at together
RHYTHM = Rhythm(interval=0.5, timeout=2.0)  # of the echoes; timeout: until a node is doubted
DEAD = 3.2  # seconds of silence
GLANCE, GLANCES = 0.25, 4  # seconds between looks at a node in doubt, and how many at least


@dataclass(slots=True)
class Node:
    """One node that wires come from; pulse is None where it cannot be asked."""

    pulse: Pulse | None
    doubted: bool = False


class FarNodes:
    """Asks them, for as long as `follow` runs."""

    def __init__(
        self,
        hop: Hop[Crossing],
        kernel: Kernel,
        spawn: Spawn,
        changed: asyncio.Event,
        store: Store,
    ) -> None:
        """changed is set whenever a connection has been made."""
        self._hop = hop
        self._changed = changed
        self._kernel = kernel
        self._spawn = spawn
        self._liveness = Liveness(RHYTHM)
        self._nodes: dict[Way, Node] = {}
        self._store = store
        self._answered = set(store.answered)

    async def follow(self) -> NoReturn:
        """Ask all of them, until cancelled."""
        asked = False
        async with asyncio.TaskGroup() as group:
            group.create_task(self._liveness.run())
            while True:
                ways = self._wires()
                if ways and not asked:
                    asked = True
                    if why := await asyncio.to_thread(pings.allow):
                        log.warning("nobody is told when another node dies", why=why)
                self._compare(ways)
                with suppress(TimeoutError):  # who dies soon is to have answered once
                    async with asyncio.timeout(LOOK_EVERY):
                        await self._changed.wait()
                        await asyncio.sleep(BREATH)
                self._changed.clear()

    def _wires(self) -> Mapping[Way, list[Held[Crossing]]]:
        """The wires that come from each node."""
        found: dict[Way, list[Held[Crossing]]] = {}
        for held in self._hop.connections.established():
            if way := _way(held):
                found.setdefault(way, []).append(held)
        return found

    def _compare(self, ways: Mapping[Way, object]) -> None:
        for way in self._nodes.keys() - ways.keys():
            if pulse := self._nodes.pop(way).pulse:
                self._liveness.forget(pulse)
        for way in ways.keys() - self._nodes.keys():
            own, far = map(ipaddress.ip_interface, way)
            pulse = self._liveness.watch([own], [far], partial(self._silent, way))
            self._nodes[way] = Node(pulse)
            if pulse and way in self._answered:
                pulse.known(time.monotonic())
        self._remember()

    def _remember(self) -> None:
        """For the next life: who answers, of those that wires come from."""
        for way in self._answered - self._nodes.keys():
            self._store.left(way)
        self._answered &= self._nodes.keys()
        for way, node in self._nodes.items():
            if node.pulse and node.pulse.answered and way not in self._answered:
                self._answered.add(way)
                self._store.answers(way)

    def _silent(self, way: Way) -> None:
        node = self._nodes.get(way)
        if node and not node.doubted:
            node.doubted = True
            self._spawn(self._doubt(way, node), f"doubt of node {way[1]}")

    async def _doubt(self, way: Way, node: Node) -> None:
        """End its wires, unless it answers or something comes from it."""
        try:
            before = await self._received(way)
            glances = 0
            while (pulse := node.pulse) and pulse.silent and self._nodes.get(way) is node:
                silence = time.monotonic() - pulse.heard
                if silence < DEAD or glances < GLANCES:
                    glances += 1
                    await asyncio.sleep(GLANCE)
                    continue
                now = await self._received(way)
                if any(now[at] != count for at, count in before.items() if at in now):
                    log.info("a node answers no echo, and sends packets", node=way[1])
                    pulse.anew()
                    return
                wires = self._wires().get(way, [])
                log.warning("a node is gone", node=way[1], silent_s=silence, wires=len(wires))
                for held in wires:
                    self._spawn(self._hop.end(held.id, self._still(way)), f"end of {held.id}")
                return
        finally:
            node.doubted = False

    def _still(self, way: Way) -> Callable[[Held[Crossing]], Awaitable[bool]]:
        async def comes_from_there(held: Held[Crossing]) -> bool:
            node = self._nodes.get(way)
            return bool(_way(held) == way and node and node.pulse and node.pulse.silent)

        return comes_from_there

    async def _received(self, way: Way) -> Mapping[Place, int]:
        """How many packets came out of each of its wires so far."""
        wires = self._wires().get(way, [])
        places = [place for held in wires for place in self._kernel.places(held.id, "dst")]
        counted = await self._kernel.counters(places)
        return {at: count.rx_packets for at, count in zip(places, counted, strict=True) if count}


def _way(held: Held[Crossing]) -> Way | None:
    """Between which addresses a wire comes in from another node; None if it comes from here."""
    mechanism = held.made.mechanism if held.made else None
    if mechanism is None or mechanism.cls != mechanisms.REMOTE:
        return None
    try:
        far = ends.address(mechanism, mechanisms.SRC_IP)
        own = ends.address(mechanism, mechanisms.DST_IP)
    except InvalidError:
        return None
    return (str(own), str(far)) if own.version == far.version else None

"""Wires that come from another node end here when that node dies.

No kernel says so here: the tunnel stands, and nothing comes through it any more. Each such node
is asked for an echo, once for all its wires. One that answered before and has been silent for
`DEAD` seconds, while none of its wires received anything, is taken for dead: the endpoint is
told and has its addresses again. A node that never answered is never judged, and a loop that did
not run when it should have judges nobody (`nsm.liveness`). That a node answered is known to the
next life too: it may die together with this process.

A node whose own network is cut hears nobody, and all the others seem dead to it. So nobody is
judged while no way or no carrier leads there, nor where everybody who answered fell silent at
once: all far nodes, those that wires lead to, and the gateway. Silence counts from when that is
over. Where nobody else was there to be heard, carrier is all there is to go by.

Only the side that was asked ends wires. What a partition further away cuts off looks like a death;
the client's side keeps its interface, and when its client asks again it gets the same addresses.
"""

import asyncio
import ipaddress
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
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
from nsm.errors import InvalidError, NsmError
from nsm.hop import Hop
from nsm.kernel import pings
from nsm.kernel.ensure import Place
from nsm.kernel.node import Kernel
from nsm.kernel.owner import SideName
from nsm.liveness import Liveness, Pulse, Rhythm
from nsm.model import Mechanism
from nsm.watches import Spawn

log = structlog.get_logger(__name__)
LOOK_EVERY = 1.0  # seconds between looks at which nodes wires come from
BREATH = 0.02  # seconds: connections that are made at once are looked at together
RHYTHM = Rhythm(interval=0.5, timeout=2.0)  # of the echoes; timeout: until a node is doubted
DEAD = 3.2  # seconds of silence
GLANCE, GLANCES = 0.25, 4  # seconds between looks at a node in doubt, and how many at least
AT_ONCE = 1.0  # seconds within which nodes fall silent whose silence has one cause: two echoes
HEARD = 1.5  # seconds since its last answer within which somebody answers still: three echoes


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
        self._beside: dict[Way, Pulse | None] = {}  # who else may tell that our network works
        self._gateways: dict[Way, Way | None] = {}  # of those among them, by a node's way
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
                self._compare_beside(await self._others(ways))
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

    async def _others(self, ways: Collection[Way]) -> set[Way]:
        """Whom to ask besides: gateways on the way, and nodes that wires lead to."""
        if not ways:
            self._gateways.clear()
            return set()
        for way in self._gateways.keys() - set(ways):
            del self._gateways[way]
        for way in ways - self._gateways.keys():
            with suppress(NsmError):  # no way there now: asked again at the next look
                found = await self._kernel.gateway(ipaddress.ip_address(way[1]))
                self._gateways[way] = (way[0], str(found)) if found else None
        onward = {
            to
            for held in self._hop.connections.established()
            if held.memory and (to := between(held.memory.outgoing, "src"))
        }
        return (onward | {way for way in self._gateways.values() if way}) - set(ways)

    def _compare_beside(self, others: Collection[Way]) -> None:
        for way in self._beside.keys() - set(others):
            if pulse := self._beside.pop(way):
                self._liveness.forget(pulse)
        for way in set(others) - self._beside.keys():
            own, far = map(ipaddress.ip_interface, way)
            self._beside[way] = self._liveness.watch([own], [far], lambda: None)

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
            glances, deaf = 0, 0.0
            while (pulse := node.pulse) and pulse.silent and self._nodes.get(way) is node:
                if why := await self._deaf(way, pulse, deaf):
                    if not deaf:
                        log.warning("no far node is judged now", node=way[1], why=why)
                    glances, deaf = 0, time.monotonic()
                silence = time.monotonic() - max(pulse.heard, deaf)
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

    async def _deaf(self, way: Way, pulse: Pulse, deaf: float) -> str:
        """Why its silence may be this node's own; empty if it is not. deaf: until when it was."""
        pulses = [(other, node.pulse) for other, node in self._nodes.items()]
        others = [
            one.heard
            for other, one in (*pulses, *self._beside.items())
            if one and one.heard and other[0] == way[0] and other != way
        ]
        if together(pulse.heard, others, deaf, time.monotonic()):
            return "all who answered fell silent at once"
        try:
            there = await self._kernel.way_to(ipaddress.ip_address(way[1]))
        except NsmError as none:
            return str(none)
        return "" if there.carrier else f"{there.device} is down, or has no carrier"

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
    return between(mechanism, "dst") if mechanism else None


def between(mechanism: Mechanism, side: SideName) -> Way | None:
    """Our address and the other node's of a tunnel, of which we are that side; None of others."""
    if mechanism.cls != mechanisms.REMOTE:
        return None
    try:
        src = ends.address(mechanism, mechanisms.SRC_IP)
        dst = ends.address(mechanism, mechanisms.DST_IP)
    except InvalidError:
        return None
    if src.version != dst.version:
        return None
    return (str(dst), str(src)) if side == "dst" else (str(src), str(dst))


def together(heard: float, others: Iterable[float], deaf: float, now: float) -> bool:
    """Whether a node last heard then fell silent together with everybody who answered at that
    time, and nobody answers now. others: when each was heard last. Pure.

    deaf is the last moment at which that was so: who was heard only briefly after it proves
    nothing, and who fell silent later did so for a reason of its own.
    """
    there = [one for one in others if one >= heard - AT_ONCE]
    silent = all(one < now - HEARD for one in there)
    return silent and any(one <= max(heard, deaf) + AT_ONCE for one in there)

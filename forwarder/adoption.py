"""From one life of a forwarder to the next: what is written down, and held again from that.

Whatever happens to an adopted wire before anybody refreshes it (a namespace dies, a Close comes,
its lease ends) does all that it would have done: the endpoint is told and has its addresses
again. One whose devices are gone ended while nobody looked: `forwarder.deaths` begins with that.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import replace

from forwarder.asking import name_of
from forwarder.crossing import Crossing
from forwarder.route import ForwarderRoute
from forwarder.store import Lease, Space, Store
from nsm.connections import Held
from nsm.errors import NsmError
from nsm.hop import Hop
from nsm.kernel.state import Namespace
from nsm.model import SECOND

RETURN = 30.0  # seconds a lease holds at least after a start: who refreshes could not meanwhile
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between looks for a socket; the last repeats
SOCKET = "unix:///proc/self/fd/"  # how `Sockets` calls one: of no use to the next life


class Keeper:
    """Writes down what the next life needs of each connection (`nsm.hop.Keeper`)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(self, id_: str) -> None:
        """It is about to be made."""
        self._store.begin(id_)

    def keep(self, held: Held[Crossing], ends: int) -> None:
        """What is held now; nothing of what has no way to go on yet."""
        made, memory = held.made, held.memory
        if made is None or memory is None or held.previous is None:
            return
        sides = memory.wire.sides if memory.wire else ()
        spaces = [
            Space(side, one.namespace.nsid, one.namespace.inode, one.name) for side, one in sides
        ]
        if memory.wire is None:
            spaces = [Space("", one.nsid, one.inode, one.name) for one in memory.seats]
        self._store.keep(
            Lease(
                id=held.id,
                previous=held.previous,
                origin=held.origin,
                connection=made,
                next_url="" if memory.url.startswith(SOCKET) else memory.url,
                endpoint=memory.endpoint,
                payload=memory.payload,
                outgoing=memory.outgoing,
                chosen=memory.chosen,
                spaces=tuple(spaces),
                ends=ends,
                leg=memory.leg,
                left_endpoint=memory.left,
            )
        )

    def drop(self, id_: str) -> None:
        """It is held no more."""
        self._store.drop(id_)


def adopt(leases: Iterable[Lease], hop: Hop[Crossing]) -> list[Held[Crossing]]:
    """Hold all of that again; before anybody is served."""
    soonest = time.time_ns() + int(RETURN * SECOND)
    adopted = []
    for lease in leases:
        seats = tuple(Namespace(0, one.nsid, one.inode, one.interface) for one in lease.spaces)
        memory = Crossing(
            lease.endpoint,
            lease.payload,
            lease.next_url,
            lease.outgoing,
            None,
            lease.chosen,
            seats,
            lease.leg,
            lease.left_endpoint,
        )
        held = Held(lease.id, lease.connection, lease.previous, lease.origin, memory)
        called = name_of(lease.id, lease.leg)
        hop.adopt(held, max(lease.ends, soonest), lease.next_url, called)
        adopted.append(held)
    return adopted


async def follow_again(held: Held[Crossing], hop: Hop[Crossing], route: ForwarderRoute) -> None:
    """Find the socket of an adopted connection's endpoint, and follow it there."""
    turn = 0
    while _sought(held):
        assert held.made is not None
        assert held.memory is not None
        try:
            url = await route.reach(held.made, held.memory.endpoint)
        except NsmError:  # not registered yet, or not any more: then its lease ends
            await asyncio.sleep(PAUSES[min(turn, len(PAUSES) - 1)])
            turn += 1
            continue
        async with hop.connections.turn(held.id, own=True):
            if not _sought(held):
                route.forget(url)
                return
            assert held.memory is not None
            held.memory = replace(held.memory, url=url)
            if hop.watches:
                hop.watches.follow(held.id, url, name_of(held.id, held.memory.leg))
            return


def _sought(held: Held[Crossing]) -> bool:
    """Whether it is still as it was adopted, and where it goes on is not known."""
    return held.made is not None and held.memory is not None and not held.memory.url

"""From one life of a manager to the next: which wires it carried.

Wires stand while no manager runs. One that is held again is told to whoever asked for it, with
the wish to ask once more, until its forwarder says how it is: so a client that was restarted
together with its manager finds what its earlier life left.
"""

import time
from collections.abc import Iterable
from dataclasses import replace

from nsm.connections import Held
from nsm.hop import Hop
from nsm.model import SECOND, State
from nsmgr.registry import Locals
from nsmgr.route import Next
from nsmgr.store import Carried, Store

RETURN = 30.0  # seconds a lease holds at least after a start: who refreshes could not meanwhile


class Keeper:
    """Writes down what the next life needs of each connection (`nsm.hop.Keeper`)."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def begin(self, id_: str) -> None:
        """It is about to be made; nothing that a manager makes stands of itself."""

    def keep(self, held: Held[Next], ends: int) -> None:
        """What is held now."""
        if held.made and held.memory and held.previous:
            carrier = held.memory.name
            self._store.carries(
                Carried(held.id, held.previous, held.origin, held.made, carrier, ends)
            )

    def drop(self, id_: str) -> None:
        """It is held no more."""
        self._store.lost(id_)


def adopt(left: Iterable[Carried], hop: Hop[Next]) -> list[Held[Next]]:
    """Hold all of that again; before anybody is served."""
    soonest = time.time_ns() + int(RETURN * SECOND)
    adopted = []
    for one in left:
        made = replace(one.connection, state=State.REFRESH_REQUESTED)
        held = Held(one.id, made, one.previous, one.origin, Next(one.forwarder, ""))
        hop.adopt(held, max(one.ends, soonest))
        adopted.append(held)
    return adopted


async def follow_again(adopted: Iterable[Held[Next]], hop: Hop[Next], locals_: Locals) -> None:
    """Hear of each again once its forwarder is back; who is asked for sooner is heard of sooner."""
    away = list(adopted)
    while away := [held for held in away if _sought(held)]:
        for held in away:
            assert held.memory is not None
            forwarder = locals_.get(held.memory.name)
            if forwarder and not held.waiting and hop.watches:
                held.memory = Next(held.memory.name, forwarder.url)
                hop.watches.follow(held.id, forwarder.url)
        if any(_sought(held) for held in away):
            await locals_.change()


def _sought(held: Held[Next]) -> bool:
    """Whether it is still as it was adopted."""
    return held.made is not None and held.memory is not None and not held.memory.url

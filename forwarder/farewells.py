"""Endpoints that could not be told that a wire of theirs is over are told later.

Their node's manager may be away just then, and what they have would stay until its lease ends,
ten minutes perhaps. So it is said again with growing pauses, at the connection's turn, and not
once the same wire has been asked for anew.
"""

import asyncio
import time
from dataclasses import dataclass
from typing import NoReturn

import structlog

from forwarder.asking import Asking
from forwarder.crossing import Crossing
from nsm.connections import Connections
from nsm.errors import DeadlineError, NsmError, UnavailableError
from nsm.model import SECOND, Connection
from nsm.path import earliest_expiry

log = structlog.get_logger(__name__)
PAUSES = (0.5, 0.5, 1.0, 2.0, 5.0, 10.0)  # seconds between tries; the last repeats
WITHIN = 2.0  # seconds a try may take
MOST = 10_000  # that wait: more are left to their leases


@dataclass(slots=True)
class _Owed:
    conn: Connection
    memory: Crossing
    due: float
    ends: int  # ns since 1970: from then on its lease there has ended
    tries: int = 0


class Farewells:
    """Says them, for as long as `follow` runs."""

    def __init__(self, asking: Asking) -> None:
        self._asking = asking
        self._owed: dict[tuple[str, str], _Owed] = {}
        self._some = asyncio.Event()

    def __len__(self) -> int:
        return len(self._owed)

    def owe(self, conn: Connection, memory: Crossing | None, why: BaseException) -> bool:
        """Have it closed at its next hop later; whether that can be.

        Not where the next hop refused, or is a socket of this node: that one's manager sees.
        """
        passing = isinstance(why, UnavailableError | DeadlineError | TimeoutError)
        if not passing or memory is None or not memory.url.startswith("tcp:"):
            return False
        ends = earliest_expiry(conn.segments) or 0
        if len(self._owed) >= MOST or ends <= time.time_ns():
            return False
        due = time.monotonic() + PAUSES[0]
        self._owed[conn.id, memory.leg] = _Owed(conn, memory, due, ends)
        self._some.set()
        return True

    async def follow(self, connections: Connections[Crossing]) -> NoReturn:
        """Say what is owed when its time comes, until cancelled."""
        while True:
            if not self._owed:
                self._some.clear()
                await self._some.wait()
            key, one = min(self._owed.items(), key=lambda item: item[1].due)
            if (early := one.due - time.monotonic()) > 0:
                await asyncio.sleep(min(early, PAUSES[0]))  # what is owed meanwhile may be sooner
                continue
            async with connections.turn(key[0], own=True) as held:
                again = held.memory is not None and held.memory.leg == key[1]
                if again or await self._said(one):
                    if self._owed.get(key) is one:
                        del self._owed[key]
                    continue
            one.due = time.monotonic() + PAUSES[min(one.tries, len(PAUSES) - 1)]

    async def _said(self, one: _Owed) -> bool:
        """Whether there is nothing more to say of it."""
        one.tries += 1
        try:
            async with asyncio.timeout(WITHIN):
                await self._asking.close_far(one.conn, one.memory)
        except (UnavailableError, DeadlineError, TimeoutError):
            return time.time_ns() + int(PAUSES[0] * SECOND) > one.ends
        except NsmError as reason:
            log.warning("an endpoint takes no farewell", id=one.conn.id, why=str(reason))
            return True
        log.info("an endpoint was told late of a close", id=one.conn.id, tries=one.tries + 1)
        return True

"""Until when a hop keeps a connection nobody refreshes (`wire.md` §3.8).

A lease ends at the earliest expiry to the left of the hop, less the time the
last request had left when it came: hops further left still accept our Close
then. That spares at most half of what is left until the expiry, because a caller
with tokens shorter than its patience would else have a lease that is over before
its answer is there. How long that is, is asked of the clock once: one that is set
meanwhile ends no lease and lengthens none.
"""

import asyncio
import contextvars
import time
from collections.abc import Callable

from nsm.errors import InvalidError
from nsm.model import SECOND, Connection
from nsm.path import earliest_expiry


class Leases:
    """One timer a connection; on_expiry is called with its id, and must not block."""

    def __init__(self, on_expiry: Callable[[str], None]) -> None:
        self._on_expiry = on_expiry
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ends: dict[str, int] = {}

    def renew(self, conn: Connection, remaining: float) -> None:
        """Keep conn until its left segments expire, less remaining seconds."""
        until = until_when(conn, remaining)
        self.release(conn.id)
        self._arm(conn.id, until)

    def again(self, id_: str, seconds: float) -> None:
        """Let the lease of id_ end once more, seconds from now."""
        self.until(id_, time.time_ns() + int(seconds * SECOND))

    def until(self, id_: str, ends: int) -> None:
        """Keep id_ until then, ns since 1970."""
        self.release(id_)
        self._arm(id_, ends)

    def ends(self, id_: str) -> int:
        """When the lease of id_ ends, ns since 1970; 0 if it has none."""
        return self._ends.get(id_, 0)

    def release(self, id_: str) -> None:
        """Forget the lease of id_, if there is one."""
        self._ends.pop(id_, None)
        if timer := self._timers.pop(id_, None):
            timer.cancel()

    def stop(self) -> None:
        """Forget all leases: the process ends and its wires stay."""
        for id_ in list(self._timers):
            self.release(id_)

    def __contains__(self, id_: str) -> bool:
        return id_ in self._timers

    def __len__(self) -> int:
        return len(self._timers)

    def _arm(self, id_: str, until: int) -> None:
        self._ends[id_] = until
        delay = max(0.0, (until - time.time_ns()) / SECOND)
        loop = asyncio.get_running_loop()
        # with a context of its own, because a lease outlives the request whose it would copy
        self._timers[id_] = loop.call_later(delay, self._fire, id_, context=contextvars.Context())

    def _fire(self, id_: str) -> None:
        self.release(id_)
        self._on_expiry(id_)


def until_when(conn: Connection, remaining: float) -> int:
    """When the lease of conn ends: ns since 1970. conn is at the hop that holds it."""
    first = earliest_expiry(conn.segments[: conn.index])
    if first is None:
        raise InvalidError(
            "expiration for the previous path segment cannot be nil",
            hint="the caller must send nsm-client-token-expires with its token",
        )
    ahead = max(0, first - time.time_ns())
    return first - min(int(remaining * SECOND), ahead // 2)

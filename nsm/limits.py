"""How much is worked on at once, and whose turn it is next.

A request holds descriptors, memory, and time of the kernel and of other hops, so
only so many are worked on at once; the others wait here, where one costs next to
nothing. Whoever has least under way is let in first: who floods waits behind
himself. Who is counted is the peer and, behind it, where the request began,
because a manager asks for all workloads of its node: what a peer says of those
to its left is believed as far as sharing the peer's own part goes, and no further.
Whoever invents them has three quarters of the places at most, and waits behind all others.

Who has a place may wait for a place further along the path, and nodes ask one another: were all
places theirs who come first, two nodes full of one another's requests would wait until every
deadline. So at each step further along there are some places that nobody before it gets.

Nothing here knows what it lets in.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from nsm.errors import ExhaustedError

K = TypeVar("K")
Whose = tuple[str, str]  # who asks, and for whom: SPIFFE ids
PART = 4  # no client has more than one place in so many; no peer those of all
QUEUE = 4  # so many wait for each place there is, at most
STEPS = 6  # hops of a path, of which no two share their last places; longer ones go between domains
KEPT = 32  # one place in so many is kept for each of them
UNREAD = "a client whose token says no name"


@dataclass(frozen=True, slots=True)
class Bounds:
    """at_once are worked on; in_all of one client are here, those that wait included."""

    at_once: int = 128
    in_all: int = 128


@dataclass(slots=True, eq=False)
class Ticket:
    """One request that is here: it waits, or has a place."""

    whose: Whose
    number: int
    step: int
    let_in: "asyncio.Future[None] | None" = None


@dataclass(slots=True, eq=False)
class Places:
    """Lets in what is asked for at one process, called where; what is it: `requests`.

    variable begins the names of the settings that bound it, "" where none does; queue is how
    many may wait, 0: QUEUE for each place.
    """

    where: str
    bounds: Bounds = Bounds()
    what: str = "requests"
    variable: str = "NSM_MAX_REQUESTS"
    queue: int = 0
    _here: Counter[Whose] = field(default_factory=Counter)
    _working: Counter[Whose] = field(default_factory=Counter)
    _peers: Counter[str] = field(default_factory=Counter)  # those of _working, by who asks
    _waiting: list[Ticket] = field(default_factory=list)  # the oldest first
    _numbers: int = 0

    @asynccontextmanager
    async def entered(self, whose: Whose, step: int = STEPS) -> AsyncIterator[Ticket]:
        """Be counted for the block, working or not. Raises ExhaustedError.

        step: how far along its path it is here, 1 at the first hop; what is worked on here may
        wait for those of greater steps elsewhere.
        """
        if self._here[whose] >= self.bounds.in_all:
            raise self._too_many(whose)
        self._here[whose] += 1
        self._numbers += 1
        try:
            yield Ticket(whose, self._numbers, step)
        finally:
            _less(self._here, whose)

    @asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[None]:
        """Wait for a place, and have it for the block. Raises ExhaustedError."""
        await self._get(ticket)
        try:
            yield
        finally:
            self._put(ticket)

    @property
    def working(self) -> int:
        """How many are worked on."""
        return self._working.total()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    async def _get(self, ticket: Ticket) -> None:
        if self._free(ticket):
            self._take(ticket)
            return
        let_in = ticket.let_in = asyncio.get_running_loop().create_future()
        self._waiting.append(ticket)
        if len(self._waiting) > self._longest:
            self._shed()
        try:
            await let_in
        except BaseException:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            elif not let_in.cancelled() and let_in.exception() is None:
                self._put(ticket)  # let in, and given up in the same moment
            raise

    def _take(self, ticket: Ticket) -> None:
        self._working[ticket.whose] += 1
        self._peers[ticket.whose[0]] += 1

    def _put(self, ticket: Ticket) -> None:
        _less(self._working, ticket.whose)
        _less(self._peers, ticket.whose[0])
        while some := [one for one in self._waiting if self._free(one)]:
            next_ = min(some, key=self._turn)
            self._waiting.remove(next_)
            assert next_.let_in is not None
            if next_.let_in.done():  # it was cancelled, and has not run since
                continue
            self._take(next_)
            next_.let_in.set_result(None)

    @property
    def _longest(self) -> int:
        return self.queue or self.bounds.at_once * QUEUE

    def _free(self, ticket: Ticket) -> bool:
        quarter = self.bounds.at_once // PART
        kept = max(0, STEPS - ticket.step) * (self.bounds.at_once // KEPT)
        there = self.bounds.at_once - kept
        return (
            self.working < there
            and self._peers[ticket.whose[0]] < max(1, there - quarter)
            and self._working[ticket.whose] < max(1, quarter)
        )

    def _turn(self, ticket: Ticket) -> tuple[int, int, int]:
        return self._peers[ticket.whose[0]], self._working[ticket.whose], ticket.number

    def _shed(self) -> None:
        """More wait than may: whose peer has most here loses what came last."""
        peers = Counter(one.whose[0] for one in self._waiting)
        most, _ = peers.most_common(1)[0]
        clients = Counter(one.whose for one in self._waiting if one.whose[0] == most)
        greediest, _ = clients.most_common(1)[0]
        last = next(one for one in reversed(self._waiting) if one.whose == greediest)
        self._waiting.remove(last)
        assert last.let_in is not None
        if not last.let_in.done():
            last.let_in.set_exception(self._overrun(last.whose))

    def _too_many(self, whose: Whose) -> ExhaustedError:
        return ExhaustedError(
            f"{_named(whose)} has {self._here[whose]} {self.what} under way at {self.where},"
            f" which takes {self.bounds.in_all} of one client",
            hint="wait for answers before asking for more"
            + (f", or raise {self.variable}_PER_CLIENT there" if self.variable else ""),
        )

    def _overrun(self, whose: Whose) -> ExhaustedError:
        return ExhaustedError(
            f"{self._longest} {self.what} wait at {self.where}, which works on"
            f" {self.bounds.at_once} at once; {_named(whose)} has most of them,"
            f" {self._here[whose]}",
            hint="ask again in a moment"
            + (f", or raise {self.variable} there" if self.variable else ""),
        )


def _named(whose: Whose) -> str:
    peer, client = whose
    return peer if peer == client else f"{client or UNREAD}, for whom {peer} asks,"


def _less(counter: Counter[K], key: K) -> None:
    """Forget what is at nought: names are the peers' to choose, and must not add up."""
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]

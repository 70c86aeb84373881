"""Numbered datagrams both ways between two places of a lab: what is lost is known by number.

    with Traffic(paths, "app", "pong", ("172.16.1.1", "172.16.1.0")) as traffic:
        mark = traffic.mark()
        ...                                     # whatever must not be noticed
        report = traffic.report(mark)
    assert report.whole, str(report)

Couriers in the places' namespaces send and listen on the wire's addresses; see
labs/courier.py for what they do with an interface that is away. Each number is sent
once. One that did not arrive is missing, whether the wire lost it or the kernel where it
started would not take it: a program notices either; the second are told with the reason.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from labs.hands import EndedError, Hands
from labs.paths import Paths
from labs.sequences import Ranges, Silence
from nsm.errors import DeadlineError

RATE: Final = 200.0  # datagrams a second, each way
SIZE: Final = 64  # bytes of payload
LAST: Final = 1.0  # seconds that the last ones may take, without another arriving meanwhile
_LOOK: Final = 0.02  # seconds between looks at what arrived
_TOLD: Final = 6  # ranges of missing numbers in a sentence
_names = itertools.count()


class Couriers(Hands):
    """The couriers of one run: one in each place, however many flows it has."""

    def __init__(self) -> None:
        super().__init__("labs.courier")


@dataclass(frozen=True, slots=True)
class Way:
    """One direction of a flow, as far as it is judged: numbers from a mark on."""

    source: str
    target: str
    numbers: range  # sent
    missing: tuple[range, ...]
    refused: Mapping[str, int]  # of those missing, what the kernel at the source did not take
    duplicates: int
    reordered: int
    silence: float  # the longest time without an arrival, in seconds; 0: none of a tenth
    overrun: int  # arrived, but the courier was stalled for so long that it could not read them
    rate: float

    @property
    def lost(self) -> int:
        """How many did not arrive."""
        return sum(len(gap) for gap in self.missing)

    @property
    def arrived(self) -> int:
        """How many did."""
        return len(self.numbers) - self.lost

    @property
    def outage(self) -> float:
        """The longest run of numbers that were lost, in seconds of sending."""
        return max((len(gap) for gap in self.missing), default=0) / self.rate

    @property
    def whole(self) -> bool:
        """Whether each arrived, and none twice."""
        return not self.missing and not self.duplicates

    def __str__(self) -> str:
        says = [f"{self.source} -> {self.target}: {len(self.numbers)} sent"]
        if not self.missing:
            says.append("all arrived")
        else:
            which = [
                f"{g.start}-{g.stop - 1}" if len(g) > 1 else str(g.start) for g in self.missing
            ]
            more = f" and {len(which) - _TOLD} more" if len(which) > _TOLD else ""
            says.append(f"{self.lost} lost ({', '.join(which[:_TOLD])}{more})")
        says += [f"{count} of them refused with {why}" for why, count in self.refused.items()]
        for count, what in (
            (self.duplicates, "came twice"),
            (self.reordered, "came late"),
            (self.overrun, "came and were not read: the courier was stalled"),
        ):
            if count:
                says.append(f"{count} {what}")
        if self.silence:
            says.append(f"longest silence {self.silence:.3f} s")
        return ", ".join(says)


@dataclass(frozen=True, slots=True)
class Report:
    """Both directions of a flow."""

    there: Way
    back: Way

    @property
    def ways(self) -> tuple[Way, Way]:
        """There and back."""
        return self.there, self.back

    @property
    def lost(self) -> int:
        """How many did not arrive, of both."""
        return self.there.lost + self.back.lost

    @property
    def arrived(self) -> int:
        """How many arrived of the direction of which fewer did."""
        return min(self.there.arrived, self.back.arrived)

    @property
    def outage(self) -> float:
        """The longest run of lost numbers of either, in seconds of sending."""
        return max(self.there.outage, self.back.outage)

    @property
    def whole(self) -> bool:
        """Whether each number arrived, and none twice."""
        return self.there.whole and self.back.whole

    def __str__(self) -> str:
        return f"{self.there}; {self.back}"


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment of a flow: the first number of each way that was not sent yet."""

    there: int = 0
    back: int = 0


@dataclass(slots=True)
class _End:
    """One place of a flow, and the newest it told."""

    place: str
    number: int
    sent: int = 0
    refused: Mapping[str, Ranges] = field(default_factory=dict)
    heard: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    overrun: int = 0
    gone: bool = False  # its courier is no more: what it told last is what is known


class Traffic:
    """A flow between a and b, from its start to its end.

    addresses: a's and b's. stand_by: other places that have b's address once b is gone, as
    another endpoint of the same service: what arrives at any of them has arrived. They only
    listen. couriers: whose to use, for many flows at once.
    """

    def __init__(
        self,
        paths: Paths,
        a: str,
        b: str,
        addresses: tuple[str, str],
        *,
        rate: float = RATE,
        size: int = SIZE,
        stand_by: Sequence[str] = (),
        couriers: Couriers | None = None,
    ) -> None:
        self._paths = paths
        self._addresses = addresses
        self._rate = rate
        self._size = size
        self._name = f"{os.getpid() & 0xFFFF:04x}{next(_names) & 0xFFFF:04x}"
        self._near = _End(a, 0)
        self._far = [_End(place, number) for number, place in enumerate((b, *stand_by), 1)]
        self._couriers = couriers or Couriers()
        self._own = couriers is None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._open:
            if self._own:
                self._open.enter_context(self._couriers)
            own, others = self._addresses
            ports: dict[str, int] = {}
            for end in self._ends:
                address, port = (own, 0) if end is self._near else (others, ports.get(others, 0))
                told = self._order(end, "open", sender=end.number, address=address, port=port)
                ports[address] = told["port"]
                self._open.callback(self._close, end)
            pace = {"rate": self._rate, "size": self._size}
            for end, to in ((self._far[0], own), (self._near, others)):
                self._order(end, "start", address=to, port=ports[to], **pace)
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def mark(self) -> Mark:
        """This moment: what `report` judges from."""
        self._look()
        return Mark(self._near.sent, self._far[0].sent)

    def report(self, since: Mark = Mark(), *, patience: float = LAST) -> Report:
        """What became of every number sent until now, once the last ones had time to arrive.

        patience: seconds that they may take, without another one arriving meanwhile.
        """
        self._look()
        until = Mark(self._near.sent, self._far[0].sent)
        report = self._judged(since, until)
        end = time.monotonic() + patience
        while report.lost and time.monotonic() < end:
            time.sleep(_LOOK)
            self._look()
            newer = self._judged(since, until)
            if newer.lost < report.lost:
                end = time.monotonic() + patience
            report = newer
        return report

    def arrive(self, count: int, since: Mark = Mark(), *, patience: float) -> Report:
        """Wait until so many numbers have arrived each way since a mark.

        Raises DeadlineError after patience seconds, with what did.
        """
        return self.until(
            lambda report: report.arrived >= count,
            f"{count} datagrams each way",
            since,
            patience=patience,
        )

    def until(
        self,
        holds: Callable[[Report], bool],
        what: str,
        since: Mark = Mark(),
        *,
        patience: float,
    ) -> Report:
        """Look at the flow until it is so. Raises DeadlineError after patience seconds."""
        end = time.monotonic() + patience
        while True:
            self._look()
            report = self._judged(since, Mark(self._near.sent, self._far[0].sent))
            if holds(report):
                return report
            if time.monotonic() > end:
                raise DeadlineError(f"waited {patience:g} s for {what}; {report}")
            time.sleep(_LOOK)

    # -- the couriers -----------------------------------------------------------------------

    @property
    def _ends(self) -> list[_End]:
        return [self._near, *self._far]

    def _order(self, end: _End, do: str, **what: Any) -> Any:
        namespace = self._paths.namespace(end.place)
        order = {"do": do, "flow": self._name, **what}
        return self._couriers.ask({namespace: order})[namespace]

    def _close(self, end: _End) -> None:
        if not end.gone:
            with contextlib.suppress(EndedError):
                self._order(end, "close")

    def _look(self) -> None:
        """Ask every courier that is left; first who sent, so that what arrived was sent."""
        for end in self._ends:
            if end.gone:
                continue
            told = None
            with contextlib.suppress(EndedError):
                told = self._order(end, "tell")
            if told is None:
                end.gone = True
                continue
            end.sent = told["sent"]
            end.refused = {why: Ranges(pairs) for why, pairs in told["refused"].items()}
            end.heard = {int(sender): heard for sender, heard in told["heard"].items()}
            end.overrun = told["overrun"]

    # -- the report -------------------------------------------------------------------------

    def _judged(self, since: Mark, until: Mark) -> Report:
        return Report(
            self._way(self._near, self._far, range(since.there, until.there)),
            self._way(self._far[0], [self._near], range(since.back, until.back)),
        )

    def _way(self, source: _End, targets: Sequence[_End], sent: range) -> Way:
        heard = [end.heard[source.number] for end in targets if source.number in end.heard]
        arrived = Ranges()
        for one in heard:
            arrived = arrived.joined(Ranges(one["numbers"]))
        missing = arrived.without(sent)
        refused = {
            why: count
            for why, ranges in source.refused.items()
            if (count := ranges.within(sent).count)
        }
        silences = [Silence(**silence) for one in heard for silence in one["silences"]]
        return Way(
            source.place,
            targets[0].place,
            sent,
            tuple(missing),
            refused,
            sum(one["duplicates"] for one in heard),
            sum(one["reordered"] for one in heard),
            max((s.seconds for s in silences if s.after in sent), default=0.0),
            sum(end.overrun for end in targets),
            self._rate,
        )

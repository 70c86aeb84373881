"""Which numbers have arrived: kept as ranges, so that hours of them need no more room than minutes.

Pure, and of the standard library alone: a courier is one more process in somebody's
namespace and must be small.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

SILENCE: Final = 0.1  # seconds without an arrival from which on it is noted
_SILENCES: Final = 10_000  # the newest that are kept


class Ranges:
    """A set of numbers that mostly come in order."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        """ranges: each from its first number to behind its last, in order and apart."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self._starts.append(start)
            self._ends.append(end)

    def add(self, number: int) -> bool:
        """Take a number in; whether it is new."""
        place = bisect_right(self._starts, number)  # ranges before it start at it or earlier
        if place and number < self._ends[place - 1]:
            return False
        joins_before = place > 0 and self._ends[place - 1] == number
        joins_after = place < len(self._starts) and self._starts[place] == number + 1
        if joins_before and joins_after:
            self._ends[place - 1] = self._ends.pop(place)
            del self._starts[place]
        elif joins_before:
            self._ends[place - 1] = number + 1
        elif joins_after:
            self._starts[place] = number
        else:
            self._starts.insert(place, number)
            self._ends.insert(place, number + 1)
        return True

    def __iter__(self) -> Iterator[range]:
        return map(range, self._starts, self._ends)

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._starts)

    def within(self, window: range) -> "Ranges":
        """Those of the window."""
        cut = ((max(r.start, window.start), min(r.stop, window.stop)) for r in self)
        return Ranges((start, end) for start, end in cut if start < end)

    def without(self, window: range) -> "Ranges":
        """What of the window is not there."""
        gaps, at = [], window.start
        for found in self.within(window):
            if found.start > at:
                gaps.append((at, found.start))
            at = found.stop
        if at < window.stop:
            gaps.append((at, window.stop))
        return Ranges(gaps)

    def joined(self, other: "Ranges") -> "Ranges":
        """The numbers of both."""
        merged: list[tuple[int, int]] = []
        for found in sorted([*self, *other], key=lambda r: r.start):
            if merged and found.start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(merged[-1][1], found.stop)
            else:
                merged.append((found.start, found.stop))
        return Ranges(merged)

    @property
    def count(self) -> int:
        """How many numbers there are."""
        return sum(len(found) for found in self)

    def pairs(self) -> list[tuple[int, int]]:
        """What makes the same ranges again."""
        return [(found.start, found.stop) for found in self]


@dataclass(frozen=True, slots=True)
class Silence:
    """A time without arrivals: between which numbers, and how long in seconds."""

    before: int
    after: int
    seconds: float


@dataclass(slots=True)
class Heard:
    """What arrived of one sender's numbers."""

    numbers: Ranges = field(default_factory=Ranges)
    duplicates: int = 0
    reordered: int = 0  # came behind a higher one
    silences: deque[Silence] = field(default_factory=lambda: deque(maxlen=_SILENCES))
    _latest: float = 0.0
    _number: int = -1
    _highest: int = -1

    def take(self, number: int, when: float) -> None:
        """A number that arrived, and when in seconds by any clock, which is always the same."""
        if not self.numbers.add(number):
            self.duplicates += 1
            return
        if number < self._highest:
            self.reordered += 1
        self._highest = max(self._highest, number)
        if self._number >= 0 and when - self._latest >= SILENCE:
            self.silences.append(Silence(self._number, number, round(when - self._latest, 4)))
        self._number, self._latest = number, when

"""When a bar holds. Pure.

A ratio of what is taken pair by pair is known as well as its pairs agree: of 100 runs like
this one, 95 would have it within the interval (percentile bootstrap over the pairs).
"""

import itertools
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeVar

T = TypeVar("T")
RESAMPLES: Final = 2000
LEVEL: Final = 0.95
Holds = Literal["holds", "unclear", "does not hold"]


@dataclass(frozen=True, slots=True)
class Judged:
    """A figure beside its bar. most says that it may be as large as that, not as small."""

    what: str
    value: float
    bar: float
    most: bool = True
    interval: tuple[float, float] | None = None
    unit: str = ""

    @property
    def verdict(self) -> Holds:
        """unclear: the bar is within what runs like this differ by, on whichever side we are."""
        within = [self._within(end) for end in self.interval or (self.value,)]
        return "holds" if all(within) else "unclear" if any(within) else "does not hold"

    def words(self) -> dict[str, Any]:
        """All of it, for JSON."""
        told = {"figure": self.figure, "demand": self.demand, "verdict": self.verdict}
        return {**asdict(self), **told}

    def _within(self, value: float) -> bool:
        return value <= self.bar if self.most else value >= self.bar

    def __str__(self) -> str:
        return f"{self.what:<46} {self.figure:<26} {self.demand:<16} {self.verdict}"

    @property
    def figure(self) -> str:
        """With its unit and its interval."""
        if not self.interval:
            return f"{self.value:.3g} {self.unit}".rstrip()
        low, high = self.interval
        return f"{self.value:.3f} ({low:.3f} to {high:.3f}) {self.unit}".rstrip()

    @property
    def demand(self) -> str:
        """Its bar."""
        return f"{'at most' if self.most else 'at least'} {self.bar:g} {self.unit}".rstrip()


def median_of(what: str, ratios: Sequence[float], bar: float, *, most: bool) -> Judged:
    """The median of ratios taken pair by pair, and how well it is known."""
    return Judged(what, _median(ratios), bar, most, interval(ratios))


def of_medians(what: str, ours: Sequence[float], floors: Sequence[float], bar: float) -> Judged:
    """The ratio of both medians, taken by turns: for short times, of which some are very long."""
    turns = list(zip(ours, floors, strict=True))
    return Judged(what, _ratio(turns), bar, most=True, interval=interval(turns, _ratio))


def slope_of(what: str, points: Sequence[tuple[float, float]], bar: float, unit: str) -> Judged:
    """How much one more adds, and how well that is known."""
    return Judged(what, slope(points), bar, interval=interval(points, slope), unit=unit)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between any two of them (Theil and Sen): a few that are far off
    do not tilt it."""
    pairs = itertools.combinations(points, 2)
    return statistics.median((y - v) / (x - u) for (x, y), (u, v) in pairs if x != u)


def _ratio(turns: Sequence[tuple[float, float]]) -> float:
    ours, floors = (statistics.median(turn[which] for turn in turns) for which in (0, 1))
    return ours / floors


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def interval(
    values: Sequence[T],
    figure: Callable[[Sequence[T]], float] = _median,  # type: ignore[assignment]
    resamples: int = RESAMPLES,
) -> tuple[float, float]:
    """Between what that figure of such values lies; the same for the same values."""
    draw = random.Random(0)
    figures = sorted(figure(draw.choices(values, k=len(values))) for _ in range(resamples))
    beyond = round(resamples * (1 - LEVEL) / 2)
    return figures[beyond], figures[-1 - beyond]

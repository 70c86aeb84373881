"""When a bar holds. Pure.

A ratio that is taken pair by pair is known as well as its pairs agree: the interval holds the
median of 95 of 100 runs like this one (percentile bootstrap over the pairs).
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

RESAMPLES: Final = 4000
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
        """unclear: the figure misses its bar, but by less than what runs like this differ by."""
        if self._within(self.value):
            return "holds"
        return (
            "unclear"
            if self.interval and any(map(self._within, self.interval))
            else "does not hold"
        )

    def _within(self, value: float) -> bool:
        return value <= self.bar if self.most else value >= self.bar

    def __str__(self) -> str:
        told = f"{self.value:.3g}" if self.unit else f"{self.value:.3f}"
        unit = f" {self.unit}" if self.unit else ""
        sure = ""
        if self.interval:
            sure = f" ({self.interval[0]:.3f} to {self.interval[1]:.3f})"
        sign = "≤" if self.most else "≥"
        return f"{self.what:<48} {told}{unit}{sure}  bar {sign} {self.bar:g}{unit}  {self.verdict}"


def median_of(what: str, ratios: Sequence[float], bar: float, *, most: bool) -> Judged:
    """The median of ratios taken pair by pair, and how well it is known."""
    return Judged(what, statistics.median(ratios), bar, most, interval(ratios))


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Between what the median of such values lies; the same for the same values."""
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(values, k=len(values))) for _ in range(resamples)
    )
    beyond = round(resamples * (1 - LEVEL) / 2)
    return medians[beyond], medians[-1 - beyond]

"""The results as one picture: the pairs of each data path, and every other figure on its bar."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageDraw, ImageFont

WIDTH: Final = 1300
LEFT, RIGHT = 350, 910  # of the scales; before them what it is, behind them the figure
ROW: Final = 28
INK, PALE, LINE = "#1d1d1f", "#8e8e93", "#d8d8dc"
COLOURS: Final = {"holds": "#1e7b34", "unclear": "#b26a00", "does not hold": "#b3261e"}
NARROW: Final = (0.85, 1.15)  # the scale of data paths; what lies beyond is drawn at its edge
WIDE: Final = (0.0, 2.0)

Bar = Mapping[str, Any]


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write it, as PNG."""
    paths = [bar for bar in results["bars"] if "by hand" in bar["what"] and not bar["most"]]
    others = [bar for bar in results["bars"] if bar not in paths]
    rows = len(paths) + len(others) + len(results["missing"])
    height = 130 + ROW * rows + 100 * bool(paths) + 70 * bool(others)
    sheet = _Sheet(height)
    machine = results["machine"]
    sheet.text(24, 20, "vwire bench", 26)
    about = f"{machine['processor']}, {machine['processors']} processors, Linux {machine['kernel']}"
    sheet.text(24, 56, f"{about}, Python {machine['python']}", 15, PALE)
    load = f"load {machine['load'][0]:.1f} before, {results['load_after'][0]:.1f} after"
    sheet.text(24, 78, f"{machine['commit']}, {machine['when']}, {load}", 15, PALE)
    top = 116
    if paths:
        top = sheet.heading(top, "Data path ÷ the same made by hand with ip and wg", NARROW, 0.05)
        for bar in paths:
            sheet.pairs(top, bar, ratios(bar["what"], results["samples"]["paths"]))
            top += ROW
        top += 30
    if others:
        top = sheet.heading(top, "Every other figure ÷ its bar (left of 1 it holds)", WIDE, 0.5)
        for bar in others:
            sheet.level(top, bar)
            top += ROW
    for one in results["missing"]:
        sheet.text(24, top + 4, f"not measured: {one[:150]}", 15, COLOURS["unclear"])
        top += ROW
    sheet.save(path)


def ratios(what: str, samples: Mapping[str, Any]) -> list[float]:
    """Of each pair, what that bar is the median of."""
    kind, _, measure = what.partition(": ")
    if measure.startswith("throughput"):
        return [ours / hand for ours, hand in samples[kind]["rates"]]
    return [hand / ours for ours, hand in samples[kind]["trips"]]


class _Sheet:
    def __init__(self, height: int) -> None:
        self._image = Image.new("RGB", (WIDTH, height), "white")
        self._draw = ImageDraw.Draw(self._image)
        self._bottom = 0

    def save(self, path: Path) -> None:
        self._image.save(path, "PNG", optimize=True)

    def text(self, x: float, y: float, words: str, size: int, colour: str = INK) -> None:
        words = words.replace("÷", "/")  # which the font has not
        self._draw.text((x, y), words, fill=colour, font=ImageFont.load_default(size))

    def heading(self, top: int, words: str, scale: tuple[float, float], step: float) -> int:
        """Words, and the scale with its ticks; where the first row begins."""
        self.text(24, top, words, 18)
        top += 38
        low, high = scale
        for n in range(round((high - low) / step) + 1):
            value = low + n * step
            x = _across(value, scale)
            self._draw.line([(x, top + 18), (x, top + 24)], fill=PALE)
            self.text(x - 12, top, f"{value:.2f}", 12, PALE)
        return top + 30

    def pairs(self, top: int, bar: Bar, values: Sequence[float]) -> None:
        """A dot for each pair, the interval, the median; lines at 1 and at the bar."""
        self._label(top, bar)
        self._upright(top, 1.0, NARROW, LINE)
        self._upright(top, bar["bar"], NARROW, COLOURS["does not hold"])
        middle = top + ROW // 2 - 2
        for n, value in enumerate(values):  # one beside the other, as they came
            x, y = _across(value, NARROW), middle - 7 + 14 * (n % 5) / 4
            self._draw.ellipse([(x - 2, y - 2), (x + 2, y + 2)], fill=PALE)
        colour = COLOURS[bar["verdict"]]
        low, high = (_across(value, NARROW) for value in bar["interval"])
        self._draw.line([(low, middle), (high, middle)], fill=colour, width=3)
        x = _across(bar["value"], NARROW)
        self._draw.rectangle([(x - 3, middle - 7), (x + 3, middle + 7)], fill=colour)

    def level(self, top: int, bar: Bar) -> None:
        """How far the figure comes on the way to its bar, which is at 1."""
        self._label(top, bar)
        share = bar["value"] / bar["bar"] if bar["bar"] else 2.0 * bool(bar["value"])
        middle = top + ROW // 2 - 2
        ends = [(_across(0.0, WIDE), middle - 6), (_across(share, WIDE), middle + 6)]
        self._draw.rectangle(ends, fill=COLOURS[bar["verdict"]])
        self._upright(top, 1.0, WIDE, COLOURS["does not hold"])

    def _label(self, top: int, bar: Bar) -> None:
        self.text(24, top + 4, bar["what"], 15)
        told = f"{bar['figure']}, {bar['demand']}"
        self.text(RIGHT + 20, top + 4, told, 15, COLOURS[bar["verdict"]])

    def _upright(self, top: int, at: float, scale: tuple[float, float], colour: str) -> None:
        x = _across(at, scale)
        self._draw.line([(x, top), (x, top + ROW - 4)], fill=colour)


def _across(value: float, scale: tuple[float, float]) -> float:
    low, high = scale
    return LEFT + (RIGHT - LEFT) * (min(max(value, low), high) - low) / (high - low)

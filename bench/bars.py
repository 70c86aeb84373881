"""The bars, and how samples are held against them. Pure: samples may be of another day."""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any, Final

from bench.requests import Requests
from bench.verdict import Judged, median_of, of_medians, slope_of

SAME: Final = 0.97  # of throughput, and of round trips by hand ÷ ours
MAKING: Final = 2.0  # ÷ the raw batches
CLOSING: Final = 2.0  # ÷ the raw delete
REQUEST: Final = 3.0  # ÷ the sum of its floors; a close the same
IDLE: Final = 90.0  # MB
WIRE: Final = 20.0  # kB
SLOWEST: Final = 10.0  # ÷ the median

Samples = Mapping[str, Mapping[str, Any]]


def judged(samples: Samples) -> list[Judged]:
    """Every bar there are samples for, kind by kind."""
    return [
        *_same(samples.get("same", {})),
        *_paths(samples.get("paths", {})),
        *_setup(samples.get("setup", {})),
        *_requests(samples.get("requests", {}), samples.get("setup", {})),
        *_memory(samples.get("memory", {})),
        *_bringups(samples.get("bringups", {})),
    ]


def without_floors(samples: Samples) -> list[str]:
    """Figures that cannot be judged: of their floors, the batches are those of another part."""
    lacking = samples.get("requests", {}).keys() - samples.get("setup", {}).keys()
    return [
        f"request and close of {kind} ÷ their floors: those need the part setup of it"
        for kind in sorted(lacking)
    ]


def _same(of: Mapping[str, Any]) -> Iterator[Judged]:
    for kind, found in of.items():
        yield Judged(f"{kind}: differences from the one by hand", len(found), 0)


def _paths(of: Mapping[str, Any]) -> Iterator[Judged]:
    for kind, told in of.items():
        ratios = [ours / hand for ours, hand in told["rates"]]
        yield median_of(f"{kind}: throughput ÷ by hand", ratios, SAME, most=False)
        ratios = [hand / ours for ours, hand in told["trips"]]
        yield median_of(f"{kind}: round trip, by hand ÷ ours", ratios, SAME, most=False)


def _setup(of: Mapping[str, Any]) -> Iterator[Judged]:
    for kind, told in of.items():
        for what, bar in (("making", MAKING), ("closing", CLOSING)):
            both = told[what]["ours"], told[what]["raw"]
            yield of_medians(f"{kind}: {what} ÷ raw", *both, bar)


def _requests(of: Mapping[str, Any], setup: Mapping[str, Any]) -> Iterator[Judged]:
    for kind, told in of.items():
        asked = Requests(**told)
        if kind in setup:
            batch, delete = (
                statistics.median(setup[kind][what]["raw"]) * 1000 for what in ("making", "closing")
            )
            yield of_medians(f"{kind}: request ÷ its floors", *asked.requests(batch), REQUEST)
            yield of_medians(f"{kind}: close ÷ its floors", *asked.closes(delete), REQUEST)
        if kind.startswith("wireguard"):
            yield _slowest(f"{kind}: slowest request ÷ median", asked.told["request_ms"])


def _memory(of: Mapping[str, Any]) -> Iterator[Judged]:
    if of:
        idle = statistics.median(sum(told["idle"].values()) for told in of.values())
        yield Judged("nsmgr and forwarder at rest", idle / 1e6, IDLE, unit="MB")
    for kind, told in of.items():
        points = [(n, octets / 1e3) for n, octets in zip(told["wires"], told["both"], strict=True)]
        yield slope_of(f"{kind}: one more wire in both", points, WIRE, unit="kB")


def _bringups(of: Mapping[str, Any]) -> Iterator[Judged]:
    for kind, seconds in of.items():
        yield _slowest(f"{kind}: slowest bring-up ÷ median", seconds)


def _slowest(what: str, values: list[float]) -> Judged:
    return Judged(what, max(values) / statistics.median(values), SLOWEST)

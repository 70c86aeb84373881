"""Numbered traffic along wires of a lab, for as long as something of it is broken."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from labs.lab import FAMILIES, Lab, matching
from labs.paths import Paths
from labs.traffic import RATE, Couriers, Mark, Report, Traffic
from labs.wires import Wire, of_family, wires
from nsm.errors import NsmError, UnavailableError

MOST: Final = 20  # flows at once: more of them than this measure the machine
ENOUGH: Final = 20  # datagrams that arrive each way: then packets flow
BEFORE: Final = 5.0  # seconds until they do, on a wire that is whole


@dataclass(frozen=True, slots=True)
class Pair:
    """Two places that a wire, or a flat network, joins, and their addresses there."""

    a: str
    b: str
    addresses: tuple[str, str]

    def __str__(self) -> str:
        return f"{self.a} <-> {self.b}"


@dataclass(frozen=True, slots=True)
class Toll:
    """What all flows lost since a moment, and for how long any of them was interrupted."""

    flows: int
    sent_there: int
    lost_there: int
    sent_back: int
    lost_back: int
    twice: int
    seconds: float  # the longest run of lost datagrams
    says: tuple[str, ...]  # of each flow that is not whole

    @property
    def lost(self) -> int:
        """Both ways."""
        return self.lost_there + self.lost_back

    def __str__(self) -> str:
        if self.lost_there == self.lost_back == 0:
            text = f"lost 0 of {self.sent_there + self.sent_back}"
        else:
            text = (
                f"lost {self.lost_there} of {self.sent_there} there,"
                f" {self.lost_back} of {self.sent_back} back"
            )
        if self.twice:
            text += f", {self.twice} came twice"
        return f"{text}; interrupted for {self.seconds:.2f} s" if self.seconds else text

    @property
    def figures(self) -> dict[str, Any]:
        """For machines."""
        return {
            "flows": self.flows,
            "sent_there": self.sent_there, "lost_there": self.lost_there,
            "sent_back": self.sent_back, "lost_back": self.lost_back,
            "twice": self.twice, "interrupted_s": round(self.seconds, 3),
        }  # fmt: skip


def pairs(
    lab: Lab, paths: Paths, source: str = "*", target: str = "*", service: str = "*"
) -> list[Pair]:
    """Who can be asked along the wires that are up: globs as of a ping. Each two once a family."""
    there = [wire for wire in wires(lab, paths) if wire.serves(service)]
    ends = (*lab.clients, *lab.endpoints, *lab.routers)
    asked = itertools.product(matching(source, ends), matching(target, ends))
    found: dict[frozenset[tuple[str, str]], Pair] = {}
    for a, b in asked:
        for own, far in _addresses(there, a, b):
            for family in FAMILIES:
                both = [of_family(one, (family,))[:1] for one in (own, far)]
                if all(both):
                    pair = Pair(a, b, (both[0][0], both[1][0]))
                    found.setdefault(frozenset(zip((a, b), pair.addresses, strict=True)), pair)
    return list(found.values())


def _addresses(
    there: Sequence[Wire], a: str, b: str
) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Of a and of b, by each wire between them, and in each flat network that both are in."""
    for wire in there:
        if wire.joins(a, b) and a != b:
            yield wire.far(b), wire.far(a)
    own = {wire.network: wire for wire in there if wire.network and wire.client == a != b}
    for wire in there:
        if wire.client == b and wire.network in own:
            yield own[wire.network].client_addresses, wire.client_addresses


class Flows:
    """A flow for each of pairs, from its start to its end."""

    def __init__(self, paths: Paths, between: Sequence[Pair], *, rate: float = RATE) -> None:
        self._paths = paths
        self._pairs = between
        self._rate = rate
        self._traffic: list[Traffic] = []
        self._marks: list[Mark] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with self._open:
            couriers = self._open.enter_context(Couriers())
            for pair in self._pairs:
                flow = Traffic(self._paths, pair.a, pair.b, pair.addresses, rate=self._rate,
                               couriers=couriers)  # fmt: skip
                self._traffic.append(self._open.enter_context(flow))
            self.flow(BEFORE, "before anything is broken")
            self._marks = [flow.mark() for flow in self._traffic]
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def flow(self, patience: float, when: str) -> None:
        """Wait until packets arrive both ways on each, from now on.

        Raises UnavailableError naming those on which they do not.
        """
        marks = [flow.mark() for flow in self._traffic]
        silent = []
        for pair, flow, mark in zip(self._pairs, self._traffic, marks, strict=True):
            try:
                flow.arrive(ENOUGH, mark, patience=patience)
            except NsmError as late:
                silent.append(f"{pair} {when}: {late.message}")
        if silent:
            raise UnavailableError("; ".join(silent))

    def toll(self) -> Toll:
        """What became of everything sent since the start."""
        flows = zip(self._traffic, self._marks, strict=True)
        reports = [flow.report(mark) for flow, mark in flows]
        there, back = [r.there for r in reports], [r.back for r in reports]
        return Toll(
            len(reports),
            sum(len(way.numbers) for way in there),
            sum(way.lost for way in there),
            sum(len(way.numbers) for way in back),
            sum(way.lost for way in back),
            sum(way.duplicates for way in (*there, *back)),
            max((report.outage for report in reports), default=0.0),
            tuple(_says(report) for report in reports if not report.whole),
        )


def _says(report: Report) -> str:
    return "; ".join(str(way) for way in report.ways if not way.whole)

"""What is measured, one part after the other; every part gives samples that JSON can hold."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from bench import bringups, memory, paths, raw, requests, same
from bench.mesh import mesh
from bench.wires import Kind, stage

PARTS: Final = ("same", "paths", "setup", "requests", "memory", "bringups")
ALONE: Final = ("same", "paths", "setup", "bringups")  # without a mesh
Report = Callable[[str], None]
Samples = dict[str, dict[str, Any]]
"""By part, by kind of wire."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How many samples are taken."""

    pairs: int
    turns: int
    requests: int
    wires: int
    bringups: int
    all_kinds: bool  # the memory of each, or of the first alone, because a mesh is started for it


FULL: Final = Settings(30, 60, 60, 100, 100, all_kinds=True)
QUICK: Final = Settings(4, 12, 12, 40, 10, all_kinds=False)


async def measured(
    kinds: Sequence[Kind], wanted: Collection[str], settings: Settings, report: Report
) -> Samples:
    """Everything wanted that needs no mesh."""
    samples: Samples = {}
    for kind in kinds:
        if "same" in wanted:
            report(f"{kind}: the objects, ours and by hand")
            _put(samples, "same", kind, await same.differences(kind))
        if "setup" in wanted:
            report(f"{kind}: making and closing, {settings.turns} times")
            with stage() as where:
                turns = await raw.measured(kind, settings.turns, where)
            both = {"making": asdict(turns.making), "closing": asdict(turns.closing)}
            _put(samples, "setup", kind, both)
        if "paths" in wanted:
            _put(samples, "paths", kind, asdict(await paths.measure(kind, settings.pairs, report)))
        if "bringups" in wanted and kind.startswith("wireguard"):
            times = await bringups.measure(kind, settings.bringups, report)
            _put(samples, "bringups", kind, times)
    return samples


def in_a_mesh(
    kinds: Sequence[Kind], wanted: Collection[str], settings: Settings, report: Report
) -> Samples:
    """What is asked of a whole mesh. Its WireGuard is the kernel's or wireguard-go, not both."""
    samples: Samples = {}
    if "requests" in wanted:
        with mesh() as there:
            for kind in kinds:
                report(f"{kind}: {settings.requests} requests and closes")
                _put(
                    samples,
                    "requests",
                    kind,
                    asdict(requests.asked(there, kind, settings.requests)),
                )
    if "memory" in wanted:
        for kind in kinds if settings.all_kinds else kinds[:1]:
            report(f"{kind}: the memory of {settings.wires} wires")
            with mesh() as there:  # because memory that was once used is not given back
                _put(samples, "memory", kind, asdict(memory.measure(there, kind, settings.wires)))
    return samples


def _put(samples: Samples, part: str, kind: Kind, what: Any) -> None:
    samples.setdefault(part, {})[kind] = what

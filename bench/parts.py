"""What is measured, one part after the other; every part gives samples that JSON can hold.

What cannot be measured costs the rest nothing: it is told with why.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from bench import bringups, memory, paths, raw, requests, same
from bench.mesh import ENGINES, mesh
from bench.wires import Kind, stage
from nsm.errors import NsmError

PARTS: Final = ("same", "paths", "setup", "requests", "memory", "bringups")
ALONE: Final = ("same", "paths", "setup", "bringups")  # without a mesh
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """How many samples are taken."""

    pairs: int
    turns: int
    requests: int
    wires: int
    bringups: int
    all_kinds: bool  # the memory of each, or of the first alone: a mesh is started for each


FULL: Final = Settings(30, 60, 60, 100, 100, all_kinds=True)
QUICK: Final = Settings(4, 12, 12, 40, 10, all_kinds=False)


@dataclass(slots=True)
class Found:
    """Samples by part, and by kind of wire; and what there are none of."""

    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def put(self, part: str, kind: str, what: Any) -> None:
        """Samples of a part."""
        self.samples.setdefault(part, {})[kind] = what

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """The block may fail to measure."""
        try:
            yield
        except (RuntimeError, NsmError, OSError) as why:
            self.missing.append(f"{what}: {why}")


def measure(
    kinds: Sequence[Kind], wanted: Collection[str], settings: Settings, report: Report
) -> Found:
    """Everything wanted."""
    found = Found()
    for kind in kinds:
        for part in (one for one in ALONE if one in wanted):
            with found.trying(f"{part} of {kind}"):
                asyncio.run(_alone(found, part, kind, settings, report))
    for some in in_meshes(kinds) if "requests" in wanted else ():
        names = ", ".join(some)
        with found.trying(f"requests of {names}"), mesh(*some) as there:
            report(f"{names}: {settings.requests} requests and closes of each")
            for kind, told in requests.asked(there, some, settings.requests).items():
                found.put("requests", kind, asdict(told))
    for number, kind in enumerate(kinds if "memory" in wanted else ()):
        if number and not settings.all_kinds:
            found.missing.append(f"memory of {kind}: with --quick, that of {kinds[0]} alone is")
            continue
        wires = settings.wires
        report(f"{kind}: the memory of {wires} wires")
        # one mesh for each, because memory that was once used is not given back
        with found.trying(f"memory of {kind}"), mesh(kind) as there:
            found.put("memory", kind, asdict(memory.measure(there, kind, wires)))
    return found


def in_meshes(kinds: Sequence[Kind]) -> list[list[Kind]]:
    """The kinds that one mesh can make, and those for which there must be another."""
    first = next((ENGINES[kind] for kind in kinds if kind in ENGINES), "")
    fit = [kind for kind in kinds if ENGINES.get(kind, first) == first]
    rest = [kind for kind in kinds if kind not in fit]
    return [some for some in (fit, rest) if some]


async def _alone(found: Found, part: str, kind: Kind, settings: Settings, report: Report) -> None:
    match part:
        case "same":
            report(f"{kind}: the objects, ours and by hand")
            found.put(part, kind, await same.differences(kind))
        case "paths":
            found.put(part, kind, asdict(await paths.measure(kind, settings.pairs, report)))
        case "setup":
            report(f"{kind}: making and closing, {settings.turns} times")
            with stage() as where:
                turns = await raw.measured(kind, settings.turns, where)
            both = {"making": asdict(turns.making), "closing": asdict(turns.closing)}
            found.put(part, kind, both)
        case "bringups" if kind.startswith("wireguard"):
            found.put(part, kind, await bringups.measure(kind, settings.bringups, report))

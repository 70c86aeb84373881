"""What wires cost: against the same made by hand, against floors, against our own bars.

    make bench              everything: five minutes, or ten if others work here too
    make bench QUICK=1      few samples, and nothing in the lane: a minute
    python -m bench [--quick] [--only PART,...] [--kinds KIND,...] [--out DIR] [--no-lane]

Writes bench.json (every sample) and bench.png into out/bench, and prints each figure beside
its bar. Exit code: 0 all bars hold, 1 one does not, 2 asked wrongly, 3 one is unclear because
this machine was too busy, or something could not be measured here. docs/bench.md has more.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from bench import lane, machine, parts, picture
from bench.bars import judged, without_floors
from bench.verdict import Judged
from bench.wires import KINDS, Kind
from nsm.kernel.tunnels import Engine

OUT: Final = Path(__file__).parents[1] / "out" / "bench"


def main() -> int:
    """Measure, write, print, judge."""
    told = options()
    if os.geteuid() != 0:
        sys.stderr.write("bench: it makes network namespaces, so it needs root: sudo make bench\n")
        return 3
    say, silence = reporter(live=sys.stderr.isatty() and not told.guest)
    began = time.monotonic()
    before = machine.facts()
    settings = parts.QUICK if told.quick else parts.FULL
    engines = machine.engines()
    here, in_lane, missing = where(told.kinds, told.only, engines, use_lane=told.lane)
    whole = f"about {told.takes}" if set(told.only) == set(parts.PARTS) else "less than all"
    places = [f"{kind} here" for kind in here] + ["wireguard in the lane"] * bool(in_lane)
    say(f"{', '.join(places) or 'nothing here'}: {whole}")
    found = parts.measure(here, told.only, settings, say)
    if in_lane:
        say("wireguard: in the lane")
        lane.add(found, in_lane)
    samples = found.samples
    missing += [*found.missing, *without_floors(samples)]
    if not samples and not missing:
        missing.append(f"{', '.join(told.only)} of {', '.join(told.kinds)}: there is none")
    silence()
    bars = judged(samples)
    results = {
        "machine": before, "load_after": os.getloadavg(), "settings": asdict(settings),
        "seconds": round(time.monotonic() - began, 1), "missing": missing,
        "bars": [bar.words() for bar in bars], "samples": samples,
    }  # fmt: skip
    told.out.mkdir(parents=True, exist_ok=True)
    (told.out / "bench.json").write_text(json.dumps(results) + "\n")
    picture.draw(results, told.out / "bench.png")
    if not told.guest:
        print("\n".join([*lines(bars), *(f"not measured: {one}" for one in missing)]))
        print(f"{told.out}/bench.json, {told.out}/bench.png")
    return status(bars, missing)


def options() -> argparse.Namespace:
    """What is asked for."""
    options = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--quick", action="store_true", help="few samples, nothing in the lane")
    options.add_argument("--only", type=some_of(parts.PARTS), default=parts.PARTS, metavar="PART,…")
    options.add_argument("--kinds", type=some_of(KINDS), default=KINDS, metavar="KIND,…")
    options.add_argument("--out", type=Path, default=OUT, metavar="DIR")
    options.add_argument("--no-lane", dest="lane", action="store_false")
    options.add_argument("--guest", action="store_true", help="in the lane: steps, no figures")
    told = options.parse_args()
    told.lane = told.lane and not told.quick
    told.takes = "a minute" if told.quick else "five minutes"
    return told


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a list of them."""

    def read(text: str) -> list[str]:
        wanted = text.split(",")
        if wrong := [one for one in wanted if one not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(known)}")
        return wanted

    return read


def where(
    wanted: Sequence[Kind],
    only: Sequence[str],
    engines: tuple[Engine, Engine],
    *,
    use_lane: bool,
) -> tuple[list[Kind], list[str], list[str]]:
    """Kinds that are measured here, parts that the lane is needed for, and what of it there is
    nobody for. engines are the kernel's WireGuard and wireguard-go, as they are here."""
    here, missing = list(wanted), []
    kernel, userspace = engines
    if "wireguard-go" in here and not userspace.name:
        here.remove("wireguard-go")
        missing.append(f"wireguard-go: {userspace.why}")
    if "wireguard" not in here or kernel.name:
        return here, [], missing
    here.remove("wireguard")
    if not use_lane:
        missing.append(f"wireguard: {kernel.why}, and the lane was not to be used")
        return here, [], missing
    meshed = [part for part in only if part not in parts.ALONE]
    missing += [f"{one} of wireguard: {kernel.why}, and in the lane is no mesh" for one in meshed]
    return here, [part for part in only if part in parts.ALONE], missing


def reporter(*, live: bool) -> tuple[Callable[[str], None], Callable[[], None]]:
    """Tells on stderr what goes on, in one line that changes or in a line for each step; and
    a way to end that."""
    began = time.monotonic()
    last = [""]

    def say(what: str) -> None:
        line = f"{time.monotonic() - began:6.1f} s  {what}"
        step = what.rstrip("0123456789 of")  # of pairs, the first is told
        if live:
            sys.stderr.write(f"\r\033[K{line}")
        elif step != last[0]:
            sys.stderr.write(f"{line}\n")
        last[0] = step
        sys.stderr.flush()

    def silence() -> None:
        sys.stderr.write("\r\033[K" if live else "")
        sys.stderr.flush()

    return say, silence


def lines(bars: Sequence[Judged]) -> list[str]:
    """A line for each bar, and one that sums them up."""
    counts = dict.fromkeys(("holds", "unclear", "does not hold"), 0)
    for bar in bars:
        counts[bar.verdict] += 1
    total = ", ".join(f"{number} {verdict}" for verdict, number in counts.items())
    return [*map(str, bars), f"{len(bars)} bars: {total}"]


def status(bars: Sequence[Judged], missing: Sequence[Any]) -> int:
    """The exit code."""
    verdicts = {bar.verdict for bar in bars}
    if "does not hold" in verdicts:
        return 1
    return 3 if "unclear" in verdicts or missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""What a wire costs to set up, against the floors of its stages, measured in the same run.

    python -m bench.wire            the figures, some 20 seconds, and whether they hold
    python -m bench.wire --quick    fewer rounds, as `make demo` has it; --json for programs

Ratios only: both sides of each are taken on the same machine within seconds. The
absolute times are this machine's, and are there to see which stage they are in.
What pyroute2 takes for the same wire, used as documented, is printed beside them.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from bench.bars import MAKING, REQUEST
from bench.mesh import mesh
from bench.raw import measured
from bench.requests import TOKENS, Requests, asked
from bench.wires import stage
from nsm.kernel import namespaces


def main() -> int:
    """Measure, print, and say by the exit code whether the bars hold."""
    options = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__)
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    options.add_argument("--bars", action="store_true", help="exit code 1 if a bar does not hold")
    options.add_argument("--json", action="store_true", help="one JSON object")
    told = options.parse_args()
    rounds = 15 if told.quick else 60
    with stage() as where:
        turns = asyncio.run(measured("veth", rounds, where))
    raw, ours = (seconds * 1000 for seconds in turns.making.medians)
    with mesh() as there:
        requests = asked(there, ["veth"], rounds)["veth"]
    figures = judged(raw, ours, requests, documented_figure(rounds // 3))
    if told.json:
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(lines(figures)))
    return 0 if figures["holds"] or not told.bars else 1


def documented_figure(rounds: int) -> float | None:
    """Median ms of the same wire by pyroute2 as documented; None where that is not installed."""
    names = [f"bench-{os.getpid()}-{end}" for end in ("client", "server", "host")]
    try:
        for name in names:
            namespaces.create_named(name)
        done = subprocess.run(
            ["ip", "netns", "exec", names[2], sys.executable, "-m", "bench.documented",
             *names[:2], str(rounds)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        for name in set(names) & set(namespaces.list_named()):
            namespaces.delete_named(name)
    told: float | None = json.loads(done.stdout)
    return told


def judged(raw: float, ours: float, requests: Requests, documented: float | None) -> dict[str, Any]:
    """The figures in ms, their ratios and bars, and whether these hold."""
    floor, request = requests.floor(raw), requests.request
    tokens, _ = TOKENS[requests.shape]
    ratios = {
        "kernel": {"ratio": ours / raw, "bar": MAKING},
        "request": {"ratio": request / floor, "bar": REQUEST},
    }
    return {
        "ms": {
            "request": request,
            "close": requests.close,
            **requests.stages,
        },
        "floors_ms": {
            "its calls, bare": statistics.median(requests.told["calls_ms"]),
            "one token": requests.told["token_ms"],
            "raw netlink batch": raw,
            f"calls, {tokens} tokens, one batch": floor,
        },
        "kernel_ms": ours,
        "pyroute2_ms": documented,
        "ratios": ratios,
        "holds": all(one["ratio"] <= one["bar"] for one in ratios.values()),
    }


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures for people."""
    told = ["set-up of a wire on one node, tokens and policies on (median, ms)"]
    told += [f"  {what:<12}{value:8.2f}" for what, value in figures["ms"].items()]
    told += ["floors of the same run (median, ms)"]
    told += [f"  {what:<36}{value:8.3f}" for what, value in figures["floors_ms"].items()]
    names = {
        "kernel": "programming a wire / its raw netlink batch",
        "request": "request / the sum of its floors",
    }
    for key, one in figures["ratios"].items():
        verdict = "holds" if one["ratio"] <= one["bar"] else "DOES NOT HOLD"
        told.append(f"{names[key]:<44}{one['ratio']:6.2f}  bar {one['bar']:.1f}  {verdict}")
    if documented := figures["pyroute2_ms"]:
        times = documented / figures["floors_ms"]["raw netlink batch"]
        told.append(
            f"(pyroute2, used as documented: {documented:.1f} ms a wire, {times:.0f} such batches)"
        )
    return told


if __name__ == "__main__":
    sys.exit(main())

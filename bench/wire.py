"""What a wire costs to set up, against the floors of its stages, measured in the same run.

    make bench                      the figures, some 20 seconds, and whether they hold
    python -m bench.wire --quick    fewer rounds; --json for programs

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

from bench.raw import Measured, wire
from labs import engine, processes
from nsm.kernel import namespaces
from nsm.kernel.namespaces import Home
from nsm.kernel.node import Kernel

KERNEL_BAR = 2.0
REQUEST_BAR = 3.0
# Tokens that a first request for a wire on one node must have: of the client, the manager and the
# forwarder for each of their calls, and of each hop for the one before it.
TOKENS = 9
STAGES = ("calling", "manager", "find", "forwarder", "kernel", "endpoint")


def main() -> int:
    """Measure, print, and say by the exit code whether the bars hold."""
    options = argparse.ArgumentParser(prog="python -m bench.wire", description=__doc__)
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    options.add_argument("--bars", action="store_true", help="exit code 1 if a bar does not hold")
    options.add_argument("--json", action="store_true", help="one JSON object")
    asked = options.parse_args()
    rounds = 15 if asked.quick else 60
    raw, ours = asyncio.run(kernel_figures(rounds))
    told = request_figures(rounds)
    figures = judged(raw, ours, told, documented_figure(rounds // 3))
    if asked.json:
        print(json.dumps(figures, indent=2))
    else:
        print("\n".join(lines(figures)))
    return 0 if figures["holds"] or not asked.bars else 1


async def kernel_figures(rounds: int) -> tuple[float, float]:
    """Median ms of one wire: as a raw batch, and as we make it (look, plan, do, look again)."""
    names = [f"bench-{os.getpid()}-{end}" for end in ("a", "b")]
    try:
        for name in names:
            namespaces.create_named(name)
        async with Kernel("bench") as kernel:
            paths = [f"{namespaces.NAMED}/{name}" for name in names]
            here, there = [await kernel.namespace(path=path) for path in paths]
            with Home() as home:
                known = {here: paths[0], there: paths[1]}
                measured = Measured(kernel, home, known, lambda n: wire(here, there, n))
                for n in range(rounds):
                    await measured.turn(n)
    finally:
        for name in names:
            namespaces.delete_named(name)
    raw, ours = measured.making.medians
    return raw * 1000, ours * 1000


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


def request_figures(rounds: int) -> dict[str, Any]:
    """What a client in a lab of this machine measured."""
    name = f"bench-{os.getpid() % 100000}"
    nsmctl = [sys.executable, "-P", "-m", "nsmctl", "lab"]
    try:
        up = [*nsmctl, "up", "one-node", "--name", name]
        made = subprocess.run(up, check=False, capture_output=True, text=True)
        if made.returncode:
            sys.exit(f"{made.stderr}there is no lab to measure in")
        lab, paths = engine.running(name)
        mine = [e for e in processes.plan(lab, paths).entries if e.spiffe_id.endswith("/outsider")]
        asking = [sys.executable, "-m", "bench.asking", str(rounds)]
        done = subprocess.run(
            ["ip", "netns", "exec", paths.namespace("outsider"), *asking],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            group=mine[0].gid,
            extra_groups=[],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "NSM_CONNECT_TO": f"unix://{paths.node('node-1', 'nsm.io.sock')}",
                "SPIFFE_ENDPOINT_SOCKET": f"unix://{paths.cluster('home', 'spiffe.sock')}",
            },
        )
    finally:
        subprocess.run([*nsmctl, "down", name], check=False, capture_output=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def judged(
    raw: float, ours: float, told: Mapping[str, Any], documented: float | None
) -> dict[str, Any]:
    """The figures in ms, their ratios and bars, and whether these hold."""
    floor = told["calls_ms"] + TOKENS * told["token_ms"] + raw
    request = statistics.median(told["request_ms"])
    ratios = {
        "kernel": {"ratio": ours / raw, "bar": KERNEL_BAR},
        "request": {"ratio": request / floor, "bar": REQUEST_BAR},
    }
    return {
        "ms": {
            "request": request,
            "close": statistics.median(told["close_ms"]),
            **{stage: statistics.median(one[stage] for one in told["stages"]) for stage in STAGES},
        },
        "floors_ms": {
            "its calls, bare": told["calls_ms"],
            "one token": told["token_ms"],
            "raw netlink batch": raw,
            f"calls, {TOKENS} tokens, one batch": floor,
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

"""What wires cost, as the bench tells it: figures that add up, beside the right bars."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.wait import write

ROOT = Path(__file__).parents[3]
STAGES = ("calling", "manager", "find", "forwarder", "kernel", "endpoint")
BARS = {"kernel": 2.0, "request": 3.0}
KINDS = ("veth", "vxlan", "wireguard-go")


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def test_the_figures_of_a_request_tell_stages_floors_and_both_ratios_with_their_bars():
    done = bench("bench.wire", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ms, floors = told["ms"], told["floors_ms"]
    assert set(ms) == {"request", "close", *STAGES}
    assert all(value > 0 for value in ms.values()), ms
    calls, token, batch, floor = floors.values()
    assert all(value > 0 for value in floors.values()), floors
    assert floor == pytest.approx(calls + 9 * token + batch)
    assert {what: one["bar"] for what, one in told["ratios"].items()} == BARS
    kernel, request = (told["ratios"][what]["ratio"] for what in BARS)
    assert kernel == pytest.approx(told["kernel_ms"] / batch)
    assert request == pytest.approx(ms["request"] / floor)
    assert told["pyroute2_ms"] > told["kernel_ms"]
    write("programming a wire / its raw netlink batch (a ratio)", kernel, BARS["kernel"])
    write("request / the sum of its floors (a ratio)", request, BARS["request"])
    assert kernel < 10 * BARS["kernel"]
    assert request < 10 * BARS["request"]


@pytest.mark.long
def test_a_quick_bench_measures_every_part_judges_it_and_writes_figures_and_picture(tmp_path):
    done = bench("bench", "--quick", "--out", str(tmp_path))
    told = json.loads((tmp_path / "bench.json").read_text())
    write("make bench QUICK=1", told["seconds"], 60.0)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    left_out = ["memory of vxlan", "memory of wireguard-go", "wireguard"]
    if "wireguard" in told["samples"]["paths"]:  # this kernel has it
        left_out[-1] = "memory of wireguard"
    missing = sorted(one.partition(":")[0] for one in told["missing"])
    assert missing == sorted(left_out), done.stderr
    bars = {bar["what"]: bar for bar in told["bars"]}
    verdicts = {bar["verdict"] for bar in bars.values()}
    wanted = 1 if "does not hold" in verdicts else 3
    assert done.returncode == wanted, done.stderr
    for bar in bars.values():
        line = next(line for line in done.stdout.splitlines() if line.startswith(bar["what"]))
        assert line.endswith(bar["verdict"])
    assert told["machine"]["kernel"] in Path("/proc/version").read_text()
    for kind in KINDS:
        assert bars[f"{kind}: differences from the one by hand"]["value"] == 0, told["samples"]
        check_paths(kind, told["samples"]["paths"][kind], bars)
        check_floors(kind, told["samples"], bars)
    idle = told["samples"]["memory"]["veth"]["idle"]
    assert set(idle) == {"nsmgr", "forwarder", "files of both"}
    assert all(5e6 < octets < 900e6 for octets in idle.values()), idle
    write("memory of nsmgr and forwarder at rest, MB", sum(idle.values()) / 1e6, 90.0)
    assert [len(times) for times in told["samples"]["bringups"].values()] in ([10], [10, 10])


def check_paths(kind: str, samples: dict[str, Any], bars: dict[str, Any]) -> None:
    rates, trips = samples["rates"], samples["trips"]
    assert len(rates) == len(trips) == 4
    assert all(1e5 < rate < 1e12 for pair in rates for rate in pair), rates
    assert all(1e-7 < trip < 1.0 for pair in trips for trip in pair), trips
    for what in ("throughput ÷ by hand", "round trip, by hand ÷ ours"):
        bar = bars[f"{kind}: {what}"]
        low, high = bar["interval"]
        assert (bar["bar"], bar["most"]) == (0.97, False)
        assert low <= bar["value"] <= high
        assert 0.1 < bar["value"] < 10


def check_floors(kind: str, samples: dict[str, Any], bars: dict[str, Any]) -> None:
    for what in ("making", "closing"):
        both = samples["setup"][kind][what]
        assert len(both["raw"]) == len(both["ours"]) == 12
        assert bars[f"{kind}: {what} ÷ raw"]["bar"] == 2.0
    told = samples["requests"][kind]["told"]
    for took, stages in zip(told["request_ms"], told["stages"], strict=True):
        assert sum(stages.values()) == pytest.approx(took, rel=0.05, abs=1.0), stages
    for what in ("request", "close"):
        bar = bars[f"{kind}: {what} ÷ its floors"]
        assert bar["bar"] == 3.0
        assert 0.1 < bar["value"] < 30

"""What a wire costs, as the bench tells programs: figures that add up, and the right bars."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wait import write

ROOT = Path(__file__).parents[3]
STAGES = ("calling", "manager", "find", "forwarder", "kernel", "endpoint")
BARS = {"kernel": 2.0, "request": 3.0}


def test_the_bench_tells_stages_floors_and_both_ratios_with_their_bars():
    done = subprocess.run(
        [sys.executable, "-m", "bench.wire", "--quick", "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ms, floors = told["ms"], told["floors_ms"]
    assert set(ms) == {"request", "close", *STAGES}
    assert all(value > 0 for value in ms.values()), ms
    # medians of each; what they are medians of adds up to a request
    assert sum(ms[stage] for stage in STAGES) == pytest.approx(ms["request"], rel=0.25)
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

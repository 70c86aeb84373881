"""A clock that is set an hour forth and back, under traffic.

No namespace has a clock of its own that certificates are dated by: the lane's kernel has.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from labs import engine
from labs.flows import Flows, pairs
from tests.support.wait import until, write

ROOT = Path(__file__).parents[2]
LAB = ROOT / "labs" / "parity" / "Kernel2Ethernet2Kernel.yaml"
NAME = "clock"
HOUR = 3600.0
LOOKS = 5  # at packets, after each step


def nsmctl(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", "-m", "nsmctl", *words],
        # one processor has all of the lab's processes
        env={**os.environ, "NSM_DIAL_TIMEOUT": "5s"},
        capture_output=True, text=True, check=False, timeout=250,
    )  # fmt: skip


def newcomer() -> str:
    """What a new client's ping says of its wire; nothing where it got none."""
    ping = ("ping", "-c2", "-i0.2", "172.16.1.102")
    url = "kernel://icmp-responder/nsm-2"
    done = nsmctl("connect", url, "--lab", NAME, "-n", "late", "--", *ping)
    return done.stdout if done.returncode == 0 else ""


@pytest.mark.needs_kernel("wireguard")
@pytest.mark.long
async def test_wires_live_through_a_clock_that_is_set_an_hour_forth_and_back(
    tmp_path: Path,
) -> None:
    assert "LANE_GUEST" in os.environ, "it sets the clock of the whole machine"
    file = tmp_path / "clock.yaml"
    text = LAB.read_text().partition("\nchecks:")[0].replace("172.16.1.100/31", "172.16.1.100/30")
    file.write_text(f"{text}  late: {{on: node-1, netns-only: true}}\n")
    done = nsmctl("lab", "up", str(file), "--name", NAME)
    assert done.returncode == 0, done.stderr
    try:
        lab, paths = engine.running(NAME)
        with Flows(paths, pairs(lab, paths), rate=50) as flows:
            for seconds in (HOUR, -HOUR):
                time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)
                for _ in range(LOOKS):
                    flows.flow(60.0, f"{seconds:+.0f} s on the clock")
                said = await until(newcomer, f"a wire for who is new, {seconds:+.0f} s", bar=10.0)
                assert "2 received" in said
            toll = flows.toll()
        assert toll.lost == toll.twice == 0, (str(toll), toll.says)
        told = [json.loads(line) for line in Path(paths.status("app")).read_text().splitlines()]
        assert told[-1]["event"] == "up"
        for one in told:  # certificates end with their connections, and nothing else does
            assert (one["endpoint"], one["path"]) == ("nse", told[0]["path"]), one
            assert one.get("cause", "control") == "control", one
            assert one.get("flowed", True), one
            if one["event"] == "up" and "outage_ms" in one:
                write("a mesh whose clock was set to know its wires", one["outage_ms"] / 1000, 1.0)
        status = json.loads(nsmctl("lab", "status", NAME, "--json").stdout)
        assert status["well"] == status["nodes"] == 2
    finally:
        nsmctl("lab", "down", NAME)

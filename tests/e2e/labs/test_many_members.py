"""Sixty members of one network join at once, on six nodes of three clusters."""

import json
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.labs.test_labs import names, nsmctl
from tests.support.wait import write

pytestmark = pytest.mark.long
NODES = ("east-1", "east-2", "west-1", "west-2", "north-1", "north-2")
LAB = names("members")


def inside(place: str, *words: str) -> str:
    command = ["ip", "netns", "exec", f"{LAB}-{place}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def asked(*words: str) -> Any:
    done = nsmctl(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def address(place: str) -> str:
    (link,) = json.loads(inside(place, "ip", "-j", "-4", "addr", "show", "nsm-1"))
    return link["addr_info"][0]["local"]


def unanswered(place: str, others: list[str]) -> list[str]:
    """Which of the others do not answer a stock ping from there."""
    every = " ".join(others)
    script = f"for a in {every}; do ping -qc1 -W5 $a >/dev/null || echo $a & done; wait"
    return inside(place, "sh", "-c", script).split()


def test_sixty_that_join_at_once_all_reach_one_another():
    done = nsmctl("lab", "up", "many-members", "--name", LAB, "--json", patience=300)
    try:
        assert done.returncode == 0, done.stderr
        wires = asked("lab", "status", LAB)["wires"]
        joined = sorted(wire["ms"] / 1000 for wire in wires)
        assert Counter((wire["mechanism"], *wire["nodes"]) for wire in wires) == {
            ("veth", node, node): 10 for node in NODES
        }
        write("sixty members at once: the first has joined", joined[0], 5.0)
        write("sixty members at once: half of them have", joined[30], 10.0)
        write("sixty members at once: the last one has", joined[-1], 15.0)
        print(f"\n{'node':<10}{'at its router: devices':>24}{'routes':>8}{'on the node':>13}")
        for node in NODES:
            router = f"team-{node}"
            links = json.loads(inside(router, "ip", "-j", "link"))
            routes = json.loads(inside(router, "ip", "-j", "-4", "route"))
            own = json.loads(inside(node, "ip", "-j", "link"))
            print(f"{node:<10}{len(links):>24}{len(routes):>8}{len(own):>13}")
            # loopback, its ten members, and one wire to each of the other routers: no more
            assert len(links) == 1 + 10 + len(NODES) - 1
            assert len(own) == 2  # loopback and its cable: nothing of a wire stays on the node
        members = [f"app-{n:02}" for n in range(1, 61)]
        found = {one: address(one) for one in members}
        assert len(set(found.values())) == 60
        with ThreadPoolExecutor(4) as pool:
            tried = pool.map(
                lambda one: unanswered(one, [a for who, a in found.items() if who != one]), members
            )
            assert {one: lost for one, lost in zip(members, tried, strict=True) if lost} == {}
    finally:
        left = nsmctl("lab", "down", LAB)
    assert "left over: 0" in left.stdout

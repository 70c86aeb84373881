"""Many wires, one after the other and all at once, through one manager and one forwarder."""

import contextlib
import json
import os
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.wires.nodes import Nodes, Program, same, settled
from tests.support.spaces import Space, kernel_state
from tests.support.wait import write

LAB = """
name: size
topology:
  clusters:
    east: {trust-domain: east.test}
  nodes:
    one: {cluster: east}
    lan: {kind: switch}
  links:
    - {endpoints: ["one:eth0", "lan:p1"]}
  underlay: {ipv4: 198.18.0.0/24}
services:
  many:
    payload: ethernet
    endpoints:
      pong: {on: one, prefixes: [172.16.0.0/20]}
clients:
  app: {on: one, connect: ["kernel://many/nsm-1"]}
"""
MESH = ("one/nsmgr", "one/forwarder", "one/registry", "one/issuer", "one/pong")
MEGABYTE = 1 << 20
ROUNDS, EARLY, LATE = 200, slice(29, 50), slice(180, 200)
AT_ONCE, WORKLOADS = 300, 6
# Pings every address at once; says how many answered.
ASK = """
for address in $0; do ping -n -q -c1 -W5 $address >/dev/null & pids="$pids $!"; done
for pid in $pids; do wait $pid && answered=$((answered + 1)); done
echo $answered
"""


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


class Holder:
    """A program that stands in for workloads: it opens and closes wires in their namespaces."""

    def __init__(self, program: Program, orders: Any, answers: Any) -> None:
        self.program = program
        self._orders = orders
        self._answers = answers

    def do(self, what: str, wires: list[tuple[str, str]], at_once: int = 1) -> dict[str, Any]:
        order = {"do": what, "wires": wires, "at_once": at_once}
        self._orders.write(json.dumps(order).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self._answers.readline())
        assert not answer["errors"], f"{len(answer['errors'])} failed: {answer['errors'][0]}"
        return answer


@contextlib.contextmanager
def holder(nodes: Nodes) -> Iterator[Holder]:
    paths = [nodes.directory / name for name in ("orders", "answers")]
    for path in paths:
        os.mkfifo(path)
    variables = {"HOLDER_ORDERS": str(paths[0]), "HOLDER_ANSWERS": str(paths[1])}
    process = replace(nodes.process("app"), module="tests.e2e.wires.holder", privileged=True)
    program = nodes.bear(process, "holder", **variables)
    try:
        with open(paths[0], "wb", 0) as orders, open(paths[1], "rb", 0) as answers:
            program.ready()
            yield Holder(program, orders, answers)
        assert program.ended() == 0, program.words
    finally:
        for path in paths:
            path.unlink()


@pytest.fixture
def workloads(nodes: Nodes) -> Iterator[list[Space]]:
    """A few namespaces to hold wires in."""
    made = [Space(f"{nodes.lab.name}-work-{n}") for n in range(WORKLOADS)]
    for space in made:
        subprocess.run(["ip", "netns", "add", space.name], check=True)
    yield made
    for space in made:
        subprocess.run(["ip", "netns", "del", space.name], check=True)


def held(nodes: Nodes, spaces: list[Space]) -> dict[str, object]:
    """All that wires may leave anywhere: in namespaces, in processes, in files."""
    places = [*spaces, nodes.space("pong"), nodes.space("one")]
    processes = {name: nodes.now[name].fds for name in MESH}
    files = sorted(str(file) for file in nodes.directory.rglob("*") if "log" not in file.parts)
    return {**kernel_state(*places), **processes, "files": files}


def pss(nodes: Nodes) -> dict[str, int]:
    return {name: nodes.now[name].pss for name in MESH}


async def test_two_hundred_wires_one_after_the_other_leave_nothing_and_no_memory_behind(
    nodes: Nodes, workloads: list[Space]
):
    space = workloads[0]
    memory: list[dict[str, int]] = []
    seconds: list[float] = []
    with holder(nodes) as many:
        for number in range(ROUNDS):
            wire = [(space.path, f"kernel://many/w-{number}")]
            opened = many.do("open", wire)
            if number % 20 == 5:
                assert await space.pings(opened["told"][0]["far"][0])
            many.do("close", wire)
            seconds.append(opened["seconds"])
            memory.append(pss(nodes))
            if number == EARLY.start:
                before = await settled(lambda: held(nodes, [space]))
                threads = {name: nodes.now[name].threads for name in MESH}
        await same(lambda: held(nodes, [space]), before, "everything as before 170 wires")
        assert all(nodes.now[name].threads <= max(threads[name], 12) for name in MESH)
    median = statistics.median(seconds)
    write(f"one of {ROUNDS} wires, one after the other (median)", median, 0.05)
    grown = {}
    for name in MESH:
        early = statistics.median(one[name] for one in memory[EARLY])
        late = statistics.median(one[name] for one in memory[LATE])
        grown[name] = late - early
        print(f"{name}: {early / MEGABYTE:.2f} MB, after 150 wires {(late - early) / 1024:+.0f} kB")
    assert all(more < MEGABYTE for more in grown.values()), grown


async def test_three_hundred_wires_at_once_all_answer_and_then_leave_nothing(
    nodes: Nodes, workloads: list[Space]
):
    wires = [
        (workloads[n % WORKLOADS].path, f"kernel://many/w-{n // WORKLOADS}") for n in range(AT_ONCE)
    ]
    with holder(nodes) as many:
        warm = wires[:WORKLOADS]
        many.do("open", warm)
        many.do("close", warm)
        before = await settled(lambda: held(nodes, workloads))
        opened = many.do("open", wires, at_once=16)
        assert sum(len(space.links()) for space in workloads) == AT_ONCE
        assert len(nodes.space("pong").links()) == AT_ONCE
        far = {space.path: [] for space in workloads}
        for one in opened["told"]:
            far[one["namespace"]] += one["far"]
        assert len({a for some in far.values() for a in some}) == AT_ONCE
        inside = [("ip", "netns", "exec", space.name, "sh", "-c", ASK) for space in workloads]
        asking = [
            subprocess.Popen([*words, " ".join(far[space.path])], stdout=subprocess.PIPE, text=True)
            for words, space in zip(inside, workloads, strict=True)
        ]
        answered = sum(int(one.communicate(timeout=60)[0]) for one in asking)
        assert answered == AT_ONCE
        memory = {name: round(size / MEGABYTE, 1) for name, size in pss(nodes).items()}
        closed = many.do("close", wires, at_once=16)
        await same(lambda: held(nodes, workloads), before, "everything as before 300 wires")
    each = opened["seconds"] / AT_ONCE
    write(f"one of {AT_ONCE} wires, 16 at a time", each, 0.05)
    write(f"the close of one of {AT_ONCE} wires, 16 at a time", closed["seconds"] / AT_ONCE, 0.05)
    print(f"{each * 1000:.1f} ms a wire, {closed['seconds'] / AT_ONCE * 1000:.1f} ms a close")
    print(f"memory with all of them: {memory}")

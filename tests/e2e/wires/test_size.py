"""Many wires, one after the other and all at once, through one manager and one forwarder."""

import contextlib
import json
import os
import re
import statistics
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.e2e.wires.nodes import Nodes, Program, running, same, settled, tentative
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until, write

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
WIRES, WORKLOADS = 300, 6
TEMPORARY = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/run/vwire", "/run/netns")
# Threads of a pool: Python's own, and those of nsm.kernel.
BOUNDS = {"asyncio": min(32, (os.cpu_count() or 1) + 4), "kernel-create": 2, "kernel-delete": 32}
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

    def runs(self) -> dict[str, Any]:
        """Its tasks and threads, by name."""
        return self.do("nothing", [])


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
async def workloads(nodes: Nodes) -> AsyncIterator[list[Space]]:
    """A few namespaces to hold wires in."""
    await until(lambda: not tentative(nodes.space("one")), "the kernel's own addresses", bar=2)
    made = [Space(f"{nodes.lab.name}-work-{n}") for n in range(WORKLOADS)]
    for space in made:
        subprocess.run(["ip", "netns", "add", space.name], check=True)
    yield made
    for space in made:
        subprocess.run(["ip", "netns", "del", space.name], check=True)


async def held(nodes: Nodes, many: Holder, spaces: list[Space]) -> dict[str, object]:
    """All that wires may leave anywhere: in namespaces, in processes, in files."""
    programs = [nodes.now[name] for name in MESH]
    runs = {**await running(programs), many.program.name: many.runs()}
    found = kernel_state(*spaces, nodes.space("pong"), nodes.space("one"))
    for one in (*programs, many.program):
        found[f"{one.name} files"] = one.fds
        found[f"{one.name} tasks"] = runs[one.name]["tasks"]
        # Each pool has as many as were busy at once, up to its bound: see `bounded`.
        found[f"{one.name} threads"] = sorted(pools(runs[one.name]["threads"]))
    found["files"] = sorted(files(nodes))
    return found


def pools(threads: dict[str, int]) -> Counter[str]:
    """Threads by what they are for: those of a pool are numbered."""
    found: Counter[str] = Counter()
    for name, many in threads.items():
        found[re.sub(r"_\d+$", "", name)] += many
    return found


async def bounded(nodes: Nodes, many: Holder) -> None:
    """Every process has the threads it knows of, and no pool more than it may have."""
    programs = [nodes.now[name] for name in MESH]
    runs = {**await running(programs), many.program.name: many.runs()}
    for one in (*programs, many.program):
        threads = runs[one.name]["threads"]
        assert one.threads == sum(threads.values()), f"{one.name}: not all are in {threads}"
        for pool, size in pools(threads).items():
            assert size <= BOUNDS.get(pool, 1), f"{one.name} has {size} threads {pool}"


def files(nodes: Nodes) -> Iterator[str]:
    """The lab's own files, and what its processes made where files are made for a while."""
    for path in nodes.directory.rglob("*"):
        if "log" not in path.parts:
            yield str(path)
    groups = {process.gid for process in nodes.plan.processes}
    for folder in TEMPORARY:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another run's, gone meanwhile
                    if entry.stat(follow_symlinks=False).st_gid in groups:
                        yield entry.path


def pss(nodes: Nodes, many: Holder) -> dict[str, int]:
    return {**{name: nodes.now[name].pss for name in MESH}, "client": many.program.pss}


@pytest.mark.long
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
            memory.append(pss(nodes, many))
            if number == 0:  # what a process opens once, it opens for its first wire
                before = await settled(lambda: held(nodes, many, [space]))
        await same(lambda: held(nodes, many, [space]), before, "everything as after one wire")
        await bounded(nodes, many)
    median = statistics.median(seconds)
    write(f"one of {ROUNDS} wires, one after the other (median)", median, 0.05)
    grown = {}
    for name in memory[0]:
        early = statistics.median(one[name] for one in memory[EARLY])
        late = statistics.median(one[name] for one in memory[LATE])
        grown[name] = late - early
        print(f"{name}: {early / MEGABYTE:.2f} MB, after 150 wires {(late - early) / 1024:+.0f} kB")
    assert all(more < MEGABYTE for more in grown.values()), grown


@pytest.mark.long
@pytest.mark.parametrize("at_once", [16, WIRES])
async def test_three_hundred_wires_at_once_all_answer_and_then_leave_nothing(
    nodes: Nodes, workloads: list[Space], at_once: int
):
    wires = [
        (workloads[n % WORKLOADS].path, f"kernel://many/w-{n // WORKLOADS}") for n in range(WIRES)
    ]
    with holder(nodes) as many:
        warm = wires[:WORKLOADS]  # one for each client: a monitor stream is its client's
        many.do("open", warm)
        many.do("close", warm)
        before = await settled(lambda: held(nodes, many, workloads))
        opened = many.do("open", wires, at_once=at_once)
        in_flight = sum(one["seconds"] for one in opened["told"]) / opened["seconds"]
        assert in_flight > at_once / 4, "they did not wait together"  # the mean, to the last one
        assert sum(len(space.links()) for space in workloads) == WIRES
        assert len(nodes.space("pong").links()) == WIRES
        far = {space.path: [] for space in workloads}
        for one in opened["told"]:
            far[one["namespace"]] += one["far"]
        assert len({a for some in far.values() for a in some}) == WIRES
        inside = [("ip", "netns", "exec", space.name, "sh", "-c", ASK) for space in workloads]
        asking = [
            subprocess.Popen([*words, " ".join(far[space.path])], stdout=subprocess.PIPE, text=True)
            for words, space in zip(inside, workloads, strict=True)
        ]
        answered = sum(int(one.communicate(timeout=60)[0]) for one in asking)
        assert answered == WIRES
        memory = {name: round(size / MEGABYTE, 1) for name, size in pss(nodes, many).items()}
        closed = many.do("close", wires, at_once=at_once)
        await same(lambda: held(nodes, many, workloads), before, "everything as before 300 wires")
        await bounded(nodes, many)
    each = opened["seconds"] / WIRES
    write(f"one of {WIRES} wires, {at_once} at a time", each, 0.05)
    write(f"the close of one of {WIRES}, {at_once} at a time", closed["seconds"] / WIRES, 0.05)
    ended = closed["seconds"] / WIRES
    print(f"{in_flight:.0f} in flight, {each * 1000:.1f} ms a wire, {ended * 1000:.1f} ms a close")
    print(f"memory with all of them: {memory}")

"""What a node's manager and forwarder have in memory: at rest, and for each wire.

PSS, as the kernel counts it: pages of their own, and a share of those that others have too.
In a mesh all programs are forked from one that has imported everything, and share with it
what they would not share on a node. So the two that are measured are started anew, as a
node's service manager does.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from bench.mesh import SERVICES, Mesh
from bench.wires import Kind
from labs import alive, processes, state

NODE: Final = "node-1"
FEW: Final = 10  # wires that are there before one is counted: what is made once is made then
REST: Final = 1.0  # seconds after which what a request leaves for later has been done
PATIENCE: Final = 20.0


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes. each is what one more wire takes of both, helper of a wireguard-go beside them."""

    idle: dict[str, int]
    each: float
    wires: int
    helper: float


def measure(mesh: Mesh, kind: Kind, wires: int) -> Memory:
    """Start them, and have FEW wires, then as many more as told."""
    with _agents(mesh) as pids, mesh.asker("bench.holding", SERVICES[kind]) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        time.sleep(REST)
        idle = {name: pss(pid) for name, pid in pids.items()}
        figures = []
        for wanted in (FEW, FEW + wires):
            holder.stdin.write(f"{wanted}\n")
            holder.stdin.flush()
            if holder.stdout.readline() != f"{wanted}\n":
                raise RuntimeError(f"{wanted} wires did not come up; see above")
            time.sleep(REST)
            figures.append((sum(map(pss, pids.values())), _helpers(mesh)))
        holder.stdin.close()
    (few, few_helpers), (many, many_helpers) = figures
    more = sum(many_helpers) - sum(few_helpers)
    return Memory(idle, (many - few) / wires, wires, more / wires)


def pss(pid: int) -> int:
    """Bytes, as smaps_rollup says."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss:"))


def _helpers(mesh: Mesh) -> list[int]:
    """PSS of each wireguard-go of the node."""
    inode = os.stat(f"/run/netns/{mesh.paths.namespace(NODE)}").st_ino
    return [pss(mark.pid) for mark in alive.inside([inode]) if _command(mark.pid) == "wireguard-go"]


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


@contextmanager
def _agents(mesh: Mesh) -> Iterator[dict[str, int]]:
    """Both of them, as on a node: in place of the mesh's."""
    plan = processes.plan(mesh.lab, mesh.paths)
    wanted = [p for p in plan.processes if p.name in (f"{NODE}/nsmgr", f"{NODE}/forwarder")]
    born = state.born(mesh.paths)
    alive.stop([born[process.name].mark for process in wanted], PATIENCE)
    started: list[subprocess.Popen[bytes]] = []
    try:
        started.extend(_start(process) for process in wanted)
        yield {p.name.partition("/")[2]: s.pid for p, s in zip(wanted, started, strict=True)}
    finally:
        _stop(started)


def _start(process: processes.Process) -> "subprocess.Popen[bytes]":
    """One, and wait until it says that it is ready."""
    ready, said = os.pipe()
    with open(process.log, "ab") as log, open(ready) as line:
        started = subprocess.Popen(
            ["ip", "netns", "exec", process.namespace, sys.executable, "-P", "-m", process.module],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", pass_fds=[said],
            group=process.gid, extra_groups=[],
            env={**process.environment, "NSM_READY_FD": str(said)},
        )  # fmt: skip
        os.close(said)
        if not line.readline():
            started.wait()
            raise RuntimeError(f"{process.name} is not ready; see {process.log}")
    return started


def _stop(started: Sequence["subprocess.Popen[bytes]"]) -> None:
    for process in started:
        process.terminate()
    for process in started:
        process.wait()

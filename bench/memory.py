"""What a node's manager and forwarder have in memory: at rest, and for each wire.

In a mesh all programs are forked from one that has imported everything, and share with it
what they would not share on a node. So the two that are measured are started anew, as a
node's service manager does. Of the files they map, every Python of this machine has a part,
and how many there are would be in the figure: so files count as if only those two had them.

One more wire is a slope, of how much memory of their own they have over how many wires there
are, because some is taken once: by the first calls, by as many at a time as there are. It begins
where all that closed wires left free is taken again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.mesh import ASKER, SERVICES, Mesh, must_be
from bench.wires import Kind
from labs import alive, processes, state
from nsm.kernel import topology

NODE: Final = "node-1"
WARM: Final = 50  # wires that are there before one is counted, and were made and closed before
STEPS: Final = 10  # readings, each with as many wires more
REST: Final = 1.0  # seconds after which what a request leaves for later has been done
PATIENCE: Final = 20.0
INSTANCES: Final = Path("/proc/sys/fs/inotify/max_user_instances")
SPARE: Final = 256  # of them for everybody else


@dataclass(frozen=True, slots=True)
class Memory:
    """In bytes. idle is each one's own, and the files they map; both is what both have of their
    own with so many wires, helpers what all wireguard-go processes of the node have then."""

    idle: dict[str, int]
    wires: list[int]
    both: list[int]
    helpers: list[int]


def measure(mesh: Mesh, kind: Kind, wires: int) -> Memory:
    """Start them, make WARM wires and close them, make them again, and so many more in STEPS."""
    counts = [WARM + wires * step // STEPS for step in range(1, STEPS + 1)]
    found = Memory({}, counts, [], [])
    with (
        _instances(2 * counts[-1]),
        _agents(mesh) as pids,
        mesh.asker("bench.holding", SERVICES[kind]) as holder,
    ):
        time.sleep(REST)
        found.idle.update({name: own(pid) for name, pid in pids.items()})
        found.idle["files of both"] = files(pids.values())
        for wanted in (WARM, 0, WARM):
            _hold(holder, wanted)
        device = topology.device(mesh.paths.namespace(ASKER), "m-0")
        must_be(kind, device.kind if device else "")
        for wanted in counts:
            _hold(holder, wanted)
            time.sleep(REST)
            found.both.append(sum(map(own, pids.values())))
            found.helpers.append(sum(map(pss, _helpers(mesh))))
        assert holder.stdin is not None
        holder.stdin.close()
    return found


def _hold(holder: "subprocess.Popen[str]", wanted: int) -> None:
    assert holder.stdin is not None
    assert holder.stdout is not None
    holder.stdin.write(f"{wanted}\n")
    holder.stdin.flush()
    if holder.stdout.readline() != f"{wanted}\n":
        raise RuntimeError(f"{wanted} wires did not come up; see above")


def pss(pid: int) -> int:
    """Bytes, a share of what others have too."""
    return _rolled_up(pid, "Pss:")


def own(pid: int) -> int:
    """Bytes that are no file's, a share of what others have too."""
    return _rolled_up(pid, "Pss_Anon:", "Pss_Shmem:")


def _rolled_up(pid: int, *words: str) -> int:
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line[1]) * 1024 for line in lines if line[0] in words)


def files(pids: Iterable[int]) -> int:
    """Bytes of files' pages that they have between them, each counted once."""
    most: dict[tuple[str, ...], int] = {}
    for pid in pids:
        for mapping, octets in _mapped(Path(f"/proc/{pid}/smaps").read_text()):
            most[mapping] = max(octets, most.get(mapping, 0))
    return sum(most.values())


def _mapped(smaps: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """What part of which file, and how many bytes of it are there and as in the file."""
    part: tuple[str, ...] = ()
    resident = 0
    for line in smaps.splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, _, end = first.partition("-")
            size = str(int(end, 16) - int(begin, 16))
            _, offset, device, inode, *_ = rest
            part = (device, inode, offset, size) if inode != "0" else ()
        elif part and first == "Rss:":
            resident = int(rest[0]) * 1024
        elif part and first == "Anonymous:":
            yield part, resident - int(rest[0]) * 1024


@contextmanager
def _instances(many: int) -> Iterator[None]:
    """Room for as many wireguard-go, each of which takes one of inotify's instances."""
    before = int(INSTANCES.read_text())
    INSTANCES.write_text(str(max(before, many + SPARE)))
    try:
        yield
    finally:
        INSTANCES.write_text(str(before))


def _helpers(mesh: Mesh) -> list[int]:
    """The wireguard-go processes of the node."""
    inode = os.stat(f"/run/netns/{mesh.paths.namespace(NODE)}").st_ino
    return [mark.pid for mark in alive.inside([inode]) if _command(mark.pid) == "wireguard-go"]


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
        started.extend(_start(process, mesh.settings) for process in wanted)
        yield {p.name.partition("/")[2]: s.pid for p, s in zip(wanted, started, strict=True)}
    finally:
        _stop(started)


def _start(process: processes.Process, more: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """One, and wait until it says that it is ready."""
    ready, said = os.pipe()
    with open(process.log, "ab") as log, open(ready) as line:
        started = subprocess.Popen(
            ["ip", "netns", "exec", process.namespace, sys.executable, "-P", "-m", process.module],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", pass_fds=[said],
            group=process.gid, extra_groups=[],
            env={**process.environment, **more, "NSM_READY_FD": str(said)},
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

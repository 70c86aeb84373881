"""A mesh to measure in, bench/mesh.yaml, and programs that ask in it as a workload does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.wires import Kind
from labs import engine, processes, seats
from labs.lab import Lab
from labs.paths import Paths

SERVICES: Final[dict[Kind, str]] = {
    "veth": "near", "vxlan": "far", "wireguard": "safe", "wireguard-go": "safe",
}  # fmt: skip
ENGINES: Final[dict[Kind, str]] = {"wireguard": "kernel", "wireguard-go": "userspace"}
"""A mesh has the one or the other; the other kinds are the same in both."""

DEVICES: Final[dict[Kind, str]] = {
    "veth": "veth", "vxlan": "vxlan", "wireguard": "wireguard", "wireguard-go": "tun",
}  # fmt: skip
ASKER: Final = "asker"
_FILE: Final = Path(__file__).with_name("mesh.yaml")


@dataclass(frozen=True, slots=True)
class Mesh:
    """One that is up."""

    lab: Lab
    paths: Paths
    settings: Mapping[str, str] = field(default_factory=dict)  # of its forwarders

    def ask(self, module: str, *words: str) -> Any:
        """What a program of ours says, in JSON, that runs as the asker."""
        with self.asker(module, *words) as process:
            said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{module} ended with {process.returncode}; see above")
        return json.loads(said)

    def asker(self, module: str, *words: str) -> "subprocess.Popen[str]":
        """A program in the asker's namespace, under its identity and without its rights.

        With them it could misuse a tunnel, and would be given another device on top of one.
        """
        seat = seats.of(self.lab, self.paths, ASKER)
        namespace = self.paths.namespace(ASKER)
        return subprocess.Popen(
            ["ip", "netns", "exec", namespace, "setpriv", "--bounding-set=-all", "--inh-caps=-all",
             sys.executable, "-m", module, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            group=seat.gid, extra_groups=[], env={"PATH": processes.PATH, **seat.variables},
        )  # fmt: skip


def must_be(kind: Kind, device: str) -> None:
    """RuntimeError if a wire's device, in the kernel's word for it, is not of that kind."""
    if device != DEVICES[kind]:
        raise RuntimeError(
            f"the mesh made a {device or 'wire without a device'} where {kind} was to be"
            f" measured, whose devices are {DEVICES[kind]}: no figure of it is one of {kind}"
        )


@contextmanager
def mesh(*kinds: Kind) -> Iterator[Mesh]:
    """A mesh for the block that makes those kinds; of both WireGuards it has but one."""
    engines = {ENGINES[kind] for kind in kinds if kind in ENGINES}
    if len(engines) > 1:
        raise ValueError(f"no mesh makes all of {', '.join(kinds)}")
    settings = {"NSM_WIREGUARD": engines.pop()} if engines else {}
    name = f"bench-{os.getpid() % 100000}"
    nsmctl = [sys.executable, "-P", "-m", "nsmctl", "lab"]
    try:
        up = [*nsmctl, "up", str(_FILE), "--name", name]
        environment = {**os.environ, **settings}  # noqa: TID251
        made = subprocess.run(up, check=False, capture_output=True, text=True, env=environment)
        if made.returncode:
            raise RuntimeError(f"there is no mesh to measure in: {made.stderr.strip()}")
        yield Mesh(*engine.running(name), settings)
    finally:
        subprocess.run([*nsmctl, "down", name], check=False, capture_output=True)

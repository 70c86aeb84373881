"""Two nodes with a cable, a workload on each, and who can be asked about WireGuard there."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.node import Kernel
from nsm.kernel.state import (
    EngineName,
    Hop,
    Interface,
    Namespace,
    RemoteWire,
    WireguardTunnel,
)
from nsm.undo import Undo
from tests.support.spaces import Space

ENGINES = [
    "userspace",
    pytest.param("kernel", marks=pytest.mark.needs_kernel("wireguard")),
]
ALIKE = pytest.mark.parametrize(
    "encrypted",
    [
        "userspace",
        pytest.param("kernel", marks=[pytest.mark.needs_kernel("wireguard"), pytest.mark.long]),
    ],
    indirect=True,
)
"""For what is ours and above either engine, or is seen with the kernel's by another test too: a
test in the lane takes some ten times as long."""
INSTANCE = f"test-{os.getpid()}"  # wireguard-go's sockets are the whole machine's
_numbers = itertools.count()


@dataclass(frozen=True)
class Nodes:
    """near and far are underlays; client is on the near node, server on the far one."""

    near: Space
    far: Space
    client: Space
    server: Space
    engine: EngineName

    def __post_init__(self) -> None:
        cable = f"link add eth0 type veth peer name eth0 netns {self.far.name}\n"
        for space, number in ((self.near, 1), (self.far, 2)):
            # in one go, because starting a program in the lane takes its time
            lines = (
                f"addr add 192.0.2.{number}/24 dev eth0\n"
                f"addr add 2001:db8:ffff::{number}/64 dev eth0 nodad\n"
                "link set eth0 up\n"
            )
            words = ["ip", "-n", space.name, "-batch", "-"]
            subprocess.run(words, input=cable + lines, text=True, check=True)
            cable = ""

    async def wires(
        self, kernel: Kernel, *, six: bool = False, name: str = "nsm-1", net: int = 0
    ) -> tuple[RemoteWire, RemoteWire]:
        """Both halves of a new wire; the near one speaks first."""
        id_ = f"{INSTANCE}-{next(_numbers)}"
        outside = [ip_address(f"2001:db8:ffff::{n}" if six else f"192.0.2.{n}") for n in (1, 2)]
        keys = [Key.generate(), Key.generate()]
        halves = []
        for number, (node, workload) in enumerate(
            ((self.near, self.client), (self.far, self.server))
        ):
            other = 1 - number
            there = await kernel.namespace(path=workload.path, name=("client", "server")[number])
            underlay = await kernel.namespace(path=node.path, name=("near", "far")[number])
            end = Interface(
                there,
                name,
                mtu=1500 - (80 if six else 60),
                addresses=(
                    ip_interface(f"172.16.{net}.{number}/32"),
                    ip_interface(f"2001:db8:{net}::{number}/128"),
                ),
                routes=(
                    Hop(ip_network(f"172.16.{net}.{other}/32")),
                    Hop(ip_network(f"2001:db8:{net}::{other}/128")),
                ),
            )
            tunnel = WireguardTunnel(
                key=keys[number],
                peer=keys[other].public,
                local=outside[number],
                remote=outside[other],
                remote_port=51900 + 10 * net + other,
                underlay=underlay,
                port=51900 + 10 * net + number,
                engine=self.engine,
                keepalive=0 if number else 10,
            )
            halves.append(RemoteWire(id_, owner.SIDES[number], end, tunnel))
        return halves[0], halves[1]

    def wg(self, wire: RemoteWire) -> "Said":
        """What `wg` says of a half's device, where it can be asked."""
        space = self.client if wire.side == "src" else self.server
        name = owner.tunnel_name(wire.connection, wire.side)
        command = ["wg", "show", name, "dump"]
        if self.engine == "kernel":
            command = ["ip", "netns", "exec", space.name, "wg", "show", wire.end.name, "dump"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        device, *peers = [line.split("\t") for line in done.stdout.splitlines()]
        return Said(device[1], int(device[2]), [SaidPeer.of(peer) for peer in peers])

    def tell(self, wire: RemoteWire, *words: str) -> None:
        """Have stock `wg` change a half's device, behind our back."""
        space = self.client if wire.side == "src" else self.server
        if self.engine == "kernel":
            done = space.run("wg", "set", wire.end.name, *words)
        else:
            name = owner.tunnel_name(wire.connection, wire.side)
            done = subprocess.run(
                ["wg", "set", name, *words], capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class SaidPeer:
    public: str
    endpoint: str
    allowed: set[str]
    handshake: int
    keepalive: str

    @classmethod
    def of(cls, fields: list[str]) -> "SaidPeer":
        return cls(fields[0], fields[2], set(fields[3].split(",")), int(fields[4]), fields[7])


@dataclass(frozen=True)
class Said:
    public: str
    port: int
    peers: list[SaidPeer]


async def ensured(kernel: Kernel, *wires: RemoteWire) -> tuple[str, ...]:
    """Ensure them one after the other; the steps that took."""
    steps: list[str] = []
    for wire in wires:
        async with Undo() as undo:
            steps += map(str, (await kernel.ensure(wire, undo)).steps)
    return tuple(steps)


def seat(wire: RemoteWire) -> tuple[Namespace, str]:
    """Where the workload's device is to be."""
    return wire.end.namespace, wire.end.name


def retold(wire: RemoteWire, **changes: object) -> RemoteWire:
    """The wire with another tunnel."""
    return replace(wire, tunnel=replace(wire.tunnel, **changes))


def remains() -> set[str]:
    """What of this run's wireguard-go is on the machine: processes and sockets."""
    found = {f"process {pid} {state}" for pid, state in processes()}
    ours = {
        owner.tunnel_name(f"{INSTANCE}-{n}", side)
        for n in range(next(_numbers) + 1)
        for side in owner.SIDES
    }
    found |= {f"socket {file}" for file in Path("/run/wireguard").glob("*") if file.stem in ours}
    return found


def processes() -> Iterator[tuple[int, str]]:
    """Our wireguard-go processes, dead ones of this run too, and their state."""
    mark = f"VWIRE_OWNER={owner.group(INSTANCE):08x}/".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            name, _, rest = status.partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            marked = mark in (folder / "environ").read_bytes()
        except OSError:
            continue
        if marked or (name == "wireguard-go" and int(parent) == os.getpid()):
            yield int(folder.name), state

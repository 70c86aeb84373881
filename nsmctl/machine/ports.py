"""The ports of the mesh, and who holds them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from nsmctl.machine import processes
from nsmctl.machine.asking import Answer, bad, note, ok
from nsmctl.machine.processes import Process

Protocol = Literal["tcp", "udp"]
MANAGER: Final = 5001
REGISTRY: Final = 5002
VXLAN: Final = 4789
WIREGUARD: Final = 51820
_LISTENS: Final = "0A"  # the state in /proc/net/tcp


@dataclass(frozen=True, slots=True)
class Bound:
    """A socket that has a port of this network namespace, and whose it is as far as /proc shows.

    A tunnel device's socket is the kernel's own: no process has it.
    """

    uid: int
    process: Process | None

    def __str__(self) -> str:
        if self.process:
            return f"held by {self.process}"
        if os.geteuid() == 0:
            return "held by the kernel, for a tunnel device"
        return f"held by somebody whom only root sees (user {self.uid})"


def manager() -> Answer:
    """Where other nodes reach this node's manager."""
    return _of_program(MANAGER, "nsmgr")


def registry() -> Answer:
    """Where the domain's registry is reached."""
    return _of_program(REGISTRY, "registry")


def vxlan() -> Answer:
    """The port of VXLAN tunnels, which all devices of a node share."""
    for one in _bound("udp", VXLAN):
        if one.process or os.geteuid() != 0:
            return (bad if one.process else note)(
                str(one), "stop it, or set NSM_VXLAN_PORT, the same on every node"
            )
        return ok("held by VXLAN devices, which share it")
    return ok("free")


def wireguard() -> Answer:
    """The first port of WireGuard tunnels, each of which has its own."""
    for one in _bound("udp", WIREGUARD):
        if one.process is None and os.geteuid() == 0:
            return ok(f"{one}: wires take those above it")
        return note(f"{one}: wires take those above it", "stop it, or set NSM_WIREGUARD_PORT")
    return ok("free")


def _of_program(port: int, ours: str) -> Answer:
    for one in _bound("tcp", port):
        if one.process and one.process.module == ours:
            return ok(str(one))
        return note(str(one), f"stop it, or let {ours} have another: NSM_LISTEN_ON")
    return ok("free")


def _bound(protocol: Protocol, port: int) -> Iterator[Bound]:
    for version in ("", "6"):
        try:
            with open(f"/proc/self/net/{protocol}{version}") as file:
                lines = file.readlines()[1:]
        except FileNotFoundError:
            continue  # a kernel without IPv6
        for line in lines:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) != port:
                continue
            if protocol == "udp" or fields[3] == _LISTENS:
                yield Bound(int(fields[7]), processes.holder(int(fields[9])))

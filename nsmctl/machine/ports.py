"""The ports of the mesh, and who holds them."""

import os
from typing import Final

from nsm import holders
from nsm.holders import Holder
from nsmctl.machine.asking import Answer, note, ok
from nsmctl.machine.processes import Process

MANAGER: Final = 5001
REGISTRY: Final = 5002
VXLAN: Final = 4789
WIREGUARD: Final = 51820
OTHERS: Final = "4790 to 4805"  # of which VXLAN tunnels take one where theirs is taken


def manager() -> Answer:
    """Where other nodes reach this node's manager."""
    return _of_program(MANAGER, "nsmgr")


def registry() -> Answer:
    """Where the domain's registry is reached."""
    return _of_program(REGISTRY, "registry")


def vxlan() -> Answer:
    """The port of VXLAN tunnels, which all devices of a node share."""
    for one in holders.of_port("udp", VXLAN):
        if one.process or os.geteuid() != 0:
            return note(
                f"{_told(one)}: wires take one of {OTHERS}, which must pass between nodes",
                "stop it, or set NSM_VXLAN_PORT, the same on every node",
            )
        return ok("held by VXLAN devices, which share it")
    return ok("free")


def wireguard() -> Answer:
    """The first port of WireGuard tunnels, each of which has its own."""
    for one in holders.of_port("udp", WIREGUARD):
        if one.process is None and os.geteuid() == 0:
            return ok(f"{_told(one)}: wires take those above it")
        return note(
            f"{_told(one)}: wires take those above it", "stop it, or set NSM_WIREGUARD_PORT"
        )
    return ok("free")


def _of_program(port: int, ours: str) -> Answer:
    for one in holders.of_port("tcp", port):
        if one.process and _named(one.process).module == ours:
            return ok(_told(one))
        return note(_told(one), f"stop it, or let {ours} have another: NSM_LISTEN_ON")
    return ok("free")


def _told(one: Holder) -> str:
    if one.process:
        return f"held by {_named(one.process)}"
    if os.geteuid() == 0:
        return "held by the kernel, for a tunnel device"
    return f"held by somebody whom only root sees (user {one.uid})"


def _named(process: holders.Process) -> Process:
    return Process(process.pid, process.argv)

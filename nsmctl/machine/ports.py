"""The ports of the mesh, and who holds them."""

import os
from typing import Final

from nsm import holders
from nsm.holders import Holder
from nsm.kernel import messages, netlink
from nsm.kernel import namespaces as netns
from nsmctl.machine import sight
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
        # that no process is seen to have it does not say that it is a device's
        if one.process or not _is_of_devices():
            return note(
                f"{_told(one)}: wires take one of {OTHERS}, which must pass between nodes",
                "stop it, or set NSM_VXLAN_PORT, the same on every node",
            )
        return ok("held by VXLAN devices, which share it")
    return ok("free")


def _is_of_devices() -> bool:
    """Whether a VXLAN device has its socket here, wherever the device itself is."""
    with open("/proc/thread-self/ns/net") as here:
        for sock, inside in sight.namespaces():
            far = netns.number(sock, here.fileno(), assign=False) if inside else None
            for kind, body in sock.dump(messages.dump_links(kind="vxlan")):
                if kind == netlink.NEWLINK:
                    device = messages.device(body)
                    if (device.kind, device.port, device.far) == ("vxlan", VXLAN, far):
                        return True
    return False


def wireguard() -> Answer:
    """The first port of WireGuard tunnels, each of which has its own."""
    for one in holders.of_port("udp", WIREGUARD):
        told = f"{_told(one)}: wires take those above it"
        if one.process is None and os.geteuid() == 0 and sight.of_everybody():
            return ok(told)
        return note(told, "stop it, or set NSM_WIREGUARD_PORT")
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
    if os.geteuid() != 0:
        return f"held by somebody whom only root sees (user {one.uid})"
    if not sight.of_everybody():
        return f"held by the kernel, or by somebody who runs {sight.OUTSIDE}"
    return "held by the kernel"


def _named(process: holders.Process) -> Process:
    return Process(process.pid, process.argv)

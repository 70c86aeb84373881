"""What earlier labs and wires left: found by their own marks, never by a name's pattern."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from labs import state
from labs.paths import ROOT, Paths
from labs.units import count
from nsm.errors import NsmError
from nsm.kernel import messages, netlink, owner
from nsm.kernel.netlink import Socket
from nsmctl.machine import processes, sight
from nsmctl.machine.asking import Answer, note, ok
from nsmctl.machine.processes import Process

DEFAULT_NAME: Final = "forwarder"  # a forwarder's own, without NSM_NAME
_TOLD: Final = 3  # commands that a line holds


def labs() -> Answer:
    """Labs that are up, and what is left of those that are not."""
    there = state.labs(ROOT)
    left = [name for name in there if _is_left(Paths(name))]
    up = [name for name in there if name not in left]
    if left:
        more = f" and {len(left) - 1} more" if left[1:] else ""
        seen = sight.of_everybody()
        return note(
            f"{left[0]}{more}: left by an engine that ended"
            + ("" if seen else f", or that runs {sight.OUTSIDE}"),
            f"nsmctl lab down {left[0] if not more else '--all'}"
            + ("" if seen else f", if nobody runs {'them' if more else 'it'} there"),
        )
    return ok(f"up: {', '.join(up)}" if up else "none up, none left")


def _is_left(paths: Paths) -> bool:
    """Whether nobody is there any more to whom a lab's folder belongs."""
    try:
        now = state.read(paths)
    except NsmError:
        return True
    if now is None or now.crashed:
        return True
    return now.phase == "up" and not any(child.mark.alive for child in state.born(paths).values())


@dataclass(frozen=True, slots=True)
class Left:
    """Devices of one group in one namespace, and what to write before a command to run it there."""

    group: int
    devices: int
    inside: str

    @property
    def removal(self) -> str:
        """The command that takes them away."""
        return f"{self.inside}ip link del group {self.group}"


def wires() -> Answer:
    """Devices with our mark that belong to no forwarder which runs here."""
    alive = _groups_alive()
    found = list(_ours())
    if alive is None:
        return ok(f"{count(sum(one.devices for one in found), 'device')}, and a forwarder runs")
    left = [one for one in found if one.group not in alive]
    if not left:
        standing = sum(one.devices for one in found)
        return ok(f"{count(standing, 'device')} of running forwarders" if standing else "none")
    devices = count(sum(one.devices for one in left), "device")
    if not sight.of_everybody():
        # theirs may be live wires: those of a forwarder in a pod of its own, of all things
        return note(
            f"{devices} whose forwarder is not seen: it may run {sight.OUTSIDE}",
            "ask on the host itself, as root: nsmctl doctor",
        )
    places = count(len({one.inside for one in left}), "namespace")
    removals = "; ".join(one.removal for one in left[:_TOLD])
    again = "; then ask again: that is not all" if left[_TOLD:] else ""
    return note(
        f"{devices} in {places} of forwarders that do not run",
        f"start them again, or: {removals}{again}",
    )


def _groups_alive() -> set[int] | None:
    """The link groups of running forwarders; None if one does not say what it is called."""
    groups = set()
    for process in processes.listed():
        if process.module == "forwarder":
            name = _name(process)
            if name is None:
                return None
            groups.add(owner.group(name))
    return groups


def _name(process: Process) -> str | None:
    """What a forwarder calls itself: by its lab's plan, or by its environment."""
    lab, _, place = process.argv[-1].partition("/")
    if place:
        from labs import engine  # costs as much as all the rest, and mostly there is no lab
        from labs import processes as plans

        with contextlib.suppress(NsmError, OSError):
            paths = Paths(lab)
            for planned in plans.plan(engine.saved(paths), paths).processes:
                if planned.name == place:
                    return planned.environment["NSM_NAME"]
        return None
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as file:
            variables = file.read().decode(errors="replace").split("\0")
    except OSError:
        return None
    named = [one.partition("=")[2] for one in variables if one.startswith("NSM_NAME=")]
    return named[-1] if named else DEFAULT_NAME


def _ours() -> Iterator[Left]:
    """Devices with our mark in every namespace that somebody's process or name leads to."""
    for sock, inside in sight.namespaces():
        yield from _marked(sock, inside)


def _marked(sock: Socket, inside: str) -> Iterator[Left]:
    groups: dict[int, int] = {}
    for kind, body in sock.dump(messages.dump_links()):
        if kind == netlink.NEWLINK:
            group = messages.device(body).group
            if owner.is_ours(group):
                groups[group] = groups.get(group, 0) + 1
    for group, devices in groups.items():
        yield Left(group, devices, inside)

"""`nsmctl leaks`: what carries our mark on a node, against what its forwarder's leases say."""

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from nsm.errors import NotFoundError
from nsmctl import show
from nsmctl.asking import Json, Lab

if TYPE_CHECKING:
    from nsmctl.machine.leaks import Forwarder, Leak

CAP_NET_ADMIN = 12
COLUMNS = ("node", "what", "where", "why", "connection")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: sudo nsmctl leaks --lab two-nodes")(leaks)


def leaks(
    lab: Lab = "",
    remove: Annotated[
        bool, typer.Option("--remove", help="Take away devices that nobody holds.")
    ] = False,
    json_: Json = False,
) -> None:
    """What a forwarder left, or lost: its marks in the kernel against its leases.

    Looked at are all nodes of a lab, or the forwarders that run on this machine. The exit code
    is 1 where the two differ, and something of that is still so.
    """
    from labs.units import count
    from nsmctl.machine import leaks as looking

    show.need_root()
    forwarders = _of_lab(lab) if lab else _here()
    found = [leak for forwarder in forwarders for leak in looking.of(forwarder)]
    removed = [leak for leak in found if remove and leak.remove]
    for leak in removed:
        if leak.remove:
            leak.remove()
    left = [leak for leak in found if leak not in removed]
    nodes = len({forwarder.node for forwarder in forwarders})
    if json_:
        show.as_json({"nodes": nodes, "found": [*map(_plain, found)], "removed": len(removed)})
    else:
        if found:
            rows = [(one.node, one.what, one.where, one.why, one.connection) for one in found]
            show.table("", COLUMNS, rows)
        objects = count(len(found), "object")
        took = f", {len(removed)} removed" if remove else ""
        show.line(f"{objects} without an owner on {count(nodes, 'node')}{took}")
    show.finish(show.FAILED if left else 0)


def _plain(leak: "Leak") -> dict[str, str]:
    return {column: getattr(leak, column) for column in COLUMNS}


def _of_lab(lab: str) -> "list[Forwarder]":
    """Every forwarder of a lab that is up."""
    from labs import engine, processes
    from labs.processes import Stage
    from nsmctl.machine.leaks import Forwarder

    there, paths = engine.running(lab)
    return [
        Forwarder(
            one.name.partition("/")[0],
            one.environment["NSM_NAME"],
            one.environment["NSM_STORE"],
            one.namespace,
        )
        for one in processes.plan(there, paths).of(Stage.FORWARDER)
    ]


def _here() -> "list[Forwarder]":
    """Those that run on this machine and keep leases; a lab's are its own."""
    from nsmctl.machine import processes
    from nsmctl.machine.leaks import Forwarder

    found = []
    for process in processes.listed():
        with suppress(OSError):
            if process.module != "forwarder" or not _is_ours(process.pid):
                continue
            said = _environment(process.pid)
            if said.get("NSM_STORE"):
                name = said.get("NSM_NAME", "forwarder")
                found.append(Forwarder(os.uname().nodename, name, said["NSM_STORE"]))
    if not found:
        raise NotFoundError(
            "no forwarder with a store runs in this network namespace",
            hint="start it with NSM_STORE, or ask a lab: nsmctl leaks --lab NAME",
        )
    return found


def _is_ours(pid: int) -> bool:
    """In our network namespace, and with the right to change it: because anybody may call a
    process so, and name a store in which no wire is held.
    """
    for kind in ("net", "user"):
        if os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}"):
            return False
    with open(f"/proc/{pid}/status") as file:
        held = next((int(line.split()[1], 16) for line in file if line.startswith("CapEff:")), 0)
    return bool(held >> CAP_NET_ADMIN & 1)


def _environment(pid: int) -> dict[str, str]:
    with open(f"/proc/{pid}/environ", "rb") as file:
        pairs = file.read().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)

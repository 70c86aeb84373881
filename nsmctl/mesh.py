"""Verbs that ask a mesh: for a wire, for who offers what, for the wires of a node."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsm.errors import InvalidError, NotFoundError, NsmError
from nsm.model import SECOND, Connection, Endpoint, Selector, Service
from nsm.path import PROBE
from nsmctl import show
from nsmctl.asking import (
    AGENT,
    MANAGER,
    PATIENCE,
    Identity,
    Json,
    Lab,
    Manager,
    Node,
    asked,
    interruptible,
    left,
    seat,
)

if TYPE_CHECKING:
    from labs.seats import Seat
    from nsm.client import Wire
    from nsm.rpc.peers import Peers

LIFETIME = 600 * SECOND  # of tokens
OBSERVED_ONLY = "(a caller sees its own wires; NSM_OBSERVERS of the manager lets it see all)"


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(
        context_settings={"ignore_unknown_options": True},
        epilog="Example: sudo nsmctl connect kernel://icmp-responder/nsm-1 -n app"
        " --lab one-node -- ip addr",
    )(connect)
    app.command(epilog="Example: sudo nsmctl services --lab one-node")(services)
    app.command(epilog="Example: sudo nsmctl endpoints --lab two-nodes -n east-1")(endpoints)
    app.command(epilog="Example: sudo nsmctl connections --lab two-nodes -n east-1")(connections)
    app.command(epilog="Example: sudo nsmctl path far-0 --lab two-nodes -n east-1")(path)


# --- a wire ----------------------------------------------------------------------------------


def connect(
    nsurl: Annotated[str, typer.Argument(help="kernel://SERVICE[/INTERFACE][?LABEL=VALUE]")],
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: held while this runs.")
    ] = None,
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """Hold a wire until Ctrl-C, or while a command runs; its exit status is then ours."""
    from nsm import nsurl as grammar

    grammar.parse(nsurl)
    at = seat(lab, node, manager, identity)
    at.need_manager()
    show.finish(asyncio.run(interruptible(_hold(at, nsurl, command or [], json_=json_))))


async def _hold(seat: "Seat", nsurl: str, command: Sequence[str], *, json_: bool) -> int:
    from nsm.client import Client
    from nsm.identity.workload import workload_source

    async with (
        workload_source(seat.identity, patience=PATIENCE) as source,
        Client(seat.name, source=source, manager=seat.manager) as client,
    ):
        start = time.monotonic()
        async with client.connect(nsurl) as wire:
            _tell_wire(wire, (time.monotonic() - start) * 1000, json_=json_)
            if command:
                return await _run(command)
            await asyncio.Event().wait()
    return 0


async def _run(command: Sequence[str]) -> int:
    """The command's exit status; it is asked to end if we are."""
    try:
        running = await asyncio.create_subprocess_exec(*command)
    except OSError as wrong:
        raise InvalidError(f"{command[0]}: {wrong.strerror}") from None
    try:
        status = await running.wait()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            running.terminate()
        await running.wait()
        raise
    return status if status >= 0 else 128 - status  # as a shell tells of a signal


def _tell_wire(wire: "Wire", ms: float, *, json_: bool) -> None:
    own = [str(a.ip) for a in wire.addresses]
    far = [str(a.ip) for a in wire.peer_addresses]
    if json_:
        show.as_json(
            {
                "id": wire.id,
                "interface": wire.interface,
                "addresses": own,
                "peer_addresses": far,
                "mtu": wire.mtu,
                "endpoint": wire.endpoint,
                "ms": round(ms, 2),
                "stages": wire.stages,
            }
        )
        return
    show.line(
        f"{wire.interface} {', '.join(own)} \N{LEFT RIGHT ARROW} {', '.join(far)}"
        f"  {wire.endpoint}  mtu {wire.mtu}  {ms:.0f} ms"
    )


# --- who offers what -------------------------------------------------------------------------


def services(
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """The network services the node's registry knows."""

    async def ask(seat: "Seat", peers: "Peers") -> list[Service]:
        from nsm.rpc.registry import RegistryClient

        return await RegistryClient(peers, seat.manager).find_services(Service())

    found = sorted(asked(ask, lab, node, manager, identity), key=lambda s: s.name)
    if json_:
        show.as_json([{"name": s.name, "payload": s.payload, "matches": s.matches} for s in found])
        return
    rows = [(s.name, s.payload, len(s.matches)) for s in found]
    show.table("", ("service", "payload", ">rules"), rows)


def endpoints(
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """Who offers what, and for how much longer unless they say so again."""

    async def ask(seat: "Seat", peers: "Peers") -> list[Endpoint]:
        from nsm.rpc.registry import RegistryClient

        return await RegistryClient(peers, seat.manager).find_endpoints(Endpoint())

    found = sorted(asked(ask, lab, node, manager, identity), key=lambda e: e.name)
    if json_:
        show.as_json(
            [
                {
                    "name": e.name,
                    "services": e.services,
                    "labels": e.labels,
                    "url": e.url,
                    "expires": e.expires,
                }
                for e in found
            ]
        )
        return
    rows = [(e.name, ", ".join(e.services), e.url, left(e.expires)) for e in found]
    show.table("", ("endpoint", "services", "url", "expires in"), rows)


# --- the wires of a node ---------------------------------------------------------------------


def connections(
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """The wires the node's manager holds."""
    found = _connections(lab, node, manager, identity)
    if json_:
        show.as_json([_facts(conn) for conn in found])
        return
    if not found:
        show.line(f"no wires {OBSERVED_ONLY}")
        return
    rows = [
        (_first_id(c), c.service, c.endpoint, _ends(c), _state(c), left(_expires(c))) for c in found
    ]
    show.table("", ("wire", "service", "endpoint", "from", "state", "expires in"), rows)


def path(
    id_: Annotated[str, typer.Argument(metavar="ID", help="A wire, as `connections` lists it.")],
    lab: Lab = "",
    node: Node = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    json_: Json = False,
) -> None:
    """Each hop of a wire; probe is what the client's forwarder saw when the wire was made."""
    found = _connections(lab, node, manager, identity)
    wanted = [c for c in found if id_ in {s.id for s in c.segments}]
    if not wanted:
        known = ", ".join(_first_id(c) for c in found) or "none"
        raise NotFoundError(f"no wire {id_!r} here; there is {known}", hint=OBSERVED_ONLY)
    conn = wanted[0]
    hops = [
        {
            "hop": place,
            "name": segment.name,
            "id": segment.id,
            "spiffe_id": _speaker(segment.token),
            "expires": segment.expires,
            "metrics": dict(segment.metrics),
        }
        for place, segment in enumerate(conn.segments)
    ]
    if json_:
        show.as_json({**_facts(conn), "path": hops})
        return
    rows = [
        (
            hop["hop"],
            hop["name"],
            hop["spiffe_id"],
            hop["id"],
            left(conn.segments[i].expires),
            conn.segments[i].metrics.get(PROBE, ""),
        )
        for i, hop in enumerate(hops)
    ]
    show.table("", (">hop", "name", "identity", "id", "expires in", "probe"), rows)


def _connections(lab: str, node: str, manager: str, identity: str) -> list[Connection]:
    async def ask(seat: "Seat", peers: "Peers") -> list[Connection]:
        from nsm.rpc.calls import Calls

        seat.need_manager()
        calls = Calls(peers, LIFETIME)
        async with contextlib.aclosing(calls.monitor(seat.manager, Selector())) as events:
            async for event in events:  # the first is everything there is
                return list(event.connections.values())
        return []

    return sorted(asked(ask, lab, node, manager, identity), key=_first_id)


def _first_id(conn: Connection) -> str:
    return conn.segments[0].id if conn.segments else conn.id


def _ends(conn: Connection) -> str:
    return conn.segments[0].name if conn.segments else ""


def _expires(conn: Connection) -> int | None:
    return min((s.expires for s in conn.segments if s.expires is not None), default=None)


def _state(conn: Connection) -> str:
    return str(getattr(conn.state, "name", conn.state))


def _facts(conn: Connection) -> dict[str, Any]:
    return {
        "id": _first_id(conn),
        "service": conn.service,
        "endpoint": conn.endpoint,
        "payload": conn.payload,
        "state": _state(conn),
        "mechanism": conn.mechanism.type if conn.mechanism else "",
        "src": conn.ip.src_ip_addrs,
        "dst": conn.ip.dst_ip_addrs,
        "mtu": conn.context.mtu if conn.context else 0,
        "labels": dict(conn.labels),
        "expires": _expires(conn),
        "hops": [segment.name for segment in conn.segments],
    }


def _speaker(token: str) -> str:
    """Who a segment's token is of; never the token."""
    from nsm.identity.tokens import claims

    try:
        return claims(token).sub
    except NsmError:
        return ""

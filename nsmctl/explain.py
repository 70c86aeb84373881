"""`nsmctl explain CLIENT [TARGET]`: what a wire needs, a line each, to the first that is broken."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from nsm.errors import InvalidError, NotFoundError, NsmError
from nsm.model import Endpoint, Service
from nsmctl import show
from nsmctl.asking import AGENT, MANAGER, Identity, Json, Lab, Manager, asked

if TYPE_CHECKING:
    from labs.seats import Seat
    from nsm.rpc.peers import Peers
    from nsmctl.machine.walk import Held, Known, Line

STORE: Final = "/var/lib/vwire/forwarder/forwarder.sqlite"
MARKS: Final = {True: "\N{CHECK MARK}", False: "\N{BALLOT X}", None: "-"}
STYLES: Final = {True: "green", False: "red", None: ""}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: sudo nsmctl explain app icmp-responder --lab one-node")(explain)


def explain(
    client: Annotated[str, typer.Argument(help="A client's name, or a wire's as `connections`.")],
    target: Annotated[
        str, typer.Argument(help="The service, endpoint or interface; all of the client's without.")
    ] = "",
    lab: Lab = "",
    manager: Manager = MANAGER,
    identity: Identity = AGENT,
    store: Annotated[
        str, typer.Option("--store", help="What the node's forwarder keeps, without --lab.")
    ] = STORE,
    json_: Json = False,
) -> None:
    """What is broken of a wire: registration, lease, policy, link, address, route and on.

    Each line is looked at, in the kernel and with packets, and nothing is changed. The first
    that is broken ends it and says what mends it; the exit code is then 1.
    """
    from nsmctl.machine import walk

    show.need_root()
    wanted = _in_lab(lab, client, target) if lab else _here(store, client, target)
    heard = _asked(wanted, lab, manager, identity)
    broken = 0
    told: list[dict[str, Any]] = []
    for one in heard:
        if not json_:
            show.line(f"{one.client} to {one.service}" + (f"  ({one.id})" if one.id else ""))
        lines = []
        for line in walk.walk(one):
            lines.append(line)
            if not json_:
                _print(line)
        broken += lines[-1].well is False
        told.append({"client": one.client, "service": one.service, "id": one.id, "lines": lines})
    if json_:
        show.as_json({"broken": broken, "wires": told})
    show.finish(show.FAILED if broken else show.OK)


def _print(line: "Line") -> None:
    from rich.text import Text

    text = Text(f"  {MARKS[line.well]} ", style=STYLES[line.well])
    text.append(f"{line.name}: {show.visible(line.found)}", style="")
    if line.fix:
        text.append(f"  fix: {show.visible(line.fix)}", style="")
    show.console().print(text, soft_wrap=True)


# --- which wires, and what forwarders hold of them -------------------------------------------


def _in_lab(name: str, client: str, target: str) -> "list[Known]":
    from labs import engine, processes, state
    from labs.processes import Stage
    from nsm import nsurl
    from nsmctl.machine.walk import Known, named

    lab, paths = engine.running(name)
    if client not in lab.clients:
        raise NotFoundError(
            f"lab {name} has no client {client!r}", hint=f"it has {', '.join(lab.clients)}"
        )
    asking = lab.clients[client]
    forwarders = [
        (one.name.partition("/")[0], one.environment["NSM_STORE"], named(one.namespace))
        for one in processes.plan(lab, paths).of(Stage.FORWARDER)
    ]
    forwarders.sort(key=lambda one: one[0] != asking.on)  # the one next to the client first
    held = [one for node, store, space in forwarders for one in _held(store, node, space)]
    urls = [nsurl.parse(url) for url in asking.connect]
    said = {str(one["id"]): str(one.get("error", "")) for one in state.statuses(paths, client)}
    found = []
    for id_, url in zip(nsurl.connection_ids(client, urls), urls, strict=True):
        of = [one for one in held if one.lease.connection.segments[0].id == id_]
        known = Known(id_, client, url.service, asking.on, of, told=said.get(id_, ""))
        if target in ("", url.service, url.interface, id_) or _ends_at(known, target):
            found.append(known)
    return found or [Known("", client, _service(client, target), asking.on, ())]


def _here(store: str, client: str, target: str) -> "list[Known]":
    from nsmctl.machine.walk import Known

    found, here = [], os.uname().nodename
    for one in _held(store, here, "", must=True):
        conn = one.lease.connection
        first = conn.segments[0]
        if client not in (first.name, first.id, one.lease.id):
            continue
        known = Known(first.id, first.name, conn.service, here, (one,))
        if target in ("", conn.service, first.id) or _ends_at(known, target):
            found.append(known)
    return found or [Known("", client, _service(client, target), here, ())]


def _service(client: str, target: str) -> str:
    if not target:
        raise InvalidError(
            f"{client} has no wire here, and asked for none that is known",
            hint="say which service it should have a wire to: nsmctl explain CLIENT SERVICE",
        )
    return target


def _ends_at(known: "Known", target: str) -> bool:
    """Whether that is its endpoint, or its interface."""
    return any(
        target == one.lease.connection.endpoint.partition("@")[0]
        or target in (space.interface for space in one.lease.spaces)
        for one in known.held
    )


def _held(path: str, node: str, space: str, *, must: bool = False) -> "Sequence[Held]":
    from forwarder.store import KEPT, load
    from nsm.store import looked_into
    from nsmctl.machine.walk import Held

    if not must and not os.path.exists(path):
        return ()
    with looked_into(path, KEPT) as kept:
        return [Held(node, space, one) for one in load(kept) if one.connection.segments]


# --- what the registry says ------------------------------------------------------------------


def _asked(wanted: "Sequence[Known]", lab: str, manager: str, identity: str) -> "list[Known]":
    names = list(dict.fromkeys(one.service for one in wanted))

    async def ask(seat: "Seat", peers: "Peers") -> dict[str, tuple[list[Endpoint], list[Service]]]:
        from nsm.rpc.registry import RegistryClient

        client = RegistryClient(peers, seat.manager)
        return {
            name: (
                await client.find_endpoints(Endpoint(services=(name,))),
                await client.find_services(Service(name)),
            )
            for name in names
        }

    try:
        found = asked(ask, lab, wanted[0].node if lab else "", manager, identity)
    except NsmError as trouble:
        return [replace(one, trouble=trouble) for one in wanted]
    return [
        replace(one, offered=found[one.service][0], rules=found[one.service][1]) for one in wanted
    ]

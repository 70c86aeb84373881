"""`nsmctl lab fault`: breaking one thing of a lab that is up, and mending it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsm.errors import NsmError, UnavailableError
from nsmctl import completion, show

if TYPE_CHECKING:  # what touches Linux is imported where it is used
    from labs.breaking import Fault
    from labs.flows import Flows, Toll
    from labs.lab import Broken

app = typer.Typer(
    help="Break something of a lab that is up, and mend it; meanwhile packets are counted.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

LabName = Annotated[str, typer.Argument(help="The lab.", autocompletion=completion.up)]
Whom = Annotated[
    list[str],
    typer.Argument(
        help="forwarder@NODE, registry@CLUSTER, client:NAME, endpoint:NAME, or as lab logs has it.",
        autocompletion=completion.faulty,
    ),
]
Nodes = Annotated[list[str], typer.Argument(help="Nodes.", autocompletion=completion.places)]
Places = Annotated[
    list[str], typer.Argument(help="Clients, endpoints.", autocompletion=completion.places)
]
Cables = Annotated[
    list[str],
    typer.Argument(
        help="A node; or PLACE:INTERFACE of a client or endpoint.", autocompletion=completion.places
    ),
]
For = Annotated[str, typer.Option("--for", help="How long: 500ms, 2s; or ever, which stays.")]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Quiet = Annotated[
    bool, typer.Option("--no-traffic", help="Send nothing meanwhile: it is not known what is lost.")
]


@app.command(epilog="Example: sudo nsmctl lab fault kill two-nodes forwarder@east-1")
def kill(
    lab: LabName, who: Whom, for_: For = "0s", no_traffic: Quiet = False, json_: Json = False
) -> None:
    """Kill processes (SIGKILL), and start them again: at once, after --for, or not."""
    _break(lab, {"kill": who, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault stop two-nodes registry@east")
def stop(
    lab: LabName, who: Whom, for_: For = "ever", no_traffic: Quiet = False, json_: Json = False
) -> None:
    """Ask processes to end (SIGTERM); they stay so, or are started again after --for."""
    _break(lab, {"stop": who, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault start two-nodes registry@east")
def start(lab: LabName, who: Whom, no_traffic: Quiet = False, json_: Json = False) -> None:
    """Start again what has ended: processes, clients' and endpoints' namespaces, nodes."""
    _break(lab, {"start": who}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault freeze two-nodes nsmgr@east-1 --for 300ms")
def freeze(
    lab: LabName, who: Whom, for_: For = "ever", no_traffic: Quiet = False, json_: Json = False
) -> None:
    """Let processes stand still (SIGSTOP)."""
    _break(lab, {"freeze": who, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault thaw two-nodes nsmgr@east-1")
def thaw(lab: LabName, who: Whom, no_traffic: Quiet = False, json_: Json = False) -> None:
    """Let them go on."""
    _break(lab, {"thaw": who}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault end two-nodes app")
def end(
    lab: LabName, place: Places, for_: For = "ever", no_traffic: Quiet = False, json_: Json = False
) -> None:
    """End the namespaces of clients or endpoints, with all that is in them."""
    _break(lab, {"end": place, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault reboot two-nodes east-2 --for 1s")
def reboot(
    lab: LabName, node: Nodes, for_: For = "0s", no_traffic: Quiet = False, json_: Json = False
) -> None:
    """End whole nodes with all they have, and start them: at once, after --for, or not."""
    _break(lab, {"reboot": node, "for": for_}, no_traffic, json_)


@app.command("link-down", epilog="Example: sudo nsmctl lab fault link-down two-nodes east-2")
def link_down(
    lab: LabName, cable: Cables, for_: For = "ever", no_traffic: Quiet = False, json_: Json = False
) -> None:
    """Pull nodes' cables out, or set the interface of a client or endpoint down."""
    _break(lab, {"link-down": cable, "for": for_}, no_traffic, json_)


@app.command("link-up", epilog="Example: sudo nsmctl lab fault link-up two-nodes east-2")
def link_up(lab: LabName, cable: Cables, no_traffic: Quiet = False, json_: Json = False) -> None:
    """The opposite of link-down."""
    _break(lab, {"link-up": cable}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault rate two-nodes east-2 --to 10Mbit")
def rate(
    lab: LabName,
    node: Nodes,
    to: Annotated[str, typer.Option("--to", help="500kbit, 10Mbit, 1Gbit")],
    for_: For = "ever",
    no_traffic: Quiet = False,
    json_: Json = False,
) -> None:
    """Let nodes send no more than that; `mend` takes it back."""
    _break(lab, {"rate": node, "to": to, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault partition two-nodes east-1 east-2,six-1")
def partition(
    lab: LabName,
    group: Annotated[list[str], typer.Argument(help="Groups: NODE,NODE NODE,NODE")],
    for_: For = "ever",
    no_traffic: Quiet = False,
    json_: Json = False,
) -> None:
    """Nodes of different groups lose what the others send, silently."""
    groups = [one.split(",") for one in group]
    _break(lab, {"partition": groups, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault fill disk-full home --for 2s")
def fill(
    lab: LabName,
    cluster: Annotated[list[str], typer.Argument(help="Clusters with a disk of their own.")],
    for_: For = "ever",
    no_traffic: Quiet = False,
    json_: Json = False,
) -> None:
    """Leave no room on a cluster's disk: its stores cannot be written."""
    _break(lab, {"fill": cluster, "for": for_}, no_traffic, json_)


@app.command(epilog="Example: sudo nsmctl lab fault mend two-nodes")
def mend(lab: LabName, no_traffic: Quiet = False, json_: Json = False) -> None:
    """All cables are in, at full rate, and no nodes are apart. Starts nobody: see start."""
    _break(lab, {"mend": "all"}, no_traffic, json_)


def _break(lab: str, asked: dict[str, Any], no_traffic: bool, json_: bool) -> None:
    show.need_root()
    from labs import engine, flows
    from labs import lab as labfile
    from labs.breaking import carry_out, check, touched
    from labs.faults import Faults

    there, paths = engine.running(lab)
    faults, broken = Faults(there, paths), labfile.broken(asked)
    check(faults, broken)
    between = [] if no_traffic else flows.pairs(there, paths)
    gone = touched(faults, broken)
    between = [pair for pair in between if not {pair.a, pair.b} & gone][: flows.MOST]
    with flows.Flows(paths, between) as traffic:
        done = carry_out(faults, broken)
        silent = _again(traffic, broken)
        toll = traffic.toll() if between else None
    _tell(done, toll, silent, json_=json_)
    show.finish(show.FAILED if silent else show.OK)


def _again(traffic: "Flows", broken: "Broken") -> str:
    """What does not flow again, though nothing is broken any more."""
    from labs.checks import HEALING

    if broken.seconds is None:
        return ""  # it is broken still
    try:
        traffic.flow(HEALING, "after it")
    except NsmError as late:
        return late.message
    return ""


def _tell(done: "Sequence[Fault]", toll: "Toll | None", silent: str, *, json_: bool) -> None:
    if json_:
        show.as_json(
            {"faults": done, "traffic": toll.figures if toll else None, "silent": silent or None}
        )
        return
    for one in done[:-1]:
        show.line(str(one))
    show.line(f"{done[-1]}; {toll}" if toll else str(done[-1]))
    if silent:
        show.error(UnavailableError(silent), json_wanted=False)

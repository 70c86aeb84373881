"""`nsmctl lab`: whole meshes on this machine, from one file each."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
import yaml

from nsm.errors import InvalidError, NsmError
from nsmctl import completion, fault, show

if TYPE_CHECKING:  # what touches Linux is imported where it is used: `lab check` works anywhere
    from labs.checks import Result
    from labs.engine import Gone, Up
    from labs.lab import Lab
    from labs.paths import Paths
    from labs.processes import Process
    from labs.state import Born
    from labs.wires import Answers, Wire

app = typer.Typer(
    help="Whole meshes on this machine, from one file each.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(fault.app, name="fault")

File = Annotated[
    str,
    typer.Argument(
        help="A lab file, or the name of a shipped one.", autocompletion=completion.shipped
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Name = Annotated[str, typer.Option("--name", help="Call the lab so, not as its file does.")]
LabName = Annotated[
    str,
    typer.Option("--lab", help="Which lab, if several are up.", autocompletion=completion.up),
]
OnlyLab = Annotated[
    str,
    typer.Argument(help="The lab; the only one if left out.", autocompletion=completion.up),
]


# --- reading: anybody, anywhere --------------------------------------------------------------


@app.command(epilog="Example: nsmctl lab check labs/two-nodes.yaml")
def check(file: File, json_: Json = False) -> None:
    """Read a lab file and say what is wrong with it. Needs no root and no Linux."""
    from labs import lab as labfile
    from labs import units

    path = labfile.find(file)
    lab = labfile.read(path)
    counts = {
        "nodes": sum(node.kind == "node" for node in lab.nodes.values()),
        "clusters": len(lab.clusters),
        "endpoints": len(lab.endpoints),
        "networks": len(lab.networks),
        "routers": len(lab.routers),
        "clients": len(lab.clients),
        "checks": len(lab.checks),
    }
    if json_:
        show.as_json({"file": str(path), "name": lab.name, **counts})
        return
    optional = ("networks", "routers")
    there = {what: number for what, number in counts.items() if number or what not in optional}
    told = ", ".join(units.count(number, what[:-1]) for what, number in there.items())
    show.line(f"{path}: ok: {told}")


@app.command(epilog="Example: nsmctl lab schema > lab.schema.json")
def schema(json_: Json = False) -> None:
    """Print the JSON Schema of lab files, for editors to complete them."""
    from labs import schema as grammar

    del json_  # it is JSON anyway
    show.as_json(grammar.document())


@app.command("show", epilog="Example: nsmctl lab show two-nodes")
def show_(file: File, json_: Json = False) -> None:
    """Show a lab with its defaults filled in, its addresses, and the processes it starts."""
    from labs import lab as labfile
    from labs import processes
    from labs.paths import Paths

    lab = labfile.read(labfile.find(file))
    plan = processes.plan(lab, Paths(lab.name))
    whole = {
        **show.plain(asdict(lab)),
        "processes": {
            p.name: {
                "module": " ".join((p.module, *p.argv)).strip(),
                "namespace": p.namespace,
                "gid": p.gid,
                "settings": {k: v for k, v in p.environment.items() if k.startswith("NSM_")},
            }
            for p in plan.processes
        },
        "identities": {e.spiffe_id: {"namespace": e.namespace, "gid": e.gid} for e in plan.entries},
    }
    if json_:
        show.as_json(whole)
        return
    sys.stdout.write(yaml.safe_dump(whole, sort_keys=False, width=100))


# --- making ----------------------------------------------------------------------------------


@app.command(epilog="Example: sudo nsmctl lab run two-nodes")
def run(file: File, name: Name = "", json_: Json = False) -> None:
    """Bring a lab up, run its checks, take it down. Exit code 1 if a check does not hold."""
    show.need_root()
    from labs import engine, state
    from labs.checks import Checks
    from labs.hands import Hands
    from labs.wires import answers, wires

    lab, text, path, paths = _read(file, name)
    with state.locked(paths, create=True), show.taking_back():
        start = time.monotonic()
        try:
            with Hands() as hands:
                checks = Checks(lab, paths, hands)
                with show.progress() as report, checks.watching() as before:
                    # takes itself back if it fails
                    up = engine.up(lab, text, path, report=report, before=before)
                start = time.monotonic()
                there = wires(lab, paths)
                answered = answers(there, paths, hands)
                table = [(wire, answered[wire.id]) for wire in there]
                results = _checked(lab, checks, quiet=json_)
                took = _since_typed()
        finally:
            with engine.undisturbed():
                checks_took = time.monotonic() - start
                if engine.made_by_us(paths):  # not one of that name that was up before
                    with show.progress() as report:
                        gone = engine.down(paths, report=report)
    _tell_run(up, table, results, checks_took, took, gone, json_=json_)
    bad = gone.left or any(not result.holds for result in results)
    show.finish(show.FAILED if bad else show.OK)


def _since_typed() -> float:
    """Seconds since this command began."""
    from labs.alive import started

    now = time.clock_gettime(time.CLOCK_BOOTTIME)
    return now - started(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _checked(lab: "Lab", checks: Any, *, quiet: bool) -> "list[Result]":
    results = []
    with show.progress() as report:
        for one in lab.checks:
            if not quiet:
                report(f"check: {one.name}")
            results.append(checks.run(one))
    return results


@app.command(epilog="Example: sudo nsmctl lab up one-node")
def up(
    file: File,
    name: Name = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Take down the one of that name first.")
    ] = False,
    json_: Json = False,
) -> None:
    """Bring a lab up and leave it running."""
    show.need_root()
    from labs import engine, state

    lab, text, path, paths = _read(file, name)
    with state.locked(paths, create=True), show.taking_back(), show.progress() as report:
        made = engine.up(lab, text, path, replace_it=replace, report=report)
    took = sum(made.seconds.values())
    if json_:
        show.as_json({"lab": lab.name, "seconds": _rounded(made.seconds), "cleaned": made.cleaned})
        return
    cleared = "  (cleared what a crash had left)" if made.cleaned else ""
    show.line(f"{lab.name} is up after {took:.1f} s{cleared}: nsmctl lab status {lab.name}")


@app.command(epilog="Example: sudo nsmctl lab down one-node")
def down(
    name: OnlyLab = "",
    all_: Annotated[bool, typer.Option("--all", help="All labs of this machine.")] = False,
    json_: Json = False,
) -> None:
    """Take a lab down, also one whose engine crashed."""
    show.need_root()
    from labs import engine, state
    from labs.paths import Paths

    told: dict[str, Gone] = {}
    refused: dict[str, NsmError] = {}
    for one in state.labs() if all_ else [_which(name)]:
        try:
            paths = Paths(one)
            with state.locked(paths, create=False) as there, show.progress() as report:
                if there:
                    told[one] = engine.down(paths, report=report)
        except NsmError as refusal:
            if not all_:
                raise
            refused[one] = refusal
    if not told and not all_:
        raise engine.NotUpError(f"lab {name} is not up", hint="nsmctl lab list")
    if json_:
        show.as_json({**told, **{one: show.refusal(why) for one, why in refused.items()}})
    else:
        for one, gone in told.items():
            show.line(f"{one} is down after {gone.seconds:.1f} s, left over: {_left(gone.left)}")
        for why in refused.values():
            show.error(why, json_wanted=False)
        if not told and not refused:
            show.line("no lab is up")
    bad = refused or any(gone.left for gone in told.values())
    show.finish(show.FAILED if bad else show.OK)


def _read(file: str, name: str) -> "tuple[Lab, str, str, Paths]":
    from labs import lab as labfile
    from labs.paths import Paths

    path = labfile.find(file)
    lab = labfile.read(path, name=name)
    return lab, path.read_text(), str(path), Paths(lab.name)


# --- looking ---------------------------------------------------------------------------------


@app.command("list", epilog="Example: nsmctl lab list --json")
def list_(json_: Json = False) -> None:
    """All labs of this machine."""
    from labs import state

    rows = [_summary(name) for name in state.labs()]
    if json_:
        show.as_json(rows)
        return
    for row in rows:
        show.line(_in_words(row))
    if not rows:
        show.line("no lab is up")


@app.command(epilog="Example: sudo nsmctl lab status one-node")
def status(
    name: OnlyLab = "",
    json_: Json = False,
) -> None:
    """A lab's processes and wires. Exit code 1 if something of it is not well."""
    show.need_root()
    from labs import engine, processes, state
    from labs.faults import standing
    from labs.wires import wires

    lab, paths = engine.running(_which(name))
    children = state.born(paths)
    planned = {p.name: p for p in processes.plan(lab, paths).processes}
    due = {n: p for n, p in planned.items() if n in children or not p.later}
    alive = {n: n in children and _is_well(p, children[n]) for n, p in due.items()}
    there = wires(lab, paths)
    later = engine.on_demand(lab, paths)
    broken = standing(paths)
    if json_:
        rows = {
            n: {
                "pid": child.mark.pid,
                "alive": alive[n],
                "ready": child.ready,
                "ready_s": child.seconds,
                "status": child.ended,
            }
            for n, child in children.items()
            if n in alive
        }
        started = {
            n: {"pid": mark.pid if mark else None, "alive": bool(mark and mark.alive)}
            for n, mark in later.items()
        }
        whole = {
            "processes": rows, "on_demand": started, "networks": _networks(lab), "wires": there,
            "faults": broken,
        }  # fmt: skip
        show.as_json({**_summary(lab.name), **whole})
    else:
        show.line(_in_words(_summary(lab.name)))
        for line in broken.lines():
            show.line(f"fault: {line}")
        show.table(
            "",
            ("process", ">pid", "state", ">after ms"),
            [
                (n, c.mark.pid, _state(planned[n], c), _took(c))
                for n, c in children.items()
                if n in planned
            ]
            + [
                (n, mark.pid, "runs, as was asked", "")
                if mark and mark.alive
                else (n, "", "not asked for now", "")
                for n, mark in later.items()
            ],
        )
        _network_table(lab)
        _wire_table([(wire, None) for wire in there])
    show.finish(show.OK if all(alive.values()) else show.FAILED)


def _is_well(process: "Process", child: "Born") -> bool:
    """Whether a process is as it should be: an errand has ended, all others live."""
    return child.ended == 0 if process.is_errand else child.mark.alive


def _networks(lab: "Lab") -> list[dict[str, Any]]:
    """The flat networks of a lab, as its file has them."""
    return [
        {
            "network": network.name,
            "prefixes": network.prefixes,
            "dns": network.dns,
            "routers": [name for name, one in lab.routers.items() if one.network == network.name],
            "members": [
                name for name, one in lab.clients.items() if network in lab.networks_of(one)
            ],
        }
        for network in lab.networks.values()
    ]


def _network_table(lab: "Lab") -> None:
    if lab.networks:
        show.table(
            "flat networks",
            ("network", "prefixes", "names", "routers", "members"),
            [
                (row["network"], ", ".join(row["prefixes"]), row["dns"] or "none",
                 ", ".join(row["routers"]), ", ".join(row["members"]))
                for row in _networks(lab)
            ],
        )  # fmt: skip


def _took(child: "Born") -> str:
    return "" if child.ready is None else f"{1000 * child.seconds:.0f}"


def _state(process: "Process", child: "Born") -> str:
    from labs.faults import stands_still

    if stands_still(child.mark):
        return "stands still"
    if child.mark.alive:
        return "ready" if child.ready is not None else "runs"
    if process.is_errand and child.ended == 0:
        return "done"
    return "gone" if child.ended is None else f"ended ({child.ended})"


def _summary(name: str) -> dict[str, Any]:
    from labs import engine, state
    from labs.paths import Paths

    paths = Paths(name)
    row: dict[str, Any] = {"lab": name, "phase": "nothing", "since": None}
    try:
        now = state.read(paths)
        if now is None:
            return row
        phase = "crashed" if now.crashed else now.phase
        row |= {"phase": phase, "since": now.since, "file": now.file}
        lab = engine.saved(paths)
    except FileNotFoundError:
        return row
    except NsmError as broken:
        return row | {"phase": "broken", "why": broken.message}
    health = engine.node_health(lab, paths)
    told = [line for client in lab.clients for line in state.statuses(paths, client)]
    return row | {
        "nodes": len(health),
        "well": sum(health.values()),
        "clusters": len(lab.clusters),
        "wires": sum(line.get("event") == "up" for line in told),
    }


def _in_words(row: dict[str, Any]) -> str:
    from labs.units import count, since

    if row["phase"] == "nothing" or "nodes" not in row:
        return f"{row['lab']}  {row['phase']}: nsmctl lab down {row['lab']}"
    if row["phase"] == "crashed":
        return f"{row['lab']}  its engine crashed: nsmctl lab down {row['lab']}"
    well = "healthy" if row["well"] == row["nodes"] else f"{row['well']} of {row['nodes']} nodes"
    age = since(time.time() - row["since"])
    return (
        f"{row['lab']}  {row['phase']} {age}  {count(row['nodes'], 'node')}"
        f"  {count(row['clusters'], 'cluster')}  {count(row['wires'], 'wire')}  {well}"
    )


@app.command(
    "exec",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: sudo nsmctl lab exec app -- ip addr",
)
def exec_(
    place: Annotated[
        str,
        typer.Argument(help="A node, endpoint or client.", autocompletion=completion.places),
    ],
    command: Annotated[list[str], typer.Argument(help="What to run there.")],
    lab: LabName = "",
) -> None:
    """Become a command in a node's, endpoint's or client's namespace, under its identity.

    NSM_CONNECT_TO and SPIFFE_ENDPOINT_SOCKET tell it where the mesh is. What it prints and its
    exit status are its own, so there is no --json.
    """
    show.need_root()
    from labs import engine, seats

    there, paths = engine.running(_which(lab))
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        raise InvalidError("no command", hint=f"nsmctl lab exec {place} -- ip addr")
    seats.sit(there, paths, place)
    try:
        os.execvp(command[0], command)  # noqa: S606 - what was asked for
    except OSError as wrong:
        raise InvalidError(f"{command[0]}: {wrong.strerror}") from None


@app.command(epilog="Example: nsmctl lab logs east-1/nsmgr -f")
def logs(
    process: Annotated[
        str,
        typer.Argument(
            help="NODE or NODE/PROC, or a glob; all if left out.",
            autocompletion=completion.processes,
        ),
    ] = "",
    lab: LabName = "",
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on as more comes.")] = False,
    json_: Json = False,
) -> None:
    """Show the logs of a lab's processes."""
    from labs import engine
    from labs.paths import Paths

    if follow and json_:
        raise InvalidError("--json shows what is there and ends", hint="leave out -f, or --json")
    paths = Paths(_which(lab))
    try:
        files = engine.log_files(paths, process)
    except FileNotFoundError:
        engine.running(paths.lab)  # says why not
        raise
    there = [file for file in files if os.path.exists(file)]
    if json_:
        show.as_json({os.path.basename(file): _lines(file) for file in there})
    elif follow:
        subprocess.run(["tail", "-n", "20", "-F", *there], check=False)
    else:
        for file in there:
            for text in _lines(file):
                sys.stdout.write(
                    f"{os.path.basename(file)}: {text}\n" if there[1:] else f"{text}\n"
                )


def _lines(file: str) -> list[str]:
    with open(file, errors="replace") as lines:
        return lines.read().splitlines()


def _which(name: str) -> str:
    """The lab somebody means: the named one, or the only one there is."""
    from labs import engine, state

    there = state.labs()
    if name:
        return name
    if len(there) == 1:
        return there[0]
    if not there:
        raise engine.NotUpError("no lab is up", hint="nsmctl lab up one-node")
    raise InvalidError(f"several labs are up: {', '.join(there)}", hint="say which")


# --- the tables of a run ---------------------------------------------------------------------


def _tell_run(
    up: "Up",
    table: "Sequence[tuple[Wire, Answers]]",
    results: "Sequence[Result]",
    checks_took: float,
    last_check: float,
    gone: "Gone",
    *,
    json_: bool,
) -> None:
    took = sum(up.seconds.values())
    held = sum(result.holds for result in results)
    if json_:
        show.as_json(
            {
                "lab": up.lab.name,
                "up_s": round(took, 3),
                "up": _rounded(up.seconds),
                "wires": [{**asdict(wire), **asdict(answer)} for wire, answer in table],
                "checks": results,
                "held": held,
                "failed": len(results) - held,
                "checks_s": round(checks_took, 3),
                "last_check_s": round(last_check, 3),
                "down_s": round(gone.seconds, 3),
                "left": gone.left,
            }
        )
        return
    _wire_table(table)
    _stage_table([wire for wire, _ in table])
    stages = ", ".join(f"{what} {seconds:.1f}" for what, seconds in up.seconds.items())
    for row in textwrap.wrap(f"coming up, s: {stages}", show.console().width):
        show.line(row)
    show.table(
        "checks",
        ("", "check", ">s", "says"),
        [("ok" if r.holds else "RED", r.name, f"{r.seconds:.1f}", r.says) for r in results],
    )
    show.line("")
    show.line(
        f"{held} checks hold, {len(results) - held} failed  up {took:.1f} s"
        f"  checks {checks_took:.1f} s  last check after {last_check:.1f} s"
        f"  down {gone.seconds:.1f} s  left over: {_left(gone.left)}"
    )


def _wire_table(rows: "Sequence[tuple[Wire, Answers | None]]") -> None:
    if not rows:
        return
    columns: tuple[str, ...] = (
        "client", "service", "endpoint", "nodes", "kind", ">mtu", ">up",
    )  # fmt: skip
    answered = any(answers for _, answers in rows)
    if answered:
        columns = (*columns, ">out", ">back", ">lost")
    show.table(
        "wires; up, out and back in ms",
        columns,
        [
            (
                wire.client,
                wire.service,
                "router" if wire.network else wire.endpoint,  # whose node is in the next column
                "\N{RIGHTWARDS ARROW}".join(dict.fromkeys(wire.nodes)),
                wire.mechanism or "none",
                wire.mtu,
                _ms(wire.ms),
                *(_answer_cells(answers) if answers else ()),
            )
            for wire, answers in rows
        ],
    )


def _answer_cells(answers: "Answers") -> tuple[str, ...]:
    return _ms(answers.there_ms), _ms(answers.back_ms), f"{answers.lost}/{answers.sent}"


def _ms(value: float | None) -> str:
    """At most four characters, so that a slow machine's tables fit as well."""
    if value is None:
        return "none"
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


_SHORT: Final = {"handshake": "keys", "identity": "id"}


def _stage_table(wires: "Sequence[Wire]") -> None:
    stages = list(dict.fromkeys(stage for wire in wires for stage in wire.stages))
    if not stages:
        return
    show.table(
        "set-up by stage, ms",
        # short words, because the table would not fit 80 columns
        ("wire", *(f">{_SHORT.get(stage, stage)}" for stage in stages)),
        [
            (wire.id, *(_ms(wire.stages[s]) if s in wire.stages else "" for s in stages))
            for wire in wires
        ],
    )


def _left(left: Sequence[str]) -> str:
    return f"{len(left)}" + (f" ({', '.join(left)})" if left else "")


def _rounded(seconds: Any) -> dict[str, float]:
    return {what: round(value, 4) for what, value in dict(seconds).items()}

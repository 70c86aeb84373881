"""`nsmctl chaos`: a lab that is broken in every way, and whether it holds."""

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from nsm.errors import InvalidError
from nsmctl import completion, show

if TYPE_CHECKING:
    from labs.chaos import Outcome
    from labs.lab import Lab
    from labs.schedule import Fault

app = typer.Typer(
    help="Break a lab in every way, and see whether it holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]
Save = Annotated[
    str,
    typer.Option("--save", help="Where to write a schedule that does harm. [chaos-LAB-SEED.yaml]"),
]


@app.command(epilog="Example: sudo nsmctl chaos run chaos --seed 7 --minutes 10")
def run(
    lab: Annotated[
        str,
        typer.Argument(
            help="A lab file, or the name of a shipped one.", autocompletion=completion.shipped
        ),
    ],
    seed: Annotated[int, typer.Option("--seed", help="The same number, the same schedule.")] = 1,
    minutes: Annotated[
        float, typer.Option("--minutes", min=0.05, max=10_000, help="How long at most.")
    ] = 1.0,
    name: Annotated[str, typer.Option("--name", help="Call the lab so.")] = "",
    save: Save = "",
    json_: Json = False,
) -> None:
    """Bring a lab up, break it for so long, take it down. Exit code 1 if it does not hold."""
    show.need_root()
    from labs import lab as labfile
    from labs import schedule
    from labs.paths import Paths

    path = labfile.find(lab)
    made = labfile.read(path, name=name)
    faults = schedule.drawn(seed, minutes, schedule.site(made, Paths(made.name)))
    _go(made, path.read_text(), lab, faults, seed, minutes, save, json_=json_)


@app.command(epilog="Example: sudo nsmctl chaos replay chaos-chaos-7.yaml")
def replay(
    file: Annotated[str, typer.Argument(help="What `chaos run` wrote, or a part of it.")],
    name: Annotated[str, typer.Option("--name", help="Call the lab so.")] = "",
    save: Save = "",
    json_: Json = False,
) -> None:
    """Go through the faults of a file, as they are there. Exit code 1 if it does not hold."""
    show.need_root()
    from labs import lab as labfile
    from labs import schedule
    from labs.paths import Paths

    try:
        with open(file) as source:
            said = yaml.safe_load(source)
    except yaml.YAMLError as wrong:
        raise InvalidError(f"{file} is no YAML: {wrong}") from None
    if not isinstance(said, dict) or not isinstance(said.get("lab"), str):
        raise InvalidError(f"{file} names no lab", hint="it is a file that `chaos run` wrote")
    path = labfile.find(said["lab"])
    made = labfile.read(path, name=name)
    faults = schedule.read(said.get("faults"), schedule.site(made, Paths(made.name)), file)
    _go(made, path.read_text(), said["lab"], faults, said.get("seed"), 0.0, save, json_=json_)


def _go(
    lab: "Lab",
    text: str,
    file: str,
    faults: "Sequence[Fault]",
    seed: object,
    minutes: float,
    save: str,
    *,
    json_: bool,
) -> None:
    from labs import engine, state
    from labs.chaos import Chaos
    from labs.paths import Paths

    paths = Paths(lab.name)
    save = save or f"chaos-{lab.name}-{'again' if not minutes else seed}.yaml"
    if minutes and not json_:
        show.line(f"seed {seed}: {len(faults)} faults in {minutes:g} min at most")
    with state.locked(paths, create=True), show.taking_back():
        try:
            with show.progress() as report:
                engine.up(lab, text, file, report=report)
                until = time.monotonic() + (minutes * 60 if minutes else 1e9)
                with Chaos(lab, paths, report) as chaos:
                    outcome = chaos.run(faults, until)
                if outcome.broke:
                    _written(save, file, seed, outcome)
                    _kept(paths.folder, save)
        finally:
            with engine.undisturbed():
                if engine.made_by_us(paths):
                    with show.progress() as report:
                        gone = engine.down(paths, report=report)
    _tell(outcome, gone.left, save, json_=json_, seed=seed)
    show.finish(show.FAILED if outcome.broke or gone.left else show.OK)


def _written(save: str, file: str, seed: object, outcome: "Outcome") -> None:
    """What was done until it broke, for `chaos replay`."""
    from labs.schedule import written

    assert outcome.broke is not None
    whole: dict[str, Any] = {
        "lab": os.path.abspath(file) if os.path.exists(file) else file,
        "seed": seed,
        "broke": {
            "invariant": outcome.broke.invariant,
            "after": f"fault {outcome.broke.after}, {outcome.broke.seconds} s after the first",
            "evidence": list(outcome.broke.evidence),
        },
        "faults": written(outcome.done),
    }
    with open(save, "w") as out:
        yaml.safe_dump(whole, out, sort_keys=False, width=100, allow_unicode=True)


def _kept(folder: str, save: str) -> None:
    """The programs' logs beside the schedule: the lab's own go with it."""
    logs = f"{save.removesuffix('.yaml')}.logs"
    shutil.rmtree(logs, ignore_errors=True)
    shutil.copytree(f"{folder}/log", logs)


def _tell(outcome: "Outcome", left: Sequence[str], save: str, *, json_: bool, seed: object) -> None:
    if json_:
        show.as_json(
            {
                "seed": seed,
                "seconds": round(outcome.seconds, 1),
                "faults": [str(one) for one in outcome.done],
                "packets": {"arrived": outcome.arrived, "lost_where_cut": outcome.lost},
                "healed": outcome.healing(),
                "asked": outcome.asked,
                "held": outcome.held,
                "broke": {**asdict(outcome.broke), "file": save} if outcome.broke else None,
                "left": list(left),
            }
        )
        return
    healed = outcome.healing()
    cut = ""
    if healed["n"]:
        cut = f", wires that were cut carried again {healed['max_s']} s later at most"
        cut += f" ({healed['moved']} of {healed['n']} with other addresses)" * bool(healed["moved"])
    show.line(
        f"{len(outcome.done)} faults in {outcome.seconds:.0f} s{cut}; {outcome.arrived} packets"
        f" each way and none lost where none may be; {outcome.made} wires asked for and closed,"
        f" {outcome.refused} requests refused"
        if not outcome.broke
        else f"{len(outcome.done)} faults in {outcome.seconds:.0f} s{cut}"
    )
    if outcome.held and not outcome.broke:
        show.table(
            "",
            ("process", ">PSS MiB", ">fds", ">tasks", ">threads"),
            [
                (
                    name,
                    " - ".join(f"{kib / 1024:.1f}" for kib in of["pss_kib"]),
                    *(
                        " - ".join(f"{n:g}" for n in of.get(what, ()))
                        for what in ("fds", "tasks", "threads")
                    ),
                )
                for name, of in outcome.held.items()
            ],
        )
    if broke := outcome.broke:
        show.line(f"does not hold: {broke.invariant}, after fault {broke.after}:")
        for line in broke.evidence:
            show.line(f"  {line}")
        show.line(f"again: nsmctl chaos replay {save}    logs: {save.removesuffix('.yaml')}.logs")
    if left:
        show.line(f"left over: {', '.join(left)}")

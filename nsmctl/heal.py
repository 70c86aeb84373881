"""`nsmctl heal report`: how often wires were lost, why, and how soon they were back."""

import glob
import os
from typing import Annotated

import typer

from nsm.errors import InvalidError
from nsmctl import show
from nsmctl.asking import Json, Lab

_SAID = 5  # lines that are no outages, of which each is said why
app = typer.Typer(no_args_is_help=True, help="How wires were lost, and healed.")


@app.callback()
def heal() -> None:
    """How wires were lost, and healed."""


@app.command(epilog="Example: sudo nsmctl heal report --lab two-nodes")
def report(
    files: Annotated[
        list[str] | None,
        typer.Argument(envvar="NSM_OUTAGE_LOG", help="What clients wrote, without --lab."),
    ] = None,
    lab: Lab = "",
    json_: Json = False,
) -> None:
    """For each cause: how many, how soon noticed and healed, the median and the longest.

    A 99th percentile is said of 300 outages or more. Lost are those that were given up;
    no packets flowed in those that are cut. Lines that are no outages are told on stderr, and
    count for nothing.
    """
    from nsm import outages

    if lab:
        from labs import engine

        _, paths = engine.running(lab)
        files = sorted(
            {one.removesuffix(".1") for one in glob.glob(glob.escape(paths.outages("")) + "*")}
        )
    elif not files:
        raise InvalidError(
            "no file is named", hint="--lab NAME, or the files clients write: NSM_OUTAGE_LOG"
        )
    refused: list[str] = []
    found = outages.summed(outages.read(files, refused.append))
    for sentence in refused[:_SAID]:
        show.warning(sentence)
    if len(refused) > _SAID:
        show.warning(f"and {len(refused) - _SAID} more lines are none")
    if json_:
        show.as_json(found)
        return
    if not found:
        missing = [one for one in files if not os.path.exists(one)]  # or it has another name
        show.line("no outage" + f"; not there: {', '.join(missing)}" * bool(missing))
        return
    rows = [
        (
            one.cause.value,
            one.n,
            one.lost,
            one.cut,
            _s(one.noticed_median),
            _s(one.noticed_max),
            _s(one.healed_median),
            _s(one.healed_max),
            _s(one.healed_p99),
        )
        for one in found
    ]
    heads = (">noticed", ">max", ">healed", ">max", ">p99")
    show.table("", ("cause", ">n", ">lost", ">cut", *heads), rows)


def _s(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.2f} s"

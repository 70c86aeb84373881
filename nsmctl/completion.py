"""What the shell offers at Tab: labs that are shipped, labs that are up, who is in them.

A shell asks while somebody types, so what cannot be found out is not offered, and
nothing is said about it.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import typer

from nsm.errors import NsmError

if TYPE_CHECKING:  # what touches Linux is imported where it is used
    from labs.lab import Lab
    from labs.paths import Paths


def shipped(incomplete: str) -> list[str]:
    """Labs that come with vwire; where none fits, the shell offers files."""
    from labs import lab as labfile

    names = [path.stem for path in labfile.shipped_files()]
    if incomplete.startswith(labfile.EXAMPLES):  # else they would bury the others
        names += [f"{labfile.EXAMPLES}/{id_}" for id_ in labfile.examples()]
    return _fitting(names, incomplete)


def up(incomplete: str) -> list[str]:
    """Labs of this machine."""
    return _fitting(_up(), incomplete)


def places(context: typer.Context, incomplete: str) -> list[str]:
    """Nodes, endpoints and clients of the lab that is meant."""
    return _fitting(_of_lab(context, lambda lab, _: lab.places), incomplete)


def processes(context: typer.Context, incomplete: str) -> list[str]:
    """NODE/PROC of the lab that is meant."""

    def names(lab: "Lab", paths: "Paths") -> Iterable[str]:
        from labs import processes

        return [process.name for process in processes.plan(lab, paths).processes]

    return _fitting(_of_lab(context, names), incomplete)


def faulty(context: typer.Context, incomplete: str) -> list[str]:
    """Whom `lab fault` can mean."""

    def names(lab: "Lab", paths: "Paths") -> Iterable[str]:
        from labs.faults import Faults

        return Faults(lab, paths).names

    return _fitting(_of_lab(context, names), incomplete)


def _up() -> list[str]:
    with suppress(ImportError, OSError):
        from labs import state

        return state.labs()
    return []


def _of_lab(
    context: typer.Context, names: Callable[["Lab", "Paths"], Iterable[str]]
) -> Iterable[str]:
    """What names finds in the lab that --lab says, or in the only one."""
    said = context.params.get("lab")
    there = [said] if said else _up()
    if len(there) != 1:
        return ()
    with suppress(ImportError, OSError, NsmError):
        from labs import engine
        from labs.paths import Paths

        paths = Paths(there[0])
        return names(engine.saved(paths), paths)
    return ()


def _fitting(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))

"""`nsmctl run`: one process of the mesh in the foreground, settings from the environment."""

import os
import sys
from enum import StrEnum
from typing import Annotated, Final

import typer


class Program(StrEnum):
    """What can be run."""

    registry = "registry"
    nsmgr = "nsmgr"
    forwarder = "forwarder"
    responder = "responder"
    client = "client"
    issuer = "issuer"


MODULES: Final = {
    Program.registry: "registry",
    Program.nsmgr: "nsmgr",
    Program.forwarder: "forwarder",
    Program.responder: "endpoints.responder",
    Program.client: "nsm.process.client",
    Program.issuer: "nsm.process.issuer",
}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(epilog="Example: NSM_LISTEN_ON=tcp://:5002 nsmctl run registry")(run)


def run(
    process: Annotated[Program, typer.Argument(help="Which of the mesh's processes.")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="After --: --help lists its variables, --check shows what they are."),
    ] = None,
) -> None:
    """Become one of the mesh's processes, told what to do by its NSM_... variables.

    What it prints and its exit status are its own, so there is no --json.
    """
    # `-P`: a folder of that name in the working directory must not be taken for it
    command = [sys.executable, "-P", "-m", MODULES[process], *(arguments or [])]
    os.execv(sys.executable, command)  # noqa: S606

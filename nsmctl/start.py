"""`nsmctl run`: one process of the mesh in the foreground, settings from the environment."""

import os
import sys
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from nsm.errors import InvalidError


class Program(StrEnum):
    """What can be run."""

    registry = "registry"
    registry_proxy = "registry-proxy"
    nsmgr = "nsmgr"
    nsmgr_proxy = "nsmgr-proxy"
    forwarder = "forwarder"
    responder = "responder"
    vl3 = "vl3"
    supplier = "supplier"
    ipam = "ipam"
    client = "client"
    issuer = "issuer"


MODULES: Final = {
    Program.registry: "registry",
    Program.registry_proxy: "registry.proxy",
    Program.nsmgr: "nsmgr",
    Program.nsmgr_proxy: "nsmgr.proxy",
    Program.forwarder: "forwarder",
    Program.responder: "endpoints.responder",
    Program.vl3: "endpoints.vl3",
    Program.supplier: "endpoints.supplier",
    Program.ipam: "endpoints.ipam",
    Program.client: "nsm.process.client",
    Program.issuer: "nsm.process.issuer",
}


class _Passing(TyperCommand):
    """What stands behind the process is for it: `run registry --help` is the registry's help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[1:2] != ["--"]:
            args = [args[0], "--", *args[1:]]
        left: list[str] = super().parse_args(ctx, args)
        return left


def _programs(incomplete: str) -> list[str]:
    return [one for one in Program if one.startswith(incomplete)]


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(cls=_Passing, epilog="Example: NSM_LISTEN_ON=tcp://:5002 nsmctl run registry")(run)


def run(
    process: Annotated[  # as a Program its help would be wider than a terminal
        str, typer.Argument(help=f"One of {', '.join(Program)}.", autocompletion=_programs)
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Its own: --help lists its variables, --check shows what they are."),
    ] = None,
) -> None:
    """Become one of the mesh's processes, told what to do by its NSM_... variables.

    What it prints and its exit status are its own, so there is no --json.
    """
    try:
        module = MODULES[Program(process)]
    except ValueError:
        raise InvalidError(
            f"there is no program {process!r}", hint=f"one of {', '.join(Program)}"
        ) from None
    # `-P`: a folder of that name in the working directory must not be taken for it
    command = [sys.executable, "-P", "-m", module, *(arguments or [])]
    os.execv(sys.executable, command)  # noqa: S606

"""`nsmctl`: everything a person does with the mesh.

Exit codes: 0 ok, 1 a check or the mesh said no, 2 asked wrongly, 3 this machine
cannot, 4 not running, 130 Ctrl-C.
"""

import errno
import platform
import sys
from importlib import metadata
from typing import Annotated

import typer

from nsm.errors import InternalError, NsmError
from nsm.process.origins import refuse_foreign
from nsmctl import chaos, define, doctor, explain, heal, lab, leaks, mesh, show, start, units, vl3

UPSTREAM = "sdk 9ac672ca, api ad7e9c4"  # whose protocol we follow

app = typer.Typer(
    name="nsmctl",
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(lab.app, name="lab")
app.add_typer(chaos.app, name="chaos")
app.add_typer(heal.app, name="heal")
app.add_typer(vl3.app, name="vl3")
app.add_typer(units.app, name="systemd")
doctor.register(app)
mesh.register(app)
explain.register(app)
leaks.register(app)
define.register(app)
start.register(app)


def _own_version() -> str:
    try:
        return metadata.version("vwire")
    except metadata.PackageNotFoundError:
        return "(not installed: a source tree)"


def _version(wanted: bool) -> None:
    if wanted:
        show.line(
            f"vwire {_own_version()}, Network Service Mesh protocol of {UPSTREAM},"
            f" Python {platform.python_version()}, {platform.system()} {platform.release()}"
        )
        raise typer.Exit


@app.callback()
def nsmctl(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print versions and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Virtual wires between workloads: try them in a lab, ask for them, look at them."""


def main() -> None:
    """Run the command; errors become sentences and exit codes."""
    try:
        refuse_foreign()
        app(prog_name="nsmctl")
    except NsmError as failure:
        _tell(failure)
        sys.exit(show.exit_code(failure))
    except OSError as failure:
        if failure.errno not in (errno.EIO, errno.EPIPE):  # else nobody reads what went wrong
            _tell(InternalError(f"{failure.filename or 'the machine'}: {failure.strerror}"))
        sys.exit(show.FAILED)


def _tell(failure: NsmError) -> None:
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    show.error(failure, json_wanted="--json" in own)

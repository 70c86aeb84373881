"""`nsmctl systemd`: the programs as services of a plain machine (docs/systemd.md)."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

import typer

import nsm
from nsm.errors import InternalError
from nsm.process.folders import make_open
from nsmctl import show

SHIPPED: Final = Path(__file__).parent / "systemd"  # what deploy/systemd holds
PYTHON: Final = "/opt/vwire/bin/python"  # in the units, as they are shipped
UNITS: Final = Path("/etc/systemd/system")
USERS: Final = Path("/etc/sysusers.d/vwire.conf")
SETTINGS: Final = Path("/etc/vwire")
PROGRAMS: Final = ("vwire-issuer", "vwire-registry", "vwire-nsmgr", "vwire-forwarder")
STATE: Final = (
    SETTINGS,
    Path("/var/lib/vwire"),
    *(Path("/run/vwire", name) for name in ("issuer", "forwarder", "wireguard")),
)
EMPTY: Final = (  # or it is others' too
    Path("/run/vwire"),
    Path("/run/wireguard"),
    Path("/var/lib/networkservicemesh"),
)
BOOTED: Final = Path("/run/systemd/system")  # as sd_booted(3) asks
HIDDEN: Final = ("/home", "/root", "/run/user")  # by ProtectHome=
app = typer.Typer(no_args_is_help=True, help="Install the programs as services, or take them away.")
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON.")]


@app.command(epilog="Example: sudo /opt/vwire/bin/nsmctl systemd install")
def install(json_: Json = False) -> None:
    """Write the units, make their users, and start nothing.

    Units are written anew; settings in /etc/vwire that are there already stay as they are.
    """
    _need_systemd()
    python = _python(sys.executable)
    wrote, kept = [], []
    for source in sorted(SHIPPED.iterdir()):
        target, is_setting = _place(source.name)
        if is_setting and target.exists():
            kept.append(str(target))
            continue
        make_open(target.parent)
        target.write_text(source.read_text().replace(PYTHON, python))
        target.chmod(0o644)
        wrote.append(str(target))
    _run("systemd-sysusers", str(USERS))
    _run("systemctl", "daemon-reload")
    if json_:
        show.as_json({"wrote": wrote, "kept": kept, "python": python})
        return
    for path in wrote:
        show.line(f"wrote {path}")
    for path in kept:
        show.line(f"kept {path}")
    show.line(f"look at {SETTINGS}, then: systemctl enable --now {' '.join(PROGRAMS)}")


@app.command(epilog="Example: sudo /opt/vwire/bin/nsmctl systemd uninstall --purge")
def uninstall(
    purge: Annotated[bool, typer.Option("--purge", help="Settings, state and users too.")] = False,
    json_: Json = False,
) -> None:
    """Stop the programs and take their units away. Wires stay until their workloads end."""
    _need_systemd()
    units = [unit for unit in reversed(PROGRAMS) if (UNITS / f"{unit}.service").exists()]
    if units:
        _run("systemctl", "disable", "--now", *units)
        _tried("systemctl", "reset-failed", *units)  # or they stay listed as not found
    removed = [str(path) for path in _leftovers(purge=purge) if _removed(path)]
    for user in PROGRAMS if purge else ():
        if _exists(user):
            _run("userdel", "--force", user)  # wireguard-go runs on, with its wire
            removed.append(f"user {user}")
    _run("systemctl", "daemon-reload")
    if json_:
        show.as_json({"removed": removed})
        return
    for what in removed:
        show.line(f"removed {what}")


def _place(name: str) -> tuple[Path, bool]:
    """Where a shipped file goes, and whether it is for people to change."""
    if name.endswith(".service"):
        return UNITS / name, False
    if name == "vwire-users.conf":
        return USERS, False
    return SETTINGS / name.removeprefix("vwire-"), True


def _leftovers(*, purge: bool) -> Iterator[Path]:
    for unit in PROGRAMS:
        yield UNITS / f"{unit}.service"
        if purge:
            yield UNITS / f"{unit}.service.d"
    yield USERS
    if purge:
        yield from STATE
        yield from EMPTY


def _removed(path: Path) -> bool:
    """Whether it was there, and is no more."""
    try:
        if path in EMPTY:
            path.rmdir()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        return False
    except OSError:
        if path in EMPTY:
            return False
        raise
    return True


def _exists(user: str) -> bool:
    import pwd  # which Windows lacks

    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True


def _need_systemd() -> None:
    if not BOOTED.is_dir():
        raise show.MachineCannotError(
            "no systemd runs this machine", hint="start each program with: nsmctl run"
        )
    if os.geteuid() != 0:
        raise show.MachineCannotError(f"writes to /etc, as root: {show.again_as_root()}")


def _python(executable: str) -> str:
    """The Python the units start; MachineCannotError where their users could not."""
    for path in (executable, os.path.realpath(executable), str(nsm.__path__[0])):
        for folder in Path(path).parents:
            closed = not folder.stat().st_mode & 0o001
            if closed or str(folder) in HIDDEN:
                raise show.MachineCannotError(
                    f"the units' users cannot reach {path}: {folder} is closed to them",
                    hint="install vwire where everybody may read it: umask 022 &&"
                    " python3 -m venv /opt/vwire && /opt/vwire/bin/pip install dist/vwire-*.whl",
                )
    return executable


def _run(*command: str) -> None:
    done = _tried(*command)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()
        raise InternalError(f"{' '.join(command)}: {said or f'exit {done.returncode}'}")


def _tried(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, check=False)

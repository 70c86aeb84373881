"""What a lab has made, on disk before it is made, so that anybody can take it back.

The engine may be killed at any moment, the machine may lose power. Whoever comes
next finds in /run/vwire/labs/NAME which namespaces and processes there are or could
be, and holds the folder's lock while changing any of it.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from labs.alive import Mark, started
from labs.paths import ROOT, Paths, is_name
from nsm.errors import InternalError, InvalidError, RightsError, TakenError
from nsm.process.folders import make_open

SCHEMA: Final = 2
_FRESH: Final = ".new"  # behind a file's name until it is whole


@dataclass(frozen=True, slots=True)
class State:
    """One lab, as its newest engine left it."""

    lab: str
    file: str
    phase: str  # making, up, going
    since: float  # seconds since 1970
    engine: Mark
    namespaces: Mapping[str, int] = field(default_factory=dict)  # cookie; 0: not known to be made
    schema: int = SCHEMA

    @property
    def crashed(self) -> bool:
        """Whether whoever was making or removing it is gone."""
        return self.phase != "up" and not self.engine.alive


@dataclass(frozen=True, slots=True)
class Born:
    """A process of a lab, from its journal."""

    name: str
    mark: Mark
    ready: str | None  # what it said; None if it has not said it yet
    seconds: float  # from its birth until it was ready
    ended: int | None  # exit status; negative: the signal


def me() -> Mark:
    """This process."""
    return Mark(os.getpid(), started(os.getpid()))


def write(paths: Paths, state: State) -> None:
    """Replace the state in one step."""
    put(paths.state, json.dumps(asdict(state), indent=1))


def put(path: str, text: str) -> None:
    """Replace a file in one step: whoever is killed meanwhile leaves no half of it."""
    fresh = f"{path}{_FRESH}"
    with open(fresh, "w") as file:
        file.write(text)
    os.replace(fresh, path)


def read(paths: Paths) -> State | None:
    """The state of a lab, or None if there is none (yet).

    Raises InternalError for one of another version, InvalidError for one that is broken.
    """
    try:
        with open(paths.state) as file:
            data: dict[str, Any] = json.load(file)
        version = data["schema"]
        if version == SCHEMA:
            return State(**{**data, "engine": Mark(**data["engine"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InvalidError(
            f"{paths.state} is broken", hint=f"nsmctl lab down {paths.lab}"
        ) from None
    raise InternalError(
        f"{paths.state} is of version {version}, this one knows {SCHEMA}",
        hint="use the version that made the lab",
    )


def born(paths: Paths) -> dict[str, Born]:
    """All processes of a lab by name, the newest of each; a broken last line is left out."""
    found: dict[str, Born] = {}
    with contextlib.suppress(FileNotFoundError), open(paths.processes) as file:
        for line in file:
            if not line.endswith("\n"):
                break
            event = json.loads(line)
            name = event["name"]
            match event["event"]:
                case "born":
                    mark = Mark(event["pid"], event["start"])
                    found[name] = Born(name, mark, None, 0.0, None)
                case "ready":
                    found[name] = replace(
                        found[name], ready=event["says"], seconds=event["seconds"]
                    )
                case "ended" if found[name].mark.pid == event["pid"]:
                    found[name] = replace(found[name], ended=event["status"])
    return found


def supplied(folder: str, name: str) -> Mark | None:
    """The router of that name which a supplier has started, as it noted it in its folder."""
    try:
        with open(f"{folder}/{quote(name, safe='@')}.json") as file:
            told = json.load(file)
            return Mark(told["pid"], told["start"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise InvalidError(f"{file.name} is broken") from None


def statuses(paths: Paths, client: str) -> list[dict[str, Any]]:
    """The newest line of each wire a client told of."""
    newest: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError), open(paths.status(client)) as file:
        for line in file:
            with contextlib.suppress(ValueError):  # a line being written
                told = json.loads(line)
                newest[told["id"]] = told
    return list(newest.values())


def labs(root: str = ROOT) -> list[str]:
    """The names of all labs there are."""
    try:
        folders = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(name for name in folders if is_name(name))


@contextlib.contextmanager
def locked(paths: Paths, *, create: bool) -> Iterator[bool]:
    """Hold a lab's folder. Yields whether there is one; create makes it.

    The lock is the folder's own, so that none is left when it is removed. Raises
    TakenError while somebody else holds it, DeniedError without the rights.
    """
    fd = _lock(paths, create=create)
    if fd is None:
        yield False
        return
    try:
        yield True
    finally:
        os.close(fd)


def _lock(paths: Paths, *, create: bool) -> int | None:
    while True:
        try:
            if create:
                # /run/vwire, above it, is also where services of other users keep their sockets
                make_open(Path(paths.folder))
            fd = os.open(paths.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if create:
                continue  # removed by somebody between the two calls
            return None
        except PermissionError:
            raise RightsError(f"may not write {paths.folder}", hint="labs need root") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as busy:
            os.close(fd)
            if busy.errno != errno.EWOULDBLOCK:
                raise
            raise _busy(paths) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(paths.folder)):
                return fd
        os.close(fd)  # the folder we hold was removed meanwhile; another may be there


def _busy(paths: Paths) -> TakenError:
    state = None
    with contextlib.suppress(InvalidError):
        state = read(paths)
    if state is None:
        return TakenError(f"lab {paths.lab} is being made by somebody else", hint="wait for it")
    doing = {"making": "brought up", "up": "used", "going": "taken down"}[state.phase]
    when = time.strftime("%H:%M:%S", time.localtime(state.since))
    return TakenError(
        f"lab {paths.lab} is being {doing} by pid {state.engine.pid} since {when}",
        hint="wait for it, stop that process, or take another name with --name",
    )


def is_foreign(paths: Paths) -> bool:
    """Whether the folder is none of a lab: there is no state in it, but something else."""
    try:
        names = set(os.listdir(paths.folder))
    except FileNotFoundError:
        return False
    own = os.path.basename(paths.state)
    return bool(names - {f"{own}{_FRESH}"}) and own not in names


def remove(paths: Paths) -> None:
    """Remove all files of a lab, and the folder of labs if it was the last."""
    shutil.rmtree(paths.folder, ignore_errors=True)
    for folder in (paths.root, os.path.dirname(paths.root)):
        with contextlib.suppress(OSError):
            os.rmdir(folder)

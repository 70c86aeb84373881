"""Starting routers so that they outlive us, and finding those that an earlier life started.

A router gets a session of its own, and nothing of ours but its log. It waits for a line on its
standard input before it begins: until its number and start time are in its state file nobody
could find it, and a second one would be started. Should we be killed in between, that line
never comes and it ends. Whether it serves it says in its health file, to each of our lives.

All of this blocks and belongs in a thread, but for what waits.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import quote

import structlog

from endpoints.supplier import recipes
from endpoints.supplier.recipes import Recipe
from nsm.errors import InvalidError, NsmError, PreconditionError, RightsError, TakenError
from nsm.kernel.namespaces import NAMED, create_named
from nsm.process.alive import Mark, started
from nsm.process.health import SERVING
from nsm.process.words import last_words

GATE: Final = 'read _ && exec "$@" </dev/null'
LONGEST: Final = 1024 * 1024  # bytes of a routers file
LARGEST_LOG: Final = 4 << 20  # bytes; as much again in the one before it
journal = structlog.get_logger(__name__)


@dataclass(eq=False)
class Child:
    """A router's process; health is its file, empty where it knows of none."""

    mark: Mark
    pidfd: int
    log: str
    said_before: int  # bytes of the log that are not its own
    health: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def serving(self) -> bool:
        """Whether it says that it serves; one that knows of no health file never says no."""
        if not self.health:
            return True
        try:  # it is another's file: what is no file must not make us wait
            fd = os.open(self.health, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        with open(fd, "rb") as file:
            return file.read(64).strip() == SERVING.encode()

    async def ended(self) -> int | None:
        """Wait for its end: its exit code, minus its signal, or None where that is not told us."""
        loop, over = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.pidfd, over.set)
        try:
            await over.wait()
        finally:
            loop.remove_reader(self.pidfd)
        return self.process.wait() if self.process else None

    def words(self) -> str:
        """What it said last."""
        return last_words(self.log, after=self.said_before)

    def release(self) -> None:
        """Let go of it; it goes on."""
        os.close(self.pidfd)
        if self.process and self.process.returncode is None:
            self.process.returncode = 0  # it outlives us on purpose


class House:
    """The routers' files: state, logs, and a lock, so that a node has one supplier for them.

    inherited is what each router is told beside its recipe's environment.
    """

    def __init__(self, folder: str, inherited: Mapping[str, str]) -> None:
        self.folder = folder
        self._inherited = dict(inherited)
        self._lock = -1

    def __enter__(self) -> "House":
        try:
            os.makedirs(self.folder, mode=0o755, exist_ok=True)
            _private(self.folder, "NSM_STATE_DIR")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._lock = os.open(f"{self.folder}/lock", flags, 0o600)
        except OSError as error:
            raise PreconditionError(
                f"NSM_STATE_DIR is {self.folder}, which cannot be used: {error.strerror}"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise TakenError(
                f"another supplier runs with NSM_STATE_DIR={self.folder}",
                hint="one is enough for a node; give a second one a directory of its own",
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def log_of(self, recipe: Recipe) -> str:
        """Where the router's words go."""
        return recipe.log or self._file(recipe, "log")

    def find(self, recipe: Recipe) -> tuple[Child | None, bool]:
        """The router that runs, and whether one was noted, be it that it has ended."""
        try:
            with open(self._file(recipe, "json"), encoding="utf-8") as file:
                told = json.load(file)
            mark = Mark(int(told["pid"]), int(told["start"]))
        except FileNotFoundError:
            return None, False
        except (ValueError, KeyError, TypeError):  # cut short: it was never let go
            return None, False
        try:
            pidfd = os.pidfd_open(mark.pid)
        except OSError:
            return None, True
        if not mark.alive:  # looked at after opening: now the pidfd cannot be another's
            os.close(pidfd)
            return None, True
        log = self.log_of(recipe)
        return Child(mark, pidfd, log, _size(log), self._health(recipe)), True

    def forget(self, recipe: Recipe) -> None:
        """It has ended."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._file(recipe, "json"))

    def start(self, recipe: Recipe) -> Child:
        """Start it. Raises PreconditionError, RightsError: whose, and what the machine lacks."""
        whose = f"router {recipe.name} of {recipe.service}"
        if recipe.namespace:
            _make_namespace(recipe.namespace, whose)
        log = self.log_of(recipe)
        try:
            return self._start(recipe, log)
        except PermissionError as error:
            raise RightsError(
                f"{whose} cannot be started: {error.strerror}"
                f"{f' ({error.filename})' if error.filename else ''}",
                hint=f"see {recipe.where}; to start it as another user or group needs root",
            ) from error
        except OSError as error:
            raise PreconditionError(
                f"{whose} cannot be started: {error.strerror}"
                f"{f' ({error.filename})' if error.filename else ''}",
                hint=f"see {recipe.where}",
            ) from error

    def _start(self, recipe: Recipe, log: str) -> Child:
        self._prepare(recipe)
        with contextlib.ExitStack() as closes:
            out = _own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            closes.callback(os.close, out)
            undo = closes.enter_context(contextlib.ExitStack())
            size = _size(log)
            process = subprocess.Popen(
                ["/bin/sh", "-c", GATE, recipe.name, *_command(recipe)],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                cwd="/",
                env=self._environment(recipe),
                start_new_session=True,
                umask=0o022,
                user=recipe.uid,
                group=recipe.gid,
                extra_groups=None if recipe.gid is None and recipe.uid is None else [],
            )
            assert process.stdin is not None
            undo.callback(process.wait)  # its gate is closed before: it ends
            undo.callback(process.stdin.close)
            pidfd = os.pidfd_open(process.pid)
            undo.callback(os.close, pidfd)
            mark = Mark(process.pid, started(process.pid))
            self._note(recipe, mark)
            process.stdin.write(b"\n")
            process.stdin.close()
            undo.pop_all()
        return Child(mark, pidfd, log, size, self._health(recipe), process)

    def _prepare(self, recipe: Recipe) -> None:
        """A folder in which only the router writes, without what an earlier one wrote there."""
        if health := self._health(recipe):
            folder = os.path.dirname(health)
            shutil.rmtree(folder, ignore_errors=True)
            os.mkdir(folder, 0o755)
            if recipe.uid is not None:
                os.chown(folder, recipe.uid, -1)

    def _health(self, recipe: Recipe) -> str:
        return "" if recipe.argv else self._file(recipe, "d/health")  # upstream's know of none

    def _environment(self, recipe: Recipe) -> dict[str, str]:
        own = {"NSM_NAME": recipe.name, "NSM_SERVICE_NAMES": recipe.service}
        if recipe.namespace:
            own["NSM_NAMESPACE"] = recipe.namespace
        if not recipe.argv:
            own["NSM_HEALTH_FILE"] = self._health(recipe)
            own["PYTHONPATH"] = _home()  # the same code as ours, wherever that lies
        return {**self._inherited, **recipe.environment, **own}

    def _note(self, recipe: Recipe, mark: Mark) -> None:
        file = self._file(recipe, "json")
        with open(f"{file}~", "w", encoding="utf-8") as text:
            json.dump({"pid": mark.pid, "start": mark.start, "service": recipe.service}, text)
        os.replace(f"{file}~", file)

    def _file(self, recipe: Recipe, kind: str) -> str:
        return f"{self.folder}/{quote(recipe.name, safe='@')}.{kind}"


def bound(logs: Sequence[str]) -> None:
    """Empty each log that has grown too large into the one before it.

    Its folder may be the router's: no link there leads us to what only we may write.
    """
    for log in logs:
        with contextlib.suppress(OSError), open(_own(log, os.O_RDWR), "rb+") as file:
            if os.fstat(file.fileno()).st_size <= LARGEST_LOG:
                continue
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{log}.1")
                with open(_own(f"{log}.1", os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as before:
                    shutil.copyfileobj(file, before)
            except OSError as error:  # as of a full disk, which it must not go on to fill
                why = error.strerror
                journal.warning("a router's log is emptied without a copy", log=log, why=why)
            # copied and emptied, not renamed: its writers keep the file, in append mode
            file.truncate(0)


def _own(file: str, flags: int) -> int:
    """The file itself, opened, and nothing that a link there names."""
    return os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)


def read(path: str) -> tuple[Recipe, ...]:
    """The recipes in a file that only its owner may write. Raises InvalidError."""
    try:
        _private(path, "NSM_ROUTERS_FILE")
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise InvalidError(
            f"NSM_ROUTERS_FILE is {path}, which cannot be read: {error.strerror}"
        ) from error
    if len(data) > LONGEST:
        raise InvalidError(f"{path} has more than {LONGEST} bytes")
    try:
        return recipes.parse(data.decode(), path)
    except UnicodeDecodeError:
        raise InvalidError(f"{path} is no UTF-8 text") from None


def _private(path: str, setting: str) -> None:
    """Refuse what somebody else may write: it says what is run as us."""
    facts = os.stat(path)
    if facts.st_uid not in (0, os.geteuid()) or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise InvalidError(
            f"{setting} is {path}, which others than uid {os.geteuid()} may write: uid"
            f" {facts.st_uid}, mode {stat.S_IMODE(facts.st_mode):04o}",
            hint=f"they could run programs as this one: chown {os.geteuid()} and chmod go-w it",
        )


def _command(recipe: Recipe) -> tuple[str, ...]:
    return recipe.argv or (sys.executable, "-P", "-m", recipe.module)


def _make_namespace(path: str, whose: str) -> None:
    if os.path.exists(path):
        return
    folder, name = os.path.split(path)
    if folder != NAMED:
        raise PreconditionError(
            f"the network namespace {path} of {whose} is not there",
            hint=f"make it, or name one in {NAMED}: those are made",
        )
    try:
        create_named(name)
    except TakenError:  # by now it is there
        return
    except NsmError as error:
        error.message = f"the network namespace of {whose} cannot be made: {error.message}"
        raise


def _home() -> str:
    here = os.path.abspath(__file__)
    for _ in range(3):
        here = os.path.dirname(here)
    return here


def _size(log: str) -> int:
    try:
        return os.stat(log).st_size
    except FileNotFoundError:
        return 0

"""A program's own SQLite file: opened, known to be its own and whole, or refused with why.

Everything but `Writer` blocks: whoever has an event loop calls it in the one thread that the
connection stays in.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar
from urllib.parse import quote

import structlog

from nsm.errors import InvalidError, PreconditionError

BUSY = 1.0  # seconds to wait for a process that is just letting go of the file
BATCH = 1000  # changes of one transaction
AGAIN = 2.0  # seconds until what could not be written is tried again
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

T = TypeVar("T")
K = TypeVar("K")
C = TypeVar("C")
log = structlog.get_logger(__name__)


class UnusableError(PreconditionError):
    """The file is damaged, or cannot be read or written: whose it is was not the question."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept in a file, and how it is told from anybody else's."""

    whose: str
    """For messages: `the registry`."""
    application: int
    """In the file's header."""
    schema: int
    tables: str
    """Makes what is not there yet."""
    synchronous: str = "NORMAL"
    """NORMAL: a killed process loses nothing, a power cut the last moments. FULL: nor that."""
    alone: bool = True
    """Nobody else may have it open, not even to read."""
    moved_away: str = "it is made anew"
    """What becomes of a program whose damaged file is moved away."""


def opened(
    path: str, kept: Kept, load: Callable[[sqlite3.Connection], T]
) -> tuple[sqlite3.Connection, T]:
    """The file, made if it is not there, and what load read in it.

    load raises InvalidError for content that cannot be read. Raises PreconditionError for a
    file of a newer version, damaged, somebody else's, in use, or not to be opened; it is then
    as it was.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise UnusableError(
            f"{kept.whose}'s store {path} cannot be opened: {error.strerror}",
            hint="NSM_STORE names a file in a directory that this user may write",
        ) from error
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    try:
        with _said(path, kept):
            if kept.alone:
                connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            _check(connection, path, kept)  # before anything is written: whose is it?
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {kept.synchronous}")
            connection.executescript(
                f"BEGIN IMMEDIATE; {kept.tables}; PRAGMA user_version = {kept.schema};"
                f" PRAGMA application_id = {kept.application}; COMMIT;"
            )
            return connection, load(connection)
    except BaseException:
        connection.close()
        raise


@contextmanager
def looked_into(path: str, kept: Kept) -> Iterator[sqlite3.Connection]:
    """The file, to read only, while its program may be running (kept is not `alone`).

    Raises PreconditionError as `opened` does, and for a file that is not there.
    """
    where = f"file:{quote(path)}?mode=ro"
    with _said(path, kept):
        connection = sqlite3.connect(where, uri=True, timeout=BUSY, isolation_level=None)
    try:
        with _said(path, kept):
            _check(connection, path, kept)
            yield connection
    finally:
        connection.close()


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of what is done in it, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # a full disk has ended the transaction already
            connection.execute("ROLLBACK")
        raise


class Writer(Generic[K, C]):
    """Writes changes down a moment after they come: whoever makes them waits for nothing.

    Of each key the newest, all that waits in one transaction. said is told why they cannot be
    written, once, and "" when they can again; until then they are tried again. commit
    writes them, in thread. Without a connection nothing is kept.
    """

    def __init__(
        self,
        connection: sqlite3.Connection | None,
        thread: ThreadPoolExecutor,
        commit: Callable[[sqlite3.Connection, dict[K, C]], None],
        said: Callable[[str], None],
    ) -> None:
        self.transactions = 0
        self.trouble = ""
        """Why what is kept is not written now; empty if it is."""
        self._connection = connection
        self._thread = thread
        self._commit = commit
        self._said = said
        self._waiting: dict[K, C] = {}
        self._writing = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._later: asyncio.TimerHandle | None = None

    def change(self, key: K, change: C) -> None:
        """Have it written."""
        if self._connection is None:
            return
        self._waiting.pop(key, None)  # the newest of each, in the order of the newest
        self._waiting[key] = change
        if self._later is None:
            self._write()

    async def flushed(self) -> None:
        """Wait until all is written, or cannot be."""
        await self._idle.wait()

    def close(self) -> None:
        """Try nothing again any more."""
        if self._later:
            self._later.cancel()

    def _write(self) -> None:
        self._later = None
        if self._writing or not self._waiting or self._connection is None:
            return
        self._writing = True
        self._idle.clear()
        batch = {key: self._waiting.pop(key) for key in list(self._waiting)[:BATCH]}
        loop = asyncio.get_running_loop()
        self._thread.submit(self._commit, self._connection, batch).add_done_callback(
            lambda result: loop.call_soon_threadsafe(self._written, batch, result)
        )

    def _written(self, batch: dict[K, C], result: "Future[None]") -> None:
        self._writing = False
        error = result.exception()
        if error is None:
            self.transactions += 1
            self._tell("")
            self._write()
        elif isinstance(error, sqlite3.Error):
            self._waiting = batch | self._waiting  # what changed meanwhile is newer
            self._tell(f"{error} ({getattr(error, 'sqlite_errorname', '')})")
            self._later = asyncio.get_running_loop().call_later(AGAIN, self._write)
        else:
            log.error("changes could not be written down", of=list(batch), why=repr(error))
            self._write()
        if not self._writing:
            self._idle.set()

    def _tell(self, trouble: str) -> None:
        before, self.trouble = self.trouble, trouble
        if bool(before) != bool(trouble):
            self._said(trouble)


def _check(connection: sqlite3.Connection, path: str, kept: Kept) -> None:
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != kept.application:
        raise PreconditionError(
            f"{path} is a database of some other program",
            hint=f"set NSM_STORE to a file of {kept.whose}'s own",
        )
    if schema > kept.schema:
        raise PreconditionError(
            f"{kept.whose}'s store {path} was written by a newer version: it has schema"
            f" {schema}, and this one knows up to {kept.schema}",
            hint="start the newer version, or set NSM_STORE to another file",
        )
    (damage,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if damage != "ok":
        raise _damaged(path, kept, damage.replace("\n", " "))


@contextmanager
def _said(path: str, kept: Kept) -> Iterator[None]:
    """Say of what fails inside whose file it was, and what to do."""
    try:
        yield
    except InvalidError as error:
        raise _damaged(path, kept, error.message) from error
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
        if code == sqlite3.SQLITE_BUSY:
            raise PreconditionError(
                f"{kept.whose}'s store {path} is in use by another process",
                hint="stop that one, or set NSM_STORE to another file",
            ) from error
        if code in _CORRUPT:
            raise _damaged(path, kept, str(error)) from error
        raise UnusableError(
            f"{kept.whose}'s store {path} cannot be used: {error}"
            f" ({getattr(error, 'sqlite_errorname', '')})"
        ) from error


def _damaged(path: str, kept: Kept, how: str) -> UnusableError:
    return UnusableError(
        f"{kept.whose}'s store {path} is damaged: {how[:300]}",
        hint=f"move it away and start again: {kept.moved_away}; or restore a copy",
    )

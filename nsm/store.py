"""A program's own SQLite file: opened, known to be its own and whole, or refused with why.

Everything here blocks: whoever has an event loop calls it in the one thread that the
connection stays in.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote

from nsm.errors import InvalidError, PreconditionError

BUSY = 1.0  # seconds to wait for a process that is just letting go of the file
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

T = TypeVar("T")


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

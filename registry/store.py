"""Where registrations survive the registry: one SQLite file, written by one thread.

What is served stands in memory; this is for the next start, which needs every
name, its owner and its first registration time. Changes that come while a
transaction runs go into the next one together, so that a thousand endpoints
that register at once cost a few transactions. In WAL mode with synchronous=NORMAL a
crash of the process loses nothing that was answered; a power cut may lose the
last moments, which endpoints register again anyway.
"""

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from nsm.errors import PreconditionError, UnavailableError
from nsm.model import Endpoint, Service
from nsm.proto import registry_pb2 as pb
from nsm.registrar import Change, Gone
from nsm.rpc import wire

SCHEMA = 1
APPLICATION = 0x76776972  # "vwir", in the file's header
BATCH = 5000  # changes of one transaction
BUSY = 1.0  # seconds to wait for a process that is just letting go of the file

_CREATE = """
CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL,    -- 'endpoint' or 'service'
    name TEXT NOT NULL,
    body BLOB NOT NULL,    -- the protobuf message, as it travels
    PRIMARY KEY (kind, name)
) WITHOUT ROWID
"""
_KINDS = {Endpoint: "endpoint", Service: "service"}
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an earlier life left."""

    endpoints: Sequence[Endpoint] = ()
    services: Sequence[Service] = ()


@asynccontextmanager
async def open_store(path: str) -> AsyncIterator[tuple["Store", Loaded]]:
    """The store in the file path, made if it is not there, and what it holds.

    Raises PreconditionError for a file that cannot be used: of a newer version,
    damaged, somebody else's, in use, or not to be opened.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="registry-store") as thread:
        loop = asyncio.get_running_loop()
        connection, loaded = await loop.run_in_executor(thread, _open, path)
        store = Store(path, connection, thread)
        try:
            yield store, loaded
        finally:
            await store.flushed()
            await loop.run_in_executor(thread, connection.close)


class Store:
    """Keeps changes in the order they come; every call returns when its own are on disk."""

    def __init__(self, path: str, connection: sqlite3.Connection, thread: ThreadPoolExecutor):
        self.transactions = 0
        self._path = path
        self._connection = connection
        self._thread = thread
        self._waiting: list[tuple[tuple[Change, ...], asyncio.Future[None]]] = []
        self._writing = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def keep(self, *changes: Change) -> None:
        """Return when changes are kept. Raises UnavailableError if they are not."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append((changes, done))
        self._write()
        await done

    async def flushed(self) -> None:
        """Wait until nothing is being written."""
        await self._idle.wait()

    def _write(self) -> None:
        if self._writing or not self._waiting:
            return
        self._writing = True
        self._idle.clear()
        batch, self._waiting = self._waiting[:BATCH], self._waiting[BATCH:]
        loop = asyncio.get_running_loop()
        changes = [change for some, _ in batch for change in some]
        self._thread.submit(_commit, self._connection, changes).add_done_callback(
            lambda result: loop.call_soon_threadsafe(self._written, batch, result)
        )

    def _written(
        self,
        batch: Sequence[tuple[tuple[Change, ...], "asyncio.Future[None]"]],
        result: "Future[None]",
    ) -> None:
        self.transactions += 1
        error = result.exception()
        for changes, done in batch:
            if done.done():  # its caller gave up; the change is kept or not as the others'
                continue
            if error is None:
                done.set_result(None)
            elif isinstance(error, sqlite3.Error):
                done.set_exception(self._lost(changes, error))
            else:
                done.set_exception(error)
        self._writing = False
        self._write()
        if not self._writing:
            self._idle.set()

    def _lost(self, changes: Sequence[Change], error: sqlite3.Error) -> UnavailableError:
        return UnavailableError(
            f"the registry cannot keep {', '.join(repr(c.name[:64]) for c in changes[:3])} in"
            f" {self._path}: {error} ({getattr(error, 'sqlite_errorname', '')})",
            hint="is there space, and may it be written?",
        )


def _open(path: str) -> tuple[sqlite3.Connection, Loaded]:
    """Runs in the store's thread, like all that touches the file."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        raise PreconditionError(
            f"the registry's store {path} cannot be opened: {error.strerror}",
            hint="NSM_STORE names a file in a directory that this user may write",
        ) from error
    connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
    try:
        return connection, _prepare(connection, path)
    except sqlite3.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    except BaseException:
        connection.close()
        raise


def _prepare(connection: sqlite3.Connection, path: str) -> Loaded:
    # Ours alone until we end: two registries on one file would serve different worlds.
    connection.execute("PRAGMA locking_mode = EXCLUSIVE")
    _check(connection, path)  # before anything is written: it may be somebody else's
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(_CREATE)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")
    connection.execute(f"PRAGMA application_id = {APPLICATION}")
    loaded = _load(connection, path)
    connection.execute("COMMIT")
    return loaded


def _check(connection: sqlite3.Connection, path: str) -> None:
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION:
        raise PreconditionError(
            f"{path} is a database of some other program",
            hint="set NSM_STORE to a file of the registry's own",
        )
    if schema > SCHEMA:
        raise PreconditionError(
            f"the registry's store {path} was written by a newer version: it has schema"
            f" {schema}, and this one knows up to {SCHEMA}",
            hint="start the newer version, or set NSM_STORE to another file",
        )
    (damage,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if damage != "ok":
        raise _damaged(path, damage.replace("\n", " "))


def _load(connection: sqlite3.Connection, path: str) -> Loaded:
    endpoints: list[Endpoint] = []
    services: list[Service] = []
    for kind, name, body in connection.execute("SELECT kind, name, body FROM records"):
        try:
            if kind == "endpoint":
                endpoints.append(wire.endpoint(pb.NetworkServiceEndpoint.FromString(body)))
            elif kind == "service":
                services.append(wire.service(pb.NetworkService.FromString(body)))
            else:
                raise _damaged(path, f"a record of the unknown kind {kind!r}")
        except DecodeError as error:
            raise _damaged(path, f"the {kind} {name!r} cannot be read") from error
    return Loaded(endpoints, services)


def _commit(connection: sqlite3.Connection, changes: Sequence[Change]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    try:
        for change in changes:
            if isinstance(change, Gone):
                connection.execute(
                    "DELETE FROM records WHERE kind = ? AND name = ?",
                    (_KINDS[change.of], change.name),
                )
            else:
                connection.execute(
                    "INSERT OR REPLACE INTO records VALUES (?, ?, ?)",
                    (_KINDS[type(change)], change.name, wire.to_pb(change).SerializeToString()),
                )
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # some errors have ended the transaction already
            connection.execute("ROLLBACK")
        raise


def _unusable(path: str, error: sqlite3.Error) -> PreconditionError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # without the extended part
    if code == sqlite3.SQLITE_BUSY:
        return PreconditionError(
            f"the registry's store {path} is in use by another process",
            hint="stop that registry, or set NSM_STORE to another file",
        )
    if code in _CORRUPT:
        return _damaged(path, str(error))
    return PreconditionError(
        f"the registry's store {path} cannot be used: {error}"
        f" ({getattr(error, 'sqlite_errorname', '')})"
    )


def _damaged(path: str, how: str) -> PreconditionError:
    return PreconditionError(
        f"the registry's store {path} is damaged: {how[:300]}",
        hint="move it away and start again: endpoints register anew within their refresh;"
        " owners of names and hand-made network services are lost",
    )

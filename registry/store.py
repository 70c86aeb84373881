"""Where registrations survive the registry: one SQLite file, written by one thread.

What is served stands in memory; this is for the next start, which needs every
name, its owner and its first registration time. Changes that come while a
transaction runs go into the next one together, so that a thousand endpoints
that register at once cost a few transactions. In WAL mode with synchronous=NORMAL a
crash of the process loses nothing that was answered; a power cut may lose the
last moments, which endpoints register again anyway.
"""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from nsm import store
from nsm.errors import InvalidError, UnavailableError
from nsm.model import Endpoint, Service
from nsm.proto import registry_pb2 as pb
from nsm.registrar import Change, Gone
from nsm.rpc import wire

SCHEMA = 1
BATCH = 5000  # changes of one transaction

_TABLES = """
CREATE TABLE IF NOT EXISTS records (
    kind TEXT NOT NULL,    -- 'endpoint' or 'service'
    name TEXT NOT NULL,
    body BLOB NOT NULL,    -- the protobuf message, as it travels
    PRIMARY KEY (kind, name)
) WITHOUT ROWID
"""
KEPT = store.Kept(  # by one registry: two on one file would serve different worlds
    whose="the registry",
    application=0x76776972,  # "vwir"
    schema=SCHEMA,
    tables=_TABLES,
    moved_away="endpoints register anew within their refresh; owners of names and hand-made"
    " network services are lost",
)
_KINDS = {Endpoint: "endpoint", Service: "service"}


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
        opened = await loop.run_in_executor(thread, store.opened, path, KEPT, _load)
        connection, loaded = opened
        kept = Store(path, connection, thread)
        try:
            yield kept, loaded
        finally:
            await kept.flushed()
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


def _load(connection: sqlite3.Connection) -> Loaded:
    endpoints: list[Endpoint] = []
    services: list[Service] = []
    for kind, name, body in connection.execute("SELECT kind, name, body FROM records"):
        try:
            if kind == "endpoint":
                endpoints.append(wire.endpoint(pb.NetworkServiceEndpoint.FromString(body)))
            elif kind == "service":
                services.append(wire.service(pb.NetworkService.FromString(body)))
            else:
                raise InvalidError(f"a record of the unknown kind {kind!r}")
        except DecodeError as error:
            raise InvalidError(f"the {kind} {name!r} cannot be read") from error
    return Loaded(endpoints, services)


def _commit(connection: sqlite3.Connection, changes: Sequence[Change]) -> None:
    with store.transaction(connection):
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

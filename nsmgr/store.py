"""What a manager's next life needs: the connections it carried, and who registered through it.

One SQLite file (NSM_STORE) with a row for each:

    connections(
      id          TEXT     the connection's, as this manager calls it
      previous    TEXT     SPIFFE id of who asked for it
      origin      TEXT     whom its first segment's token names
      connection  BLOB     the Connection as made here, with its path: protobuf, as it travels
      forwarder   TEXT     who carries it
      ends        INTEGER  when its lease ends, ns since 1970
    )

    registrations(
      name        TEXT     the endpoint's
      endpoint    BLOB     as the domain has it: protobuf
      path        TEXT     over which it came: as in the metadata of a call
      ids         TEXT     JSON: the SPIFFE ids of that path, its owner first
      expires     INTEGER  when the path's tokens end, ns since 1970
      until       INTEGER  when it ends that nobody refreshes, ns since 1970
      pid         INTEGER  of who registered, as the kernel says; 0 where it cannot
    )

No answer waits for it. The paths hold tokens, which are of use to nobody without the key of
the hop that sent them; the file is its owner's alone nevertheless.
"""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog
from google.protobuf.message import DecodeError

from nsm import registration, store
from nsm.errors import InvalidError
from nsm.identity.spiffe import SpiffeId
from nsm.model import Connection, Endpoint
from nsm.proto import connection_pb2, registry_pb2
from nsm.registration import RegistrationPath
from nsm.rpc import wire

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS connections (
    id TEXT PRIMARY KEY, previous TEXT NOT NULL, origin TEXT NOT NULL,
    connection BLOB NOT NULL, forwarder TEXT NOT NULL, ends INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS registrations (
    name TEXT PRIMARY KEY, endpoint BLOB NOT NULL, path TEXT NOT NULL, ids TEXT NOT NULL,
    expires INTEGER NOT NULL, until INTEGER NOT NULL, pid INTEGER NOT NULL
) WITHOUT ROWID
"""
WITHOUT = "a restart forgets which wires there are until they are refreshed, and who was registered"
KEPT = store.Kept(
    whose="the manager",
    application=0x7677696D,  # "vwim"
    schema=SCHEMA,
    tables=_TABLES,
    moved_away="wires are known again when they are refreshed",
)
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Carried:
    """One connection as it is kept; see the module."""

    id: str
    previous: SpiffeId
    origin: str
    connection: Connection
    forwarder: str
    ends: int


@dataclass(frozen=True, slots=True)
class Registered:
    """One endpoint as it is kept; see the module."""

    endpoint: Endpoint
    path: RegistrationPath
    ids: tuple[str, ...]
    expires: int
    until: int
    pid: int


@dataclass(frozen=True, slots=True)
class Left:
    """What an earlier life left."""

    connections: Sequence[Carried] = field(default_factory=list)
    registrations: Sequence[Registered] = field(default_factory=list)


_Key = tuple[str, str]  # a table, and what its rows are called by
_Change = Carried | Registered | None  # None: forgotten


class Store(store.Writer[_Key, _Change]):
    """Keeps what changes, a moment later; with no file (`""`) it keeps nothing."""

    def __init__(
        self, path: str, connection: sqlite3.Connection | None, thread: ThreadPoolExecutor
    ) -> None:
        super().__init__(connection, thread, _commit, self._trouble_changed)
        self._path = path

    def carries(self, one: Carried) -> None:
        """Have it written, instead of what was kept of that connection."""
        self.change(("connections", one.id), one)

    def lost(self, id_: str) -> None:
        """Have a connection forgotten."""
        self.change(("connections", id_), None)

    def registers(self, one: Registered) -> None:
        """Have it written, instead of what was kept of that endpoint."""
        self.change(("registrations", one.endpoint.name), one)

    def unregistered(self, name: str) -> None:
        """Have an endpoint forgotten."""
        self.change(("registrations", name), None)

    def _trouble_changed(self, trouble: str) -> None:
        if trouble:
            log.error(
                "the manager's store is not written now",
                store=self._path,
                then=WITHOUT,
                why=trouble,
                hint="is there space, and may it be written?",
            )
        else:
            log.warning("the manager's store is written again", store=self._path)


@asynccontextmanager
async def open_store(path: str) -> AsyncIterator[tuple[Store, Left]]:
    """The store in the file path ("": none), and what an earlier life left in it.

    Raises PreconditionError for a file of a newer version, of another program or in use. One
    that is damaged or cannot be written is said so, and done without: a node whose disk is full
    still needs its door.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="nsmgr-store") as thread:
        run = asyncio.get_running_loop().run_in_executor
        connection, left = None, Left()
        if path:
            try:
                connection, left = await run(thread, store.opened, path, KEPT, load)
            except store.UnusableError as damaged:
                log.error("there is no store", why=str(damaged), then=WITHOUT)  # noqa: TRY400
        kept = Store(path, connection, thread)
        try:
            yield kept, left
        finally:
            kept.close()
            await kept.flushed()
            if connection is not None:
                await run(thread, connection.close)


def load(connection: sqlite3.Connection) -> Left:
    """All that is kept. Raises InvalidError for what cannot be read."""
    connections, registrations = [], []
    for row in connection.execute("SELECT * FROM connections"):
        try:
            made = wire.connection(connection_pb2.Connection.FromString(row[3]))
            connections.append(
                Carried(row[0], SpiffeId.parse(row[1]), row[2], made, row[4], row[5])
            )
        except (DecodeError, ValueError, TypeError) as error:
            raise InvalidError(f"the connection {row[0]!r} cannot be read") from error
    for row in connection.execute("SELECT * FROM registrations"):
        try:
            endpoint = wire.endpoint(registry_pb2.NetworkServiceEndpoint.FromString(row[1]))
            path, ids = registration.parse(row[2]), tuple(map(str, json.loads(row[3])))
            registrations.append(Registered(endpoint, path, ids, row[4], row[5], row[6]))
        except (DecodeError, ValueError, TypeError) as error:
            raise InvalidError(f"the endpoint {row[0]!r} cannot be read") from error
    return Left(connections, registrations)


def _commit(connection: sqlite3.Connection, changes: dict[_Key, _Change]) -> None:
    with store.transaction(connection):
        for (table, name), change in changes.items():
            if change is None:
                column = "id" if table == "connections" else "name"
                connection.execute(f"DELETE FROM {table} WHERE {column} = ?", (name,))  # noqa: S608
            else:
                row = _row(change)
                marks = ", ".join("?" * len(row))
                connection.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)  # noqa: S608


def _row(one: Carried | Registered) -> tuple[str | bytes | int, ...]:
    if isinstance(one, Carried):
        body = wire.to_pb(one.connection).SerializeToString()
        return one.id, str(one.previous), one.origin, body, one.forwarder, one.ends
    body = wire.to_pb(one.endpoint).SerializeToString()
    path, ids = registration.write(one.path), json.dumps(one.ids)
    return one.endpoint.name, body, path, ids, one.expires, one.until, one.pid

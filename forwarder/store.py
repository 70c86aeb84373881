"""What a forwarder's next life needs of each connection and the kernel does not hold.

One SQLite file (NSM_STORE) with a row for each connection held here:

    leases(
      id          TEXT     the connection's, as this forwarder calls it: what devices' aliases say
      previous    TEXT     SPIFFE id of who asked for it
      origin      TEXT     whom its first segment's token names
      connection  BLOB     the Connection as made here, with its path: protobuf, as it travels
      next_url    TEXT     where it goes on; "" for a socket of this node, found again by endpoint
      endpoint    TEXT     who serves it
      payload     TEXT     IP or ETHERNET
      outgoing    BLOB     the Mechanism agreed on with the next hop: protobuf
      chosen      INTEGER  1: chosen by the service's rules, and not by who asked
      spaces      TEXT     JSON: [[side, nsid, inode, interface], …] of the wire's ends here
      ends        INTEGER  when its lease ends, ns since 1970
      leg         TEXT     which of the connection's wires it is; "" for the first
      left_endpoint  TEXT  the endpoint it was led to before; "" for none
    )

    begun(
      id          TEXT     a connection that was being made: without a lease, what stands of it
                           after a kill is most likely nobody's
    )

    nodes(
      own         TEXT     our address of tunnels
      far         TEXT     another node's, that has answered an echo: its silence means something
    )

The answer to a request does not wait for it: what is made is written a moment later, in one
thread, all that waits in one transaction. A wire that was made in that moment before a kill
is adopted when it is refreshed, as without a store. A file that cannot be written is said so
once, and again when it can; wires do not depend on it. The path holds tokens, which are of use
to nobody without the key of the hop that sent them; the file is its owner's alone nevertheless.
"""

import asyncio
import fcntl
import json
import os
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import structlog
from google.protobuf.message import DecodeError

from nsm import store
from nsm.errors import InvalidError, PreconditionError
from nsm.identity.spiffe import SpiffeId
from nsm.model import Connection, Mechanism
from nsm.proto import connection_pb2 as pb
from nsm.rpc import wire

SCHEMA = 1
_TABLES = """
CREATE TABLE IF NOT EXISTS leases (
    id TEXT PRIMARY KEY, previous TEXT NOT NULL, origin TEXT NOT NULL,
    connection BLOB NOT NULL, next_url TEXT NOT NULL, endpoint TEXT NOT NULL,
    payload TEXT NOT NULL, outgoing BLOB NOT NULL, chosen INTEGER NOT NULL,
    spaces TEXT NOT NULL, ends INTEGER NOT NULL,
    leg TEXT NOT NULL, left_endpoint TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS begun (id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS nodes (
    own TEXT NOT NULL, far TEXT NOT NULL, PRIMARY KEY (own, far)
) WITHOUT ROWID
"""
KEPT = store.Kept(
    whose="the forwarder",
    application=0x76776966,  # "vwif"
    schema=SCHEMA,
    tables=_TABLES,
    alone=False,  # `nsmctl` reads it meanwhile; of forwarders there is one, see `_alone`
    moved_away="wires are adopted when they are refreshed",
)
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Space:
    """Where one end of a wire is: the namespace's numbers, and the interface's name."""

    side: str
    nsid: int
    inode: int
    interface: str


@dataclass(frozen=True, slots=True)
class Lease:
    """One connection as it is kept; see the module."""

    id: str
    previous: SpiffeId
    origin: str
    connection: Connection
    next_url: str
    endpoint: str
    payload: str
    outgoing: Mechanism
    chosen: bool
    spaces: tuple[Space, ...]
    ends: int
    leg: str = ""
    left_endpoint: str = ""


class _Begun:
    """In place of a lease: it is being made."""


class _Answers:
    """Of a node: it has answered."""


_BEGUN = _Begun()
_ANSWERS = _Answers()
Way = tuple[str, str]
"""Our address of tunnels, and another node's."""
_Key = str | Way  # a connection's id, or a node
_Change = Lease | _Begun | _Answers | None  # None: forgotten


class Store(store.Writer[_Key, _Change]):
    """Keeps leases in the order they change; with no file (`""`) it keeps nothing."""

    def __init__(
        self, path: str, connection: sqlite3.Connection | None, thread: ThreadPoolExecutor
    ) -> None:
        super().__init__(connection, thread, _commit, self._trouble_changed)
        self.begun: frozenset[str] = frozenset()
        """Connections that an earlier life was making when it ended."""
        self.answered: frozenset[Way] = frozenset()
        """Nodes that answered echoes in an earlier life."""
        self._path = path

    def begin(self, id_: str) -> None:
        """Have it written that this connection is being made."""
        self.change(id_, _BEGUN)

    def keep(self, lease: Lease) -> None:
        """Have it written, instead of what was kept of that connection."""
        self.change(lease.id, lease)

    def drop(self, id_: str) -> None:
        """Have it forgotten."""
        self.change(id_, None)

    def answers(self, way: Way) -> None:
        """Have it written that this node answers echoes."""
        self.change(way, _ANSWERS)

    def left(self, way: Way) -> None:
        """Have that forgotten: no wire comes from there any more."""
        self.change(way, None)

    def _trouble_changed(self, trouble: str) -> None:
        if trouble:
            log.error(
                "leases are not kept now: a restart adopts wires when they are refreshed",
                store=self._path,
                why=trouble,
                hint="is there space, and may it be written?",
            )
        else:
            log.warning("leases are kept again", store=self._path)


@asynccontextmanager
async def open_store(path: str) -> AsyncIterator[tuple[Store, Sequence[Lease]]]:
    """The store in the file path ("": none), and what an earlier life left in it.

    Raises PreconditionError for a file of a newer version, of another program or of a forwarder
    that runs. One that is damaged or cannot be written is said so, and done without: a node
    whose disk is full still needs its wires.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="forwarder-store") as thread:
        run = asyncio.get_running_loop().run_in_executor
        opened = await run(thread, _opened, path) if path else None
        if isinstance(opened, PreconditionError):
            log.error(
                "there is no store: a restart adopts wires when they are refreshed",
                why=str(opened),
            )
        connection, lock, leases = opened if isinstance(opened, tuple) else (None, -1, ())
        kept = Store(path, connection, thread)
        if connection is not None:
            kept.begun = await run(thread, _unfinished, connection)
            kept.answered = await run(thread, _nodes, connection)
        try:
            yield kept, leases
        finally:
            kept.close()
            await kept.flushed()
            if connection is not None:
                await run(thread, connection.close)
                os.close(lock)


def _opened(
    path: str,
) -> tuple[sqlite3.Connection, int, Sequence[Lease]] | PreconditionError:
    try:
        connection, leases = store.opened(path, KEPT, load)
    except store.UnusableError as damaged:
        return damaged
    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        connection.close()
        os.close(lock)
        raise PreconditionError(
            f"the forwarder's store {path} is in use by another forwarder",
            hint="stop that one, or set NSM_STORE to another file",
        ) from None
    return connection, lock, leases


def load(connection: sqlite3.Connection) -> Sequence[Lease]:
    """Every lease that is kept. Raises InvalidError for one that cannot be read."""
    found = []
    for row in connection.execute("SELECT * FROM leases"):
        try:
            found.append(
                Lease(
                    id=row[0],
                    previous=SpiffeId.parse(row[1]),
                    origin=row[2],
                    connection=wire.connection(pb.Connection.FromString(row[3])),
                    next_url=row[4],
                    endpoint=row[5],
                    payload=row[6],
                    outgoing=wire.mechanism(pb.Mechanism.FromString(row[7])),
                    chosen=bool(row[8]),
                    spaces=tuple(Space(*one) for one in json.loads(row[9])),
                    ends=row[10],
                    leg=row[11],
                    left_endpoint=row[12],
                )
            )
        except (DecodeError, ValueError, TypeError) as error:
            raise InvalidError(f"the lease of {row[0]!r} cannot be read") from error
    return found


def _unfinished(connection: sqlite3.Connection) -> frozenset[str]:
    """What was begun; asked for once."""
    found = frozenset(id_ for (id_,) in connection.execute("SELECT id FROM begun"))
    with suppress(sqlite3.Error):  # a full disk: asked for again then, and found settled
        connection.execute("DELETE FROM begun")
    return found


def _nodes(connection: sqlite3.Connection) -> frozenset[Way]:
    return frozenset(connection.execute("SELECT own, far FROM nodes"))


def _commit(connection: sqlite3.Connection, changes: dict[_Key, _Change]) -> None:
    with store.transaction(connection):
        for key, change in changes.items():
            if isinstance(key, tuple):
                known = isinstance(change, _Answers)
                what = "INSERT OR REPLACE INTO nodes VALUES (?, ?)"
                gone = "DELETE FROM nodes WHERE own = ? AND far = ?"
                connection.execute(what if known else gone, key)
                continue
            if isinstance(change, _Begun):
                connection.execute("INSERT OR REPLACE INTO begun VALUES (?)", (key,))
                continue
            connection.execute("DELETE FROM begun WHERE id = ?", (key,))
            if isinstance(change, Lease):
                row = _row(change)
                marks = ", ".join("?" * len(row))
                connection.execute(f"INSERT OR REPLACE INTO leases VALUES ({marks})", row)  # noqa: S608
            else:
                connection.execute("DELETE FROM leases WHERE id = ?", (key,))


def _row(lease: Lease) -> tuple[str | bytes | int, ...]:
    spaces = [[one.side, one.nsid, one.inode, one.interface] for one in lease.spaces]
    return (
        lease.id,
        str(lease.previous),
        lease.origin,
        wire.to_pb(lease.connection).SerializeToString(),
        lease.next_url,
        lease.endpoint,
        lease.payload,
        wire.to_pb(lease.outgoing).SerializeToString(),
        int(lease.chosen),
        json.dumps(spaces),
        lease.ends,
        lease.leg,
        lease.left_endpoint,
    )

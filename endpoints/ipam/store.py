"""Where pools and leases survive the address plan: one SQLite file, written by one thread."""

import asyncio
import ipaddress
import sqlite3
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from endpoints.ipam.holdings import Address, Holding
from endpoints.ipam.plan import Lease, Pool, parse, pool
from nsm import store
from nsm.errors import InvalidError, UnavailableError

SCHEMA = 2
_TABLES = """
CREATE TABLE IF NOT EXISTS pools (
    name TEXT PRIMARY KEY, prefixes TEXT NOT NULL, ipv4 INTEGER NOT NULL, ipv6 INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (
    pool TEXT NOT NULL, prefix TEXT NOT NULL, owner TEXT NOT NULL,
    ends INTEGER,          -- ns since 1970; NULL while its holder's stream lasts
    PRIMARY KEY (pool, prefix)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS holdings (
    pool TEXT NOT NULL, address TEXT NOT NULL, holder TEXT NOT NULL, router TEXT NOT NULL,
    has_left INTEGER NOT NULL,
    PRIMARY KEY (pool, address)
) WITHOUT ROWID;
"""
KEPT = store.Kept(  # by one plan: two on one file would lend the same address twice
    whose="the address plan",
    application=0x76776970,  # "vwip"
    schema=SCHEMA,
    tables=_TABLES,
    synchronous="FULL",  # an address lent twice is worse than 2 ms
    moved_away="what was lent, and pools made since, are not known any more",
)
Change = tuple[str, Sequence[object]]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What an earlier life left."""

    pools: Sequence[Pool] = ()
    leases: Sequence[Lease] = ()
    holdings: Sequence[Holding] = ()


def pool_kept(pool: Pool) -> Change:
    """The change that keeps a pool."""
    text = " ".join(map(str, pool.prefixes))
    lengths = (pool.lengths.get(4, 0), pool.lengths.get(6, 0))
    return "INSERT OR REPLACE INTO pools VALUES (?, ?, ?, ?)", (pool.name, text, *lengths)


def pool_gone(name: str) -> tuple[Change, ...]:
    """The changes that forget a pool, all that is lent of it, and its members."""
    return (
        ("DELETE FROM pools WHERE name = ?", (name,)),
        ("DELETE FROM leases WHERE pool = ?", (name,)),
        ("DELETE FROM holdings WHERE pool = ?", (name,)),
    )


def lease_kept(lease: Lease) -> Change:
    """The change that keeps a lease."""
    row = (lease.pool, str(lease.prefix), lease.owner, lease.ends)
    return "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?)", row


def lease_gone(lease: Lease) -> Change:
    """The change that forgets a lease."""
    return "DELETE FROM leases WHERE pool = ? AND prefix = ?", (lease.pool, str(lease.prefix))


def holding_kept(one: Holding) -> Change:
    """The change that keeps whose a member's address is."""
    row = (one.pool, str(one.address), one.holder, one.router, one.left)
    return "INSERT OR REPLACE INTO holdings VALUES (?, ?, ?, ?, ?)", row


def holding_gone(pool: str, address: object) -> Change:
    """The change that forgets it."""
    return "DELETE FROM holdings WHERE pool = ? AND address = ?", (pool, str(address))


class Store:
    """Keeps changes in the order they come; what `keep` returned for is on disk."""

    def __init__(self, path: str, connection: sqlite3.Connection, thread: ThreadPoolExecutor):
        self._path = path
        self._connection = connection
        self._thread = thread

    async def keep(self, changes: Iterable[Change]) -> None:
        """Return when they are kept, all or none. Raises UnavailableError if they are not."""
        run = asyncio.get_running_loop().run_in_executor
        try:
            await run(self._thread, _commit, self._connection, list(changes))
        except sqlite3.Error as error:
            raise UnavailableError(
                f"the address plan cannot write {self._path}: {error}",
                hint="is there space, and may it be written?",
            ) from error


@asynccontextmanager
async def open_store(path: str) -> AsyncIterator[tuple[Store, Loaded]]:
    """The store in the file path, made if it is not there, and what it holds.

    Raises PreconditionError for a file that cannot be used.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ipam-store") as thread:
        run = asyncio.get_running_loop().run_in_executor
        connection, loaded = await run(thread, store.opened, path, KEPT, _load)
        try:
            yield Store(path, connection, thread), loaded
        finally:
            await run(thread, connection.close)


def _load(connection: sqlite3.Connection) -> Loaded:
    pools = [
        pool(name, text.split(), ipv4=ipv4, ipv6=ipv6)
        for name, text, ipv4, ipv6 in connection.execute("SELECT * FROM pools")
    ]
    leases = [
        Lease(name, parse(prefix, "a lease"), owner, ends)
        for name, prefix, owner, ends in connection.execute("SELECT * FROM leases")
    ]
    holdings = [
        Holding(name, _address(text), holder, router, bool(left))
        for name, text, holder, router, left in connection.execute("SELECT * FROM holdings")
    ]
    return Loaded(pools, leases, holdings)


def _address(text: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise InvalidError(f"a member's address is {text[:64]!r}") from None


def _commit(connection: sqlite3.Connection, changes: Sequence[Change]) -> None:
    with store.transaction(connection):
        for statement, values in changes:
            connection.execute(statement, values)

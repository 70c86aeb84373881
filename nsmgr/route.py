"""The manager's route: a request goes on to one of the node's forwarders (`wire.md` §3.5, §7.3)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from nsm import path
from nsm.caller import Caller, inode_url
from nsm.connections import Held
from nsm.descriptors import INODE_URL, Descriptors
from nsm.errors import DeniedError, NotFoundError, NsmError, UnavailableError
from nsm.hop import Established
from nsm.model import Connection, Context, IPContext, Mechanism, Request, State
from nsm.rpc.calls import Calls
from nsm.undo import Undo
from nsmgr.discovery import Discovery
from nsmgr.excluded import ExcludedPrefixes
from nsmgr.namespaces import open_of_caller
from nsmgr.registry import Local

log = structlog.get_logger(__name__)
LONGEST = 60.0  # seconds for a caller without a deadline
FD_PATIENCE = 2.0  # seconds a descriptor may come after the call that names it


@dataclass(frozen=True, slots=True)
class Next:
    """Which forwarder a connection goes through, and where it was reached last."""

    name: str
    url: str


class ManagerRoute:
    """Passes a connection on to the first forwarder that takes it, and stays with that one."""

    def __init__(
        self,
        discovery: Discovery,
        calls: Calls,
        excluded: ExcludedPrefixes,
        labels: Mapping[str, str],
        dial_timeout: float,
    ) -> None:
        self._discovery = discovery
        self._calls = calls
        self._excluded = excluded
        self._labels = labels
        self._dial_timeout = dial_timeout

    async def establish(
        self, asked: Request, held: Held[Next], caller: Caller, undo: Undo
    ) -> Established:
        """Find a forwarder, hand the workload's namespace on to it, return what it made."""
        conn = self._filled_in(asked.connection)
        known = held.memory
        reselect = conn.state == State.RESELECT_REQUESTED
        candidates = await self._discovery.candidates(
            conn, sticky=known.name if known and not reselect else "", caller=caller
        )
        if known and reselect:
            # Who carries it has what stands, and goes over to another endpoint without losing
            # it. Only where that one is not here any more it is another's from the start.
            candidates = [one for one in candidates if one.endpoint.name == known.name] or (
                await self._left(conn, held, candidates)
            )
            conn = conn if held.memory else path.end(conn)
        refused: list[tuple[Local, NsmError]] = []
        for forwarder in candidates:
            try:
                made = await self._try(forwarder, replace(asked, connection=conn), held, caller)
            except NsmError as reason:
                if not reason.retry and len(candidates) == 1:
                    raise
                refused.append((forwarder, reason))
                continue
            if forwarder.endpoint.name != _carrier(conn, known):
                undo.add(f"close {conn.id} at {forwarder.url}", self._close, forwarder.url, made)
            held.memory = Next(forwarder.endpoint.name, forwarder.url)
            return Established(made, forwarder.url)
        raise _none_took(conn, refused)

    async def withdraw(self, conn: Connection, memory: Next | None, caller: Caller | None) -> None:
        """Close it at its forwarder; after a restart, at the one its path names.

        Just after a restart nobody has registered yet, so the forwarder is waited
        for: a Close answered without it would leave the wire until its lease ends.
        """
        name = _carrier(conn, memory)
        if not name:
            return
        try:
            forwarder = await self._discovery.here(name, caller.left() if caller else None)
            await self._close(forwarder.url, conn)
        except NsmError as reason:
            if caller:
                raise _not_now(conn, name, reason) from reason
            # Nobody waits for an answer, and the forwarder's own lease ends soon after ours.
            log.warning("the forwarder was not told of a close", forwarder=name, why=str(reason))

    async def _left(
        self, conn: Connection, held: Held[Next], candidates: Sequence[Local]
    ) -> list[Local]:
        """The candidates, once what its forwarder of before has of conn is closed if it can be."""
        assert held.memory is not None
        if candidates:
            try:
                await self._close(held.memory.url, conn)
            except NsmError as reason:
                log.warning("the forwarder before was not told", why=str(reason))
            held.memory = None
        return list(candidates)

    async def _try(
        self, forwarder: Local, asked: Request, held: Held[Next], caller: Caller
    ) -> Connection:
        conn = asked.connection
        with Descriptors() as fds:
            asked, restore = await self._take_files(asked, caller, fds)
            async with Undo() as undo:
                if forwarder.endpoint.name != _carrier(conn, held.memory):
                    # Before the call, not after: it may fail here and have worked there.
                    undo.add(
                        f"close {conn.id} at {forwarder.url}", self._close, forwarder.url, conn
                    )
                answer = await self._calls.request(
                    forwarder.url,
                    asked,
                    fds=fds,
                    within=caller.left() or LONGEST,
                    dial_timeout=self._dial_timeout,
                    whose=f"forwarder {forwarder.endpoint.name}",
                )
            made = answer.connection
            if made.mechanism:
                fds.send_all(caller.fds, (made.mechanism,))
                made = replace(made, mechanism=_renamed(made.mechanism, restore))
            return made

    async def _take_files(
        self, asked: Request, caller: Caller, fds: Descriptors
    ) -> tuple[Request, Mapping[str, str]]:
        """Own every file the request names; return it as it goes on, and names to give back.

        A caller that cannot send descriptors may name its own namespace by path,
        where the kernel says that the process at the socket is that process.
        """
        restore: dict[str, str] = {}
        renamed: dict[str, str] = {}
        conn = asked.connection
        named = (*asked.preferences, *((conn.mechanism,) if conn.mechanism else ()))
        await fds.claim_all(caller.fds, named, FD_PATIENCE)
        for url in {one.get(INODE_URL) for one in named}:
            if url.startswith("file:"):
                fd = await open_of_caller(url, caller)
                facts = os.fstat(fd)
                inode = inode_url(facts.st_dev, facts.st_ino)
                fds.adopt(inode, fd)
                renamed[url], restore[inode] = inode, url
        if renamed:
            asked = replace(
                asked,
                preferences=tuple(_renamed(one, renamed) for one in asked.preferences),
                connection=replace(
                    conn, mechanism=conn.mechanism and _renamed(conn.mechanism, renamed)
                ),
            )
        return asked, restore

    async def _close(self, url: str, conn: Connection) -> None:
        with Descriptors() as none:
            await self._calls.close(url, conn, fds=none)

    def _filled_in(self, conn: Connection) -> Connection:
        """Labels, context and excluded prefixes: there for endpoints that take them as given."""
        context = conn.context or Context()
        ip = context.ip or IPContext()
        excluded = tuple(dict.fromkeys((*ip.excluded_prefixes, *self._excluded.prefixes)))
        return replace(
            conn,
            labels={**self._labels, **conn.labels},
            context=replace(context, ip=replace(ip, excluded_prefixes=excluded)),
        )


def _carrier(conn: Connection, memory: Next | None) -> str:
    """The forwarder that carries conn already, after a restart by its path; empty if none does.

    What fails there now must not close what works: a failed refresh keeps the wire.
    """
    if memory:
        return memory.name
    return conn.segments[conn.index + 1].name if len(conn.segments) > conn.index + 1 else ""


def _renamed(mechanism: Mechanism, names: Mapping[str, str]) -> Mechanism:
    url = mechanism.get(INODE_URL)
    return mechanism.with_(**{INODE_URL: names[url]}) if url in names else mechanism


def _not_now(conn: Connection, forwarder: str, reason: NsmError) -> NsmError:
    if not isinstance(reason, NotFoundError):
        return reason
    return UnavailableError(
        f"connection {conn.id} of {conn.service!r} is not closed: forwarder {forwarder},"
        " which carries it, is not registered",
        hint="ask again; if it does not come back the wire ends with its tokens",
    )


def _none_took(conn: Connection, refused: list[tuple[Local, NsmError]]) -> NsmError:
    tried = "; ".join(f"{one.endpoint.name}: {reason}" for one, reason in refused)
    if all(isinstance(reason, DeniedError) for _, reason in refused):
        return DeniedError(tried)
    if len(refused) == 1:
        return refused[0][1]
    return UnavailableError(
        f"all forwarders have failed for connection {conn.id} to {conn.service!r}: {tried}"
    )

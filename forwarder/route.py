"""The forwarder's route: find an endpoint, agree on both sides, join them in the kernel.

The client's side is agreed with the hop that asks (a namespace on this node, or
another node's tunnel), the endpoint's side with the next hop. Each has its own
mechanism; neither sees the other's (`wire.md` §2.3).
"""

import asyncio
import time
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Literal

import structlog

from forwarder.asking import Asking, name_of, new_leg
from forwarder.crossing import Crossing, Near, Target, anew, slim, with_context
from forwarder.discovery import Discovery, Offer
from forwarder.farewells import Farewells
from forwarder.joining import Joining
from forwarder.probe import Probe
from forwarder.recovery import Recovery
from forwarder.remote import Remote
from forwarder.search import Search
from forwarder.sockets import Sockets
from forwarder.tunnels import Tunnels
from nsm import mechanisms, path
from nsm.caller import Caller
from nsm.connections import Held
from nsm.descriptors import INODE_URL, Descriptors
from nsm.errors import (
    AbortedError,
    DeniedError,
    NotFoundError,
    NsmError,
    UnavailableError,
    UnsupportedError,
)
from nsm.hop import Established
from nsm.kernel import owner
from nsm.kernel.node import Kernel
from nsm.kernel.state import Wire
from nsm.model import Connection, IPContext, Request, State
from nsm.rpc.calls import Calls
from nsm.undo import Undo
from nsm.watches import Spawn

log = structlog.get_logger(__name__)
FD_PATIENCE = 2.0  # seconds a descriptor may come after the call that names it
GOODBYE = 2.0  # seconds for an endpoint a connection has left
SPARE = 0.5  # seconds that another search and what it finds need


class ForwarderRoute:
    """Joins a workload with an endpoint: on this node, or half of it over a tunnel."""

    def __init__(
        self,
        discovery: Discovery,
        calls: Calls,
        kernel: Kernel,
        tunnels: Tunnels,
        remotes: Sequence[Remote],
        sockets: Sockets,
        recovery: Recovery,
        dial_timeout: float,
        spawn: Spawn,
        probe: Probe,
    ) -> None:
        self._discovery = discovery
        self._kernel = kernel
        self._remotes = {one.type: one for one in remotes}
        self._supported = (mechanisms.KERNEL, *self._remotes)
        self._sockets = sockets
        self._recovery = recovery
        self._asking = Asking(calls, discovery, sockets, dial_timeout)
        self._joining = Joining(kernel, self._asking, tunnels, self._remotes, recovery, probe)
        self._spawn = spawn
        self.farewells = Farewells(self._asking)
        self._leaving: set[str] = set()
        self._aside: set[str] = set()  # wires that were left and are yet to be taken away

    @property
    def aside(self) -> Container[str]:
        """Wires that were left and are yet to be taken away."""
        return self._aside

    def leave(self, id_: str) -> None:
        """Choose anew when that connection is asked for again; it stays if nobody takes it."""
        self._leaving.add(id_)

    async def establish(
        self, asked: Request, held: Held[Crossing], caller: Caller, undo: Undo
    ) -> Established:
        """Make the wire, or bring it up to what is asked now."""
        conn = with_context(asked.connection)
        asked = replace(asked, connection=conn)
        with Descriptors() as fds:
            near = await self._near(asked, caller, fds)
            refused: list[tuple[str, NsmError]] = []
            known = held.memory
            if near.namespace and known and (why := self._moves(conn, known)):
                try:
                    wanted = replace(conn, endpoint="", state=State.UP)
                    without = known.endpoint if why == "reselect" else ""
                    return await self._find(wanted, near, held, caller, fds, undo, [], without)
                except NsmError as reason:
                    log.warning("nobody else takes it; the old one stays", why=str(reason))
            if known and not known.url and known.serves(conn.endpoint):
                # its socket is found by its name, and no service is asked for
                payload = conn.payload or known.payload
                conn = replace(conn, endpoint=known.endpoint, payload=payload)
            if known and known.url and known.serves(conn.endpoint):
                target = Target(
                    known.endpoint,
                    known.payload,
                    known.url,
                    known,
                    True,
                    known.chosen,
                    known.leg,
                )
                try:
                    return await self._join(target, conn, near, held, caller, fds, undo)
                except UnavailableError as reason:  # it may have come back elsewhere
                    refused.append((target.endpoint, reason))
                    conn = replace(conn, endpoint=known.endpoint)
            return await self._find(conn, near, held, caller, fds, undo, refused)

    def _moves(self, conn: Connection, known: Crossing) -> Literal["", "rules", "reselect"]:
        """Why it is to be led to another endpoint if one takes it: new rules, and those once, or
        because who asks has lost the old one. Not if who asks names one."""
        leaving = conn.id in self._leaving
        self._leaving.discard(conn.id)
        if not known.serves(conn.endpoint):
            return ""
        if conn.state == State.RESELECT_REQUESTED and not conn.endpoint:
            return "reselect"
        return "rules" if leaving and known.chosen else ""

    async def _find(
        self,
        conn: Connection,
        near: Near,
        held: Held[Crossing],
        caller: Caller,
        fds: Descriptors,
        undo: Undo,
        refused: list[tuple[str, NsmError]],
        without: str = "",
    ) -> Established:
        """Join the first that takes it of those that can be found, now or in a moment; not the
        endpoint `without`."""
        known, search, finding = held.memory, Search(), 0.0
        if without:  # which a match may be about: the next one is looked at instead
            search.away.add(without)
        carrier = known.endpoint if known else _carrier(conn)
        while True:
            with Descriptors() as sockets:
                began = time.monotonic()
                offers = await self._offers(conn, sockets, refused, search)
                finding += time.monotonic() - began
                conn = path.took(conn, find_ms=finding)
                if without and known:  # where nobody was reached just now: perhaps a node died
                    offers.sort(key=lambda offer: offer.endpoint.url == known.url)
                for offer in offers:
                    name, url = offer.endpoint.name, self._asking.url(offer, sockets)
                    asked_now = refused and known and url == known.url
                    if asked_now or name == without:
                        self._sockets.release(url)
                        continue
                    target, told = self._target(offer, url, conn, near, held, carrier)
                    try:
                        return await self._join(target, told, near, held, caller, fds, undo)
                    except NsmError as reason:
                        refused.append((name, reason))
                        search.refused(name, reason)
                    finally:
                        self._sockets.release(url)
            pause, left = None if conn.endpoint else search.again(), caller.left()
            if pause is None or (left is not None and left < pause + SPARE):
                raise _none_took(conn, refused)
            await asyncio.sleep(pause)

    async def reach(self, conn: Connection, endpoint: str) -> str:
        """The URL of an endpoint of this node, to be let go of with `forget`.

        Raises NotFoundError where it is not registered here, be it not yet: the domain may
        know it all the same, by a manager or proxy to which nothing of ours leads back.
        """
        with Descriptors() as fds:
            (offer,) = await self._discovery.offers(replace(conn, endpoint=endpoint), fds)
            if fds.get(offer.endpoint.url) is None and not offer.endpoint.url.startswith("unix:"):
                raise NotFoundError(f"endpoint {endpoint} is not registered on this node")
            return self._asking.url(offer, fds)

    def forget(self, url: str) -> None:
        """Where an endpoint is reached is of use to one connection less."""
        self._sockets.release(url)

    def _target(
        self,
        offer: Offer,
        url: str,
        conn: Connection,
        near: Near,
        held: Held[Crossing],
        carrier: str,
    ) -> tuple[Target, Connection]:
        """An endpoint that is offered, and the connection as it is asked for it."""
        name, known = offer.endpoint.name, held.memory
        same = known if known and known.endpoint == name else None
        chosen = not conn.endpoint or (same is not None and same.chosen)
        leg = known.leg if known else self._recovery.leg(conn.id)
        if known is None and owner.wire_id(conn.id, leg) in self._aside:
            leg = new_leg()  # what is taken away in a moment is called so, here and there
        target = Target(name, offer.payload, url, same, name == carrier, chosen, leg)
        if same or not known or near.namespace is None:
            return target, conn
        before = held.made.ip if held.made else IPContext()
        target = replace(target, leg=new_leg(), old=known, addresses=before)
        return target, replace(anew(conn, before), state=State.UP)

    async def withdraw(
        self, conn: Connection, memory: Crossing | None, caller: Caller | None
    ) -> None:
        """Close it at the endpoint and take it out of the kernel; the latter even if the
        former fails, because an endpoint that cannot be told has its own lease."""
        self._leaving.discard(conn.id)
        leg = memory.leg if memory else self._recovery.leg(conn.id)
        far, removed = await asyncio.gather(
            self._asking.close_far(conn, memory),
            self._kernel.remove(conn.id),
            return_exceptions=True,
        )
        self._recovery.settled(conn.id)
        if memory:
            self._sockets.release(memory.url)
        if isinstance(far, NsmError):
            later = self.farewells.owe(conn, memory, far)
            log.warning(
                "the endpoint was not told of a close", id=conn.id, error=str(far), later=later
            )
        elif isinstance(far, BaseException):
            raise far
        if isinstance(removed, BaseException):
            raise removed
        self._forget_tunnel(conn.id, leg)

    # ---- the client's side ---------------------------------------------------------------

    async def _near(self, asked: Request, caller: Caller, fds: Descriptors) -> Near:
        """Which of the mechanisms asked for is taken, and the namespace it names."""
        conn = asked.connection
        chosen = mechanisms.acceptable(conn, asked.preferences, self._supported)[0]
        if remote := self._remotes.get(chosen.type):
            remote.asker(chosen)  # what cannot be is refused before anybody is asked
            return Near(chosen, None)
        if not chosen.get(mechanisms.NAME):
            chosen = chosen.with_(**{mechanisms.NAME: mechanisms.generate_name(conn.service)})
        mechanisms.check_name(chosen.get(mechanisms.NAME), whose=f"the client of {conn.service!r}")
        url = chosen.get(INODE_URL)
        await fds.claim(caller.fds, url, FD_PATIENCE)
        namespace = await self._joining.namespace(url, fds, f"the client of {conn.service!r}")
        return Near(chosen, namespace)

    # ---- the endpoint's side -------------------------------------------------------------

    async def _offers(
        self,
        conn: Connection,
        fds: Descriptors,
        refused: list[tuple[str, NsmError]],
        search: Search,
    ) -> list[Offer]:
        """Whom to try now; nobody where another search finds no more than the one before."""
        if refused and not conn.endpoint:
            try:
                offers = await self._discovery.offers(conn, fds, without=search.away)
            except NotFoundError:
                return []
            except NsmError as why:
                log.warning("nobody else is looked for", service=conn.service, why=str(why))
                return []
            return [one for one in offers if search.new(one.endpoint.name)]
        try:
            return await self._discovery.offers(conn, fds, without=search.away)
        except NotFoundError as gone:
            if not refused:
                raise
            # It was here, cannot be reached, and is not registered any more. Who is told that
            # it is not found chooses anew, which ends a wire that may still carry packets: so
            # only where somebody else could take it.
            endpoint, reason = refused[0]
            if await self._another(conn):
                raise NotFoundError(f"{gone.message}; {endpoint}: {reason}") from reason
            raise UnavailableError(
                f"{gone.message}, nor is any other; {endpoint}: {reason}"
            ) from reason

    async def _another(self, conn: Connection) -> bool:
        with Descriptors() as fds:
            try:
                return bool(await self._discovery.offers(replace(conn, endpoint=""), fds))
            except NotFoundError:
                return False

    async def _join(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        held: Held[Crossing],
        caller: Caller,
        fds: Descriptors,
        undo: Undo,
    ) -> Established:
        """Ask one endpoint and join it; on failure everything of it is taken back."""
        async with Undo() as attempt:
            with Descriptors() as far_fds:
                local = target.url.startswith("unix:")
                if near.namespace is None:
                    if not local:
                        raise UnsupportedError(
                            f"endpoint {target.endpoint} is on a third node: {target.url}",
                            hint="a tunnel must end on the endpoint's node; ask its own manager",
                        )
                    near, made, wire = await self._joining.from_far(
                        target, conn, near, caller, far_fds, attempt
                    )
                elif local:
                    made, wire = await self._joining.here(
                        target, conn, near, near.namespace, caller, fds, far_fds, attempt
                    )
                else:
                    made, wire = await self._joining.to_far(
                        target, conn, near, near.namespace, caller, fds, far_fds, attempt
                    )
            self._settle(held, target, conn, made, wire, attempt)
        undo.absorb(attempt)
        fds.send_all(caller.fds, (near.mechanism,))
        shown = f"{near.mechanism.type}/{near.mechanism.get(mechanisms.NAME) or 'unknown'}"
        assert made.mechanism is not None
        far = f"{made.mechanism.type}/{made.mechanism.get(mechanisms.NAME) or 'unknown'}"
        made = path.measured(made, client_interface=shown, server_interface=far)
        done = replace(made, mechanism=near.mechanism)
        return Established(done, target.url, name_of(done.id, target.leg))

    def _settle(
        self,
        held: Held[Crossing],
        target: Target,
        asked: Connection,
        made: Connection,
        wire: Wire,
        attempt: Undo,
    ) -> None:
        """Remember what stands now; let go of what it replaced."""
        before = held.memory
        assert made.mechanism is not None
        attempt.add("remember what was there before", self._unsettle, held, before, target.url)
        self._sockets.again(target.url)
        left = before.endpoint if before and before.endpoint != target.endpoint else ""
        if before and not left and asked.endpoint not in ("", before.endpoint):
            left = before.left  # who asks has not heard of it yet
        held.memory = Crossing(
            target.endpoint,
            target.payload,
            target.url,
            made.mechanism,
            slim(wire),
            target.chosen,
            leg=target.leg,
            left=left,
        )
        self._recovery.settled(made.id)
        if before and before.endpoint != target.endpoint and held.made:
            if before.leg != target.leg:
                self._aside.add(owner.wire_id(made.id, before.leg))
            self._spawn(
                self._say_goodbye(held.made, before, target.leg), f"goodbye to {before.endpoint}"
            )
        elif before:
            self._sockets.release(before.url)

    async def _say_goodbye(self, conn: Connection, before: Crossing, leg: str) -> None:
        """Close conn at the endpoint it has left, once what that one was asked is answered; one
        that cannot be told has its own lease. Then take away what led there."""
        moved = leg != before.leg
        try:
            if moved:
                await self._kernel.drained(conn.id, before.leg)
            async with asyncio.timeout(GOODBYE):
                await self._asking.close_far(conn, before)
        except (NsmError, TimeoutError) as reason:
            later = moved and self.farewells.owe(conn, before, reason)
            log.warning(
                "the endpoint before was not told",
                endpoint=before.endpoint,
                error=str(reason),
                later=later,
            )
        finally:
            self._sockets.release(before.url)
        if moved:
            try:
                await self._kernel.remove(conn.id, leg=before.leg)
                self._forget_tunnel(conn.id, before.leg)
            finally:
                self._aside.discard(owner.wire_id(conn.id, before.leg))

    def _forget_tunnel(self, id_: str, leg: str) -> None:
        for remote in self._remotes.values():
            remote.gone(owner.wire_id(id_, leg))

    async def _unsettle(self, held: Held[Crossing], before: Crossing | None, url: str) -> None:
        held.memory = before
        if before is None or before.url != url:
            self._sockets.release(url)


def _carrier(conn: Connection) -> str:
    """The endpoint an earlier life of ours led conn to, by its path; empty if it comes first."""
    return conn.endpoint if len(conn.segments) > conn.index + 1 else ""


def _none_took(conn: Connection, refused: list[tuple[str, NsmError]]) -> NsmError:
    # Of each the last word; and a supplier's only where what it supplied said nothing.
    refused = list(dict(refused).items())
    said = [one for one in refused if not isinstance(one[1], AbortedError)]
    refused = said or refused
    if len(refused) == 1:
        return refused[0][1]
    tried = "; ".join(f"{name}: {reason}" for name, reason in refused)
    if refused and all(isinstance(reason, DeniedError) for _, reason in refused):
        return DeniedError(tried)
    return UnavailableError(
        f"all candidates have failed for connection {conn.id} to {conn.service!r}:"
        f" {tried or 'nobody was left to try'}"
    )

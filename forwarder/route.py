"""The forwarder's route: find an endpoint, agree on both sides, join them in the kernel.

The client's side is agreed with the hop that asks (a namespace on this node, or
another node's tunnel), the endpoint's side with the next hop. Each has its own
mechanism; neither sees the other's (`wire.md` §2.3).
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from forwarder import crossconnect
from forwarder.discovery import Discovery, Offer
from forwarder.mechanisms import ends
from forwarder.recovery import Recovery
from forwarder.remote import Remote, Seat, Span
from forwarder.search import Search
from forwarder.sockets import Sockets
from forwarder.tunnels import Tunnels, node_of
from nsm import mechanisms, path
from nsm.caller import Caller
from nsm.connections import Held
from nsm.descriptors import INODE_URL, Descriptors
from nsm.errors import (
    AbortedError,
    DeniedError,
    InvalidError,
    NotFoundError,
    NsmError,
    PeerError,
    UnavailableError,
    UnsupportedError,
)
from nsm.hop import Established
from nsm.kernel.netlink import PortTakenError, VniTakenError
from nsm.kernel.node import Kernel
from nsm.kernel.state import (
    Interface,
    IPAddress,
    LocalWire,
    Namespace,
    RemoteWire,
    Wire,
    WireguardTunnel,
)
from nsm.model import Connection, Context, IPContext, Mechanism, Path, Request
from nsm.rpc.calls import Calls
from nsm.undo import Undo

log = structlog.get_logger(__name__)
LONGEST = 60.0  # seconds for a caller without a deadline
FD_PATIENCE = 2.0  # seconds a descriptor may come after the call that names it
GOODBYE = 2.0  # seconds for an endpoint a connection has left
SPARE = 0.5  # seconds that another search and what it finds need
ROUNDS = 3  # of agreeing on a tunnel whose network identifier or port is free on both nodes
HANDSHAKE = (1.0, 5.0)  # seconds, at least and at most, for the far end to prove its key
TAKEN = (VniTakenError, PortTakenError)


@dataclass(frozen=True, slots=True)
class Crossing:
    """What is remembered of a connection: where it goes, by what, and what stands in the kernel.

    wire is where its devices are and by what tunnel; what they are configured with is not read
    from here (`_slim`). Of what an earlier life made it is None until it is asked for again, and
    seats are the namespaces its ends were in; url is then empty if it was a socket.
    """

    endpoint: str
    payload: str
    url: str
    outgoing: Mechanism
    wire: Wire | None
    chosen: bool = False  # by the service's rules, and not by who asks
    seats: tuple[Namespace, ...] = ()

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """Where the wire's ends are that are on this node."""
        if self.wire is None:
            return self.seats
        return tuple(interface.namespace for _, interface in self.wire.sides)


@dataclass(frozen=True, slots=True)
class Near:
    """The client's side as this request has it; namespace is None where it is another node's."""

    mechanism: Mechanism
    namespace: Namespace | None


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint to try: by name, at a URL.

    known is what this connection has there already; stands, that it has something
    there, be it from before a restart: what fails now must not close that.
    """

    endpoint: str
    payload: str
    url: str
    known: Crossing | None
    stands: bool
    chosen: bool = False


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
    ) -> None:
        self._discovery = discovery
        self._calls = calls
        self._kernel = kernel
        self._tunnels = tunnels
        self._remotes = {one.type: one for one in remotes}
        self._carrying = {one.payload: one for one in remotes}
        self._supported = (mechanisms.KERNEL, *self._remotes)
        self._sockets = sockets
        self._recovery = recovery
        self._dial_timeout = dial_timeout
        self._leaving: set[str] = set()

    def leave(self, id_: str) -> None:
        """Choose anew when that connection is asked for again; it stays if nobody takes it."""
        self._leaving.add(id_)

    async def establish(
        self, asked: Request, held: Held[Crossing], caller: Caller, undo: Undo
    ) -> Established:
        """Make the wire, or bring it up to what is asked now."""
        conn = _with_context(asked.connection)
        asked = replace(asked, connection=conn)
        with Descriptors() as fds:
            near = await self._near(asked, caller, fds)
            refused: list[tuple[str, NsmError]] = []
            known = held.memory
            if known and self._is_leaving(conn, known):
                try:
                    anew = _anew(conn, held)
                    return await self._find(anew, near, held, caller, fds, undo, [])
                except NsmError as reason:
                    log.warning("the rules' new choice fails; the old one stays", why=str(reason))
            if known and not known.url and conn.endpoint == "":
                conn = replace(conn, endpoint=known.endpoint)  # its socket is found by that
            if known and known.url and conn.endpoint in ("", known.endpoint):
                target = Target(known.endpoint, known.payload, known.url, known, True, known.chosen)
                try:
                    return await self._join(target, conn, near, held, caller, fds, undo)
                except UnavailableError as reason:  # it may have come back elsewhere
                    refused.append((target.endpoint, reason))
                    conn = replace(conn, endpoint=known.endpoint)
            return await self._find(conn, near, held, caller, fds, undo, refused)

    def _is_leaving(self, conn: Connection, known: Crossing) -> bool:
        """Whether it is to be chosen anew: once, and not if who asks wants another."""
        if conn.id not in self._leaving:
            return False
        self._leaving.discard(conn.id)
        return known.chosen and conn.endpoint in ("", known.endpoint)

    async def _find(
        self,
        conn: Connection,
        near: Near,
        held: Held[Crossing],
        caller: Caller,
        fds: Descriptors,
        undo: Undo,
        refused: list[tuple[str, NsmError]],
    ) -> Established:
        """Join the first that takes it of those that can be found, now or in a moment."""
        known, search, finding = held.memory, Search(), 0.0
        carrier = known.endpoint if known else _carrier(conn)
        while True:
            with Descriptors() as sockets:
                began = time.monotonic()
                offers = await self._offers(conn, sockets, refused, search)
                finding += time.monotonic() - began
                conn = path.took(conn, find_ms=finding)
                for offer in offers:
                    name, url = offer.endpoint.name, self._url(offer, sockets)
                    if refused and known and url == known.url:  # it was asked just now
                        self._sockets.release(url)
                        continue
                    same = known if known and known.endpoint == name else None
                    chosen = not conn.endpoint or (same is not None and same.chosen)
                    target = Target(name, offer.payload, url, same, name == carrier, chosen)
                    try:
                        return await self._join(target, conn, near, held, caller, fds, undo)
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
        """The URL of an endpoint of this node, to be let go of with `forget`."""
        with Descriptors() as fds:
            (offer,) = await self._discovery.offers(replace(conn, endpoint=endpoint), fds)
            return self._url(offer, fds)

    def forget(self, url: str) -> None:
        """Where an endpoint is reached is of use to one connection less."""
        self._sockets.release(url)

    async def withdraw(
        self, conn: Connection, memory: Crossing | None, caller: Caller | None
    ) -> None:
        """Close it at the endpoint and take it out of the kernel; the latter even if the
        former fails, because an endpoint that cannot be told has its own lease."""
        self._leaving.discard(conn.id)
        far, removed = await asyncio.gather(
            self._close_far(conn, memory), self._kernel.remove(conn.id), return_exceptions=True
        )
        self._recovery.settled(conn.id)
        if memory:
            self._sockets.release(memory.url)
        if isinstance(far, NsmError):
            log.warning("the endpoint was not told of a close", id=conn.id, error=str(far))
        elif isinstance(far, BaseException):
            raise far
        if isinstance(removed, BaseException):
            raise removed
        for remote in self._remotes.values():
            remote.gone(conn.id)

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
        namespace = await self._namespace(url, fds, f"the client of {conn.service!r}")
        return Near(chosen, namespace)

    async def _namespace(self, url: str, fds: Descriptors, whose: str) -> Namespace:
        fd = fds.get(url)
        if fd is None:
            raise InvalidError(
                f"{whose} names its network namespace by {url[:100]!r}, which did not come"
                " as a descriptor",
                hint="connect to the manager over its unix socket and send the descriptor",
            )
        return await self._kernel.namespace(fd=fd, name=whose)

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
            return await self._discovery.offers(conn, fds)
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

    def _url(self, offer: Offer, fds: Descriptors) -> str:
        fd = fds.get(offer.endpoint.url)
        return offer.endpoint.url if fd is None else self._sockets.keep(fd)

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
                    near, made, wire = await self._from_far(
                        target, conn, near, caller, far_fds, attempt
                    )
                elif local:
                    made, wire = await self._here(
                        target, conn, near, near.namespace, caller, fds, far_fds, attempt
                    )
                else:
                    made, wire = await self._to_far(
                        target, conn, near, near.namespace, caller, fds, far_fds, attempt
                    )
            await self._settle(held, target, made, wire, attempt)
        undo.absorb(attempt)
        fds.send_all(caller.fds, (near.mechanism,))
        shown = f"{near.mechanism.type}/{near.mechanism.get(mechanisms.NAME) or 'unknown'}"
        assert made.mechanism is not None
        far = f"{made.mechanism.type}/{made.mechanism.get(mechanisms.NAME) or 'unknown'}"
        made = path.measured(made, client_interface=shown, server_interface=far)
        return Established(replace(made, mechanism=near.mechanism), target.url)

    async def _settle(
        self,
        held: Held[Crossing],
        target: Target,
        made: Connection,
        wire: Wire,
        attempt: Undo,
    ) -> None:
        """Remember what stands now; let go of what it replaced."""
        before = held.memory
        assert made.mechanism is not None
        attempt.add("remember what was there before", self._unsettle, held, before, target.url)
        self._sockets.again(target.url)
        held.memory = Crossing(
            target.endpoint, target.payload, target.url, made.mechanism, _slim(wire), target.chosen
        )
        self._recovery.settled(made.id)
        if before:
            if before.endpoint != target.endpoint and held.made:
                await self._say_goodbye(held.made, before)
            self._sockets.release(before.url)

    async def _say_goodbye(self, conn: Connection, before: Crossing) -> None:
        """Close conn at the endpoint it has left; one that cannot be told has its own lease."""
        try:
            async with asyncio.timeout(GOODBYE):
                await self._close_far(conn, before)
        except (NsmError, TimeoutError) as reason:
            log.warning(
                "the endpoint before was not told", endpoint=before.endpoint, error=str(reason)
            )

    async def _unsettle(self, held: Held[Crossing], before: Crossing | None, url: str) -> None:
        held.memory = before
        if before is None or before.url != url:
            self._sockets.release(url)

    async def _here(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        namespace: Namespace,
        caller: Caller,
        fds: Descriptors,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> tuple[Connection, Wire]:
        """Both on this node: a veth pair straight from one namespace to the other."""
        made = await self._ask(target, conn, (_any_interface(),), caller, far_fds, attempt)
        outgoing = _agreed(made, mechanisms.KERNEL, target)
        url = outgoing.get(INODE_URL)
        far = await self._namespace(url, far_fds, f"endpoint {target.endpoint}")
        src_mac, dst_mac = crossconnect.macs(made)
        wire = LocalWire(
            made.id,
            crossconnect.client_side(made, near.mechanism, namespace, dst_mac),
            crossconnect.endpoint_side(made, outgoing, far, src_mac),
        )
        entries = {far: far_fds.get(url), namespace: fds.get(near.mechanism.get(INODE_URL))}
        kernel = await self._ensure(wire, target.known, entries, attempt)
        return path.took(made, kernel_ms=kernel), wire

    async def _to_far(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        namespace: Namespace,
        caller: Caller,
        fds: Descriptors,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> tuple[Connection, Wire]:
        """The client here, the endpoint on another node: our half of the tunnel."""
        remote = self._carrying.get(target.payload)
        if remote is None:
            raise UnsupportedError(
                f"service {conn.service!r} carries {target.payload[:64]!r}, and endpoint"
                f" {target.endpoint} is on another node: only {' and '.join(self._carrying)} go"
                " between nodes",
                hint=f"register the service with payload {' or '.join(self._carrying)}",
            )
        node = await node_of(target.url)
        local, mtu = await remote.local(conn.id, node)
        door = fds.get(near.mechanism.get(INODE_URL))
        entries = {namespace: door}
        standing = self._standing_hop(conn.id, remote, target.known, namespace)
        hop = await self._tunnels.hop(namespace, door, standing)
        seat = namespace, near.mechanism.get(mechanisms.NAME)
        span = Span(conn.id, "src", local, node, mtu, hop)
        half = await remote.half(span, None, seat, _wire(target), _ways(entries), attempt)
        for turn in range(ROUNDS):
            made = await self._ask(target, conn, (half.offer(),), caller, far_fds, attempt)
            agreed = _agreed(made, remote.type, target)
            made = _lowered(made, mechanisms.number(agreed.get(mechanisms.MTU)), mtu)
            less = await self._less(remote, made, agreed, node)
            if less:  # than the far end was told
                conn = _lowered(conn, less)
                made = await self._ask(target, conn, (half.offer(),), caller, far_fds, attempt)
                agreed, made = _agreed(made, remote.type, target), _lowered(made, less)
            side = crossconnect.client_side(made, near.mechanism, namespace, "")
            wire = RemoteWire(made.id, "src", side, half.tunnel(agreed), hop)
            try:
                kernel = await self._ensure(wire, target.known, entries, attempt)
                break
            except TAKEN as taken:
                # Upstream keeps identifiers apart only at the responder: two of them may
                # give us the same. So we say which one, or which port, is free here.
                if turn == ROUNDS - 1:
                    raise
                await self._close(target.url, made)
                await half.redraw(agreed, taken)
                target = replace(target, known=None, stands=False)
        proven = await self._proven(wire, entries, caller)
        return path.took(made, kernel_ms=kernel, **proven), wire

    async def _less(
        self, remote: Remote, made: Connection, agreed: Mechanism, met: IPAddress
    ) -> int:
        """The MTU towards the far end, if it is lower than the wire's; 0 if not.

        Its tunnels may be elsewhere than who was asked: behind another cluster's proxy.
        """
        far = ends.address(agreed, mechanisms.DST_IP)
        if far == met:
            return 0
        _, mtu = await remote.local(made.id, far)
        return mtu if made.context and mtu < made.context.mtu else 0

    async def _from_far(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        caller: Caller,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> tuple[Near, Connection, Wire]:
        """The endpoint here, the client on another node: our half of the tunnel."""
        asked, remote = near.mechanism, self._remotes[near.mechanism.type]
        node = remote.asker(asked)
        local, mtu = await remote.local(conn.id, node)
        ends.same_family(remote.type, local, node)
        lowest = mechanisms.lowest_mtu(mechanisms.number(asked.get(mechanisms.MTU)), mtu)
        made = await self._ask(
            target, _lowered(conn, lowest), (_any_interface(),), caller, far_fds, attempt
        )
        made = _lowered(made, lowest)
        outgoing = _agreed(made, mechanisms.KERNEL, target)
        url = outgoing.get(INODE_URL)
        far = await self._namespace(url, far_fds, f"endpoint {target.endpoint}")
        side = crossconnect.endpoint_side(made, outgoing, far, "")
        door = far_fds.get(url)
        standing = self._standing_hop(conn.id, remote, target.known, far)
        hop = await self._tunnels.hop(far, door, standing)
        span = Span(conn.id, "dst", local, node, mtu, hop)
        seat, entries = (far, side.name), {far: door}
        half = await remote.half(span, asked, seat, _wire(target), _ways(entries), attempt)
        for turn in range(ROUNDS):
            agreed = half.answer(asked)
            wire = RemoteWire(made.id, "dst", side, half.tunnel(agreed), hop)
            try:
                kernel = await self._ensure(wire, target.known, entries, attempt)
                break
            except TAKEN as taken:
                if turn == ROUNDS - 1:
                    raise
                await half.redraw(agreed, taken)
        return Near(agreed, None), path.took(made, kernel_ms=kernel), wire

    async def _proven(
        self, wire: RemoteWire, entries: Mapping[Namespace, int | None], caller: Caller
    ) -> dict[str, float]:
        """Wait until the far end has proven its key: who asked begins, and only who asked.

        If both began, each would drop the other's answer (seconds). A VXLAN proves nothing.
        """
        if not isinstance(wire.tunnel, WireguardTunnel):
            return {}
        least, most = HANDSHAKE
        left = caller.left()
        patience = most if left is None else max(least, min(most, left / 4))
        took = await self._kernel.handshake(wire, patience, fds=_ways(entries))
        return {path.HANDSHAKE: took}

    def _standing_hop(
        self, id_: str, remote: Remote, known: Crossing | None, where: Namespace
    ) -> bool | None:
        """Whether this connection's tunnel stands apart, be it from before a restart.

        None if it does not stand, or could stand otherwise tomorrow: a wireguard-go's device is
        in the workload either way, and what comes after it may be the kernel's.
        """
        if known is None or known.wire is None:
            return self._recovery.hop(id_, where, encrypted=remote.type == mechanisms.WIREGUARD)
        wire = known.wire
        if not isinstance(wire, RemoteWire) or wire.end.namespace != where:
            return None
        if isinstance(wire.tunnel, WireguardTunnel) and wire.tunnel.engine == "userspace":
            return None
        return wire.hop

    async def _ensure(
        self,
        wire: Wire,
        known: Crossing | None,
        entries: Mapping[Namespace, int | None],
        attempt: Undo,
    ) -> float:
        """Make the wire stand; how many seconds the kernel and the way to it took."""
        if known and known.wire and _seats(known.wire) != _seats(wire):
            await self._kernel.remove(wire.connection)  # it moved: nothing may stay where it was
        began = time.monotonic()
        await self._kernel.ensure(wire, attempt, fds=_ways(entries))
        return time.monotonic() - began

    # ---- calling -------------------------------------------------------------------------

    async def _ask(
        self,
        target: Target,
        conn: Connection,
        preferences: tuple[Mechanism, ...],
        caller: Caller,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> Connection:
        """Request the connection from the next hop; the way back is added before."""
        context = conn.context or Context()
        conn = replace(
            conn,
            mechanism=_again(target.known, preferences),
            endpoint=target.endpoint,
            payload=target.payload,
            context=replace(context, mtu=context.mtu or mechanisms.JUMBO_MTU),
        )
        known = [conn]
        if not target.stands:
            # Before the call, not after: it may fail here and have worked there.
            what = f"close {conn.id} at endpoint {target.endpoint}"
            attempt.add(what, self._take_back, target.url, known)
        answer = await self._calls.request(
            target.url,
            Request(conn, preferences),
            fds=far_fds,
            within=caller.left() or LONGEST,
            dial_timeout=self._dial_timeout,
            whose=f"endpoint {target.endpoint}",
        )
        made = answer.connection
        if made.id != conn.id or made.index != conn.index or len(made.segments) <= conn.index:
            raise PeerError(
                f"endpoint {target.endpoint} at {target.url} answered for connection"
                f" {made.id[:64]!r} when it was asked for {conn.id}",
                code=InvalidError.code,
            )
        known.append(replace(conn, path=made.path))
        return _with_context(made)

    async def _take_back(self, url: str, known: Sequence[Connection]) -> None:
        """Close by what was known last: upstream's hops find theirs by their own segment only."""
        await self._close(url, known[-1])

    async def _close(self, url: str, conn: Connection) -> None:
        with Descriptors() as none:
            await self._calls.close(url, conn, fds=none)

    async def _close_far(self, conn: Connection, memory: Crossing | None) -> None:
        if memory:
            told = replace(conn, endpoint=memory.endpoint, mechanism=memory.outgoing)
            conn = replace(told, payload=memory.payload)
            if memory.url:
                await self._close(memory.url, conn)
                return
        if not conn.endpoint:
            return
        with Descriptors() as fds:
            for offer in await self._discovery.offers(conn, fds):
                url = self._url(offer, fds)
                try:
                    await self._close(url, conn if memory else replace(conn, mechanism=None))
                finally:
                    self._sockets.release(url)


def _carrier(conn: Connection) -> str:
    """The endpoint an earlier life of ours led conn to, by its path; empty if it comes first."""
    return conn.endpoint if len(conn.segments) > conn.index + 1 else ""


def _anew(conn: Connection, held: Held[Crossing]) -> Connection:
    """The connection as asked for the first time: without its endpoint, the way there, and what
    that one said of addresses."""
    segments = conn.segments[: conn.index + 1]
    ip = conn.ip.without(held.made.ip) if held.made else conn.ip
    return replace(
        conn,
        endpoint="",
        path=Path(segments, conn.index, conn.path.unknown if conn.path else b""),
        context=replace(conn.context or Context(), ip=ip),
    )


def _ways(entries: Mapping[Namespace, int | None]) -> Mapping[Namespace, int]:
    return {space: fd for space, fd in entries.items() if fd is not None}


def _wire(target: Target) -> Wire | None:
    return target.known.wire if target.known else None


def _again(known: Crossing | None, preferences: tuple[Mechanism, ...]) -> Mechanism | None:
    """What was agreed on before, with what we say of our side now; None if it does not fit now."""
    before = known.outgoing.without(INODE_URL) if known else Mechanism()
    now = next((one for one in preferences if one.type == before.type), None)
    return before.with_(**now.parameters) if now else None


def _any_interface() -> Mechanism:
    """What we can do with an endpoint of this node: it names its interface and namespace."""
    return Mechanism(mechanisms.LOCAL, mechanisms.KERNEL)


def _agreed(made: Connection, type_: str, target: Target) -> Mechanism:
    if made.mechanism is None or made.mechanism.type != type_:
        got = made.mechanism.type if made.mechanism else "none"
        raise UnsupportedError(
            f"endpoint {target.endpoint} at {target.url} answered with mechanism {got}"
            f" when {type_} was asked for"
        )
    return made.mechanism


def _with_context(conn: Connection) -> Connection:
    context = conn.context or Context()
    return replace(conn, context=replace(context, ip=context.ip or IPContext()))


def _lowered(conn: Connection, *mtus: int) -> Connection:
    context = conn.context or Context()
    return replace(conn, context=replace(context, mtu=mechanisms.lowest_mtu(context.mtu, *mtus)))


def _slim(wire: Wire) -> Wire:
    """wire without its addresses, routes and neighbours: kilobytes, for as long as it stands."""

    def bare(side: Interface) -> Interface:
        return replace(side, addresses=(), routes=(), neighbours=(), policies=())

    if isinstance(wire, LocalWire):
        return replace(wire, src=bare(wire.src), dst=bare(wire.dst))
    return replace(wire, end=bare(wire.end))


def _seats(wire: Wire) -> list[Seat]:
    def seat(interface: Interface) -> Seat:
        return interface.namespace, interface.name

    return [seat(interface) for _, interface in wire.sides]


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

"""The next hop: asking it for a connection, and closing what it has of one.

While a connection goes over from one endpoint to another it has two wires, and often one next
hop for both. So each wire of a connection has a name of its own there: our segment's id as the
next hop sees it comes from the connection's id and the wire's leg. Who asks us never sees it.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from ipaddress import ip_interface, ip_network
from uuid import NAMESPACE_OID, uuid5

from forwarder.crossing import Crossing, Target, with_context
from forwarder.discovery import Discovery, Offer
from forwarder.sockets import Sockets
from nsm import mechanisms, path
from nsm.caller import Caller
from nsm.descriptors import INODE_URL, Descriptors
from nsm.errors import InvalidError, PeerError
from nsm.model import Connection, Context, IPContext, Mechanism, Request, Route
from nsm.rpc.calls import Calls
from nsm.undo import Undo

LONGEST = 60.0  # seconds for a caller without a deadline


class Asking:
    """Calls to next hops."""

    def __init__(
        self, calls: Calls, discovery: Discovery, sockets: Sockets, dial_timeout: float
    ) -> None:
        self._calls = calls
        self._discovery = discovery
        self._sockets = sockets
        self._dial_timeout = dial_timeout

    def url(self, offer: Offer, fds: Descriptors) -> str:
        """Where an endpoint is reached, to be released in time."""
        fd = fds.get(offer.endpoint.url)
        return offer.endpoint.url if fd is None else self._sockets.keep(fd)

    async def ask(
        self,
        target: Target,
        conn: Connection,
        preferences: tuple[Mechanism, ...],
        caller: Caller,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> Connection:
        """Request the connection from the next hop; the way back is added before."""
        made = await self._asked(target, conn, preferences, caller, far_fds, attempt)
        if stale := _stale(made.ip, target.addresses) if target.old else set():
            # it leaves what others gave where it is, and has now given its own
            context = replace(made.context or Context(), ip=_rid(made.ip, stale))
            again = replace(conn, path=made.path, context=context)
            target = replace(target, stands=True)
            made = await self._asked(target, again, preferences, caller, far_fds, attempt)
        return made

    async def _asked(
        self,
        target: Target,
        conn: Connection,
        preferences: tuple[Mechanism, ...],
        caller: Caller,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> Connection:
        context = conn.context or Context()
        conn = replace(
            conn,
            mechanism=_again(target.known, preferences),
            endpoint=target.endpoint,
            payload=target.payload,
            context=replace(context, mtu=context.mtu or mechanisms.JUMBO_MTU),
        )
        told = called(conn, target.leg)
        known = [told]
        if not target.stands:
            # Before the call, not after: it may fail here and have worked there.
            what = f"close {told.id} at endpoint {target.endpoint}"
            attempt.add(what, self._take_back, target.url, known)
        answer = await self._calls.request(
            target.url,
            Request(told, preferences),
            fds=far_fds,
            within=caller.left() or LONGEST,
            dial_timeout=self._dial_timeout,
            whose=f"endpoint {target.endpoint}",
        )
        made = answer.connection
        if made.id != told.id or made.index != told.index or len(made.segments) <= told.index:
            raise PeerError(
                f"endpoint {target.endpoint} at {target.url} answered for connection"
                f" {made.id[:64]!r} when it was asked for {told.id}",
                code=InvalidError.code,
            )
        known.append(replace(told, path=made.path))
        return with_context(path.called(made, conn.id))

    async def _take_back(self, url: str, known: Sequence[Connection]) -> None:
        """Close by what was known last: upstream's hops find theirs by their own segment only."""
        await self._close(url, known[-1])

    async def close(self, url: str, conn: Connection, leg: str) -> None:
        """Close that wire of a connection at the next hop."""
        await self._close(url, called(conn, leg))

    async def close_far(self, conn: Connection, memory: Crossing | None) -> None:
        """Close whatever the endpoint has of the connection, known or not."""
        if memory:
            told = replace(conn, endpoint=memory.endpoint, mechanism=memory.outgoing)
            conn = called(replace(told, payload=memory.payload), memory.leg)
            if memory.url:
                await self._close(memory.url, conn)
                return
        if not conn.endpoint:
            return
        with Descriptors() as fds:
            for offer in await self._discovery.offers(conn, fds):
                url = self.url(offer, fds)
                try:
                    await self._close(url, conn if memory else replace(conn, mechanism=None))
                finally:
                    self._sockets.release(url)

    async def _close(self, url: str, conn: Connection) -> None:
        with Descriptors() as none:
            await self._calls.close(url, conn, fds=none)


def new_leg() -> str:
    """What tells a connection's next wire from those before it."""
    return secrets.token_hex(4)


def name_of(id_: str, leg: str) -> str:
    """What the next hop has as our id of a connection, for that wire of it."""
    return str(uuid5(NAMESPACE_OID, f"{id_} {leg}")) if leg else id_


def called(conn: Connection, leg: str) -> Connection:
    """The connection as the next hop is told of it."""
    return path.called(conn, name_of(conn.id, leg))


def _again(known: Crossing | None, preferences: tuple[Mechanism, ...]) -> Mechanism | None:
    """What was agreed on before, with what we say of our side now; None if it does not fit now."""
    before = known.outgoing.without(INODE_URL) if known else Mechanism()
    now = next((one for one in preferences if one.type == before.type), None)
    return before.with_(**now.parameters) if now else None


# --- addresses of another endpoint -----------------------------------------------------------


def _stale(now: IPContext, before: IPContext) -> set[str]:
    """Addresses of before that stand beside new ones of their kind and family."""
    return _outlived(now.src_ip_addrs, before.src_ip_addrs) | _outlived(
        now.dst_ip_addrs, before.dst_ip_addrs
    )


def _outlived(now: Iterable[str], before: Iterable[str]) -> set[str]:
    held, old = set(now), set(before)
    families = {_version(text) for text in held - old}
    return {text for text in held & old if _version(text) in families}


def _version(text: str) -> int:
    try:
        return ip_interface(text).version
    except ValueError:
        return 0


def _rid(ip: IPContext, stale: set[str]) -> IPContext:
    """The context without those addresses and the routes to them."""
    hosts = {ip_interface(text).ip for text in stale if _version(text)}

    def stays(route: Route) -> bool:
        try:
            to = ip_network(route.prefix, strict=False)
        except ValueError:
            return True
        return to.num_addresses > 1 or to.network_address not in hosts

    return replace(
        ip,
        src_ip_addrs=tuple(one for one in ip.src_ip_addrs if one not in stale),
        dst_ip_addrs=tuple(one for one in ip.dst_ip_addrs if one not in stale),
        src_routes=tuple(one for one in ip.src_routes if stays(one)),
        dst_routes=tuple(one for one in ip.dst_routes if stays(one)),
    )

"""Which forwarders of this node may carry a request, best first (`wire.md` §7.3)."""

import asyncio
from contextlib import aclosing

from nsm.caller import Caller
from nsm.domains import split
from nsm.errors import DeadlineError, NotFoundError, UnavailableError
from nsm.model import Connection, Service
from nsm.rpc.registry_services import Store
from nsm.selection import match_forwarders
from nsmgr.registry import Local, Locals

WAIT = 2.0  # seconds for a forwarder to appear: one that was restarted registers within that
SPARE = 2.0  # seconds of the caller's time left for the request itself


class Discovery:
    """Matches a connection's service with the node's forwarders."""

    def __init__(self, domain: Store, locals_: Locals, forwarder_service: str) -> None:
        self._domain = domain
        self._locals = locals_
        self._forwarder_service = forwarder_service

    async def candidates(self, conn: Connection, *, sticky: str, caller: Caller) -> list[Local]:
        """Forwarders to try in order; only the sticky one, where it is named.

        Raises NotFoundError, in upstream's words and with what was there; but
        UnavailableError where the one that carries conn is away and nobody could take
        its place: who is told "not found" chooses anew, and its wires stand meanwhile.
        """
        if sticky:
            try:
                return [await self.here(sticky, caller.left())]
            except NotFoundError as away:
                if self._locals.of(self._forwarder_service):
                    raise
                raise UnavailableError(away.message, hint=away.hint) from away
        try:
            service = await self._service(conn, caller)
        except (UnavailableError, DeadlineError):
            if carrier := await self._carrier(conn, caller.left()):
                return [carrier]
            raise
        await self._some(caller.left())
        forwarders = {one.endpoint.name: one for one in self._locals.of(self._forwarder_service)}
        after = conn.segments[conn.index + 1 :]
        fitting = match_forwarders(
            service,
            conn.labels,
            [one.endpoint for one in forwarders.values()],
            forwarder_service=self._forwarder_service,
            prefer=after[0].name if after else "",
        )
        if not forwarders and after:
            raise UnavailableError(
                f"forwarder {after[0].name}, which carries connection {conn.id} of"
                f" {conn.service!r}, is not registered, nor is any other of this node",
                hint="is it running?",
            )
        if not fitting:
            raise NotFoundError(
                f"no candidates found: none of the {len(forwarders)} forwarders of this node"
                f" may carry {conn.service!r}",
                hint="start a forwarder that registers here"
                if not forwarders
                else "compare the service's match metadata with the forwarders' NSM_LABELS",
            )
        return [forwarders[one.name] for one in fitting]

    async def _carrier(self, conn: Connection, left: float | None) -> Local | None:
        """The forwarder that carries conn by its path, for as long as nobody can say which may:
        it was chosen while the registry was there, and what it carries stands."""
        after = conn.segments[conn.index + 1 :]
        if not after:
            return None
        try:
            local = await self.here(after[0].name, left)
        except NotFoundError:
            return None
        # its name is the client's word, and there are others than forwarders here
        return local if self._forwarder_service in local.endpoint.services else None

    async def _service(self, conn: Connection, caller: Caller) -> Service:
        query = Service(conn.service, conn.payload)
        async with aclosing(self._domain.find_services(query, False, caller)) as found:
            async for one in found:
                if one.item.name == conn.service and not one.deleted:
                    return one.item
        with_payload = f" with payload {conn.payload}" if conn.payload else ""
        domain = split(conn.service)[1]
        raise NotFoundError(
            f"network service {conn.service}{with_payload} is not found: nobody has registered it"
            f" in {f'domain {domain!r}' if domain else 'this domain'}",
            hint=f"see `nsmctl services`{' there' * bool(domain)} for those that are registered",
        )

    async def here(self, name: str, left: float | None) -> Local:
        """The forwarder called name; left is how many seconds its caller has, if it says.

        Raises NotFoundError where it is not registered and does not come.
        """
        try:
            async with asyncio.timeout(_patience(left)):
                while (local := self._locals.get(name)) is None:
                    await self._locals.change()
                return local
        except TimeoutError:
            raise NotFoundError(
                f"forwarder {name} is not available",
                hint="it carries this connection and has not registered again; is it running?",
            ) from None

    async def _some(self, left: float | None) -> None:
        try:
            async with asyncio.timeout(_patience(left)):
                while not self._locals.of(self._forwarder_service):
                    await self._locals.change()
        except TimeoutError:
            return  # the caller is told by candidates


def _patience(left: float | None) -> float:
    return WAIT if left is None else max(0.0, min(WAIT, left - SPARE))

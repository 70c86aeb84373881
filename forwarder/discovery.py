"""Which endpoints may serve a request, and in which order (`wire.md` §7.4)."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from nsm import mechanisms
from nsm.descriptors import Descriptors
from nsm.domains import split
from nsm.errors import NotFoundError
from nsm.model import Connection, Endpoint, Service
from nsm.race import both
from nsm.rpc.registry import RegistryClient
from nsm.selection import Turns, match_endpoints

SHOWN = 8  # names in an error's text


@dataclass(frozen=True, slots=True)
class Offer:
    """An endpoint to try, and what its service carries."""

    endpoint: Endpoint
    payload: str


class Discovery:
    """Asks the node's manager what the domain offers."""

    def __init__(self, registry: RegistryClient) -> None:
        self._registry = registry
        self._turns = Turns()

    async def offers(
        self, conn: Connection, fds: Descriptors, *, without: Collection[str] = ()
    ) -> list[Offer]:
        """Endpoints for conn, the one whose turn it is first; their sockets are in fds.

        A connection that names its endpoint gets that one and no other. Those called as in
        without count as not there. Raises NotFoundError, in upstream's words and with what was
        there.
        """
        if conn.endpoint:
            return [await self._named(conn, fds)]
        service, found = await both(
            self._service(conn),
            self._registry.find_endpoints(Endpoint(services=(conn.service,)), fds=fds),
        )
        alive = [one for one in _alive(found) if one.name not in without]
        matching = match_endpoints(service, conn.labels, alive)
        if not matching:
            raise _nobody(conn, found, alive)
        ordered = self._turns.order(service.name, matching)
        return [Offer(one, service.payload or conn.payload or mechanisms.IP) for one in ordered]

    async def _named(self, conn: Connection, fds: Descriptors) -> Offer:
        found = await self._registry.find_endpoints(Endpoint(name=conn.endpoint), fds=fds)
        alive = [one for one in _alive(found) if one.name == conn.endpoint]
        if not alive:
            raise NotFoundError(
                f"network service endpoint {conn.endpoint} not found",
                hint="it is not registered now: is it running? leave the name out to get another",
            )
        # Upstream leaves the payload to a client that names its endpoint, and
        # then offers no tunnel without one; the service knows it.
        payload = conn.payload or (await self._service(conn)).payload
        return Offer(alive[0], payload or mechanisms.IP)

    async def _service(self, conn: Connection) -> Service:
        query = Service(conn.service, conn.payload)
        for service in await self._registry.find_services(query):
            if service.name == conn.service:
                return service
        with_payload = f" with payload {conn.payload}" if conn.payload else ""
        domain = split(conn.service)[1]
        raise NotFoundError(
            f"network service {conn.service}{with_payload} is not found: nobody has registered it"
            f" in {f'domain {domain!r}' if domain else 'this domain'}",
            hint=f"see `nsmctl services`{' there' * bool(domain)} for those that are registered",
        )


def _alive(found: Sequence[Endpoint]) -> list[Endpoint]:
    now = time.time_ns()
    return [one for one in found if one.expires is None or one.expires > now]


def _nobody(
    conn: Connection, found: Sequence[Endpoint], alive: Sequence[Endpoint]
) -> NotFoundError:
    if not alive:
        expired = f"; {len(found)} are registered and expired" if found else ""
        return NotFoundError(
            "network service endpoint candidates not found: nobody serves"
            f" {conn.service!r} now{expired}",
            hint="start an endpoint of that service, or wait until one has registered",
        )
    names = ", ".join(one.name for one in alive[:SHOWN])
    return NotFoundError(
        f"network service endpoint candidates not found: none of the {len(alive)} endpoints of"
        f" {conn.service!r} ({names}) matches the labels {dict(conn.labels)}",
        hint="compare them with the service's matches",
    )

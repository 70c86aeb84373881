"""Wires follow the rules of their service: who serves a client may change while both live.

Services are watched. Where one's rules change, each wire whose endpoint they chose is held
against the new ones (`wire.md` §7.2); who would be led elsewhere now is asked to ask again, and
is. Where the rules lead to nobody the wire stays, and so does one that was asked for by its
endpoint's name.
"""

import asyncio
import random
from contextlib import aclosing
from typing import NoReturn

import structlog

from forwarder.crossing import Crossing
from forwarder.route import ForwarderRoute
from nsm.connections import Held
from nsm.descriptors import Descriptors
from nsm.errors import NsmError
from nsm.hop import Hop
from nsm.model import Endpoint, Found, Match, Service
from nsm.rpc.registry import RegistryClient
from nsm.selection import match_endpoints
from nsm.watches import Spawn

log = structlog.get_logger(__name__)
MOST = 10_000  # services whose rules are known; those of more are not followed
PAUSES = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between tries to watch; the last repeats
LOOK_EVERY = 0.05  # seconds between looks whether the manager has heard as well
PATIENCE = 5.0  # seconds until it has; then the next refresh of a wire finds it as it is


class Edits:
    """Hears of services whose rules change, for as long as `follow` runs."""

    def __init__(
        self,
        hop: Hop[Crossing],
        route: ForwarderRoute,
        registry: RegistryClient,
        spawn: Spawn,
    ) -> None:
        self._hop = hop
        self._route = route
        self._registry = registry
        self._spawn = spawn
        self._rules: dict[str, tuple[Match, ...]] = {}

    async def follow(self) -> NoReturn:
        """Watch the domain's services, for a task of the process."""
        failures = 0
        while True:
            try:
                async with aclosing(self._registry.watch_services()) as changes:
                    async for found in changes:
                        failures = 0
                        self.heard(found)
            except NsmError as error:
                if not failures:
                    log.info("services are not watched now", why=str(error))
            pause = PAUSES[min(failures, len(PAUSES) - 1)]
            failures += 1
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter

    def heard(self, found: Found[Service]) -> None:
        """A service as it is now; one that is gone leaves its wires as they are."""
        service = found.item
        before = self._rules.get(service.name)
        if found.deleted or (before is None and len(self._rules) >= MOST):
            return
        self._rules[service.name] = service.matches
        if before is not None and before != service.matches and self._chosen(service):
            self._spawn(self._judge(service), f"new rules of {service.name}")

    def _chosen(self, service: Service) -> list[Held[Crossing]]:
        """The wires of a service whose endpoints its rules chose."""
        return [
            held
            for held in self._hop.connections.established()
            if held.made
            and held.made.service == service.name
            and held.memory
            and held.memory.chosen
        ]

    async def _judge(self, service: Service) -> None:
        """Have those ask again who would be led elsewhere."""
        try:
            if not await self._manager_knows(service):
                return
            with Descriptors() as fds:
                endpoints = await self._registry.find_endpoints(
                    Endpoint(services=(service.name,)), fds=fds
                )
        except NsmError as reason:
            log.warning("new rules are not followed", service=service.name, why=str(reason))
            return
        for held in self._chosen(service):
            assert held.made is not None
            assert held.memory is not None
            found = match_endpoints(service, held.made.labels, endpoints)
            names = [one.endpoint.name for one in found]
            if names and held.memory.endpoint not in names:
                log.info("a wire is led elsewhere", connection=held.id, service=service.name)
                self._route.leave(held.id)
                self._spawn(self._hop.want_again(held.id), f"move of {held.id}")

    async def _manager_knows(self, service: Service) -> bool:
        """Wait until the manager answers with these rules; False if there are others by then."""
        for _ in range(round(PATIENCE / LOOK_EVERY)):
            if self._rules.get(service.name) != service.matches:
                return False  # edited again, which is judged by itself
            for known in await self._registry.find_services(Service(service.name)):
                if known.name == service.name and known.matches == service.matches:
                    return True
            await asyncio.sleep(LOOK_EVERY)
        return False

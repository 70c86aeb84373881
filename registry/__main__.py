"""The registry's process: every object of it is made here, in start order."""

import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from registry import origin  # noqa: F401 - first, because what stands in for `nsm` would be run

# isort: split
import structlog

from nsm.identity.source import Source
from nsm.identity.workload import workload_source
from nsm.limits import Places
from nsm.model import SECOND
from nsm.offers import Offers
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import figures
from nsm.process.run import Process, run
from nsm.registrar import Keeper, Registrar, Watchers
from nsm.registration import SERVER_POLICIES
from nsm.rpc.health import Health
from nsm.rpc.passing import Passing
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.registry_services import HEALTHY, Store, handlers
from nsm.rpc.server import serve
from registry.border import Border
from registry.config import Config
from registry.store import Loaded, open_store

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate
log = structlog.get_logger(__name__)


def main() -> int:
    """Run the registry until it is told to stop; its exit code."""
    return run("registry", read(Config), registry)


async def registry(config: Config, process: Process) -> None:
    """Serve what is registered; answer from memory, keep in the store."""
    period = int(config.expire_period * SECOND)
    if missing := SERVER_POLICIES - config.policies:
        log.warning("policies are off for Register and Unregister", policies=sorted(missing))
    async with (
        workload_source(config.spiffe_endpoint_socket, patience=IDENTITY_PATIENCE) as source,
        _kept(config.store) as (keeper, loaded),
        _beyond(config, source) as beyond,
    ):
        offers = Offers(config.limits)
        offers.load(loaded.endpoints, loaded.services, grace_until=time.time_ns() + period)
        figures.shows(
            "registrations",
            lambda: {"endpoint": len(offers.endpoints), "service": len(offers.services)},
        )
        registrar = Registrar(
            offers,
            period=period,
            keeper=keeper,
            behind=config.max_behind,
        )
        process.tasks.spawn(registrar.run(), "expiry of endpoints", forever=True, vital=True)
        store: Store = registrar
        if beyond is not None:
            limits = config.limits
            watchers = Watchers(limits.watchers, limits.watchers_per_id)
            store = Border(registrar, beyond, watchers, strangers=config.register_strangers)
        services = handlers(
            store,
            lifetime=int(config.max_token_lifetime * SECOND),
            policies=config.policies,
            record_bytes=config.max_record,
            places=Places(config.name, config.bounds, "registrations", "NSM_MAX_WRITES"),
        )
        async with serve(
            config.listen_on, [*services, Health(*HEALTHY)], source, on_call=log_call
        ) as server:
            process.ready(
                server.urls,
                id=str(source.identity.svid.id),
                store=config.store or "in memory",
                other_domains=config.proxy_registry_url,
                holds=f"{len(offers.endpoints)} endpoints, {len(offers.services)} services",
            )
            await process.stopped()


@asynccontextmanager
async def _kept(path: str) -> AsyncIterator[tuple[Keeper | None, Loaded]]:
    if not path:
        yield None, Loaded()
        return
    async with open_store(path) as (store, loaded):
        yield store, loaded


@asynccontextmanager
async def _beyond(config: Config, source: Source) -> AsyncIterator[Passing | None]:
    if not config.proxy_registry_url:
        yield None
        return
    async with Peers(source) as peers:
        lifetime = int(config.max_token_lifetime * SECOND)
        client = RegistryClient(peers, config.proxy_registry_url, lifetime=lifetime)
        yield Passing(client, "the proxy for other domains")


if __name__ == "__main__":
    sys.exit(main())

"""Start a supplier: `python -P -m endpoints.supplier`. All objects are made here."""

import asyncio
import contextlib
import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import structlog

from endpoints.supplier import house
from endpoints.supplier.config import Config
from endpoints.supplier.house import House
from endpoints.supplier.keeper import Keeper
from endpoints.supplier.recipes import Recipe
from endpoints.supplier.route import SupplierRoute
from nsm import domains
from nsm.endpoint import Endpoint
from nsm.errors import InvalidError
from nsm.identity.source import Source
from nsm.mechanisms import IP
from nsm.ondemand import ROLE, SUPPLIER
from nsm.process.calls import log_call
from nsm.process.config import for_children, read
from nsm.process.run import Process, run
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient

IDENTITY_PATIENCE: Final = 30.0  # seconds for the first certificate
LOOK_AT_LOGS: Final = 5.0  # seconds
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HANDED_ON: Final = ("PATH", "HOME", "LANG", "TMPDIR", "VWIRE_LAB")

log = structlog.get_logger(__name__)


async def serve(config: Config, process: Process) -> None:
    """Be a supplier until the process is asked to stop. Its routers stay."""
    recipes = await asyncio.to_thread(_recipes, config)
    async with (
        config.identity(IDENTITY_PATIENCE) as source,
        Peers(source, dial_timeout=config.dial_timeout) as peers,
        contextlib.AsyncExitStack() as stack,
    ):
        there = House(config.state_dir, _inherited(config))
        await asyncio.to_thread(there.__enter__)
        stack.callback(there.__exit__)
        registry = RegistryClient(peers, config.connect_to, lifetime=config.lifetime)
        keepers = {one.service: Keeper(one, there, registry) for one in recipes}
        for keeper in keepers.values():
            name = f"router {keeper.recipe.name}"
            process.tasks.spawn(keeper.run(), name, forever=True)
        logs = [there.log_of(one) for one in recipes]
        process.tasks.spawn(_bound(logs), "the routers' logs", forever=True)
        urls = [
            (await stack.enter_async_context(endpoint)).urls[0]
            for endpoint in _endpoints(config, source, keepers)
        ]
        process.ready(urls, services=", ".join(keepers), manager=config.connect_to)
        await process.stopped()


def _endpoints(config: Config, source: Source, keepers: Mapping[str, Keeper]) -> Sequence[Endpoint]:
    """One for each domain: a registration goes to one."""
    of: dict[str, list[str]] = defaultdict(list)
    for service in keepers:
        of[domains.split(service)[1]].append(service)
    made = []
    for domain, services in of.items():
        name = domains.join(config.name, domain)
        endpoint = Endpoint(
            name,
            services,
            source=source,
            manager=config.connect_to,
            labels={**config.told, ROLE: SUPPLIER},
            payload=IP,
            register_service=False,
            unregister=config.unregister_itself,
            lifetime=config.lifetime,
            on_call=log_call,
        )
        endpoint.route = SupplierRoute(name, keepers)
        made.append(endpoint)
    return made


def _recipes(config: Config) -> tuple[Recipe, ...]:
    """What the file says, if it can be done here."""
    found = house.read(config.routers_file)
    for one in found:
        if domains.split(one.service)[1] and not config.cluster_name:
            raise InvalidError(
                f"CLUSTER_NAME is not set, and {one.service} ({one.where}) is of a domain that"
                " clusters share, whose nodes may have the same names",
                hint="give it the name that this cluster's clients have for it",
            )
        if one.argv and not os.access(one.argv[0], os.X_OK):
            raise InvalidError(
                f"{one.where}: {one.argv[0]}, which is to be the router of {one.service}, is no"
                " program that can be run here"
            )
        if not one.argv and not _has(one.module):
            raise InvalidError(
                f"{one.where}: there is no module {one.module} to be the router of {one.service}"
            )
    return found


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _inherited(config: Config) -> dict[str, str]:
    """What each router is told as we are."""
    told = {
        "NODE_NAME": config.node_name,
        "CLUSTER_NAME": config.cluster_name,
        "SPIFFE_ENDPOINT_SOCKET": config.spiffe_endpoint_socket,
        "NSM_CONNECT_TO": config.connect_to,
        "NSM_LOG_LEVEL": config.log_level,
        "NSM_REGISTER_SERVICE": "false",
    }
    given = {name: value for name, value in told.items() if value}
    return {"PATH": PATH, **for_children(also=HANDED_ON), **given}


async def _bound(logs: Sequence[str]) -> NoReturn:
    while True:
        await asyncio.to_thread(house.bound, logs)
        await asyncio.sleep(LOOK_AT_LOGS)


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("supplier", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

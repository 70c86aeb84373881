"""Start a manager: `python -P -m nsmgr`. All objects are made here, in start order."""

import sys
from functools import partial

from nsmgr import origin  # noqa: F401 - first, because what stands in for `nsm` would be run

# isort: split
from nsm.process import lean  # noqa: F401 - before all that logs

# isort: split
from nsm.caller import Caller
from nsm.hop import Hop
from nsm.identity.source import Handshake, Source
from nsm.identity.workload import workload_source
from nsm.limits import Places
from nsm.model import SECOND
from nsm.offers import Offers
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import carried, figures
from nsm.process.run import Process, run
from nsm.registrar import Registrar
from nsm.rpc import registry_services, services
from nsm.rpc.calls import Calls
from nsm.rpc.health import Health
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.registry_services import Store
from nsm.rpc.server import serve as serve_grpc
from nsmgr import adoption
from nsmgr.config import Config
from nsmgr.discovery import Discovery
from nsmgr.excluded import ExcludedPrefixes
from nsmgr.registry import Locals, NodeRegistry, public_url
from nsmgr.route import ManagerRoute, Next
from nsmgr.store import open_store
from nsmgr.upstream import RemoteRegistry

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate


async def serve(config: Config, process: Process) -> None:
    """Be a manager until the process is asked to stop. Wires stay when it does."""
    lifetime = int(config.max_token_lifetime * SECOND)
    excluded = ExcludedPrefixes(config.excluded_prefixes_path)
    process.tasks.spawn(excluded.follow(), "excluded prefixes", forever=True)
    async with (
        workload_source(config.spiffe_endpoint_socket, patience=IDENTITY_PATIENCE) as source,
        Peers(source, dial_timeout=config.dial_timeout) as peers,
        open_store(config.store) as (store, left),
    ):
        domain = _domain(config, process, peers, lifetime)
        locals_ = Locals()
        calls = Calls(peers, lifetime)
        discovery = Discovery(domain, locals_, config.forwarder_network_service_name)
        route = ManagerRoute(discovery, calls, excluded, config.labels, config.dial_timeout)
        hop: Hop[Next] = Hop(
            config.name,
            route,
            lifetime=lifetime,
            spawn=process.tasks.spawn,
            monitor=calls.monitor,
            observer=lambda who: str(who) in config.observers,
            places=Places(config.name, config.bounds),
            keeper=adoption.Keeper(store),
            moves=True,
            door=True,
        )
        adopted = adoption.adopt(left.connections, hop)
        process.tasks.spawn(
            adoption.follow_again(adopted, hop, locals_), "return of an earlier life's wires"
        )
        figures.shows("wires", lambda: carried(one.made for one in hop.connections.established()))
        node = NodeRegistry(domain, locals_, config.labels, spawn=process.tasks.spawn, kept=store)
        node.expect(left.registrations, _ourselves(source))
        process.tasks.spawn(
            node.follow(config.forwarder_network_service_name, partial(_joined, hop)),
            "endpoints that are gone",
            forever=True,
        )
        health = Health(*services.HEALTHY, *registry_services.HEALTHY)
        writes = Places(config.name, config.bounds, "registrations")
        registry = registry_services.handlers(node, lifetime=lifetime, places=writes, door=True)
        handlers = [*services.of(hop), *registry, health]
        try:
            async with serve_grpc(
                config.listen_on, handlers, source, on_call=log_call, publish=False
            ) as server:
                node.public_url = await public_url(config.listen_on, config.registry_url)
                await server.publish()
                process.ready(server.urls, registry=config.registry_url or "(in memory)")
                await process.stopped()
                hop.stop()
        finally:
            locals_.close()


def _joined(hop: Hop[Next]) -> set[str]:
    """The endpoints that a wire leads to, as far as its forwarder says."""
    there = [held.made for held in hop.connections.established() if not held.ended]
    return {made.endpoint for made in there if made}


def _ourselves(source: Source) -> Caller:
    """Who asks where nobody else does."""
    own = source.identity.svid
    return Caller(Handshake(own, own.id, own.leaf, own.not_after))


def _domain(config: Config, process: Process, peers: Peers, lifetime: int) -> Store:
    """The domain's registry, or one in memory where none is named."""
    if config.registry_url:
        client = RegistryClient(peers, config.registry_url, lifetime=lifetime)
        remote = RemoteRegistry(client)
        process.tasks.spawn(remote.follow(), "the domain's services", forever=True)
        return remote
    registrar = Registrar(Offers())
    process.tasks.spawn(registrar.run(), "expiry of registrations", forever=True)
    return registrar


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("nsmgr", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

"""Start a domain's proxy: `python -P -m nsmgr.proxy`. All objects are made here, in start order."""

import asyncio
import sys
from functools import partial

from nsm.hop import Hop
from nsm.identity.workload import workload_source
from nsm.limits import Places
from nsm.model import SECOND
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import carried, figures
from nsm.process.run import Process, run
from nsm.rpc import registry_services, services
from nsm.rpc.calls import Calls
from nsm.rpc.health import Health
from nsm.rpc.passing import Passing
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.server import serve as serve_grpc
from nsmgr.followed import Followed
from nsmgr.proxy import addresses, clusters
from nsmgr.proxy.addresses import AddressMap
from nsmgr.proxy.config import Config
from nsmgr.proxy.names import Names
from nsmgr.proxy.registry import ProxyRegistry
from nsmgr.proxy.route import Passage, ProxyRoute
from nsmgr.registry import public_url

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate


async def serve(config: Config, process: Process) -> None:
    """Be a proxy until the process is asked to stop. Wires stay when it does."""
    lifetime = int(config.max_token_lifetime * SECOND)
    where = config.map_ip_file_path
    read_map = partial(addresses.parse, path=where)
    outer = Followed(where, read_map, AddressMap(), "addresses outside")
    labels: Followed[dict[str, str]] = Followed(
        config.cluster_info_path, clusters.parse, {}, "labels of the cluster"
    )
    for file, what in ((outer, "addresses outside"), (labels, "labels of the cluster")):
        await asyncio.to_thread(file.first)
        process.tasks.spawn(file.follow(), what, forever=True)
    async with (
        workload_source(config.spiffe_endpoint_socket, patience=IDENTITY_PATIENCE) as source,
        Peers(source, dial_timeout=config.dial_timeout) as peers,
    ):
        calls = Calls(peers, lifetime)
        names = Names()
        dial = config.dial_timeout
        beyond = RegistryClient(
            peers, config.registry_proxy_url, lifetime=lifetime, dial_timeout=dial
        )
        local = RegistryClient(peers, config.registry_url, lifetime=lifetime, dial_timeout=dial)
        registry = ProxyRegistry(
            Passing(beyond, "the registry-proxy"), names, lambda: outer.value, lambda: labels.value
        )
        route = ProxyRoute(
            local, registry, names, calls, lambda: outer.value, lambda: labels.value, dial
        )
        hop: Hop[Passage] = Hop(
            config.name,
            route,
            lifetime=lifetime,
            spawn=process.tasks.spawn,
            monitor=calls.monitor,
            observer=lambda who: str(who) in config.observers,
            places=Places(config.name, config.bounds),
        )
        figures.shows("wires", lambda: carried(one.made for one in hop.connections.established()))
        handlers = [
            *services.of(hop),
            *registry_services.handlers(
                registry,
                lifetime=lifetime,
                places=Places(config.name, config.bounds, "registrations"),
            ),
            Health(*services.HEALTHY, *registry_services.HEALTHY),
        ]
        async with serve_grpc(
            config.listen_on, handlers, source, on_call=log_call, publish=False
        ) as server:
            registry.public_url = await public_url(config.listen_on, config.registry_url)
            await server.publish()
            process.ready(
                server.urls,
                id=str(source.identity.svid.id),
                registry=config.registry_url,
                proxy=config.registry_proxy_url,
            )
            await process.stopped()
            hop.stop()


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("nsmgr-proxy", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

"""Start a forwarder: `python -P -m forwarder`. All objects are made here, in start order."""

import asyncio
import sys
from collections.abc import Mapping

from forwarder import origin  # noqa: F401 - first, because what stands in for `nsm` would be run

# isort: split
from nsm.process import lean  # noqa: F401 - before all that logs

# isort: split
import structlog

from forwarder import adoption, rights
from forwarder.config import Config
from forwarder.crossing import Crossing
from forwarder.deaths import Deaths
from forwarder.discovery import Discovery
from forwarder.edits import Edits
from forwarder.farnodes import FarNodes
from forwarder.leftovers import Leftovers
from forwarder.probe import Probe
from forwarder.recovery import Recovery
from forwarder.remote import Vxlan, Wireguard
from forwarder.route import ForwarderRoute
from forwarder.sockets import Sockets
from forwarder.store import open_store
from forwarder.tunnels import Tunnels
from nsm.hop import Hop
from nsm.identity.workload import workload_source
from nsm.kernel.node import Kernel
from nsm.limits import Places
from nsm.model import SECOND, Endpoint
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import carried, figures
from nsm.process.run import Process, run
from nsm.rpc import services
from nsm.rpc.calls import Calls
from nsm.rpc.health import Health
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient, keep_registered
from nsm.rpc.server import serve as serve_grpc

log = structlog.get_logger(__name__)
IDENTITY_PATIENCE = 30.0  # seconds for the first certificate


async def serve(config: Config, process: Process) -> None:
    """Be a forwarder until the process is asked to stop. Wires stay when it does."""
    await asyncio.to_thread(rights.check, config.name, config.isolation)
    lifetime = int(config.max_token_lifetime * SECOND)
    async with (
        open_store(config.store) as (store, leases),
        Kernel(config.name) as kernel,
        workload_source(config.spiffe_endpoint_socket, patience=IDENTITY_PATIENCE) as source,
        Peers(source, dial_timeout=config.dial_timeout) as peers,
    ):
        calls = Calls(peers, lifetime)
        registry = RegistryClient(peers, config.connect_to, lifetime=lifetime)
        recovery = Recovery(kernel)
        sockets = Sockets()
        tunnels = Tunnels(kernel, config.tunnel_ip, config.isolation)
        engine = await kernel.find_wireguard(config.wireguard)
        log.info("WireGuard", engine=engine.name or "none", why=engine.why)
        probe = Probe(kernel, on=config.probe)
        figures.shows("probes", lambda: probe.counts)
        route = ForwarderRoute(
            Discovery(registry),
            calls,
            kernel,
            tunnels,
            (
                Vxlan(kernel, tunnels, recovery, config.vxlan_port),
                Wireguard(kernel, tunnels, engine, config.wireguard_port),
            ),
            sockets,
            recovery,
            config.dial_timeout,
            process.tasks.spawn,
            probe,
        )
        changed = asyncio.Event()
        hop: Hop[Crossing] = Hop(
            config.name,
            route,
            lifetime=lifetime,
            spawn=process.tasks.spawn,
            monitor=calls.monitor,
            places=Places(config.name, config.bounds),
            keeper=adoption.Keeper(store),
            on_established=lambda _: changed.set(),
            moves=True,
        )
        figures.shows("wires", lambda: _carried(hop))
        found = await recovery.look()
        for held in adoption.adopt(leases, hop):
            again = adoption.follow_again(held, hop, route)
            process.tasks.spawn(again, f"return of {held.id}")
        process.tasks.spawn(
            recovery.forget(config.max_token_lifetime, hop.connections, store.begun),
            "removal of wires nobody refreshed",
        )
        deaths = Deaths(hop, kernel, process.tasks.spawn)
        process.tasks.spawn(deaths.follow(), "deaths of namespaces", vital=True)
        process.tasks.spawn(deaths.look_around(), "deserted namespaces", forever=True)
        leftovers = Leftovers(kernel, hop.connections, recovery, route.aside)
        process.tasks.spawn(leftovers.follow(), "sweep of what nobody holds", forever=True)
        far = FarNodes(hop, kernel, process.tasks.spawn, changed, store)
        process.tasks.spawn(far.follow(), "nodes that wires come from", forever=True)
        process.tasks.spawn(
            route.farewells.follow(hop.connections), "late farewells to endpoints", forever=True
        )
        edits = Edits(hop, route, registry, process.tasks.spawn)
        process.tasks.spawn(edits.follow(), "new rules of services", forever=True)
        handlers = [*services.of(hop), Health(*services.HEALTHY)]
        try:
            async with serve_grpc([config.listen_on], handlers, source, on_call=log_call) as server:
                endpoint = Endpoint(
                    name=config.name,
                    services=(config.nsname,),
                    labels={config.nsname: dict(config.labels)},
                    url=server.urls[0],
                )
                keeping = process.tasks.spawn(
                    keep_registered(
                        registry,
                        endpoint,
                        on_failure=lambda why: process.waits(f"not registered: {why}"),
                        on_registered=lambda _: _once_ready(process, server.urls, config, found),
                        unregister=False,  # wires stay, and so does the name that carries them
                    ),
                    "registration",
                    forever=True,
                )
                await process.stopped()
                keeping.cancel()
                hop.stop()
        finally:
            sockets.close()


def _carried(hop: Hop[Crossing]) -> Mapping[str, int]:
    held = hop.connections.established()
    onward = (one.memory.outgoing.type if one.memory else "" for one in held)
    return carried((one.made for one in held), onward)


def _once_ready(process: Process, urls: tuple[str, ...], config: Config, found: int) -> None:
    """Ready is who is registered: before that the manager would not find us."""
    if "process" in process.health.missing:
        process.ready(urls, manager=config.connect_to, wires=str(found) if found else "")


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("forwarder", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

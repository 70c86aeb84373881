"""Start a vL3 domain's router: `python -P -m endpoints.vl3`. All objects are made here."""

import asyncio
import os
import sys
from collections.abc import Callable

import structlog

from endpoints.vl3.config import Config
from endpoints.vl3.fellows import Fellows
from endpoints.vl3.holdings import Holdings
from endpoints.vl3.joins import Joins
from endpoints.vl3.lending import Lending
from endpoints.vl3.router import Router
from nsm import policy
from nsm.client import Client, Settings, Wish
from nsm.endpoint import OWN_NAMESPACE, Endpoint
from nsm.errors import PreconditionError
from nsm.kernel.routing import Routing
from nsm.mechanisms import IP, KERNEL
from nsm.model import SECOND
from nsm.names.router import RouterNames
from nsm.nsurl import NSURL
from nsm.ondemand import ROLE, ROUTER
from nsm.process import losses
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import carried, figures
from nsm.process.run import Process, run
from nsm.race import unless
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate
LOOK = 0.25  # seconds between looks whether our namespace is still there

log = structlog.get_logger(__name__)


async def serve(config: Config, process: Process) -> None:
    """Be a router until the process is asked to stop, or has had no member for too long."""
    routing = Routing(config.place)
    await asyncio.to_thread(routing.prepare)
    fellows = Fellows(config.name, config.service)
    names = None
    if config.dns_templates:
        names = RouterNames(config.dns_templates, apexes=config.apexes)
    router = Router(
        fellows, routing, config.families, names, config.called, config.lifetime / SECOND
    )
    url = NSURL(KERNEL, config.service, "", {})
    async with (
        losses.noted(config.outage_log) as note,
        config.identity(IDENTITY_PATIENCE) as source,
        Peers(source, dial_timeout=config.dial_timeout) as peers,
        Client(
            config.name,
            source=source,
            manager=config.connect_to,
            settings=Settings(
                dial_timeout=config.dial_timeout,
                request_timeout=config.request_timeout,
                lifetime=config.lifetime,
                namespace=config.place,
                labels=config.told,
                liveness=config.liveness,
                awareness=((url,),),  # all our wires have our address, and lead to one network
                on_change=lambda what, wire, _: note(what, wire),
            ),
        ) as client,
    ):
        registry = RegistryClient(peers, config.connect_to, lifetime=config.lifetime)
        wish = Wish(shape=router.shape, on_answer=router.answered)
        joins = Joins(fellows, client, registry, url, wish, on_left=router.left)
        endpoint = Endpoint(
            config.name,
            config.service_names,
            source=source,
            manager=config.connect_to,
            addresses=router,
            labels={ROLE: ROUTER, **config.told, **config.labels},
            payload=IP,
            prepare=router.prepare,
            answer=router.answer,
            listen=config.listen_on,
            namespace=config.place,
            shown=router.shown,
            register_service=config.register_service,
            unregister=config.unregister_itself,
            lifetime=config.lifetime,
            on_call=log_call,
        )

        serving = asyncio.Event()
        process.health.lost("prefix", "it has no addresses to hand out yet")

        def changed(larger: Callable[[int], bool]) -> None:
            if router.ready:
                serving.set()
                process.health.ready("prefix")
            endpoint.ask_again(lambda conn: larger(conn.context.mtu if conn.context else 0))
            joins.refresh(lambda wire: larger(wire.mtu))
            joins.look()

        def ways_changed() -> None:
            endpoint.ask_again(lambda conn: fellows.are(policy.origin(conn)))
            joins.refresh()

        router.on_change = changed
        router.on_ways = ways_changed
        router.on_lost = lambda id_: endpoint.ask_again(lambda conn: conn.id == id_)
        holdings = Holdings(router, config.prefix_server_url, config.pool, config.name)
        router.plan = holdings
        lending = Lending(
            config.prefix_server_url,
            config.pool,
            config.families,
            on_lent=holdings.lent,
            on_absent=router.without,
        )
        async with endpoint, joins.held(lambda: router.ready):
            process.tasks.spawn(router.settle(), "what the kernel passes on", forever=True)
            process.tasks.spawn(router.tell_ways(), "ways to members", forever=True)
            process.tasks.spawn(router.forget(), "ways of before", forever=True)
            figures.shows("wires", lambda: carried(endpoint.connections))
            holdings.start(peers, process.tasks)
            lending.start(peers, process.tasks)
            process.ready(endpoint.urls, service=config.service, manager=config.connect_to)
            needed = _needed(config, process, router, endpoint, serving)
            if not await unless(needed, _taken_away(config.place)):
                raise PreconditionError(
                    f"the network namespace {config.place}, in which wires end here, was taken"
                    " away",
                    hint="make it again, and start the router again: its members go to others",
                )
            if not config.unregister_itself:
                joins.leave()


def _which(place: str) -> tuple[int, int] | None:
    """Which namespace is there."""
    try:
        facts = os.stat(place)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


async def _taken_away(place: str) -> None:
    """Wait until the place has no namespace, or another: our sockets for names in there would
    keep what is left of it as if members could still be served.
    """
    if place == OWN_NAMESPACE:
        await asyncio.Event().wait()
    before = await asyncio.to_thread(_which, place)
    while before and await asyncio.to_thread(_which, place) == before:  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(LOOK)


async def _needed(
    config: Config, process: Process, router: Router, endpoint: Endpoint, serving: asyncio.Event
) -> bool:
    """Wait for the stop, or for the idle time, which begins when members can be served."""
    if not config.idle_timeout:
        await process.stopped()
        return True

    async def idle() -> None:
        await serving.wait()
        await router.idle(config.idle_timeout)
        endpoint.route.expired = True
        process.health.lost("members", "it had none for its idle time, and ends")
        log.info("no member for the idle time: the router ends", idle=config.idle_timeout)

    await unless(process.stopped(), idle())
    return True


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("vl3", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

"""Start an address plan: `python -P -m endpoints.ipam`. All objects are made here."""

import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from endpoints.ipam.config import Config
from endpoints.ipam.lender import Lender
from endpoints.ipam.plan import DEFAULT, Plan, Pool
from endpoints.ipam.store import Loaded, Store, open_store
from nsm.errors import InvalidError, TakenError
from nsm.identity.workload import workload_source
from nsm.model import SECOND
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import figures
from nsm.process.run import Process, run
from nsm.rpc.health import Health
from nsm.rpc.holdings import AddressHoldings
from nsm.rpc.prefixes import HEALTHY, AddressPools, Prefixes
from nsm.rpc.server import serve as serve_grpc

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate


async def serve(config: Config, process: Process) -> None:
    """Lend prefixes until the process is asked to stop. What is lent stays lent."""
    async with (
        workload_source(config.spiffe_endpoint_socket, patience=IDENTITY_PATIENCE) as source,
        _kept(config.store) as (store, loaded),
    ):
        plan = _plan(config, loaded.pools)
        lender = Lender(plan, store, hold=int(config.lease * SECOND), operators=config.operators)
        await lender.restarted(loaded.leases, loaded.holdings)
        figures.shows(
            "leases", lambda: {"prefix": sum(len(plan.leases(one.name)) for one in plan.pools())}
        )
        process.tasks.spawn(lender.sweep(), "expiry of prefixes", forever=True)
        handlers = [
            Prefixes(lender),
            AddressPools(lender),
            AddressHoldings(lender),
            Health(*HEALTHY),
        ]
        async with serve_grpc(config.listen_on, handlers, source, on_call=log_call) as server:
            process.ready(
                server.urls,
                id=str(source.identity.svid.id),
                store=config.store or "in memory",
                pools=", ".join(one.name or "(the default)" for one in plan.pools()) or "none",
            )
            await process.stopped()


def _plan(config: Config, pools: Iterable[Pool]) -> Plan:
    """The pools an earlier life left, but the default pool as it is set now."""
    plan = Plan(one for one in pools if one.name != DEFAULT)
    if config.pool:
        try:
            plan.add(config.pool)
        except TakenError as wrong:
            raise InvalidError(f"NSM_PREFIX: {wrong.message}", hint=wrong.hint) from None
    return plan


@asynccontextmanager
async def _kept(path: str) -> AsyncIterator[tuple[Store | None, Loaded]]:
    if not path:
        yield None, Loaded()
        return
    async with open_store(path) as (store, loaded):
        yield store, loaded


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("ipam", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

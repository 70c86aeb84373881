"""Hold as many wires as told, from inside a mesh: what `bench.memory` runs there.

    python -m bench.holding SERVICE

Numbers come as lines on standard input; each is answered once so many wires are up. They
are those of CLIENTS clients, in turn: the addresses of a client's wires are excluded from each
other of its wires, so those of one client alone would not be like those of many.
"""

import asyncio
import os
import sys
from contextlib import AsyncExitStack

import nsm
from nsm.errors import NsmError
from nsm.identity.workload import workload_source
from nsm.process.config import parse
from nsm.process.workload import Surroundings

AT_ONCE = 8
CLIENTS = 10


async def main(service: str) -> None:
    """Until standard input ends."""
    told = parse(Surroundings, dict(os.environ))  # noqa: TID251
    async with (
        workload_source(told.spiffe_endpoint_socket, patience=10) as source,
        AsyncExitStack() as wires,
    ):
        clients = [
            await wires.enter_async_context(
                nsm.Client(
                    f"holder-{n}",
                    source=source,
                    manager=told.connect_to,
                    settings=nsm.Settings(),
                )
            )
            for n in range(CLIENTS)
        ]
        held = 0
        gate = asyncio.Semaphore(AT_ONCE)

        async def one_more(n: int) -> None:
            async with gate:
                wire = clients[n % CLIENTS].connect(f"kernel://{service}/m-{n}", patience=20)
                await wires.enter_async_context(wire)

        while line := await asyncio.to_thread(sys.stdin.readline):
            wanted = int(line)
            async with asyncio.TaskGroup() as group:
                for n in range(held, wanted):
                    group.create_task(one_more(n))
            held = wanted
            print(held, flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except* NsmError as refused:
        sys.exit(f"bench.holding: {refused.exceptions[0]}")

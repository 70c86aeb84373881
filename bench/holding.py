"""Hold as many wires as told, from inside a mesh: what `bench.memory` runs there.

    python -m bench.holding SERVICE

Numbers come as lines on standard input; each is answered once so many wires are up, and no
more of them: the newest are closed. They are those of CLIENTS clients, in turn: the addresses
of a client's wires are excluded from each other of its wires, so those of one client alone
would not be like those of many.
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
        AsyncExitStack() as stack,
    ):
        clients = [
            await stack.enter_async_context(
                nsm.Client(
                    f"holder-{n}",
                    source=source,
                    manager=told.connect_to,
                    settings=nsm.Settings(),
                )
            )
            for n in range(CLIENTS)
        ]
        gate = asyncio.Semaphore(AT_ONCE)

        async def hold(n: int, up: asyncio.Event, over: asyncio.Event) -> None:
            async with AsyncExitStack() as wire:
                async with gate:
                    made = clients[n % CLIENTS].connect(f"kernel://{service}/m-{n}", patience=20)
                    await wire.enter_async_context(made)
                up.set()
                await over.wait()
                async with gate:
                    await wire.aclose()

        held: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        async with asyncio.TaskGroup() as group:
            while line := await asyncio.to_thread(sys.stdin.readline):
                wanted, coming = int(line), []
                for n in range(len(held), wanted):
                    up, over = asyncio.Event(), asyncio.Event()
                    held.append((group.create_task(hold(n, up, over)), over))
                    coming.append(up)
                going, held = held[wanted:], held[:wanted]
                for _, over in going:
                    over.set()
                for up in coming:
                    await up.wait()
                for task, _ in going:
                    await task
                print(wanted, flush=True)
            for _, over in held:
                over.set()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except* NsmError as refused:
        sys.exit(f"bench.holding: {refused.exceptions[0]}")

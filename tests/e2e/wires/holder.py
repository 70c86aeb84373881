"""Many wires in few processes: a program that opens and closes wires as it is told.

    python -P -m tests.e2e.wires.holder

Reads orders from a FIFO it is told by HOLDER_ORDERS, one JSON object a line, and
appends one answer a line to HOLDER_ANSWERS, with what still runs. An order names the
namespace each wire is for, so one process can stand in for the workloads of several.
"""

import asyncio
import json
import os
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from nsm.client import Client, Settings
from nsm.identity.workload import workload_source
from nsm.process.tasks import running

# Seconds for one wire: a few hundred may be under way together.
PATIENCE = 60.0


async def main() -> None:
    read = os.environ["HOLDER_ORDERS"]
    orders = await asyncio.to_thread(open, read, "rb", 0)
    answers = await asyncio.to_thread(open, os.environ["HOLDER_ANSWERS"], "wb", 0)
    async with AsyncExitStack() as stack:
        stack.callback(orders.close)
        stack.callback(answers.close)
        source = await stack.enter_async_context(
            workload_source(os.environ["SPIFFE_ENDPOINT_SOCKET"], patience=10)
        )
        clients: dict[str, Client] = {}
        held: dict[str, AsyncExitStack] = {}
        making = asyncio.Lock()

        async def client_of(namespace: str) -> Client:
            async with making:
                if namespace not in clients:
                    clients[namespace] = await stack.enter_async_context(
                        Client(
                            f"holder-{len(clients)}",
                            source=source,
                            manager=os.environ["NSM_CONNECT_TO"],
                            settings=Settings(namespace=namespace, request_timeout=PATIENCE),
                        )
                    )
            return clients[namespace]

        async def open_one(namespace: str, url: str) -> dict[str, Any]:
            began = time.monotonic()
            block = AsyncExitStack()
            wire = await block.enter_async_context((await client_of(namespace)).connect(url))
            held[f"{namespace} {url}"] = block
            return {
                "namespace": namespace,
                "interface": wire.interface,
                "far": [str(address.ip) for address in wire.peer_addresses],
                "seconds": time.monotonic() - began,
            }

        async def close_one(namespace: str, url: str) -> dict[str, Any]:
            await held.pop(f"{namespace} {url}").aclose()
            return {}

        work = {"open": open_one, "close": close_one}
        os.write(int(os.environ["NSM_READY_FD"]), b"ready\n")
        while line := await asyncio.to_thread(orders.readline):
            order = json.loads(line)
            limit = asyncio.Semaphore(order.get("at_once", 1))

            async def one(do: str, namespace: str, url: str, limit: Any = limit) -> Any:
                async with limit:
                    return await work[do](namespace, url)

            began = time.monotonic()
            results = await asyncio.gather(
                *(one(order["do"], *words) for words in order["wires"]), return_exceptions=True
            )
            errors = [str(error) for error in results if isinstance(error, BaseException)]
            told = [result for result in results if not isinstance(result, BaseException)]
            answer = {"errors": errors, "told": told, "seconds": time.monotonic() - began}
            answer.update(running())
            await asyncio.to_thread(answers.write, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)

"""A workload that proves who serves: it asks for wires at endpoints that it names, and closes them.

    python -P -m tests.e2e.kills.caller LAB ROOT PLACE

One order a line on standard input: {"wires": [[SERVICE, ENDPOINT], …], "patience": seconds}.
The answer has what each wire was refused with ("" is none), and who is registered, as the
registry says through the node's manager.
"""

import asyncio
import json
import os
import sys
import time
from typing import Any, TextIO

from labs import become, engine, seats
from nsm.client import Client, Wish
from nsm.errors import NsmError
from nsm.identity.workload import workload_source
from nsm.model import Endpoint
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient


async def call(client: Client, service: str, endpoint: str, *, patience: float) -> str:
    """Make a wire there and close it; why not, if it is not to be had."""
    end = time.monotonic() + patience
    while True:
        try:
            wish = Wish(endpoint=endpoint)
            async with client.connect(f"kernel://{service}", wish=wish) as wire:
                if endpoint and not wire.endpoint.startswith(endpoint):
                    return f"{wire.endpoint} answered instead of {endpoint}"
        except NsmError as error:
            if time.monotonic() > end:
                return f"{endpoint or service}: {error}"
            await asyncio.sleep(0.05)
        else:
            return ""


async def registered(registry: RegistryClient, patience: float) -> list[str]:
    """Who is there, as the registry says."""
    end = time.monotonic() + patience
    while True:
        try:
            return sorted(one.name for one in await registry.find_endpoints(Endpoint()))
        except NsmError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)


async def obey(seat: seats.Seat, answers: TextIO) -> None:
    async with (
        workload_source(seat.identity, patience=10) as source,
        Client(seat.name, source=source, manager=seat.manager) as client,
        Peers(source, dial_timeout=2.0) as peers,
    ):
        registry = RegistryClient(peers, seat.manager)
        while line := await asyncio.to_thread(sys.stdin.readline):
            order: dict[str, Any] = json.loads(line)
            patience = order["patience"]
            told = await asyncio.gather(
                *(call(client, *wire, patience=patience) for wire in order["wires"]),
                registered(registry, patience),
            )
            answers.write(json.dumps({"refused": told[:-1], "registered": told[-1]}) + "\n")
            answers.flush()


def main() -> None:
    name, root, place = sys.argv[1:]
    lab, paths = engine.running(name, root)
    with open(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # for what is logged
        seat = seats.take(lab, paths, place)
        become.powerless()
        asyncio.run(obey(seat, answers))


if __name__ == "__main__":
    main()

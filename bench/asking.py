"""Ask for wires again and again, from inside a mesh: what `bench.requests` runs there.

    python -m bench.asking SHAPE ROUNDS URL...

SHAPE is which bare calls are their floor, of `bench.bare`. Prints a JSON object for each
URL: milliseconds of each request and close, the stages of each request, and the floors of
the calls of both and of a token.
"""

import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import nsm
from bench import bare
from nsm.errors import NsmError
from nsm.identity import tokens
from nsm.identity.source import Svid
from nsm.identity.workload import workload_source
from nsm.kernel import messages
from nsm.kernel.netlink import Socket
from nsm.model import SECOND, Request
from nsm.process.config import parse
from nsm.process.workload import Surroundings
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc.wire import to_pb

TOKENS = 300


async def main(shape: str, rounds: int, urls: Sequence[str]) -> None:
    """Measure and print."""
    told = parse(Surroundings, dict(os.environ))  # noqa: TID251
    async with (
        workload_source(told.spiffe_endpoint_socket, patience=10) as source,
        bare.asking(shape) as floor,
        nsm.Client(
            "bench", source=source, manager=told.connect_to, settings=nsm.Settings()
        ) as client,
    ):
        figures = [await asked(client, floor, url, rounds) for url in urls]
        token = token_floor(source.identity.svid)
    print(json.dumps([{**one, "token_ms": token} for one in figures]))


async def asked(
    client: nsm.Client, floor: NetworkServiceStub, url: str, rounds: int
) -> dict[str, Any]:
    """Of one URL, all but the token."""
    requests, closes, stages = [], [], []
    bare_requests, bare_closes = [], []
    for turn in range(rounds + 3):
        start = time.perf_counter()
        async with client.connect(url, patience=10) as wire:
            took = time.perf_counter() - start
            made = wire.connection
            assert made.mechanism is not None
            device = _device(made.mechanism.parameters["name"])
            start = time.perf_counter()
        closed = time.perf_counter() - start
        # by turns, because a machine is not as fast now as a second ago
        message = to_pb(Request(made, (made.mechanism,)))
        start = time.perf_counter()
        await floor.Request(message)
        bare_request = time.perf_counter() - start
        start = time.perf_counter()
        await floor.Close(message.connection)
        bare_close = time.perf_counter() - start
        if turn >= 3:  # the first dial connections, and import what is imported late
            requests.append(took * 1000)
            closes.append(closed * 1000)
            bare_requests.append(bare_request * 1000)
            bare_closes.append(bare_close * 1000)
            stages.append(dict(wire.stages))
    return {
        "request_ms": requests,
        "close_ms": closes,
        "stages": stages,
        "device": device,
        "calls_ms": bare_requests,
        "close_calls_ms": bare_closes,
    }


def _device(name: str) -> str:
    """Of which kind it is, in the kernel's words."""
    with Socket.here() as own:
        return messages.device(own.ask(messages.get_link(name=name))).kind


def token_floor(own: Svid) -> float:
    """Making one token and checking its signature."""
    times = []
    for n in range(TOKENS):
        start = time.perf_counter()
        token = tokens.issue(
            own, own.id, 600 * SECOND, peer_not_after=own.not_after, now=time.time_ns() + n * SECOND
        )
        tokens.signed_by(token.text, own.leaf)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    except* NsmError as refused:
        sys.exit(f"bench.asking: {refused.exceptions[0]}")

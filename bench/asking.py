"""Ask for a wire again and again, from inside a lab: what `bench.wire` runs there.

    python -m bench.asking 50

Prints one JSON object: milliseconds of each request and close, the stages of each
request, and the floors of its calls and of a token.
"""

import asyncio
import json
import os
import statistics
import sys
import time

import nsm
from bench import bare
from nsm.identity import tokens
from nsm.identity.workload import workload_source
from nsm.model import SECOND, Request
from nsm.process.config import parse
from nsm.process.workload import Surroundings
from nsm.rpc.wire import to_pb

URL = "kernel://icmp-responder/b-1"
TOKENS = 300


async def main(rounds: int) -> None:
    """Measure and print."""
    told = parse(Surroundings, dict(os.environ))  # noqa: TID251
    async with (
        workload_source(told.spiffe_endpoint_socket, patience=10) as source,
        bare.asking() as ask,
        nsm.Client(
            "bench", source=source, manager=told.connect_to, settings=nsm.Settings()
        ) as client,
    ):
        requests, closes, stages, calls = [], [], [], []
        for turn in range(rounds + 3):
            start = time.perf_counter()
            async with client.connect(URL) as wire:
                took = time.perf_counter() - start
                made = wire.made
                start = time.perf_counter()
            closed = time.perf_counter() - start
            # by turns, because a machine is not as fast now as a second ago
            message = to_pb(Request(made, (made.mechanism,)))
            start = time.perf_counter()
            await ask(message)
            if turn >= 3:  # the first dial connections, and import what is imported late
                calls.append((time.perf_counter() - start) * 1000)
                requests.append(took * 1000)
                closes.append(closed * 1000)
                stages.append(dict(wire.stages))
        own = source.identity.svid
    print(
        json.dumps(
            {
                "request_ms": requests,
                "close_ms": closes,
                "stages": stages,
                "calls_ms": statistics.median(calls),
                "token_ms": token_floor(own),
            }
        )
    )


def token_floor(own) -> float:
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
    asyncio.run(main(int(sys.argv[1])))

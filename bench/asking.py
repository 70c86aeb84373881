"""Ask for a wire again and again, from inside a lab: what `bench.wire` runs there.

    python -m bench.asking 50

Prints one JSON object: milliseconds of each request and close, the stages of each
request, and the floor of one call over mutual TLS to the same manager.
"""

import asyncio
import json
import os
import statistics
import sys
import time

import nsm
from nsm.identity import tokens
from nsm.identity.workload import workload_source
from nsm.model import SECOND
from nsm.process.config import parse
from nsm.process.workload import Surroundings
from nsm.proto.health_grpc import HealthStub
from nsm.proto.health_pb2 import HealthCheckRequest
from nsm.rpc.peers import Peers

URL = "kernel://icmp-responder/b-1"
CALLS = 300


async def main(rounds: int) -> None:
    """Measure and print."""
    told = parse(Surroundings, dict(os.environ))  # noqa: TID251
    async with workload_source(told.spiffe_endpoint_socket, patience=10) as source:
        floor = await call_floor(source, told.connect_to)
        requests, closes, stages = [], [], []
        settings = nsm.Settings()
        async with nsm.Client(
            "bench", source=source, manager=told.connect_to, settings=settings
        ) as client:
            for turn in range(rounds + 3):
                start = time.perf_counter()
                async with client.connect(URL) as wire:
                    took = time.perf_counter() - start
                    start = time.perf_counter()
                if turn >= 3:  # the first dial connections, and import what is imported late
                    requests.append(took * 1000)
                    closes.append((time.perf_counter() - start) * 1000)
                    stages.append(dict(wire.stages))
        own = source.identity.svid
    print(
        json.dumps(
            {
                "request_ms": requests,
                "close_ms": closes,
                "stages": stages,
                "call_floor_ms": floor,
                "token_ms": token_floor(own),
            }
        )
    )


async def call_floor(source, manager: str) -> float:
    """The median of a unary call on an open connection, with nothing to do at the other end."""
    async with Peers(source) as peers, peers.link(manager) as link:
        check = HealthStub(link.channel).Check
        times = []
        for _ in range(CALLS):
            start = time.perf_counter()
            await check(HealthCheckRequest())
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def token_floor(own) -> float:
    """Making one token and checking its signature."""
    times = []
    for n in range(CALLS):
        start = time.perf_counter()
        token = tokens.issue(
            own, own.id, 600 * SECOND, peer_not_after=own.not_after, now=time.time_ns() + n * SECOND
        )
        tokens.signed_by(token.text, own.leaf)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))

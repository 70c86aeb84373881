"""An address plan as a process of its own, asked by stock grpcio as upstream's routers ask."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc

from nsm.proto import ipam_pb2, ipam_pb2_grpc
from tests.e2e.registry.realms import Program, Realm

PATIENCE = 20.0  # seconds for an answer
OPERATOR = "spiffe://td/operator"
SETTINGS = {"NSM_PREFIX": "172.16.0.0/16", "NSM_LEASE": "10m", "NSM_OPERATORS": OPERATOR}


class Router:
    """One stream of a router's."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def say(self, kind: Any, prefix: str = "", excluded: Sequence[str] = ()) -> None:
        """A message, without waiting for an answer."""
        await self.call.write(
            ipam_pb2.PrefixRequest(type=kind, prefix=prefix, exclude_prefixes=excluded)
        )

    async def ask(self, prefix: str = "", excluded: Sequence[str] = ()) -> str:
        """The prefix that ALLOCATE is answered with; what it excluded comes back with it."""
        await self.say(ipam_pb2.ALLOCATE, prefix, excluded)
        answer = await asyncio.wait_for(self.call.read(), PATIENCE)
        if answer is grpc.aio.EOF:  # what grpcio says where the status came first
            raise AssertionError(f"{await self.call.code()}: {await self.call.details()}")
        assert list(answer.exclude_prefixes) == list(excluded)
        return str(answer.prefix)

    async def refused(self, prefix: str = "", excluded: Sequence[str] = ()) -> tuple[str, str]:
        """The status that the stream ends with: its name and its sentence."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it ended before that
            await self.say(ipam_pb2.ALLOCATE, prefix, excluded)
        return await self.ended()

    async def ended(self) -> tuple[str, str]:
        """The status that the stream ends with, whatever is said before."""
        code = await asyncio.wait_for(self.call.code(), PATIENCE)
        return code.name, await self.call.details()


class Routers:
    """All streams of one identity, over one connection."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub = ipam_pb2_grpc.IPAMStub(channel)

    @asynccontextmanager
    async def stream(self, **metadata: str) -> AsyncIterator[Router]:
        """A stream for the block; metadata are ours, upstream's routers have none."""
        async with self.streams(1, **metadata) as (one,):
            yield one

    @asynccontextmanager
    async def streams(self, count: int, **metadata: str) -> AsyncIterator[list[Router]]:
        """So many of them."""
        told = [(f"vwire-{key}", value) for key, value in metadata.items()]
        calls = [self._stub.ManagePrefixes(metadata=told) for _ in range(count)]
        try:
            yield [Router(call) for call in calls]
        finally:
            for call in calls:
                call.cancel()


@asynccontextmanager
async def routers(realm: Realm, name: str, plan: Program) -> AsyncIterator[Routers]:
    """Who is called name, to whom the address plan is reachable."""
    async with realm.stock(name, plan) as stock:
        yield Routers(stock.channel)

"""What connections and calls keep in memory, both ends together, as tracemalloc counts it."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc.peers import Link, Peers
from nsm.rpc.server import Server, serve
from tests.e2e.rpc.echo import LIFE, Echo, request
from tests.support.certs import Authority
from tests.support.wait import until

A = Authority("a.test")


class Forgetful(Echo):
    """Keeps nothing of who called."""

    async def Request(self, stream: Any) -> None:  # noqa: N802 - the protocol's name
        """Answer, and forget it."""
        await super().Request(stream)
        self.callers.clear()


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.fixture
async def server(tmp_path: Any) -> AsyncIterator[Server]:
    async with serve([f"unix://{tmp_path}/s.sock"], [Forgetful()], A.source("/s")) as made:
        yield made


async def called(link: Link) -> None:
    """One call, to its end."""
    stub = NetworkServiceStub(link.channel)
    await stub.Request(request("c-1"), metadata=link.metadata(LIFE), timeout=10)


async def held(server: Server) -> int:
    """Bytes, once every call of before has ended."""
    await until(lambda: not server._running, "the calls to end", bar=1.0)
    await asyncio.sleep(0)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def test_a_connection_costs_no_buffer_of_a_quarter_megabyte(
    server: Server, traced: None
) -> None:
    async with AsyncExitStack() as stack:

        async def one_more(n: int) -> None:
            peers = await stack.enter_async_context(Peers(A.source(f"/c-{n}")))
            link = await stack.enter_async_context(peers.link(server.urls[0]))
            await called(link)

        await one_more(0)
        before = await held(server)
        for n in range(1, 5):
            await one_more(n)
        assert (await held(server) - before) / 4 < 250_000


async def test_a_call_that_has_ended_leaves_nothing_behind(server: Server, traced: None) -> None:
    async with Peers(A.source("/c")) as peers, peers.link(server.urls[0]) as link:
        for _ in range(300):
            await called(link)
        before = await held(server)
        for _ in range(309):  # no multiple of ten, after which grpclib would tidy up
            await called(link)
        left = await held(server) - before
        assert left / 309 < 100

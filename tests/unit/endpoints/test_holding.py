"""Holding a prefix of an address plan that is not to be believed."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from nsm.errors import NsmError
from nsm.identity.source import HeldIdentity, Identity
from nsm.rpc.peers import Peers
from nsm.rpc.prefixes import Prefixes, keep_prefix
from nsm.rpc.server import serve
from tests.support.callers import Mesh


class Liar:
    """An address plan that lends what a test says, one after the other."""

    def __init__(self) -> None:
        self.says: list[str] = []
        self.pool: tuple[str, ...] = ("10.1.0.0/16", "fd00:1::/64")
        self.wanted: list[str] = []

    async def domain(self, pool: str) -> Sequence[str]:
        return self.pool

    async def allocate(self, pool: str, owner: str, holder: int, wanted: str, *_: Any) -> str:
        self.wanted.append(wanted)
        return self.says.pop(0)

    async def leave(self, *_: Any) -> None:
        """Nothing is kept."""


@pytest.fixture
async def plan() -> Liar:
    return Liar()


@pytest.fixture
async def url(plan: Liar) -> AsyncIterator[tuple[str, Peers]]:
    mesh = Mesh()
    known = {"td": (mesh.authority.certificate,)}
    sources = [HeldIdentity(Identity(mesh.svid(name), known)) for name in ("plan", "router")]
    handlers = [Prefixes(plan)]  # type: ignore[arg-type]
    async with (
        serve(["tcp://127.0.0.1:0"], handlers, sources[0]) as server,
        Peers(sources[1]) as peers,
    ):
        yield server.urls[0], peers


@pytest.mark.parametrize(
    "lie", ["0.0.0.0/0", "10.2.0.0/24", "10.0.0.0/8", "10.1.0.1/24", "nonsense", "fd00:2::/112", ""]
)
async def test_what_is_no_prefix_of_the_pool_is_not_taken_nor_asked_for_again(
    plan: Liar, url: tuple[str, Peers], lie: str
) -> None:
    plan.says = [lie, "10.1.7.0/24"]
    lent: asyncio.Queue[str] = asyncio.Queue()
    whys: list[NsmError] = []
    where, peers = url
    holding = asyncio.create_task(
        keep_prefix(
            peers, where, on_lent=lambda one, _: lent.put_nowait(one), on_failure=whys.append
        )
    )
    try:
        assert await asyncio.wait_for(lent.get(), 10) == "10.1.7.0/24"
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
    (why,) = whys
    assert f"at {where} lends {lie!r}, which is no prefix of 10.1.0.0/16, fd00:1::/64" in str(why)
    assert plan.wanted == ["", ""]

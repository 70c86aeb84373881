"""A manager takes from the domain what ended on its node, while the tokens of it are good.

The registry here is a real one that writes down what it is told, behind the same door
and policies as the process; the manager's part is its own, with its own calls to that.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from nsm.caller import Caller
from nsm.errors import UnavailableError
from nsm.identity import tokens
from nsm.identity.authority import Authority
from nsm.identity.source import HeldIdentity, Identity
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND, Endpoint, Found
from nsm.offers import Offers
from nsm.registrar import Registrar
from nsm.registration import Registration
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.registry_services import handlers
from nsm.rpc.server import serve
from nsmgr import registry
from nsmgr.registry import Locals, NodeRegistry
from nsmgr.upstream import RemoteRegistry
from tests.support.wait import until

LIFE = 600 * SECOND
PUBLIC = "tcp://192.0.2.1:5001"
ENDPOINT = Endpoint("nse-1", ("icmp",), url="tcp://192.0.2.9:1")


@dataclass
class Told:
    """An Unregister as the registry admitted it, and how long its tokens were good then."""

    name: str
    url: str
    owner: str
    left: float


class Recording(Registrar):
    """A registry that, like upstream's, keeps a name for its owner until it is unregistered."""

    def __init__(self) -> None:
        super().__init__(Offers())
        self.told: list[Told] = []
        self.away = False
        self.asked = 0

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        end = min(tokens.claims(token).exp for token in by.path.tokens[: by.path.index])
        left = (end - time.time_ns()) / SECOND
        self.told.append(Told(asked.name, asked.url, by.owner, left))
        await super().unregister_endpoint(asked, by)

    def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        self.asked += 1
        if self.away:
            raise UnavailableError("away")
        return super().find_endpoints(query, watch, caller)


class Node:
    """A manager's part before the recording registry, and endpoints that register at it."""

    def __init__(self, url: str, locals_: Locals, upstream: Recording, authority: Authority):
        self.url = url
        self.locals = locals_
        self.upstream = upstream
        self.authority = authority

    @asynccontextmanager
    async def client(self, name: str, **how: Any) -> AsyncIterator[RegistryClient]:
        async with Peers(source(self.authority, name)) as peers:
            yield RegistryClient(peers, self.url, **how)


def source(authority: Authority, name: str) -> HeldIdentity:
    svid = authority.issue(SpiffeId("td", f"/{name}"))
    return HeldIdentity(Identity(svid, {"td": authority.certificates}))


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    authority, upstream, locals_ = Authority.create("td"), Recording(), Locals()
    domain, url = f"unix://{tmp_path}/registry.sock", f"unix://{tmp_path}/nsmgr.sock"
    manager = source(authority, "nsmgr")
    running: set[asyncio.Task[None]] = set()

    def spawn(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        running.add(task := asyncio.get_running_loop().create_task(work, name=name))
        return task

    async with (
        serve([domain], handlers(upstream, lifetime=LIFE), source(authority, "registry")),
        Peers(manager) as peers,
    ):
        remote = RemoteRegistry(RegistryClient(peers, domain))
        part = NodeRegistry(remote, locals_, {}, spawn=spawn)
        part.public_url = PUBLIC
        async with serve([url], handlers(part, lifetime=LIFE), manager):
            yield Node(url, locals_, upstream, authority)
        locals_.close()
        await asyncio.gather(*running)


async def test_an_endpoint_that_ends_is_unregistered_in_its_owners_name(node: Node) -> None:
    async with node.client("nse") as nse:
        soon = time.time_ns() + SECOND // 2
        await nse.register_endpoint(replace(ENDPOINT, expires=soon))
    await until(lambda: bool(node.upstream.told), "the registry to be told", bar=0.7)
    (told,) = node.upstream.told
    assert (told.name, told.url, told.owner) == ("nse-1", PUBLIC, "spiffe://td/nse")
    assert told.left > 500
    assert node.locals.get("nse-1") is None
    async with node.client("other") as other:  # and the name is free
        await other.register_endpoint(ENDPOINT)


async def test_the_registry_is_told_before_short_tokens_end(node: Node) -> None:
    async with node.client("nse", lifetime=4 * SECOND, call_timeout=2.0) as nse:
        held = await nse.register_endpoint(ENDPOINT)
    assert held.item.expires is not None
    assert held.item.expires - time.time_ns() > 3 * SECOND, "the tokens' end, and nothing sooner"
    await until(lambda: bool(node.upstream.told), "the registry to be told", bar=4)
    assert node.upstream.told[0].left > 0
    assert len(node.upstream.offers.endpoints) == 0


async def test_one_that_registered_elsewhere_or_here_again_is_left_alone(node: Node) -> None:
    asked = node.upstream.asked
    async with node.client("nse") as nse:
        for name in ("moved", "again"):
            soon = time.time_ns() + 3 * SECOND
            await nse.register_endpoint(replace(ENDPOINT, name=name, expires=soon))
        await nse.register_endpoint(replace(ENDPOINT, name="again"))
    held = node.upstream.offers.endpoints.get("moved")
    assert held is not None
    later = time.time_ns() + LIFE
    node.upstream.offers.endpoints.put(replace(held, url="tcp://192.0.2.2:5001", expires=later))
    await until(lambda: node.upstream.asked > asked, "the manager to look", bar=3.2)
    async with node.client("nse") as nse:  # what it does next has been done by then
        await nse.register_endpoint(replace(ENDPOINT, name="last"))
        await nse.unregister_endpoint(replace(ENDPOINT, name="last"))
    assert [one.name for one in node.upstream.told] == ["last"]
    assert {one.name for one in node.upstream.offers.endpoints} == {"moved", "again"}


async def test_a_registry_that_is_away_is_told_later(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "AGAIN", 0.1)
    node.upstream.away = True
    async with node.client("nse") as nse:
        soon = time.time_ns() + SECOND // 2
        await nse.register_endpoint(replace(ENDPOINT, expires=soon))
    await until(lambda: node.upstream.asked > 1, "two tries to fail", bar=1.0)
    assert node.upstream.told == []
    node.upstream.away = False
    await until(lambda: bool(node.upstream.told), "the registry to be told", bar=0.3)

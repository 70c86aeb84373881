"""Our own side of a registry's calls: against its process, and against a manager's stand-in."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nsm.caller import Caller
from nsm.descriptors import Descriptors
from nsm.errors import (
    DeadlineError,
    DeniedError,
    InvalidError,
    NsmError,
    UnavailableError,
)
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.offers import Offers
from nsm.registrar import Registrar
from nsm.registration import Registration, RegistrationPath, leave
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient, keep_registered
from nsm.rpc.registry_services import claim_socket, handlers, send_socket
from nsm.rpc.server import serve
from tests.e2e.registry.lab import REGISTRY, Lab, lab
from tests.support.wait import until

ENDPOINT = Endpoint("nse-1", ("icmp",), {"icmp": {"app": "x"}}, "tcp://10.0.0.5:5001")
LIFE = 600 * SECOND


def calling(peers: Peers, url: str) -> RegistryClient:
    """A client that gives a handshake the time it takes where the machine is busy: nothing
    here is about that, and a registry that is not there refuses at once."""
    return RegistryClient(peers, url, dial_timeout=5.0)


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Lab]:
    async with lab(tmp_path) as one:
        yield one


@pytest.fixture(params=["unix", "tcp"])
async def client(made: Lab, request: pytest.FixtureRequest) -> AsyncIterator[RegistryClient]:
    await made.start()
    async with Peers(made.source("nse")) as peers:
        yield calling(peers, made.url if request.param == "unix" else made.tcp)


async def test_register_refresh_find_and_unregister(client: RegistryClient) -> None:
    first = await client.register_endpoint(ENDPOINT)
    assert first.item.path_ids == ("spiffe://td/nse", REGISTRY)
    assert first.path.index == 0
    assert len(first.path.tokens) == 2
    again = await client.register_endpoint(replace(first.item, expires=None), first.path)
    assert again.item.registered == first.item.registered
    assert (again.item.expires or 0) > (first.item.expires or 0)
    assert await client.find_endpoints(Endpoint(services=("icmp",))) == [again.item]
    assert await client.find_endpoints(Endpoint(services=("vpn",))) == []
    await client.unregister_endpoint(again.item, again.path)
    assert await client.find_endpoints() == []


async def test_network_services_go_the_same_way(client: RegistryClient) -> None:
    held = await client.register_service(Service("icmp"))
    assert held.item.payload == "IP"
    assert await client.find_services(Service("icmp")) == [held.item]
    seen = client.watch_services()
    async with contextlib.aclosing(seen):
        assert await anext(seen) == Found(held.item)
        await client.unregister_service(held.item, held.path)
        assert await anext(seen) == Found(held.item, deleted=True)


async def test_a_watch_ends_with_an_error_when_the_registry_is_killed(
    client: RegistryClient, made: Lab
) -> None:
    await client.register_endpoint(ENDPOINT)
    seen = client.watch_endpoints(Endpoint(name="nse-1"))
    async with contextlib.aclosing(seen):
        assert (await anext(seen)).item.name == "nse-1"
        await made.stop(signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await anext(seen)


async def test_no_time_left_and_nobody_there_are_sentences(
    client: RegistryClient, made: Lab
) -> None:
    with pytest.raises(DeadlineError, match="no time is left"):
        await client.find_endpoints(deadline=asyncio.get_running_loop().time() - 1)
    with pytest.raises(DeniedError, match=r"no sufficient privileges$"):
        await client.register_endpoint(ENDPOINT, RegistrationPath(("x", "y"), 1))
    await made.stop()
    with pytest.raises(UnavailableError):
        await client.find_endpoints()


async def test_an_endpoint_stays_registered_through_kills_and_is_gone_at_the_end(
    made: Lab,
) -> None:
    await made.start(NSM_EXPIRE_PERIOD="1500ms")  # in memory: a kill forgets everything
    registered: list[Endpoint] = []
    failures: list[NsmError] = []
    async with Peers(made.source("nse")) as peers, Peers(made.source("looker")) as others:
        looker = calling(others, made.url)
        client = calling(peers, made.url)

        async def found() -> bool:
            try:
                return [e.name for e in await looker.find_endpoints()] == ["nse-1"]
            except UnavailableError:
                return False

        async with asyncio.TaskGroup() as group:
            kept = group.create_task(
                keep_registered(
                    client,
                    ENDPOINT,
                    [Service("icmp", "ETHERNET")],
                    on_registered=registered.append,
                    on_failure=failures.append,
                )
            )
            await until(found, "the first registration")
            await until(lambda: len(registered) >= 4, "three refreshes of 1 s each", bar=3.5)
            assert failures == []  # it never came too late, nor had to be told
            first = {e.registered for e in registered}
            assert len(first) == 1
            await made.stop(signal.SIGKILL)
            away = "a registry that is away long enough for pauses to have grown"
            await until(lambda: len(failures) >= 7, away, bar=2.5, record=False)
            await made.start(NSM_EXPIRE_PERIOD="60s")
            await until(found, "a registration with the registry that came back", bar=0.5)
            assert [s.payload for s in await looker.find_services()] == ["ETHERNET"]
            # Somebody else's hand takes it away: it comes back.
            held = registered[-1]
            await client.unregister_endpoint(held)
            count = len(registered)
            await until(lambda: len(registered) > count, "a registration after a deletion")
            await until(found, "the endpoint to be found again")
            kept.cancel()
        assert await looker.find_endpoints() == []


async def test_who_keeps_an_endpoint_hears_that_its_name_is_taken_and_may_give_up(
    made: Lab,
) -> None:
    await made.start()
    async with Peers(made.source("nse")) as peers, Peers(made.source("other")) as others:
        await calling(others, made.url).register_endpoint(ENDPOINT)

        def give_up(error: NsmError) -> None:
            raise error

        with pytest.raises(DeniedError, match="'nse-1' belongs to spiffe://td/other"):
            await keep_registered(calling(peers, made.url), ENDPOINT, on_failure=give_up)
        # and did not take what is another's with it
        assert len(await calling(peers, made.url).find_endpoints()) == 1


class Manager(Registrar):
    """What a manager does with sockets: takes them in, and hands them out."""

    def __init__(self) -> None:
        super().__init__(Offers())
        self.sockets: dict[str, int] = {}
        self.stand_in = ""

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        fd = await claim_socket(by.caller, asked.url, 2.0)
        if fd is not None:
            if asked.name in self.sockets:
                os.close(self.sockets[asked.name])
            self.sockets[asked.name] = fd
        return await super().register_endpoint(asked, by)

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        async with contextlib.aclosing(super().find_endpoints(query, watch, caller)) as found:
            async for one in found:
                url = send_socket(caller, self.sockets[one.item.name]) if caller.unix else "tcp://m"
                yield replace(one, item=replace(one.item, url=url))


async def test_an_endpoints_socket_travels_to_whoever_finds_it(tmp_path: Path, made: Lab) -> None:
    manager = Manager()
    url = f"unix://{tmp_path}/m.sock"
    path = tmp_path / "nse.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        listening.setblocking(False)
        async with (
            serve(
                [url, "tcp://127.0.0.1:0"], handlers(manager, lifetime=LIFE), made.source("m")
            ) as server,
            Peers(made.source("nse")) as peers,
            Peers(made.source("forwarder")) as others,
        ):
            nse = calling(peers, url)
            asked = replace(ENDPOINT, url=f"unix://{path}")
            held = await nse.register_endpoint(asked)
            assert held.item.url == asked.url  # mapped back
            inode = os.stat(path)
            assert manager.offers.endpoints.get("nse-1") is not None
            path.unlink()  # from now on only the descriptor leads there
            with Descriptors() as fds:
                (found,) = await calling(others, url).find_endpoints(Endpoint("nse-1"), fds=fds)
                assert found.url == f"inode://{inode.st_dev}/{inode.st_ino}"
                fd = fds.get(found.url)
                assert fd is not None
                with socket.socket(socket.AF_UNIX) as dialled:
                    dialled.connect(f"/proc/self/fd/{fd}")
                    listening.accept()[0].close()
            (found,) = await calling(others, server.urls[1]).find_endpoints()
            assert found.url == "tcp://m"
            with pytest.raises(InvalidError, match=r"its socket .*nse\.sock: No such file"):
                await nse.register_endpoint(asked)
            again = os.open(f"/proc/self/fd/{manager.sockets['nse-1']}", os.O_PATH)
            try:  # by a descriptor that one holds
                held = await nse.register_endpoint(asked, held.path, socket=again)
            finally:
                os.close(again)
            assert held.item.url == asked.url
            await nse.unregister_endpoint(held.item, held.path, socket=manager.sockets["nse-1"])
        for fd in manager.sockets.values():
            os.close(fd)


class Forward(Registrar):
    """A manager before a registry: passes the registration on as it came."""

    def __init__(self, upstream: RegistryClient) -> None:
        super().__init__(Offers())
        self.upstream = upstream
        self.back: RegistrationPath | None = None

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        held = await self.upstream.register_endpoint(asked, by.path)
        self.back = held.path
        return held.item, held.path


async def test_a_registration_through_a_manager_proves_itself_at_both_ends(
    tmp_path: Path, made: Lab
) -> None:
    await made.start()
    url = f"unix://{tmp_path}/m.sock"
    source = made.source("m")
    async with Peers(source) as upstream, Peers(made.source("nse")) as peers:
        forward = Forward(calling(upstream, made.tcp))
        async with serve([url], handlers(forward, lifetime=LIFE), source):
            client = calling(peers, url)
            held = await client.register_endpoint(ENDPOINT)
            for _ in range(3):  # what came back goes with the next
                held = await client.register_endpoint(replace(held.item, expires=None), held.path)
                assert held.item.path_ids == ("spiffe://td/nse", "spiffe://td/m", REGISTRY)
                assert len(held.path.tokens) == 3
                assert forward.back is not None
                assert held.path == leave(forward.back)


async def test_100_endpoints_register_at_once_over_connections_of_their_own(made: Lab) -> None:
    await made.start(NSM_STORE=str(made.folder / "r.sqlite"))
    sources = [made.source(f"nse-{n}") for n in range(100)]
    slowest: list[float] = []

    async def one(n: int, source: Any) -> None:
        async with Peers(source) as peers:
            began = time.monotonic()
            client = calling(peers, made.tcp)
            await client.register_endpoint(replace(ENDPOINT, name=f"nse-{n}"))
            slowest.append(time.monotonic() - began)

    async with asyncio.TaskGroup() as group:
        for n, source in enumerate(sources):
            group.create_task(one(n, source))
    async with Peers(sources[0]) as peers:
        assert len(await calling(peers, made.url).find_endpoints()) == 100
    print(f"100 dials and registrations at once: slowest {max(slowest) * 1000:.0f} ms")

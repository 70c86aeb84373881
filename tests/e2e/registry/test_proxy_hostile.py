"""The registry proxy where another domain lies, is half dead, or asks for what is not its own."""

import asyncio
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from nsm.caller import Caller
from nsm.errors import DeniedError, ExhaustedError
from nsm.identity.source import HeldIdentity, Identity
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.offers import Offers
from nsm.registrar import Registrar
from nsm.rpc.registry import RegistryClient
from nsm.rpc.registry_services import handlers
from nsm.rpc.server import serve
from tests.e2e.registry.realms import Realms
from tests.e2e.registry.two import ENDPOINT, HERE, NAMES, Two
from tests.support.nameserver import free_port, nameserver
from tests.support.wait import write

QUERY = Endpoint(services=("icmp@two",))


class Liar(Registrar):
    """A registry that tells of what it is not asked for, and may never end."""

    said: tuple[Endpoint, ...] = ()
    endless = False

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        for one in self.said:
            yield Found(one)
        while self.endless:
            yield Found(replace(HERE, labels={"icmp": {"long": "x" * 50_000}}))

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        for one in self.said:
            yield Found(Service(one.name))


@pytest.fixture
async def liar(two: Two) -> AsyncIterator[Liar]:
    """It is domain two's registry; the honest one is domain good's."""
    registrar = Liar(Offers())
    source = HeldIdentity(Identity(two.two.svid("liar"), two.two.known))
    async with serve(["tcp://127.0.0.1:0"], handlers(registrar, lifetime=SECOND), source) as far:
        two.say(two={"registry": list(far.urls)}, good={"registry": [two.far.url]})
        yield registrar


async def test_a_domain_speaks_for_its_own_names_only(
    two: Two, nse: RegistryClient, liar: Liar
) -> None:
    liar.said = (
        replace(HERE, name="nse-1@three"),
        replace(HERE, services=("icmp@three",)),
        replace(HERE, labels={"icmp@three": {"app": "x"}}),
        replace(HERE, name="honest"),
    )
    assert [one.name for one in await nse.find_endpoints(QUERY)] == ["honest@two"]
    found = await nse.find_services(Service("icmp@two"))
    assert {one.name for one in found} == {"nse-1@two", "honest@two"}
    assert two.proxy.log().count("a name of another domain") == 4


async def test_an_answer_without_an_end_is_ended_and_others_are_served(
    nse: RegistryClient, liar: Liar
) -> None:
    liar.endless = True
    flood = asyncio.create_task(nse.find_endpoints(QUERY))
    began = time.monotonic()
    assert await nse.find_services(Service("icmp@good")) == []
    write("a question beside an answer without an end", time.monotonic() - began, 2.0)
    with pytest.raises(ExhaustedError, match="or more than 16777216 bytes"):
        await flood


async def test_a_registry_that_takes_calls_and_answers_none_is_passed_over(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    await there.register_endpoint(HERE)
    hung = await two.two.start("nsmgr", "registry")
    two.say(two={"registry": [hung.url, two.far.url]})
    assert await nse.find_endpoints(QUERY) == []  # and the connection stays
    with hung.frozen():
        patience = asyncio.get_running_loop().time() + 4
        (found,) = await nse.find_endpoints(QUERY, deadline=patience)
        assert found.name == "nse-1@two"
        began = time.monotonic()
        assert len(await nse.find_endpoints(QUERY)) == 1
        write("the next question", time.monotonic() - began, 0.5)


async def test_whoever_asks_is_told_of_a_door_where_somebody_answers(
    made: Realms, two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    """A domain's nsmgr-proxy may be met at several addresses, too."""
    await there.register_endpoint(HERE)
    dead, door = f"tcp://127.0.0.9:{free_port()}", await two.two.start("nsmgr", "registry")

    async def url(*doors: str) -> str:
        two.say(two={"registry": [two.far.url], "nsmgr-proxy": list(doors)})
        (found,) = await nse.find_endpoints(QUERY)
        return found.url

    (stranger,) = await made.make("stranger.test", programs=NAMES)
    strange = await stranger.start("registry")
    assert await url(dead, strange.url, door.url) == door.url
    assert await url(door.url, dead) == door.url
    await door.stop(signal.SIGKILL)
    assert await url(dead, door.url) == dead  # who goes there is told why


async def test_a_door_that_moved_is_asked_for_again_whatever_its_ttl(
    two: Two, nse: RegistryClient, there: RegistryClient, tmp_path: Path
) -> None:
    await there.register_endpoint(HERE)
    zone, port = "two.example", two.far.url.rpartition(":")[2]
    async with nameserver(tmp_path / "dns") as dns:
        await two.proxy.stop()
        await two.proxy.start(NSM_DNS_SERVERS=dns.address)

        async def door(host: str, at: str) -> None:
            names = {"registry": ("127.0.0.1", port), "nsmgr-proxy": (host, at)}
            records = [
                f"{name}.nsm-system 3600 IN {kind}"
                for name, (address, number) in names.items()
                for kind in (f"SRV 0 0 {number} x.", f"A {address}")
            ]
            await dns.serve({zone: "\n".join(records)})

        async def url() -> str:
            (found,) = await nse.find_endpoints(Endpoint(services=(f"icmp@{zone}",)))
            return found.url

        first = await two.two.start("nsmgr", "registry")
        await door("127.0.0.1", first.url.rpartition(":")[2])
        assert await url() == first.url
        await door("127.0.0.1", port)  # elsewhere, and nobody was told
        assert await url() == first.url
        await first.stop(signal.SIGKILL)
        assert await url() == two.far.url


async def test_another_domain_does_not_ask_through_us_for_a_third(two: Two) -> None:
    two.say(third={"registry": [two.far.url]})
    asked = replace(ENDPOINT, name="nse-1@third", services=("icmp@third",), labels={})
    for here in (two.registry, two.proxy):
        async with two.two.client("looker", here) as stranger:
            for call in (
                stranger.find_endpoints(asked),
                stranger.find_services(Service("icmp@//127.0.0.1:22")),
                stranger.register_endpoint(asked),
                stranger.register_service(Service("icmp@third")),
            ):
                with pytest.raises(DeniedError) as refused:
                    await call
                assert "spiffe://two.test/looker asks for '" in refused.value.message
                assert "no sufficient privileges" in refused.value.message


async def test_another_domain_offers_nothing_to_our_clients_unless_it_may(
    two: Two, there: RegistryClient
) -> None:
    """It would only have to take the name of a service of ours."""
    async with two.one.client("nse", two.registry) as own:
        await own.register_service(Service("icmp", "IP"))
        await own.register_endpoint(HERE)
    evil = replace(HERE, name="evil")
    async with two.two.client("looker", two.registry) as stranger:
        for call in (stranger.register_endpoint(evil), stranger.register_service(Service("b"))):
            with pytest.raises(DeniedError) as refused:
                await call
            for part in ("spiffe://two.test/looker registers '", "own trust domain, one.test"):
                assert part in refused.value.message
            assert refused.value.message.endswith("no sufficient privileges")
        assert [one.name for one in await stranger.find_endpoints()] == ["nse-1"]
        await two.registry.stop()
        await two.registry.start(
            NSM_PROXY_REGISTRY_URL=two.proxy.url, NSM_REGISTER_STRANGERS="true"
        )
        await stranger.register_endpoint(evil)
    await there.register_endpoint(HERE)  # their own, as ever
    async with two.one.client("nse", two.far) as floating:
        await floating.register_endpoint(evil)  # that registry has no proxy: it is shared

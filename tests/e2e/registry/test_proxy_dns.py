"""A registry proxy that finds domains in DNS, and goes where they go."""

import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nsm.errors import NotFoundError, UnavailableError
from nsm.model import Endpoint, Service
from nsm.rpc.registry import RegistryClient
from tests.e2e.registry.realms import Program, Realm, realms
from tests.support.nameserver import Nameserver, nameserver
from tests.support.wait import until

ZONE = "two.example"


@dataclass
class Found:
    """Domain one, whose proxy asks a DNS server where the other's registries are."""

    one: Realm
    two: Realm
    registry: Program
    proxy: Program
    dns: Nameserver

    async def at(self, *addresses: str, port: str, ttl: int = 1, zone: str = ZONE) -> None:
        """Have the domain zone be there, and its door at 127.0.0.4:5004."""
        kinds = [f"{'AAAA' if ':' in one else 'A'} {one}" for one in addresses]
        lines = [f"registry.nsm-system {ttl} IN {kind}" for kind in kinds]
        door = "nsmgr-proxy.nsm-system"
        await self.dns.serve(
            {
                zone: "\n".join(
                    [
                        f"registry.nsm-system {ttl} IN SRV 0 0 {port} somewhere.else.",
                        *lines,
                        f"{door} {ttl} IN SRV 0 0 5004 {door}",
                        f"{door} {ttl} IN A 127.0.0.4",
                    ]
                )
            },
            negative=ttl,
        )


def port(program: Program) -> str:
    return program.url.rpartition(":")[2]


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Found]:
    names = ("registry", "registry-proxy", "registry-2")
    async with realms(tmp_path) as all_of_them, nameserver(tmp_path / "dns") as dns:
        one, two = await all_of_them.make("one.test", "two.test", programs=names)
        proxy = await one.start("registry-proxy", "registry-proxy", NSM_DNS_SERVERS=dns.address)
        registry = await one.start("registry", NSM_PROXY_REGISTRY_URL=proxy.url)
        yield Found(one, two, registry, proxy, dns)


@pytest.fixture
async def nse(made: Found) -> AsyncIterator[RegistryClient]:
    async with made.one.client("nse", made.registry) as client:
        yield client


async def test_a_domain_is_found_its_first_address_dead_and_met_at_its_door(
    made: Found, nse: RegistryClient
) -> None:
    far = await made.two.start("registry")
    await made.at("127.0.0.9", "127.0.0.1", port=port(far))
    asked = Endpoint(f"nse-1@{ZONE}", (f"icmp@{ZONE}",), url="tcp://192.0.2.1:5004")
    held = await nse.register_endpoint(asked)
    assert (held.item.name, held.item.url) == (asked.name, asked.url)
    (found,) = await nse.find_endpoints(Endpoint(services=asked.services))
    assert (found.name, found.url) == (asked.name, "tcp://127.0.0.4:5004")
    await made.at("127.0.0.9", port=port(far))

    async def dead() -> str:
        try:
            await nse.find_endpoints(Endpoint(services=asked.services))
        except UnavailableError as error:
            return error.message
        return ""

    why = await until(dead, "the second address to be forgotten", bar=2)
    assert f"the registry of domain '{ZONE}' at tcp://127.0.0.9:{port(far)}: " in why
    assert "Connection refused" in why


async def test_a_domain_that_moves_is_followed(made: Found, nse: RegistryClient) -> None:
    first = await made.two.start("registry")
    second = await made.two.start("registry-2", host="[::1]")
    for program, payload in ((first, "IP"), (second, "ETHERNET")):
        async with made.two.client("operator", program) as operator:
            await operator.register_service(Service("icmp", payload))

    async def payload(zone: str = ZONE) -> str:
        (found,) = await nse.find_services(Service(f"icmp@{zone}"))
        return found.payload

    async def comes(wanted: str, zone: str = ZONE) -> bool:
        try:
            return await payload(zone) == wanted
        except UnavailableError:
            return False

    await made.at("127.0.0.1", port=port(first))
    assert await payload() == "IP"
    await made.at("::1", port=port(second))  # and the first goes on, as if nothing were
    await until(lambda: comes("ETHERNET"), "the proxy to go where the domain is", bar=2)
    # However long an answer was to hold: where nobody is, nobody is.
    zone = "long.example"
    await made.at("::1", port=port(second), ttl=3600, zone=zone)
    assert await payload(zone) == "ETHERNET"
    await made.at("127.0.0.1", port=port(first), zone=zone)
    assert await payload(zone) == "ETHERNET"
    await second.stop(signal.SIGKILL)
    await until(lambda: comes("IP", zone), "the proxy to ask again where nobody answers")


async def test_a_dns_server_may_be_away_while_its_answers_hold(
    made: Found, nse: RegistryClient
) -> None:
    far = await made.two.start("registry")
    await made.at("127.0.0.1", port=port(far), ttl=3600)
    query = Service(f"icmp@{ZONE}")
    assert await nse.find_services(query) == []
    await made.dns.stop()
    assert await nse.find_services(query) == []
    with pytest.raises(UnavailableError) as away:
        await nse.find_services(Service("icmp@three.example"))
    for part in (made.proxy.url, "'three.example'", made.dns.address, "Connection refused"):
        assert part in away.value.message
    await made.dns.serve({"three.example": "x 1 IN A 192.0.2.1"})
    with pytest.raises(NotFoundError, match=r"'three\.example' has no registry in DNS"):
        await nse.find_services(Service("icmp@three.example"))


async def test_a_door_that_nobody_can_find_out_is_not_taken_for_none(
    made: Found, nse: RegistryClient
) -> None:
    far = await made.two.start("registry")
    async with made.two.client("nse", far) as there:
        await there.register_endpoint(Endpoint("nse-1", ("icmp",), url="tcp://10.0.0.1:5001"))
    zone = f"registry.nsm-system 60 IN SRV 0 0 {port(far)} x\n"
    zone += "registry.nsm-system 60 IN A 127.0.0.1\n"
    door = f"nsmgr-proxy.nsm-system.{ZONE}"
    await made.dns.serve({ZONE: zone, door: ""})  # who knows of the door has lost it
    query = Endpoint(services=(f"icmp@{ZONE}",))
    with pytest.raises(UnavailableError, match=f"'{ZONE}' has its nsmgr-proxy: .* SERVFAIL"):
        await nse.find_endpoints(query)
    await made.dns.serve({ZONE: zone})  # there is none: the domain is floating
    (found,) = await nse.find_endpoints(query)
    assert found.url == "tcp://10.0.0.1:5001"

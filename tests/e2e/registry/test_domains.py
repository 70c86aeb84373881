"""Where domains are, as a DNS server says it that is not ours."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nsm import domains
from nsm.errors import NotFoundError, UnavailableError
from nsm.resolve import Domains, Servers, open_domains
from tests.support.nameserver import Nameserver, free_port, nameserver
from tests.support.wait import until, write

ZONE = "c2.example"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Nameserver]:
    async with nameserver(tmp_path / "dns") as made:
        yield made


@pytest.fixture
async def found(server: Nameserver) -> AsyncIterator[Domains]:
    async with open_domains(servers=[domains.server(server.address)]) as made:
        yield made


async def test_the_port_is_the_first_records_and_the_addresses_are_the_names_own(
    server: Nameserver, found: Domains
) -> None:
    await server.serve(
        {
            ZONE: """
            registry.nsm-system 30 IN SRV 2 0 9999 target
            registry.nsm-system 30 IN SRV 1 0 5002 target
            registry.nsm-system 30 IN A 192.0.2.1
            registry.nsm-system 30 IN A 192.0.2.2
            registry.nsm-system 30 IN AAAA 2001:db8::1
            nsmgr-proxy.nsm-system 30 IN SRV 0 0 5004 nsmgr-proxy.nsm-system
            nsmgr-proxy.nsm-system 30 IN A 192.0.2.4
            target 30 IN A 192.0.2.99
            """
        }
    )
    assert await found.registry(ZONE) == (
        "tcp://192.0.2.1:5002",
        "tcp://192.0.2.2:5002",
        "tcp://[2001:db8::1]:5002",
    )
    assert await found.manager_proxy("C2.Example.") == ("tcp://192.0.2.4:5004",)


async def test_by_the_book_the_targets_are_met_each_at_its_port(
    server: Nameserver, found: Domains
) -> None:
    await server.serve(
        {
            ZONE: f"""
            registry.nsm-system 30 IN SRV 2 0 5003 second
            registry.nsm-system 30 IN SRV 1 0 5002 first
            first 30 IN AAAA 2001:db8::1
            second 30 IN CNAME first
            nsmgr-proxy.nsm-system 30 IN CNAME other.{ZONE}.
            other 30 IN SRV 0 0 5004 first
            """
        }
    )
    assert await found.registry(ZONE) == ("tcp://[2001:db8::1]:5002", "tcp://[2001:db8::1]:5003")
    assert await found.manager_proxy(ZONE) == ("tcp://[2001:db8::1]:5004",)


async def test_an_answer_too_long_for_a_datagram_comes_by_tcp(
    server: Nameserver, found: Domains
) -> None:
    many = "\n".join(f"registry.nsm-system 30 IN A 192.0.2.{n}" for n in range(1, 201))
    await server.serve({ZONE: f"registry.nsm-system 30 IN SRV 0 0 5002 x\n{many}"})
    assert len(await found.registry(ZONE)) == domains.MOST_URLS


async def test_a_change_is_seen_when_the_ttl_is_over_and_not_before(
    server: Nameserver, found: Domains
) -> None:
    records = """
    registry.nsm-system 60 IN SRV 0 0 5002 x
    registry.nsm-system {ttl} IN A 192.0.2.{n}
    """
    await server.serve({ZONE: records.format(ttl=2, n=1)}, negative=60)
    asked = time.monotonic()
    assert await found.registry(ZONE) == ("tcp://192.0.2.1:5002",)
    await server.serve({ZONE: records.format(ttl=60, n=2)}, negative=60)

    async def moved() -> bool:
        now = await found.registry(ZONE)
        if now == ("tcp://192.0.2.1:5002",):
            assert time.monotonic() - asked < 4  # 2 s, and a busy machine
        return now == ("tcp://192.0.2.2:5002",)

    await until(moved, "the new address", bar=2.5)
    took = time.monotonic() - asked
    write("a change of address with a TTL of 2 s", took, 2.5)
    assert took >= 2
    await server.stop()
    assert await found.registry(ZONE) == ("tcp://192.0.2.2:5002",)  # it holds
    found.doubt(ZONE)
    with pytest.raises(UnavailableError):
        await found.registry(ZONE)


async def test_what_is_not_there_is_asked_for_again_when_its_soa_says(
    server: Nameserver, found: Domains
) -> None:
    await server.serve({ZONE: "other 30 IN A 192.0.2.1"}, negative=60, minimum=2)
    asked = time.monotonic()
    with pytest.raises(NotFoundError) as none:
        await found.registry(ZONE)
    for part in (
        f"domain '{ZONE}' has no registry in DNS: {server.address} knows no name",
        f"registry.nsm-system.{ZONE}.",
        "asked for SRV: NXDOMAIN",
    ):
        assert part in none.value.message
    await server.serve(
        {
            ZONE: """
            registry.nsm-system 30 IN SRV 0 0 5002 x
            registry.nsm-system 30 IN A 192.0.2.1
            """
        }
    )

    async def there() -> bool:
        try:
            return bool(await found.registry(ZONE))
        except NotFoundError:
            return False

    await until(there, "a domain that was not there", bar=2.5)
    assert time.monotonic() - asked >= 2


async def test_a_name_without_the_record_is_another_sentence(
    server: Nameserver, found: Domains
) -> None:
    await server.serve({ZONE: "registry.nsm-system 30 IN A 192.0.2.1"})
    with pytest.raises(NotFoundError, match=r"knows no SRV record of registry\.nsm-system\.c2"):
        await found.registry(ZONE)
    await server.serve({"c3.example": "registry.nsm-system 30 IN SRV 0 0 5002 nowhere"})
    with pytest.raises(NotFoundError, match=r"knows no name nowhere\.c3\.example\."):
        await found.registry("c3.example")


async def test_a_server_that_cannot_say_is_not_one_that_says_no(
    server: Nameserver, found: Domains
) -> None:
    await server.serve({ZONE: ""})  # the server has lost the zone
    with pytest.raises(UnavailableError) as lost:
        await found.registry(ZONE)
    assert f"SRV of registry.nsm-system.{ZONE}.: {server.address} answered SERVFAIL" in str(
        lost.value
    )
    await server.stop()
    with pytest.raises(UnavailableError, match="Connection refused"):
        await found.registry(ZONE)


async def test_servers_are_asked_in_turn_and_a_silent_one_costs_a_second(
    server: Nameserver,
) -> None:
    await server.serve(
        {
            ZONE: """
            registry.nsm-system 30 IN SRV 0 0 5002 x
            registry.nsm-system 30 IN A 192.0.2.1
            """
        }
    )
    loop = asyncio.get_running_loop()
    mute, _ = await loop.create_datagram_endpoint(
        asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0)
    )
    silent = mute.get_extra_info("sockname")
    try:
        servers = [("127.0.0.1", free_port()), silent, domains.server(server.address)]
        async with open_domains(servers=servers) as found:
            began = time.monotonic()
            assert await found.registry(ZONE) == ("tcp://192.0.2.1:5002",)
            write("a domain past a silent DNS server", time.monotonic() - began, 1.5)
        async with open_domains(servers=[silent]) as found:
            with pytest.raises(UnavailableError, match="did not answer within 2 s"):
                await found.registry(ZONE)
    finally:
        mute.close()


async def test_the_systems_servers_are_those_of_resolv_conf_as_it_is_now(tmp_path: Path) -> None:
    async with nameserver(tmp_path / "dns", "127.0.0.77", 53) as server:
        await server.serve({ZONE: "x 30 IN A 192.0.2.1"})
        conf = tmp_path / "resolv.conf"
        servers = Servers(resolv_conf=str(conf))
        none = await servers.addresses(f"x.{ZONE}.", "A")
        assert none.failed
        assert f"{conf} names no DNS server, and NSM_DNS_SERVERS is not set" in none.why
        conf.write_text("search example.org\nnameserver 127.0.0.77\n")
        assert (await servers.addresses(f"x.{ZONE}.", "A")).records == ("192.0.2.1",)
        conf.write_text("# nobody\n")
        assert (await servers.addresses(f"x.{ZONE}.", "A")).failed

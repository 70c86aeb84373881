"""When a client serves names, and when it leaves things as they are."""

import asyncio
import dataclasses
from pathlib import Path

import dns.asyncquery
import dns.message
import pytest

from nsm.client import Wire
from nsm.errors import NotFoundError, PreconditionError, TakenError
from nsm.model import Connection, Context, DNSConfig, DNSContext
from nsm.names import resolvconf
from nsm.nsurl import parse
from nsm.process.client import Config
from nsm.process.config import ConfigError, resolved
from nsm.process.config import parse as configured
from nsm.process.naming import Naming
from tests.support.nameserver import free_port
from tests.support.wait import until

TEXT = "nameserver 192.0.2.1\nsearch corp.example\n"
URLS = {"NSM_NETWORK_SERVICES": "kernel://net/nsm-1"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "resolv.conf"
    path.write_text(TEXT)
    return path


@pytest.fixture
def address() -> tuple[str, int]:
    return "127.0.0.1", free_port()


def wire(*configs: DNSConfig, id_: str = "w-1") -> Wire:
    made = Wire(id_, parse("kernel://net/nsm-1"), "nsm-1")
    made.made = Connection(id_, context=Context(dns=DNSContext(configs)))
    return made


SAYS = DNSConfig(("192.0.2.7",), ("net",))


def led(file: Path) -> bool:
    return "nameserver 127.0.0.1" in file.read_text()


async def asked(address: tuple[str, int]) -> bool:
    query = dns.message.make_query("version.bind", "TXT", "CH")  # not for others: answered at once
    heard = await dns.asyncquery.udp(query, address[0], timeout=2, port=address[1])
    return heard.id == query.id


async def test_nothing_is_served_before_a_wire_says_names(
    file: Path, address: tuple[str, int]
) -> None:
    async with Naming(None, str(file), address).running() as naming:
        await naming.settled()
        naming.tell(wire())
        await naming.settled()
        assert file.read_text() == TEXT
        naming.tell(wire(SAYS))
        await naming.settled()
        assert led(file)
        assert await asked(address)
        naming.forget(wire())
    assert file.read_text() == TEXT


async def test_wires_that_came_before_it_served_are_told_as_well(
    file: Path, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, tuple[str, ...]] = {}
    async with Naming(None, str(file), address).running() as naming:
        from nsm.names.resolver import Resolver

        def tell(_: Resolver, id_: str, context: Context) -> None:
            told[id_] = tuple(one.servers[0] for one in context.dns.configs) if context.dns else ()

        monkeypatch.setattr(Resolver, "tell", tell)
        naming.tell(wire(id_="w-0"))
        naming.tell(wire(SAYS))
        await naming.settled()
        assert told == {"w-0": (), "w-1": ("192.0.2.7",)}
        naming.tell(wire(dataclasses.replace(SAYS, servers=("192.0.2.8",))))
        assert told["w-1"] == ("192.0.2.8",)


async def test_who_wants_names_has_them_from_the_start_or_is_told_why_not(
    file: Path, address: tuple[str, int]
) -> None:
    async with Naming(True, str(file), address).running() as naming:
        assert led(file)
        with pytest.raises(TakenError, match="answers DNS at"):
            async with Naming(True, str(file), address).running():
                raise AssertionError
        assert led(file)
        await naming.settled()
    with pytest.raises(NotFoundError, match="there is no"):
        async with Naming(True, f"{file}.none", address).running():
            raise AssertionError
    assert file.read_text() == TEXT


async def test_what_stands_in_the_way_is_no_failure_for_who_did_not_ask(
    file: Path, address: tuple[str, int]
) -> None:
    async with Naming(True, str(file), address).running():
        async with Naming(None, f"{file}.none", address).running() as naming:
            naming.tell(wire(SAYS))
            await naming.settled()
        assert led(file)


async def test_who_wants_none_touches_nothing(file: Path, address: tuple[str, int]) -> None:
    async with Naming(False, str(file), address).running() as naming:
        naming.tell(wire(SAYS))
        await naming.settled()
        assert file.read_text() == TEXT


async def test_the_machines_own_file_is_left_alone(
    file: Path, address: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolvconf, "PATH", str(file))
    with pytest.raises(PreconditionError, match="is this machine's"):
        resolvconf.check_given(str(file))
    resolvconf.check_given(f"{file}.other")
    resolvconf.check_given("")
    async with Naming(None, str(file), address).running() as naming:
        naming.tell(wire(SAYS))
        await naming.settled()
        assert file.read_text() == TEXT


@pytest.mark.parametrize("wanted", [None, False])
async def test_what_a_killed_life_left_is_brought_back_at_the_start(
    file: Path, address: tuple[str, int], wanted: bool | None
) -> None:
    file.write_text(resolvconf.led(TEXT, address[0]))
    async with Naming(wanted, str(file), address).running():
        assert file.read_text() == TEXT
    file.write_text(resolvconf.led(TEXT, address[0]))
    async with Naming(None, "", address).running() as living:
        living.tell(wire(SAYS))
        await living.settled()
        async with Naming(wanted, str(file), address).running():
            assert led(file)  # whoever serves there is alive


def test_resolv_conf_leads_to_no_other_port() -> None:
    other = {**URLS, "NSM_LOCAL_DNS_SERVER_ADDRESS": "127.0.0.1:5353"}
    with pytest.raises(ConfigError, match=r"5353.*can lead to port 53 only"):
        configured(Config, other)
    for more in ({"NSM_RESOLV_CONF": ""}, {"NSM_LOCAL_DNS_SERVER_ENABLED": "false"}):
        assert configured(Config, {**other, **more}).local_dns_server_address[1] == 5353
    assert "NSM_LOCAL_DNS_SERVER_ENABLED=  #" in resolved(configured(Config, URLS), URLS)


async def test_the_block_of_one_that_was_never_asked_ends_at_once(
    file: Path, address: tuple[str, int]
) -> None:
    waiting = asyncio.create_task(_held(file, address))
    await until(waiting.done, "an unused resolver to end", record=False)
    await waiting


async def _held(file: Path, address: tuple[str, int]) -> None:
    async with Naming(None, str(file), address).running():
        pass

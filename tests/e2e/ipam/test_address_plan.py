"""The address plan's process as routers meet it: stock grpcio, kill -9, and callers of bad will."""

import asyncio
import signal
import sqlite3
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from nsm.errors import DeniedError, NsmError, PreconditionError, TakenError
from nsm.identity.source import HeldIdentity, Identity
from nsm.proto import ipam_pb2
from nsm.rpc.peers import Peers
from nsm.rpc.prefixes import AddressPool, PoolsClient
from tests.e2e.ipam.plans import SETTINGS, Router, routers
from tests.e2e.registry.realms import Program, Realm, realms
from tests.support.wait import until, write


@dataclass
class Planned:
    """A trust domain with an address plan that does not run yet."""

    realm: Realm
    plan: Program
    store: Path

    async def start(self, **settings: str) -> None:
        """Start it, where and with the file it had before."""
        await self.plan.start(**SETTINGS | {"NSM_STORE": str(self.store)} | settings)

    def routers(self, name: str) -> Any:
        """Streams of an identity."""
        return routers(self.realm, name, self.plan)

    async def pools(self, name: str, work: str, *about: Any, **more: Any) -> Any:
        """What an operator's client is answered."""
        source = HeldIdentity(Identity(self.realm.svid(name), self.realm.known))
        async with Peers(source, dial_timeout=5) as peers:
            return await getattr(PoolsClient(peers, self.plan.url), work)(*about, **more)

    async def held(self, pool: str = "") -> dict[str, bool]:
        """Prefixes lent of a pool, and whether a stream holds them."""
        found = await self.pools("operator", "pools")
        return {one.prefix: one.ends is None for p in found if p.name == pool for one in p.leases}


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Planned]:
    async with realms(tmp_path) as all_of_them:
        (realm,) = await all_of_them.make("td", programs=("ipam", "second"))
        plan = realm.place("ipam", "ipam")
        yield Planned(realm, plan, realm.folder / "ipam" / "store.sqlite")


@pytest.fixture
async def running(made: Planned) -> Planned:
    await made.start()
    return made


# -- what upstream's routers do ---------------------------------------------------------------


async def test_routers_get_the_lowest_prefixes_and_theirs_again(running: Planned) -> None:
    async with running.routers("one") as one, running.routers("two") as two:
        async with one.stream() as first, two.stream() as second:
            assert await first.ask() == "172.16.0.0/24"
            assert await second.ask() == "172.16.1.0/24"
            assert await second.ask() == "172.16.2.0/24"  # one stream may hold several
        await until_left(running, "172.16.0.0/24", "172.16.1.0/24", "172.16.2.0/24")
        async with one.stream() as first, two.stream() as second:
            assert await second.ask("172.16.2.0/24") == "172.16.2.0/24"  # as wanted
            assert await second.ask("172.16.0.0/24") == "172.16.1.0/24"  # that is one's
            assert await first.ask() == "172.16.0.0/24"  # without saying what it had


async def until_left(running: Planned, *prefixes: str) -> None:
    async def left() -> bool:
        held = await running.held()
        return not any(held[prefix] for prefix in prefixes)

    await until(left, "the address plan to notice that a stream ended")


async def test_what_is_given_back_is_free_at_once_and_answered_by_nothing(
    running: Planned,
) -> None:
    async with (
        running.routers("one") as one,
        running.routers("two") as two,
        one.stream() as first,
        two.stream() as second,
    ):
        assert await first.ask() == "172.16.0.0/24"
        await second.say(ipam_pb2.DELETE, "172.16.0.0/24")  # not its own: nothing happens
        await first.say(ipam_pb2.DELETE, "172.16.0.0/24")
        assert await first.ask() == "172.16.0.0/24"  # the first answer since: DELETE had none
        await first.say(ipam_pb2.DELETE, "172.16.0.0/24")
        await first.ask("172.16.7.0/24")
        assert await second.ask() == "172.16.0.0/24"


async def test_an_undefined_operation_ends_the_stream_with_a_sentence(running: Planned) -> None:
    async with running.routers("one") as one, one.stream() as stream:
        await stream.ask()
        await stream.say(ipam_pb2.UNDEFINED)
        code, says = await stream.ended()
    assert code == "INVALID_ARGUMENT"
    assert says == (
        "spiffe://td/one asks the address plan for an operation of type 0;"
        " 1 is ALLOCATE, 2 is DELETE"
    )


async def test_a_prefix_outlives_its_stream_for_the_lease_and_no_longer(made: Planned) -> None:
    await made.start(NSM_LEASE="2s")
    async with made.routers("one") as one, made.routers("two") as two:
        async with one.stream() as first:
            await first.ask()
        ended = time.monotonic()
        async with two.stream() as second:
            assert await second.ask() == "172.16.1.0/24"
        async with made.routers("three") as three:

            async def free() -> bool:
                async with three.stream() as third:
                    got = await third.ask("172.16.0.0/24")
                    await third.say(ipam_pb2.DELETE, got)
                    await third.ask("172.16.99.0/24")  # the DELETE was heard
                return got == "172.16.0.0/24"

            await until(free, "a lease of 2 s to end", bar=3.0)
        assert time.monotonic() - ended >= 2


async def test_leases_outlive_kill_9_and_a_restart(running: Planned) -> None:
    async with running.routers("one") as one, one.stream() as first:
        assert await first.ask() == "172.16.0.0/24"
        assert await first.ask() == "172.16.1.0/24"
        await first.say(ipam_pb2.DELETE, "172.16.0.0/24")
        assert await first.ask("172.16.5.0/24") == "172.16.5.0/24"
        await running.plan.stop(signal.SIGKILL)
        code, _ = await first.ended()
        assert code == "UNAVAILABLE"
    began = time.monotonic()
    await running.start()
    write("an address plan to be back after kill -9", time.monotonic() - began, 2.0)
    assert await running.held() == {"172.16.1.0/24": False, "172.16.5.0/24": False}
    async with running.routers("two") as two, two.stream() as second:
        assert await second.ask("172.16.1.0/24") == "172.16.0.0/24"
        assert await second.ask() == "172.16.2.0/24"
    async with running.routers("one") as one, one.stream() as first:
        assert await first.ask("172.16.5.0/24") == "172.16.5.0/24"
        assert await first.ask() == "172.16.1.0/24"


async def test_what_a_router_excludes_is_stepped_over(running: Planned) -> None:
    async with running.routers("one") as one:
        async with one.stream() as stream:
            assert await stream.ask(excluded=["172.16.0.0/23", "10.0.0.0/8"]) == "172.16.2.0/24"
            code, says = await stream.refused(excluded=["172.16.0.0/16"])
        assert code == "RESOURCE_EXHAUSTED"
        assert "the pool of the address plan is exhausted: of 172.16.0.0/16 1 parts" in says
        assert "excludes 1" in says
        async with one.stream() as stream:
            code, says = await stream.refused(excluded=["nonsense"])
        assert code == "INVALID_ARGUMENT"
        assert says.startswith("an excluded prefix: 'nonsense' is none: ")


async def test_an_exhausted_pool_says_whose_its_parts_are(made: Planned) -> None:
    await made.start(NSM_PREFIX="172.16.0.0/31", NSM_CLIENT_PREFIX_LEN="32")
    async with made.routers("one") as one, one.stream() as first:
        assert [await first.ask(), await first.ask()] == ["172.16.0.0/32", "172.16.0.1/32"]
        async with made.routers("two") as two, two.stream() as second:
            code, says = await second.refused()
    assert code == "RESOURCE_EXHAUSTED"
    assert says == (
        "the pool of the address plan is exhausted: of 172.16.0.0/31 2 parts are lent, to"
        " spiffe://td/one; give it another prefix, or end routers that nobody needs"
    )


async def test_both_families_by_what_is_asked(made: Planned) -> None:
    await made.start(NSM_PREFIX="172.16.0.0/16,2001:db8:10::/64")
    async with made.routers("one") as one:
        async with one.stream(family="6") as six, one.stream() as any_of_them:
            assert await six.ask() == "2001:db8:10::/112"
            told = dict(await six.call.initial_metadata())
            assert told["vwire-domain"] == "172.16.0.0/16,2001:db8:10::/64"
            assert await any_of_them.ask() == "172.16.0.0/24"
            assert await any_of_them.ask("2001:db8:10::7/128") == "2001:db8:10::1:0/112"
            assert await any_of_them.ask("2001:db8:10::9:7/128") == "2001:db8:10::9:7/128"
            await six.say(ipam_pb2.DELETE, "2001:0DB8:10:0:0::/112")  # as another writes it
            assert await six.ask() == "2001:db8:10::/112"
        async with one.stream(family="5") as stream:
            code, says = await stream.refused()
            assert (code, says) == (
                "INVALID_ARGUMENT",
                "spiffe://td/one asks for family '5'; it is 4 or 6",
            )
    await made.plan.stop()
    made.store.unlink()
    await made.start(NSM_PREFIX="2001:db8:10::/64")
    async with made.routers("one") as one, one.stream() as stream:
        assert await stream.ask() == "2001:db8:10::/112"  # all there is, to who names none
        async with one.stream(family="4") as other:
            code, says = await other.refused()
    assert (code, "has no IPv4 prefix" in says) == ("NOT_FOUND", True)


# -- pools ------------------------------------------------------------------------------------

ORDERS = AddressPool("orders", ("10.1.0.0/16", "2001:db8:1::/64"))


async def test_pools_are_made_lent_from_kept_and_forgotten(running: Planned) -> None:
    made = await running.pools("operator", "create", ORDERS)
    assert (made.ipv4_length, made.ipv6_length) == (24, 112)
    assert await running.pools("operator", "create", ORDERS) == made  # the same again
    async with running.routers("one") as one:
        async with one.stream(pool="orders") as orders, one.stream() as default:
            assert await orders.ask() == "10.1.0.0/24"
            assert await default.ask() == "172.16.0.0/24"
            with pytest.raises(PreconditionError, match=r"spiffe://td/one holds 10\.1\.0\.0/24"):
                await running.pools("operator", "delete", "orders")
        async with one.stream(pool="unknown") as stream:
            code, says = await stream.refused()
            assert code == "NOT_FOUND"
            assert says == (
                "the address plan has no pool 'unknown'; it has orders;"
                " `nsmctl vl3 create` makes one"
            )
    await running.plan.stop(signal.SIGKILL)
    await running.start()
    assert await running.held("orders") == {"10.1.0.0/24": False}
    await running.pools("operator", "delete", "orders")
    await running.pools("operator", "delete", "orders")  # not there: fine
    await running.plan.stop(signal.SIGKILL)
    await running.start()
    assert [one.name for one in await running.pools("operator", "pools")] == [""]


async def test_two_pools_never_share_an_address(running: Planned) -> None:
    await running.pools("operator", "create", ORDERS)
    for other, says in (
        (AddressPool("b", ("10.1.7.0/24",)), "10.1.7.0/24 of pool 'b' overlaps 10.1.0.0/16 of"),
        (AddressPool("b", ("172.16.0.0/12",)), "overlaps 172.16.0.0/16 of the pool of"),
        (AddressPool("orders", ("10.2.0.0/16",)), "is there with 10.1.0.0/16, 2001:db8:1::/64"),
    ):
        with pytest.raises(TakenError) as refused:
            await running.pools("operator", "create", other)
        assert says in str(refused.value)
    with pytest.raises(NsmError, match="overlap"):
        await running.pools("operator", "create", AddressPool("b", ("10.9.0.0/16", "10.9.1.0/24")))


async def test_pools_are_for_operators_only(running: Planned) -> None:
    for work, about in (("create", ORDERS), ("delete", "orders"), ("pools", None)):
        with pytest.raises(DeniedError) as refused:
            await running.pools("one", work, *([about] if about else []))
        assert "spiffe://td/one may not manage the address plan's pools" in str(refused.value)
        assert "NSM_OPERATORS" in str(refused.value)


# -- other settings than an earlier life had ---------------------------------------------------


async def test_a_pool_with_other_prefixes_lends_only_of_those(running: Planned) -> None:
    async with running.routers("one") as one, one.stream() as first:
        assert await first.ask() == "172.16.0.0/24"
        assert await first.ask("172.16.200.0/24") == "172.16.200.0/24"
    await running.plan.stop()
    await running.start(NSM_PREFIX="172.16.128.0/17,2001:db8:10::/64")
    assert await running.held() == {"172.16.200.0/24": False}
    assert "is no longer of its pool" in running.plan.log()
    async with running.routers("one") as one, one.stream() as first:
        assert await first.ask("172.16.0.0/24") == "172.16.200.0/24"
        assert await first.ask() == "172.16.128.0/24"
    await running.plan.stop()
    await running.start(NSM_PREFIX="2001:db8:10::/64")  # not even of that family
    async with running.routers("one") as one, one.stream() as first:
        assert await first.ask("172.16.200.0/24") == "2001:db8:10::/112"
    await running.plan.stop()
    await running.start()  # what was forgotten does not come back
    assert await running.held() == {}


async def test_a_pool_of_the_settings_that_overlaps_a_made_one_does_not_start(
    running: Planned,
) -> None:
    await running.pools("operator", "create", ORDERS)
    await running.plan.stop()
    process = await running.plan.spawn(
        **SETTINGS | {"NSM_STORE": str(running.store), "NSM_PREFIX": "10.1.5.0/24"}
    )
    assert await asyncio.wait_for(process.wait(), 20) == 2
    said = running.plan.log().replace("\\", "")
    assert "NSM_PREFIX: 10.1.5.0/24 of the pool of the address plan overlaps 10.1.0.0/16" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("newer", "was written by a newer version: it has schema 99, and this one knows up to 2"),
        ("other", "is a database of some other program"),
        ("damaged", "is damaged: file is not a database"),
        ("wrong", "a lease: 'no prefix' is none"),
        ("missing", "cannot be opened: No such file or directory"),
    ],
)
async def test_a_store_that_cannot_be_used_is_left_as_it_is(
    made: Planned, content: str, says: str
) -> None:
    if content == "damaged":
        made.store.write_text("no database " * 1000)
    elif content == "other":
        with sqlite3.connect(made.store) as other:
            other.execute("CREATE TABLE mine (x)")
        other.close()
    elif content in ("newer", "wrong"):
        await made.start()
        await made.plan.stop()
        with sqlite3.connect(made.store) as own:
            if content == "newer":
                own.execute("PRAGMA user_version = 99")
            else:
                own.execute("INSERT INTO leases VALUES ('', 'no prefix', 'spiffe://td/x', NULL)")
        own.close()
    before = made.store.read_bytes() if made.store.exists() else b""
    store = "/nowhere/at/all" if content == "missing" else str(made.store)
    process = await made.plan.spawn(**SETTINGS | {"NSM_STORE": store})
    assert await asyncio.wait_for(process.wait(), 20) == 3
    assert says in made.plan.log()
    if content == "wrong":  # one that may be repaired, with what is right in it
        with sqlite3.connect(made.store) as own:
            assert own.execute("SELECT prefix FROM leases").fetchall() == [("no prefix",)]
        own.close()
    else:
        assert (made.store.read_bytes() if made.store.exists() else b"") == before


async def test_two_plans_on_one_file_would_lend_twice_so_the_second_does_not_start(
    running: Planned,
) -> None:
    second = running.realm.place("second", "ipam")
    process = await second.spawn(**SETTINGS | {"NSM_STORE": str(running.store)})
    assert await asyncio.wait_for(process.wait(), 20) == 3
    assert "is in use by another process" in second.log()


# -- callers of bad will ----------------------------------------------------------------------


async def test_nobody_gets_more_than_a_router_needs(running: Planned) -> None:
    async with running.routers("greedy") as greedy, running.routers("one") as one:
        async with greedy.stream() as stream:  # all of the pool, or of the world
            assert await stream.ask("172.16.0.0/16") == "172.16.0.0/24"
            assert await stream.ask("172.16.128.0/17") == "172.16.1.0/24"
            assert await stream.ask("0.0.0.0/0") == "172.16.2.0/24"
            code, says = await stream.refused("x" * 65)
            assert (code, says) == (
                "INVALID_ARGUMENT",
                "spiffe://td/greedy: a prefix of 65 characters",
            )
        async with greedy.stream() as stream:
            many = [f"10.0.{n % 256}.{n // 256}/32" for n in range(10_000)]
            code, says = await stream.refused(excluded=many)
            assert code == "INVALID_ARGUMENT"
            assert says == "spiffe://td/greedy excludes 10000 prefixes; at most 1024 are read"
        async with greedy.stream() as stream:
            for _ in range(64):
                await stream.ask()
            code, says = await stream.refused()
            assert code == "INVALID_ARGUMENT"
            assert says == "spiffe://td/greedy has 64 prefixes over one stream, which is the most"
        async with one.stream() as stream:
            assert await stream.ask()


async def test_many_streams_of_one_are_bounded_and_others_are_served(made: Planned) -> None:
    await made.start(NSM_PREFIX="172.16.0.0/15")
    async with (
        made.routers("greedy") as greedy,
        made.routers("one") as one,
        greedy.streams(300) as streams,
    ):

        async def lent(stream: Router) -> str:
            try:
                return await stream.ask()
            except grpc.aio.AioRpcError as error:
                return str(error.details())

        got = await asyncio.gather(*map(lent, streams))
        assert len({one for one in got if one.endswith("/24")}) == 128  # a quarter of the pool
        (says,) = {one for one in got if not one.endswith("/24")}
        assert says.startswith("spiffe://td/greedy holds 128 IPv4 prefixes of the pool of the")
        async with one.stream() as stream:
            assert await stream.ask() == "172.16.128.0/24"


async def test_who_says_nothing_keeps_nobody_from_being_served(running: Planned) -> None:
    async with (
        running.routers("asleep") as asleep,
        running.routers("one") as one,
        asleep.streams(100) as silent,
    ):
        await asyncio.gather(*(stream.call.initial_metadata() for stream in silent))
        began = time.monotonic()
        async with one.stream() as stream:
            assert await stream.ask() == "172.16.0.0/24"
        write("a prefix beside 100 silent streams", time.monotonic() - began, 0.5)
        stopped = time.monotonic()
        assert await running.plan.stop() == 0
        write("an address plan's end with 100 silent streams", time.monotonic() - stopped, 6.0)

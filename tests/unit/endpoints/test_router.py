"""A router's decisions that need neither kernel nor mesh."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import dns.rcode
import pytest
from dns.edns import GenericOption, OptionType

from endpoints.vl3 import router as at_work
from endpoints.vl3.fellows import Fellows
from endpoints.vl3.holdings import Holdings
from endpoints.vl3.router import Router
from nsm import policy
from nsm.errors import RightsError, TakenError, UnavailableError
from nsm.identity.background import beside
from nsm.kernel.routing import Routing
from nsm.model import (
    Connection,
    Context,
    DNSConfig,
    DNSContext,
    Endpoint,
    IPContext,
    Path,
    Route,
    Segment,
)
from nsm.names.asking import question
from nsm.names.router import _MARK, RouterNames
from nsm.names.server import Sockets
from nsm.names.templates import parse_all
from nsm.rpc.holdings import MemberAddress
from tests.support.nameserver import free_port
from tests.support.wait import until


@asynccontextmanager
async def settling(monkeypatch: pytest.MonkeyPatch, *named: Any) -> AsyncIterator[Router]:
    """One whose namespace takes what it is told, and has its DNS servers' sockets here."""
    for what in ("admit", "own"):
        monkeypatch.setattr(Routing, what, lambda *_: None)
    monkeypatch.setattr(Routing, "inside", lambda _, function: function())
    monkeypatch.setattr(at_work, "DNS_PORT", free_port())
    made = Router(Fellows("r", "vL3"), Routing("/nowhere"), [4], *named)
    made.fellows = made._fellows
    async with beside(made.settle(), "settling"):
        yield made


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch):
    async with settling(monkeypatch) as made:
        yield made


@pytest.fixture
async def named(monkeypatch: pytest.MonkeyPatch):
    """One that answers for names, of members and its own."""
    names = RouterNames(parse_all(["{client}.net"]), apexes=["net"])
    async with settling(monkeypatch, names, ["r.net"]) as made:
        made.names = names
        made.fellows.see(Endpoint(name="r", services=("vL3",)), deleted=False)
        yield made


def asks(id_: str, **ip) -> Connection:
    return Connection(id_, context=Context(ip=IPContext(**ip)))


async def lent(router: Router) -> None:
    router.lend("172.16.1.0/24", ["172.16.0.0/16"])
    await until(lambda: router.ready, "the kernel to be told", record=False)


async def test_nobody_is_served_before_packets_are_passed_on(router) -> None:
    with pytest.raises(UnavailableError, match=r"^prefix pool is initializing"):
        router.assign(asks("a"))
    router.lend("172.16.1.0/24", [])
    with pytest.raises(UnavailableError, match=r"^prefix pool is initializing"):
        router.assign(asks("a"))
    await until(lambda: router.ready, "the kernel to be told", record=False)
    assert router.assign(asks("a")).src_ip_addrs == ("172.16.1.1/32",)


async def test_who_comes_before_there_is_a_prefix_is_told_that_first(named) -> None:
    """In upstream's words, also by a router that answers for names."""
    with pytest.raises(UnavailableError, match=r"^prefix pool is initializing"):
        named.assign(asks("a"))


async def test_a_kernel_that_refuses_or_is_silent_is_told_again(
    router, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [TimeoutError("timed out"), RightsError("no right")]

    def admit(*_: object) -> None:
        if silent:
            raise silent.pop()

    monkeypatch.setattr(at_work, "AGAIN", 0.01)
    monkeypatch.setattr(Routing, "admit", admit)
    await lent(router)
    assert not silent


async def test_who_is_no_router_leads_nobody_on(router) -> None:
    """Else a member could draw the packets of all others to itself."""
    await lent(router)
    with pytest.raises(UnavailableError, match="has registered no router"):
        router.assign(asks("a", dst_routes=(Route("172.16.2.0/24", "172.16.1.1"),)))
    made = router.assign(asks("a", dst_routes=(Route("172.16.2.9/32"),)))
    assert made.dst_routes == (Route("172.16.1.1/32"),)


async def test_all_are_told_of_a_new_prefix_and_of_a_lower_mtu(router) -> None:
    told = []
    router.on_change = lambda larger: told.append([one for one in (0, 1400, 1500) if larger(one)])
    await lent(router)
    assert told == [[0, 1400, 1500]]
    router.lend("172.16.1.0/24", ["172.16.0.0/16"])  # the same again
    small = Connection("a", context=Context(mtu=1400))
    assert (await router.answer(small)).context.mtu == 1400
    large = Connection("b", context=Context(mtu=9000))
    assert (await router.answer(large)).context.mtu == 1400
    assert told[1:] == [[0, 1500]]
    assert router.shape(Context(mtu=9000)).mtu == 1400


async def test_it_is_idle_when_it_has_had_no_member_for_so_long(router) -> None:
    await lent(router)
    router.assign(asks("a"))
    waiting = asyncio.create_task(router.idle(0.01))
    await asyncio.sleep(0)
    assert not waiting.done()
    router.release("a")
    await until(waiting.done, "the idle time to be over", record=False)


def member(name: str, *dns: DNSConfig) -> Connection:
    return Connection(
        f"c-{name}",
        context=Context(ip=IPContext(), dns=DNSContext(dns) if dns else None),
        path=Path((Segment(name, f"c-{name}"),)),
    )


async def served(router: Router, conn: Connection) -> DNSContext:
    """As an endpoint serves a Request: addresses, then the last word."""
    ip = router.assign(conn)
    made = await router.answer(replace(conn, context=replace(conn.context, ip=ip)))
    assert made.context.dns
    return made.context.dns


async def addresses(router: Router, name: str) -> list[str]:
    """What the router says of a name."""
    heard = await router.names.answer(question(name, "A"), "172.16.1.1")
    return [one.address for answer in heard.answer for one in answer]


async def test_a_name_is_answered_from_before_the_request_returns_until_the_close(named) -> None:
    await lent(named)
    assert await addresses(named, "r.net") == ["172.16.1.0"]
    told = await served(named, member("m1"))
    assert told.configs == (DNSConfig(("172.16.1.0",), ("net",)),)
    assert await addresses(named, "m1.net") == ["172.16.1.1"]
    assert await served(named, member("m1", *told.configs)) == told
    named.release("c-m1")
    assert await addresses(named, "m1.net") == []


async def test_before_names_are_answered_members_are_told_to_wait(named, monkeypatch) -> None:
    failing = asyncio.Event()

    def refused(*_: Any) -> None:
        failing.set()
        raise TakenError("somebody answers there")

    monkeypatch.setattr(Sockets, "make", refused)
    named.lend("172.16.1.0/24", ["172.16.0.0/16"])
    await failing.wait()
    with pytest.raises(UnavailableError, match=r"^DNS address is initializing"):
        await served(named, member("m1"))
    assert not named.ready
    assert not named.addresses.members()  # what it had before, it is still to have


async def test_servers_of_a_router_that_a_member_left_are_not_carried_on(named) -> None:
    await lent(named)
    other, own = DNSConfig(("172.16.9.0",), ("net",)), DNSConfig(("10.0.0.53",), ("corp",))
    told = await served(named, member("m1", other, own))
    assert told.configs == (own, DNSConfig(("172.16.1.0",), ("net",)))


async def test_routers_tell_each_other_whom_to_ask_and_nobody_else_does(named, monkeypatch) -> None:
    monkeypatch.setattr(policy, "origin", lambda conn: f"spiffe://d/{conn.segments[0].name}")
    heard: dict[str, list[str]] = {}
    meet = named.names.meet
    named.names.meet = lambda id_, servers: meet(id_, heard.setdefault(id_, list(servers)))
    named.fellows.see(
        Endpoint(name="r2", services=("vL3",), path_ids=("spiffe://d/r2",)), deleted=False
    )
    await lent(named)
    its = DNSConfig(("172.16.2.0", "192.0.2.53"), ())
    told = await served(named, member("r2", its))
    assert told.configs == (its, DNSConfig(("172.16.1.0",)))
    await served(named, member("m1", its))
    assert heard == {"c-r2": ["172.16.2.0"]}  # of the domain, and of a router
    shaped = named.shape(Context(dns=DNSContext((its,))))
    assert shaped.dns == DNSContext((DNSConfig(("172.16.1.0",)),))


async def test_nobody_is_said_not_to_be_there_who_may_come_back(named) -> None:
    """After a restart: who had an address and has not asked again may have any name."""
    named.reserve(["172.16.1.0", "172.16.1.7", "127.0.0.1"])
    await lent(named)
    heard = await named.names.answer(question("m1.net", "A"), "172.16.1.9")
    assert heard.rcode() == dns.rcode.SERVFAIL
    asking = asyncio.create_task(addresses(named, "m1.net"))
    await asyncio.sleep(0)
    carried = replace(member("m1"), context=Context(ip=IPContext(src_ip_addrs=("172.16.1.7/32",))))
    await served(named, carried)
    assert await asking == ["172.16.1.7"]
    heard = await named.names.answer(question("m2.net", "A"), "172.16.1.9")
    assert heard.rcode() == dns.rcode.NXDOMAIN


async def test_a_router_that_is_not_met_yet_is_waited_for(named) -> None:
    named.fellows.see(Endpoint(name="r2", services=("vL3",)), deleted=False)
    await lent(named)
    heard = await named.names.answer(question("m1.net", "A"), "172.16.1.9")
    assert heard.rcode() == dns.rcode.SERVFAIL
    marked = question("m1.net", "A", options=[GenericOption(OptionType.make(_MARK), b"")])
    heard = await named.names.answer(marked, "172.16.1.9")
    assert heard.rcode() == dns.rcode.NXDOMAIN  # of its own members, a router asks
    asking = asyncio.create_task(named.names.answer(question("m1.net", "A"), "172.16.1.9"))
    await asyncio.sleep(0)
    named.names.meet("c-r2", [])
    assert (await asking).rcode() == dns.rcode.NXDOMAIN


async def test_who_could_not_move_to_another_router_is_asked_to_ask_again(router) -> None:
    """So that the way to what it has again is made in the kernel."""
    await lent(router)
    asked: list[str] = []
    router.on_lost = asked.append
    router.addresses.assign("a-1", IPContext(), holder="spiffe://x/a a-1")
    before = router.addresses.members()
    holdings = Holdings(router, [], "")
    news = MemberAddress("172.16.1.1", "spiffe://x/a a-1")
    holdings._news(replace(news, elsewhere=True))
    assert (router.addresses.members(), asked) == ({"a-1": ()}, [])
    holdings._news(replace(news, left=True))
    assert (router.addresses.members(), asked) == (before, ["a-1"])

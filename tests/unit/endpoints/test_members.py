"""Whose address is whose: what the address plan grants, tells, keeps, and takes back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoints.ipam.holdings import MOST_UNKNOWN
from endpoints.ipam.lender import Lender
from endpoints.ipam.plan import Plan, pool
from endpoints.ipam.store import open_store
from endpoints.vl3.addresses import RouterAddresses
from nsm.errors import (
    DeniedError,
    ExhaustedError,
    InvalidError,
    UnavailableError,
)
from nsm.model import SECOND, IPContext
from nsm.rpc.holdings import MOST_UNREAD, MemberAddress

pytestmark = pytest.mark.unit
R1, R2, R3 = (f"spiffe://east.test/router/r{n}" for n in (1, 2, 3))
ANN, BOB = "spiffe://east.test/ann a-0", "spiffe://east.test/bob b-0"


class Told:
    """An address plan with streams of three routers, who are lent a prefix each."""

    def __init__(self, lender: Lender) -> None:
        self.lender = lender
        self.streams = ExitStack()
        self.heard: dict[str, list[MemberAddress]] = {R1: [], R2: [], R3: []}

    async def say(self, router: str, *said: MemberAddress) -> dict[str, list[MemberAddress]]:
        """What everybody is told once a router has said that."""
        for heard in self.heard.values():
            heard.clear()
        await self.lender.hold("", router, said)
        return {router: list(heard) for router, heard in self.heard.items() if heard}


@pytest.fixture
async def told(tmp_path: Path) -> AsyncIterator[Told]:
    async with open_store(str(tmp_path / "plan.db")) as (store, loaded):
        made = await opened(store, loaded)
        yield made


async def opened(store, loaded) -> Told:
    lender = Lender(Plan([pool("", ["172.16.0.0/16"])]), store, hold=600 * SECOND, operators=())
    await lender.restarted(loaded.leases, loaded.holdings)
    made = Told(lender)
    for n, router in enumerate((R1, R2, R3)):
        await lender.allocate("", router, n, "", (), 4)
        made.streams.enter_context(lender.listening("", router, made.heard[router].append))
    return made


def has(address: str, holder: str = ANN, number: int = 0) -> MemberAddress:
    return MemberAddress(address, holder, number)


def left(address: str, holder: str = ANN) -> MemberAddress:
    return MemberAddress(address, holder, left=True)


async def test_only_who_had_an_address_gets_it_at_another_router(told: Told) -> None:
    assert await told.say(R1, has("172.16.0.1")) == {}
    stranger = has("172.16.0.1", BOB, 7)
    assert await told.say(R2, stranger) == {R2: [MemberAddress("172.16.0.1", BOB, 7, refused=True)]}
    nobodys = has("172.16.0.9", ANN, 8)  # nobody can say whose it was
    assert (await told.say(R2, nobodys))[R2][0].refused
    assert await told.say(R2, has("172.16.0.1", ANN, 9)) == {
        R2: [has("172.16.0.1", ANN, 9)],
        R1: [MemberAddress("172.16.0.1", ANN, elsewhere=True)],
    }
    # and on to a third, which the second and the owner of the prefix are told
    news = MemberAddress("172.16.0.1", ANN, elsewhere=True)
    assert await told.say(R3, has("172.16.0.1", ANN, 1)) == {
        R3: [has("172.16.0.1", ANN, 1)], R1: [news], R2: [news],
    }  # fmt: skip


async def test_a_router_that_is_back_is_told_what_is_elsewhere_and_cannot_take_it(
    told: Told,
) -> None:
    await told.say(R1, has("172.16.0.1"), has("172.16.0.2", BOB))
    await told.say(R2, has("172.16.0.1", ANN, 1))
    elsewhere = MemberAddress("172.16.0.1", ANN, elsewhere=True)
    asked = MemberAddress("172.16.0.0/24", number=5)
    assert await told.say(R1, asked) == {R1: [elsewhere, has("172.16.0.2", BOB), asked]}
    # an old life of it that did not hear, or gave it away meanwhile
    assert await told.say(R1, has("172.16.0.1")) == {R1: [elsewhere]}
    assert (await told.say(R1, has("172.16.0.1", BOB)))[R1][0].elsewhere
    assert await told.say(R1, left("172.16.0.1")) == {}
    # its member closes: it may give it again
    assert await told.say(R2, left("172.16.0.1")) == {R1: [left("172.16.0.1")]}
    assert await told.say(R1, has("172.16.0.1", BOB)) == {}
    assert (await told.say(R2, has("172.16.0.1", ANN, 2)))[R2][0].refused


async def test_who_moves_leaves_before_it_comes(told: Told) -> None:
    """Upstream's clients close a wire before they ask for another endpoint."""
    await told.say(R1, has("172.16.0.1"))
    await told.say(R1, left("172.16.0.1"))
    assert not (await told.say(R2, has("172.16.0.1", ANN, 1)))[R2][0].refused


async def test_a_router_of_the_same_identity_takes_nothing_from_its_twins_members(
    told: Told,
) -> None:
    await told.say(R1, has("172.16.0.1"))
    assert (await told.say(R1, has("172.16.0.1", BOB, 3)))[R1][0].refused


async def test_a_move_that_fails_gives_the_address_back_to_where_it_came_from(told: Told) -> None:
    """Also to a router whose prefix it is not of, and which the plan tells of nothing else."""
    await told.say(R1, has("172.16.0.1"))
    await told.say(R2, has("172.16.0.1", ANN, 1))
    await told.say(R3, has("172.16.0.1", ANN, 2))
    assert await told.say(R3, left("172.16.0.1")) == {
        R1: [left("172.16.0.1")], R2: [left("172.16.0.1")],
    }  # fmt: skip
    assert await told.say(R2, has("172.16.0.1", ANN, 3)) == {
        R2: [has("172.16.0.1", ANN, 3)],
        R1: [MemberAddress("172.16.0.1", ANN, elsewhere=True)],
    }


def test_who_could_not_move_has_its_address_again_at_once() -> None:
    router = RouterAddresses([4])
    router.lend("172.16.0.0/24", ["172.16.0.0/16"])
    carried = router.assign("a-1", IPContext(), holder=ANN)
    assert router.leave_out("172.16.0.1") == ["a-1"]
    assert router.return_("172.16.0.1", ANN) == ["a-1"]
    thief = router.assign("b-1", carried, holder=BOB)
    assert router.members() == {"a-1": ("172.16.0.1",), "b-1": ("172.16.0.2",)}, thief
    router.release("a-1")
    assert not router.members().get("a-1")
    assert [one.left for one in router.drain() if one.address == "172.16.0.1"] == [
        False, False, True,
    ]  # fmt: skip


async def test_routers_of_one_identity_are_told_apart_by_their_names(told: Told) -> None:
    """As replicas of a Deployment are, where the issuer knows them by their user."""
    lent = {"a": "172.16.0.0/24", "b": await told.lender.allocate("", R1, 7, "", (), 4)}
    heard: dict[str, list[MemberAddress]] = {"a": [], "b": []}

    async def says(who: str, *said: MemberAddress) -> dict[str, list[MemberAddress]]:
        for one in heard.values():
            one.clear()
        await told.lender.hold("", R1, said, name=who)
        return {name: list(one) for name, one in heard.items() if one}

    with ExitStack() as a, ExitStack() as b:
        a.enter_context(told.lender.listening("", R1, heard["a"].append, "a"))
        b.enter_context(told.lender.listening("", R1, heard["b"].append, "b"))
        for name, prefix in lent.items():
            await says(name, MemberAddress(prefix, number=1))
        await says("a", has("172.16.0.1"), has("172.16.0.2", BOB))
        # who moves from one to the other is elsewhere, and its end there is no end here
        elsewhere = MemberAddress("172.16.0.1", ANN, elsewhere=True)
        assert await says("b", has("172.16.0.1", ANN, 2)) == {
            "b": [has("172.16.0.1", ANN, 2)], "a": [elsewhere],
        }  # fmt: skip
        assert await says("a", left("172.16.0.1")) == {}
        assert (await says("a", has("172.16.0.1", BOB)))["a"][0].elsewhere
        # one has another name in its next life, and its prefix: what it had it may come back to
        a.close()
        heard["c"] = []
        a.enter_context(told.lender.listening("", R1, heard["c"].append, "c"))
        asked = MemberAddress(lent["a"], number=3)
        assert await says("c", asked) == {"c": [elsewhere, has("172.16.0.2", BOB), asked]}
        await says("c", left("172.16.0.2", BOB))
        assert await says("b", left("172.16.0.1")) == {"c": [left("172.16.0.1")]}
        # of one that is there it comes to nothing
        await says("c", has("172.16.0.5", BOB))
        asked = MemberAddress(lent["b"], number=4)
        assert await says("b", asked) == {"b": [asked]}
        assert (await says("b", has("172.16.0.5")))["b"][0].elsewhere
    now = told.lender._clock()
    for name, prefix in lent.items():
        await told.lender.leave("", R1, 1 if name == "a" else 7, [prefix])
    await told.lender.leave("", R1, 0, list(lent.values()))
    told.lender._clock = lambda: now + 601 * SECOND
    assert told.lender.lent_to("", ip_address("172.16.0.5")) == f"{R1} c"
    await told.lender.allocate("", R3, 2, "172.16.2.0/24", (), 4)
    assert told.lender.lent_to("", ip_address("172.16.0.5")) == ""
    found = told.lender.holdings.get("", ip_address("172.16.0.5"))
    assert found
    assert found.left


async def test_it_outlives_the_address_plan_and_what_cannot_be_kept_is_not_so(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "plan.db")
    async with open_store(path) as (store, loaded):
        told = await opened(store, loaded)
        await told.say(R1, has("172.16.0.1"))
        await told.say(R2, has("172.16.0.1", ANN, 1))
        store._connection.execute("PRAGMA query_only = ON")
        with pytest.raises(UnavailableError):
            await told.say(R3, has("172.16.0.1", ANN, 1))
    async with open_store(path) as (store, loaded):
        told = await opened(store, loaded)
        asked = MemberAddress("172.16.0.0/24", number=5)
        news = MemberAddress("172.16.0.1", ANN, elsewhere=True)
        assert await told.say(R1, asked) == {R1: [news, asked]}
        assert await told.say(R2, MemberAddress("172.16.1.0/24", number=5)) == {
            R2: [has("172.16.0.1"), MemberAddress("172.16.1.0/24", number=5)]
        }


async def test_members_of_a_router_that_nobody_saw_for_so_long_are_nobodys(told: Told) -> None:
    await told.say(R1, has("172.16.0.1"))
    await told.say(R2, has("172.16.0.1", ANN, 1))
    now = told.lender._clock()
    await told.lender.leave("", R2, 1, ["172.16.1.0/24"])
    told.lender._clock = lambda: now + 601 * SECOND
    for heard in told.heard.values():
        heard.clear()
    await told.lender.allocate("", R3, 2, "172.16.2.0/24", (), 4)
    assert told.heard[R1] == [left("172.16.0.1")]


async def test_who_is_lent_nothing_says_nothing(told: Told) -> None:
    with pytest.raises(DeniedError, match="is lent nothing of it"):
        await told.say("spiffe://east.test/stranger", has("172.16.0.1"))
    with pytest.raises(InvalidError, match="names a member's address 'x'"):
        await told.say(R1, has("x"))
    assert (await told.say(R1, has("10.0.0.1", ANN, 4)))[R1][0].refused


async def test_a_router_is_told_of_what_is_lent_to_it_and_of_no_more(told: Told) -> None:
    """Who knows whose an address is could have it."""
    await told.say(R2, has("172.16.1.1"))
    asked = MemberAddress("172.16.0.0/16", number=5)  # begins as what R1 is lent does
    assert await told.say(R1, asked) == {R1: [replace(asked, refused=True)]}


async def test_a_router_cannot_take_all_that_others_have_free(told: Told) -> None:
    before = [has(f"172.16.{n // 254 + 1}.{n % 254 + 1}", BOB) for n in range(MOST_UNKNOWN)]
    heard = await told.say(R1, *before)
    assert R1 not in heard, heard[R1][:3]
    assert (await told.say(R1, has("172.16.9.9", BOB)))[R1][0].elsewhere
    assert not await told.say(R2, has("172.16.9.9"))  # which is nobody's still
    assert await told.say(R1, has("172.16.0.9", BOB)) == {}  # its own it may have
    await told.say(R1, left(before[0].address, BOB))
    assert R1 not in await told.say(R1, has("172.16.9.10", BOB))


async def test_a_stream_is_ended_that_asks_for_more_than_anybody_reads(told: Told) -> None:
    asked = MemberAddress("172.16.0.0/24", number=5)
    with pytest.raises(ExhaustedError, match="asks for more at once"):
        await told.say(R1, *[asked] * (MOST_UNREAD + 2))


async def test_what_one_stream_asked_another_of_the_same_router_is_not_told(told: Told) -> None:
    """Its numbers mean something else there: an earlier life's, or a twin's."""
    answers: list[MemberAddress] = []
    await told.say(R1, has("172.16.0.1"))
    await told.lender.hold("", R2, [has("172.16.0.1", ANN, 4)], answers.append)
    assert answers == [has("172.16.0.1", ANN, 4)]
    assert told.heard[R2] == []


def test_what_is_kept_for_a_member_is_given_to_it_alone_and_also_where_it_carries_nothing() -> None:
    """As after its node and its router's died, and both are back."""
    router = RouterAddresses([4])
    router.keep("172.16.0.2", ANN)
    router.lend("172.16.0.0/24", ["172.16.0.0/16"])
    carried = IPContext(src_ip_addrs=("172.16.0.2/32",))
    assert router.assign("b-1", carried, holder=BOB).src_ip_addrs == ("172.16.0.1/32",)
    assert router.assign("a-1", IPContext(), holder=ANN).src_ip_addrs == ("172.16.0.2/32",)
    assert router.assign("c-1", IPContext(), holder="c").src_ip_addrs == ("172.16.0.3/32",)


class Network:
    """Three routers, members that go from one to another, and what each carries along."""

    def __init__(self) -> None:
        plan = Plan([pool("", ["10.0.0.0/26"], ipv4=28)])
        self.lender = Lender(plan, None, hold=1, operators=(), clock=lambda: 0)
        self.streams = ExitStack()
        self.routers: dict[str, RouterAddresses] = {}
        self.prefixes: dict[str, str] = {}
        self.news: dict[str, list[MemberAddress]] = {}
        self.at: dict[str, str] = {}
        self.context: dict[str, IPContext] = {}
        self.asked_again: list[tuple[str, str]] = []

    async def begin(self, name: str) -> None:
        """A router's life, without memory of the one before."""
        if name not in self.news:
            self.news[name] = []
            stream = self.lender.listening("", name, self.news[name].append)
            self.streams.enter_context(stream)
        wanted = self.prefixes.get(name, "")
        lent = self.prefixes[name] = await self.lender.allocate("", name, 0, wanted, (), 4)
        router = self.routers[name] = RouterAddresses([4])
        await self.lender.hold("", name, [MemberAddress(lent, number=1)])
        for one in self.news[name]:
            if not one.number and not one.left and not one.elsewhere:
                router.keep(one.address, one.holder)
        self.hear(name)
        router.lend(lent, ["10.0.0.0/26"])
        self.at = {one: where for one, where in self.at.items() if where != name}

    def hear(self, name: str) -> None:
        """What it was told."""
        for one in self.news[name]:
            if one.elsewhere:
                self.routers[name].leave_out(one.address)
            elif one.left:
                for id_ in self.routers[name].return_(one.address, one.holder):
                    self.asked_again.append((id_, name))
        self.news[name].clear()

    async def come(self, who: str, name: str, asked: IPContext, *, stays: bool = False) -> None:
        """A member asks a router, with what it carries."""
        router = self.routers[name]
        for address in router.claimable(who, asked, who):
            await self.lender.hold("", name, [MemberAddress(address, who, 9)])
            (answer,) = (one for one in self.news[name] if one.number == 9)
            self.news[name].remove(answer)
            if not answer.refused:
                router.grant(who, address)
        self.context[who] = router.assign(who, asked, holder=who)
        await self.said(name)
        before, self.at[who] = self.at.get(who), name
        if before not in (None, name) and not stays:
            await self.leave(who, before)

    async def fail(self, who: str, name: str) -> None:
        """A member asks a router for a wire that cannot be made, and stays where it is."""
        where, context = self.at[who], self.context[who]
        await self.come(who, name, context, stays=True)
        self.asked_again.clear()
        await self.leave(who, name)
        self.at[who], self.context[who] = where, context
        await self.said(where)
        assert set(self.asked_again) <= {(who, where)}
        if self.asked_again:
            await self.come(who, where, context)

    async def leave(self, who: str, name: str) -> None:
        self.routers[name].release(who)
        await self.said(name)

    async def said(self, name: str) -> None:
        """What it says to the address plan, and what all are told."""
        drained = self.routers[name].drain()
        said = [MemberAddress(one.address, one.holder, left=one.left) for one in drained]
        await self.lender.hold("", name, said)
        for each in self.routers:
            self.hear(each)

    def held(self, one: str = "") -> list[str]:
        """The addresses of all members, or one, where they are."""
        return [
            address
            for who, name in self.at.items()
            if one in ("", who)
            for address in self.routers[name].members().get(who, ())
        ]


@settings(max_examples=100)
@given(st.data())
def test_no_two_members_have_one_address_wherever_they_go(data: st.DataObject) -> None:
    """Routers die and return, members move, and some say that they had others' addresses."""
    asyncio.run(wander(Network(), data))


async def wander(network: Network, data: st.DataObject) -> None:
    for name in (R1, R2, R3):
        await network.begin(name)
    for _ in range(data.draw(st.integers(1, 30))):
        name = data.draw(st.sampled_from((R1, R2, R3)))
        who = data.draw(st.sampled_from([f"m{n}" for n in range(6)]))
        asked = network.context.get(who, IPContext())
        kind = data.draw(st.sampled_from(["come", "move", "leave", "die", "steal", "fail"]))
        before = {one: network.held(one) for one in network.at if one != who}
        match kind:
            case "die":
                await network.begin(name)
                before = {}
            case "leave":
                if where := network.at.pop(who, None):
                    await network.leave(who, where)
            case "fail" if network.at.get(who) not in (None, name):
                had = network.held(who)
                await network.fail(who, name)
                assert network.held(who) == had, "who cannot move keeps what it has"
            case "steal" if network.context:
                whose = data.draw(st.sampled_from(sorted(network.context)))
                await network.come(who, name, network.context[whose])
            case _:
                had = network.held(who)
                await network.come(who, name, asked)
                assert set(had) <= set(network.held(who)), "who moves keeps what it has"
        held = network.held()
        assert len(held) == len(set(held)), held
        assert before == {one: network.held(one) for one in before}, "others keep what they have"

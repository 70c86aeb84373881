"""Routers and address plans that come, go and come back while members talk."""

import signal
from pathlib import Path

import pytest

from nsm.kernel import owner
from tests.e2e.vl3.domain import Domain, Member, Pinging, joined, lost_of, routes, unreachable
from tests.e2e.wires.nodes import Program, link
from tests.e2e.wires.sealed import SOCKETS
from tests.support.spaces import Space
from tests.support.wait import until


def granted(program: Program) -> int:
    """How many Requests it granted."""
    words = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return sum(all(word in line for word in words) for line in program.log)


async def test_a_third_router_is_joined_and_its_members_reached(domain: Domain) -> None:
    domain.lend()
    for name in ("r1", "r2"):
        domain.route(name)
    members = [domain.member("m1", at="r1"), domain.member("m3", at="r2")]
    domain.route("r3")
    await joined(domain, "r1", "r2", "r3")
    members.append(domain.member("m4", at="r3"))
    assert members[-1].router == "r3"
    assert await unreachable(members) == []
    # each pair has one wire
    for name in ("r1", "r2", "r3"):
        ways = [one["dst"] for one in domain.space(name).ip("route") if "/" in one["dst"]]
        assert len(ways) == len(set(ways)) == 2


async def test_a_router_that_leaves_takes_its_routes_along_and_its_members_find_another(
    domain: Domain,
) -> None:
    domain.lend()
    leaving = domain.route("r2")
    moving = domain.member("m3")  # at whichever there is
    assert moving.router == "r2"
    domain.route("r1")
    staying = [domain.member("m1", at="r1"), domain.member("m2", at="r1")]
    await joined(domain, "r1", "r2")
    mine, its = ({one for one in routes(domain.space(name)) if "/" in one} for name in ("r2", "r1"))
    assert not mine & its
    before = moving.addresses
    pinging = [Pinging(staying[0], staying[1].addresses[0])]
    assert leaving.end() == 0
    await until(
        lambda: not its & routes(domain.space("r1")),
        "the routes of a router that left to go",
        bar=0.6,
    )
    await until(lambda: moving.router == "r1", "its member to find another router", bar=4)
    members = [*staying, moving]

    async def settled() -> bool:
        return await unreachable(members) == []

    await until(settled, "all members to be one network again", bar=3)
    assert len(before) == 2
    assert moving.addresses == before
    sent, gone = lost_of(pinging)
    assert (sent > 10, gone) == (True, 0)


async def test_members_notice_nothing_of_an_address_plan_that_is_away(domain: Domain) -> None:
    plan = domain.lend()
    routers = [domain.route("r1"), domain.route("r2")]
    members = [domain.member("m1", at="r1"), domain.member("m3", at="r2")]
    await joined(domain, "r1", "r2")
    before = [one.addresses for one in members]
    pinging = [Pinging(members[0], members[1].addresses[0])]
    assert plan.end() == 0
    members.append(domain.member("m2", at="r1"))  # of what the router has already
    lent = [sum("prefix lent" in line for line in one.log) for one in routers]
    domain.lend()
    await until(
        lambda: all(
            sum("prefix lent" in line for line in one.log) == before + 2
            for one, before in zip(routers, lent, strict=True)
        ),
        "the routers to have their prefixes again",
        bar=2,
    )
    assert await unreachable(members) == []
    assert [one.addresses for one in members[:2]] == before
    sent, gone = lost_of(pinging)
    assert (sent > 10, gone) == (True, 0)


async def test_a_router_that_is_killed_and_started_again_is_missed_by_nobody(
    domain: Domain,
) -> None:
    """Once the one that others asked for wires, once the one that asked."""
    domain.lend()
    routers = {name: domain.route(name) for name in ("r1", "r2")}
    members = [domain.member(f"m{n}", at=at) for n, at in ((1, "r1"), (2, "r1"), (3, "r2"))]
    await joined(domain, "r1", "r2")
    before = [one.addresses for one in members]
    one, two, three = members
    for name, wires in (("r1", 3), ("r2", 1)):
        pinging = [
            Pinging(one, two.addresses[0]),
            Pinging(one, three.addresses[0]),
            Pinging(three, two.addresses[1]),
        ]
        known = {each: routes(domain.space(each)) for each in ("r1", "r2")}
        routers[name].end(signal.SIGKILL)
        again = routers[name] = domain.route(name)
        await until(lambda: granted(again) >= wires, "its wires to be asked for again", bar=3)  # noqa: B023
        await until(lambda: taken_over(again) or name == "r1", "its own to be found", bar=3)  # noqa: B023
        sent, gone = lost_of(pinging)
        assert (sent > 10, gone) == (True, 0), name
        assert [each.addresses for each in members] == before
        assert {each: routes(domain.space(each)) for each in ("r1", "r2")} == known
    new = domain.member("m4", at="r1")
    assert not set(new.addresses) & {one for each in before for one in each}
    assert await unreachable([*members, new]) == []


async def test_a_router_that_others_asked_for_wires_may_be_dead_for_longer(domain: Domain) -> None:
    """Its manager looks again and again, and leaves it registered for the wires that stand."""
    domain.lend()
    killed = domain.route("r1")
    domain.route("r2")
    one, two = domain.member("m1", at="r1"), domain.member("m3", at="r2")
    await joined(domain, "r1", "r2")
    known = {each: routes(domain.space(each)) for each in ("r1", "r2")}
    pinging = [Pinging(one, two.addresses[0]), Pinging(two, one.addresses[1])]
    killed.end(signal.SIGKILL)
    await until(
        lambda: any("its wires stand" in line for line in domain.now["one/nsmgr"].log),
        "its manager to miss it",
        bar=5,
    )
    again = domain.route("r1")
    await until(lambda: granted(again) >= 2, "its wires to be asked for again", bar=3)
    sent, gone = lost_of(pinging)
    assert (sent > 10, gone) == (True, 0)
    assert {each: routes(domain.space(each)) for each in ("r1", "r2")} == known


async def test_a_router_that_does_not_return_is_forgotten_and_has_its_own_again_if_it_does(
    domain: Domain,
) -> None:
    """One that had asked another for a wire: that ends with the lease, as nobody closes it."""
    plan = domain.lend()
    domain.route("r1")
    lost = domain.route("r2", NSM_MAX_TOKEN_LIFETIME="5s", NSM_DIAL_TIMEOUT="1s")
    members = [domain.member(f"m{n}", at=at) for n, at in ((1, "r1"), (2, "r1"), (3, "r2"))]
    await joined(domain, "r1", "r2")
    before = [one.addresses for one in members]
    known = {name: routes(domain.space(name)) for name in ("r1", "r2")}
    pinging = [Pinging(members[0], members[1].addresses[0])]
    lost.end(signal.SIGKILL)
    await until(
        lambda: not any("/" in one for one in routes(domain.space("r1"))),
        "the routes of a router that is no more to go",
        bar=1,
    )
    assert plan.end() == 0  # and nothing of it is in anybody's memory
    domain.lend()
    domain.route("r2")
    await joined(domain, "r1", "r2")

    async def reached() -> bool:
        return await unreachable(members) == []

    await until(reached, "all members to reach one another", bar=2)
    assert [one.addresses for one in members] == before
    assert {name: routes(domain.space(name)) for name in ("r1", "r2")} == known
    sent, gone = lost_of(pinging)
    assert (sent > 10, gone) == (True, 0)


async def test_a_router_whose_node_died_is_reached_as_soon_as_it_is_back(domain: Domain) -> None:
    """What it had asked the others for stands there for minutes still."""
    domain.lend()
    domain.route("r1")
    lost = domain.route("r2")
    staying = domain.member("m1", at="r1")
    await joined(domain, "r1", "r2")
    known = routes(domain.space("r1"))
    (way,) = domain.space("r1").ip("route", "get", "172.16.1.0")
    lost.end(signal.SIGKILL)
    for name in ("two/nsmgr", "two/forwarder"):
        domain.now[name].end(signal.SIGKILL)
    for device in domain.space("r2").links():
        wipe(domain.space("r2"), device)
    for name in ("two/nsmgr", "two/forwarder"):
        domain.start(name).ready()
    domain.route("r2")
    members = [staying, domain.member("m3", at="r2")]

    async def reached() -> bool:
        return await unreachable(members) == []

    await until(reached, "all members to reach one another", bar=2)
    assert {one for one in routes(domain.space("r1")) if "/" in one} == {
        one for one in known if "/" in one
    }
    if way["dev"] in domain.space("r1").links():  # it may stand, and nothing goes there
        wipe(domain.space("r1"), way["dev"])


def wipe(space: Space, device: str) -> None:
    """Take a device away, and what a process of wireguard-go behind it had in /run."""
    mark = owner.Mark.parse(link(space, device).get("ifalias", ""))
    space.do("link", "del", device)
    if mark:
        socket = f"{SOCKETS}/{owner.tunnel_name(mark.connection, mark.side)}.sock"
        Path(socket).unlink(missing_ok=True)


async def test_a_router_that_starts_while_the_address_plan_is_away_lets_be_what_stands(
    domain: Domain,
) -> None:
    plan = domain.lend()
    domain.route("r1")
    killed = domain.route("r2")
    members = [domain.member(f"m{n}", at=at) for n, at in ((1, "r1"), (3, "r2"))]
    await joined(domain, "r1", "r2")
    before = [one.addresses for one in members]
    pinging = [Pinging(members[0], members[1].addresses[n]) for n in (0, 1)]
    assert plan.end() == 0
    killed.end(signal.SIGKILL)
    again = domain.route("r2")
    await until(
        lambda: any("prefix pool is initializing" in line for line in again.log),
        "its member to be told to wait",
        bar=1,
    )
    domain.lend()
    await until(lambda: granted(again), "its member to be served", bar=1)
    assert await unreachable(members) == []
    assert [one.addresses for one in members] == before
    sent, gone = lost_of(pinging)
    assert (sent > 10, gone) == (True, 0)


async def test_what_a_member_has_is_kept_for_it_while_its_router_is_away(domain: Domain) -> None:
    """However late it asks again: the kernel knows what it has."""
    domain.lend()
    router = domain.route("r1")
    silent = domain.member("m1", at="r1")
    before = silent.addresses
    silent.program.send(signal.SIGSTOP)
    try:
        router.end(signal.SIGKILL)
        domain.route("r1")
        new = domain.member("m2", at="r1")
        assert not set(new.addresses) & set(before)
        assert await unreachable([silent, new]) == []
    finally:
        silent.program.send(signal.SIGCONT)
    assert silent.addresses == before


def taken_over(program: Program) -> bool:
    return any("wire of an earlier life is taken over" in line for line in program.log)


@pytest.mark.long
async def test_a_router_may_be_told_to_leave_its_wires_for_its_next_life(domain: Domain) -> None:
    domain.lend()
    domain.route("r1")
    asking = domain.route("r2", NSM_UNREGISTER_ITSELF="false")
    members = [domain.member("m1", at="r1"), domain.member("m3", at="r2")]
    await joined(domain, "r1", "r2")
    pinging = [Pinging(members[0], members[1].addresses[0])]
    assert asking.end() == 0
    again = domain.route("r2")
    await until(lambda: taken_over(again), "its wire to be found", bar=3)
    sent, gone = lost_of(pinging)
    assert (sent > 3, gone) == (True, 0)


async def test_the_smallest_mtu_is_everybodys(domain: Domain) -> None:
    domain.lend()
    domain.route("r1")
    near = domain.member("m1", at="r1")
    assert near.mtu == 9000
    domain.route("r2")
    far = domain.member("m3", at="r2")
    members: list[Member] = [near, far]
    await until(lambda: [one.mtu for one in members] == [1440, 1440], "a lower MTU", bar=2)
    node = domain.space("two")
    node.do("link", "set", "eth0", "mtu", "1400")
    try:
        members.append(domain.member("m4", at="r1"))  # over a tunnel with less room
        assert members[-1].mtu == 1340
        await until(
            lambda: [one.mtu for one in members] == [1340] * 3, "the lowest MTU for all", bar=2
        )
        assert await unreachable(members) == []
    finally:
        node.do("link", "set", "eth0", "mtu", "1500")


async def test_a_domain_that_gets_other_addresses_moves_as_a_whole(domain: Domain) -> None:
    """As when an address plan has lost its store: routers and members are told, and follow."""
    plan = domain.lend()
    for name in ("r1", "r2"):
        domain.route(name)
    members = [domain.member("m1", at="r1"), domain.member("m3", at="r2")]
    await joined(domain, "r1", "r2")
    assert plan.end() == 0
    domain.lend(NSM_PREFIX="10.77.0.0/16,2001:db8:77::/64", NSM_STORE="")

    def moved() -> bool:
        return all(
            [one[:9] for one in member.addresses]
            in (["10.77.0.1", "2001:db8:"], ["10.77.1.1", "2001:db8:"])
            and ":77:" in member.addresses[1]
            for member in members
        )

    await until(moved, "all members to have other addresses", bar=3)

    async def reached() -> bool:
        return await unreachable(members) == []

    await until(reached, "all members to reach one another", bar=3)
    places = [domain.space(name) for name in ("r1", "r2")]
    await until(
        lambda: not any(map(routes, places)), "nothing of the old addresses at routers", bar=2
    )
    for name in ("r1", "r2"):
        (lo,) = domain.space(name).ip("addr", "show", "lo")
        assert sum(one["scope"] == "global" for one in lo["addr_info"]) == 2

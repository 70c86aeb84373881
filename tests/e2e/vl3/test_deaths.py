"""Routers that die with all they had: members keep what they have, and everybody reaches them."""

import signal

from tests.e2e.vl3.domain import Domain, Member, joined, routes, unreachable
from tests.e2e.wires.nodes import Program
from tests.support.spaces import Space, ip
from tests.support.wait import until


def die(router: Program, space: Space) -> None:
    """A router with its namespace, and all wires that end there; the place is empty then."""
    router.end(signal.SIGKILL)
    ip("netns", "del", space.name)
    ip("netns", "add", space.name)


async def reached(members: list[Member]) -> None:
    """Wait until all reach one another by every address."""

    async def all_do() -> bool:
        return await unreachable(members, "-W1") == []

    await until(all_do, "all members to reach one another", bar=2)


def wide(space: Space) -> set[str]:
    return {one for one in routes(space) if "/" in one}


async def test_members_of_a_router_that_dies_keep_their_addresses_at_another(
    domain: Domain,
) -> None:
    domain.lend()
    dying = domain.route("r1")
    for name in ("r2", "r3"):
        domain.route(name)
    await joined(domain, "r1", "r2", "r3")
    moving = [domain.member(name, near="r1") for name in ("m1", "m3")]
    staying = [domain.member("m4", at="r2"), domain.member("m5", at="r3")]
    members = [*moving, *staying]
    assert [one.router for one in members] == ["r1", "r1", "r2", "r3"]
    await reached(members)
    before = [one.addresses for one in members]
    die(dying, domain.space("r1"))
    await until(
        lambda: all(one.router in ("r2", "r3") for one in moving),
        "members to be at another router",
        bar=2,
    )
    await reached(members)
    assert [one.addresses for one in members] == before
    # the router is back: what is elsewhere stays there, and is given to nobody else
    domain.route("r1")
    await joined(domain, "r1", "r2", "r3")
    members.append(domain.member("m2", at="r1"))
    await reached(members)
    assert [one.addresses for one in members[:4]] == before
    assert not set(members[-1].addresses) & {one for each in before for one in each}
    assert all(one.router in ("r2", "r3") for one in moving)
    # until it closes
    moving[0].program.end()
    await until(
        lambda: not set(before[0]) & routes(domain.space("r1")),
        "the way to who left to go",
        bar=1,
    )

"""One flat network of members at two routers: what it carries, and what it does not."""

from tests.e2e.vl3.domain import Domain, Member, full, routes, unreachable
from tests.support.wait import until


async def start(domain: Domain, *at: str) -> dict[str, Member]:
    """An address plan, two routers, and a member at each of those."""
    domain.lend()
    for name in ("r1", "r2"):
        domain.route(name)
    members = {
        f"m{place}": domain.member(f"m{place}", at=router) for place, router in enumerate(at, 1)
    }
    await joined(domain, "r1", "r2")
    return members


async def joined(domain: Domain, *names: str) -> None:
    """Wait until each of those routers has a route to each other's prefix."""

    def all_known() -> bool:
        found = [routes(domain.space(name)) for name in names]
        wide = [{one for one in each if "/" in one} for each in found]
        return all(len(each) >= 2 * (len(names) - 1) for each in wide)

    await until(all_known, f"{len(names)} routers to be joined", bar=3)


async def test_all_members_reach_one_another_with_full_packets_in_both_families(
    domain: Domain,
) -> None:
    members = await start(domain, "r1", "r1", "r2")
    listed = list(members.values())
    assert [one.router for one in listed] == ["r1", "r1", "r2"]
    assert all(len(one.addresses) == 2 for one in listed)
    assert await unreachable(listed) == []
    for one in listed:
        for other in listed:
            if one is other:
                continue
            for address in other.addresses:
                assert await one.space.pings(address, *full(one, address)), address

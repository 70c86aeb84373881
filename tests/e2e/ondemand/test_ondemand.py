"""Routers that nobody started before somebody asked, and that end when nobody does any more."""

import os
import re
import signal
import time

from tests.e2e.ondemand.place import Place, size
from tests.e2e.vl3.domain import Member, joined, routes, unreachable
from tests.e2e.wires.nodes import addresses, flow
from tests.support.wait import until, write

PATIENT = {"NSM_REQUEST_TIMEOUT": "40s"}  # for a start that should take 4: ten times the bar


def asks(place: Place, name: str) -> Member:
    """A member that gets its wire by one Request, as its manager saw it."""
    manager = place.now["two/nsmgr" if name == "m3" else "one/nsmgr"]
    since = size(manager)
    member = place.member(name, **PATIENT)
    first, *_ = place.requests(manager, name, since)  # what follows refreshes it: a lower MTU
    assert first["code"] == "OK", first
    return member


async def test_the_first_who_asks_has_a_router_started_on_its_node_and_is_served_by_it(
    place: Place,
) -> None:
    place.supply("one", idle="2s")
    place.supply("two", idle="2s")
    assert (place.pid("r1"), place.pid("r2")) == (0, 0)

    manager, since = place.now["one/nsmgr"], size(place.now["one/nsmgr"])
    first = asks(place, "m1")
    asked, *_ = place.requests(manager, "m1", since)
    write("the first member of a network on demand is served", asked["ms"] / 1000, 4)
    one = place.pid("r1")
    assert one
    assert not place.pid("r2")
    second = asks(place, "m2")
    third = asks(place, "m3")
    assert [each.router for each in (first, second, third)] == ["r1", "r1", "r2"]
    assert place.pid("r1") == one
    await joined(place, "r1", "r2")
    await until(lambda: _all_reach([first, second, third]), "all members to be one network", bar=3)
    own = set(addresses(place.space("r1"), "lo")) - {"127.0.0.1", "::1"}
    assert len(own) == 2

    for member in (first, second):
        member.program.end()
    await until(lambda: not place.pid("r1"), "an idle router to be gone", bar=3)
    assert place.says("r1", "no member for the idle time") == 1
    links = [link["ifname"] for link in place.space("r1").ip("link")]
    assert links == ["lo"], links
    assert routes(place.space("r1")) <= own
    shown = place.shown()
    assert shown["state"] == "1 router, on demand"
    assert [each["name"] for each in shown["routers"]] == ["r2"]
    assert [each["node"] for each in shown["suppliers"]] == ["one", "two"]
    ends = [each["ends"] for each in shown["leases"] if each["identity"].endswith("/r1")]
    assert len(ends) == 2
    assert all(ends), "its prefixes are kept for a while, and no longer held"

    again = asks(place, "m1")
    assert again.router == "r1"
    await joined(place, "r1", "r2")
    await until(lambda: _all_reach([again, third]), "both members to be one network", bar=3)
    assert own <= set(addresses(place.space("r1"), "lo")), "it has what it had"


async def _all_reach(members: list[Member]) -> bool:
    return await unreachable(members) == []


async def test_who_come_at_once_have_one_router(place: Place) -> None:
    place.supply("one")
    programs = [
        place.asks(name, "kernel://net/nsm-1", name=name, **PATIENT) for name in ("m1", "m2")
    ]
    members = [Member(one.ready(), place.space(one.name.partition("#")[0])) for one in programs]
    assert [one.router for one in members] == ["r1", "r1"]
    assert place.says("r1", "vl3 r1 ready") == 1


async def test_who_meets_a_router_that_is_ending_gets_the_next(place: Place) -> None:
    place.supply("one", idle="1s")
    member = asks(place, "m1")
    for life in (1, 2):
        pid = place.pid("r1")
        member.program.end()
        await until(
            lambda: place.says("r1", "no member for the idle time") == life,  # noqa: B023
            "a router to begin to end",
            bar=2,
        )
        member = asks(place, "m1")
        assert place.pid("r1") not in (0, pid)


async def test_a_supplier_that_is_killed_leaves_its_router_and_takes_it_over(place: Place) -> None:
    supplier = place.supply("one")
    members = [asks(place, "m1")]
    pid = place.pid("r1")
    with flow(members[0].space, "172.16.0.0") as pings:
        supplier.end(signal.SIGKILL)
        again = place.supply("one")
        assert any("router of an earlier life is taken over" in line for line in again.log)
        members.append(asks(place, "m2"))
        assert place.pid("r1") == pid
        assert {one.router for one in members} == {"r1"}
        assert await unreachable(members) == []

        before = [one.addresses for one in members]
        os.kill(pid, signal.SIGKILL)  # it has members: nobody need ask
        await until(
            lambda: place.says("r1", "vl3 r1 ready") == 2, "one that died to be back", bar=4
        )
        assert place.pid("r1") not in (0, pid)
        assert [one.addresses for one in members] == before
        assert await unreachable(members) == []
    assert pings.sent > 10
    assert pings.received >= pings.sent - 1  # the last may be under way


async def test_a_router_that_cannot_be_is_told_to_who_asks(place: Place) -> None:
    place.supply("one", NSM_FAMILIES="5")
    began = time.monotonic()
    asking = place.asks("m1", "kernel://net/nsm-1", name="m1")
    told = await until(
        lambda: [one["error"] for one in asking.told if one.get("error")], "a refusal", bar=2
    )
    write("a router that cannot be started is told", time.monotonic() - began, 3)
    words = r"router r1 of net ended with 2 after .* NSM_FAMILIES is '5'; expected .*routers-one"
    assert re.search(words, told[0]), told[0]
    assert not place.pid("r1")

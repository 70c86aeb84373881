"""One flat network of members at two routers: what it carries, and what it does not."""

import asyncio
import re
import subprocess

import pytest

from tests.e2e.vl3.domain import Domain, Member, echoes, full, joined, routes, unreachable
from tests.support.wait import until

SERVER = """
import socket
listening = socket.create_server(("", 8080))
print("listening", flush=True)
taken, _ = listening.accept()
total = 0
while data := taken.recv(1 << 16):
    total += len(data)
print(total, flush=True)
"""
SENDER = """
import socket, sys
with socket.create_connection((sys.argv[1], 8080), timeout=10) as to:
    to.sendall(bytes(5_000_000))
"""


async def start(domain: Domain, *at: str) -> list[Member]:
    """An address plan, two routers, and a member at each of those named."""
    domain.lend()
    for name in ("r1", "r2"):
        domain.route(name)
    members = [domain.member(f"m{n}", at=router) for n, router in enumerate(at, 1)]
    await joined(domain, "r1", "r2")
    return members


async def test_all_members_reach_one_another_with_full_packets_in_both_families(
    domain: Domain,
) -> None:
    members = await start(domain, "r1", "r1", "r2")
    assert [one.router for one in members] == ["r1", "r1", "r2"]
    assert all(len(one.addresses) == 2 for one in members)
    assert await unreachable(members) == []
    await until(lambda: {one.mtu for one in members} == {1440}, "one MTU for all", bar=2)
    for one in members:
        for other in members:
            if one is not other:
                for address in other.addresses:
                    assert await one.space.pings(address, *full(one, address)), address
        own = [f"172.16.{n}.0" for n in (0, 1)] + ["2001:db8:10::", "2001:db8:10::1:0"]
        for address in own:
            assert await one.space.pings(address), address


async def test_tcp_and_routers_are_what_is_between_members(domain: Domain) -> None:
    one, _, three = await start(domain, "r1", "r1", "r2")
    with subprocess.Popen(
        ["ip", "netns", "exec", three.space.name, "python3", "-c", SERVER],
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        sent = await asyncio.to_thread(one.space.run, "python3", "-c", SENDER, three.addresses[0])
        assert sent.returncode == 0, sent.stderr
        assert server.stdout.readline() == "5000000\n"
    hops = [
        re.findall(r"From (\S+)", one.space.run("ping", "-n", "-c1", "-W2", "-t", ttl, to).stdout)
        for to in three.addresses
        for ttl in ("1", "2", "3")
    ]
    assert hops == [["172.16.0.0"], ["172.16.1.0"], [], ["2001:db8:10::"], ["2001:db8:10::1:0"], []]


async def test_nobody_speaks_for_another_and_nothing_leaves_the_domain(domain: Domain) -> None:
    one, two, three = await start(domain, "r1", "r1", "r2")
    r1 = domain.space("r1")
    before = echoes(three)
    for stolen in (two.addresses[0], "172.16.9.9"):  # a neighbour's, and nobody's
        one.space.do("addr", "add", f"{stolen}/32", "dev", "lo")
        assert not await one.space.pings(three.addresses[0], "-I", stolen, "-W1")
        one.space.do("addr", "del", f"{stolen}/32", "dev", "lo")
    assert echoes(three) == before
    assert await one.space.pings(three.addresses[0])
    assert echoes(three) == before + 1

    two.space.do("addr", "add", "10.9.9.9/32", "dev", "lo")
    (way,) = r1.ip("route", "get", two.addresses[0])
    r1.do("route", "add", "10.9.9.9/32", "dev", way["dev"])
    one.space.do("route", "add", "10.9.9.9/32", "dev", "nsm-1")
    before = echoes(two)
    try:
        assert not await one.space.pings("10.9.9.9", "-W1")
        assert echoes(two) == before
    finally:
        r1.do("route", "del", "10.9.9.9/32")
        two.space.do("addr", "del", "10.9.9.9/32", "dev", "lo")


@pytest.mark.parametrize("families", ["4", "6"])
async def test_a_domain_of_one_family_has_nothing_of_the_other(
    domain: Domain, families: str
) -> None:
    domain.lend()
    for name in ("r1", "r2"):
        domain.route(name, NSM_FAMILIES=families)
    members = [domain.member("m1", at="r1"), domain.member("m3", at="r2")]
    assert all(len(one.addresses) == 1 for one in members)
    assert {":" in one.addresses[0] for one in members} == {families == "6"}
    await until(lambda: unreached(members), "members to reach one another", bar=3)


async def unreached(members: list[Member]) -> bool:
    return await unreachable(members) == []


async def test_before_a_prefix_is_lent_members_are_told_to_wait(domain: Domain) -> None:
    domain.route("r1")
    asking = domain.asks("m1", "kernel://net/nsm-1?at=r1", name="m1")
    await until(
        lambda: any("prefix pool is initializing" in one["error"] for one in asking.told),
        "a member to be refused",
    )
    domain.lend()
    asking.ready()
    assert await domain.space("m1").pings("172.16.0.0")


async def test_a_router_without_members_ends_and_its_wires_with_it(domain: Domain) -> None:
    """Another router's wire to it does not keep it."""
    domain.lend()
    short = domain.route("r1", NSM_IDLE_TIMEOUT="3s")
    domain.route("r2")
    await joined(domain, "r1", "r2")
    member = domain.member("m3", at="r2")
    assert short.ended() == 0
    await until(
        lambda: not any("/" in one for one in routes(domain.space("r2"))),
        "the routes of a router that ended to go",
        bar=3,
    )
    assert await member.space.pings(next(one for one in own(domain, "r2")))


def own(domain: Domain, name: str) -> list[str]:
    """A router's own addresses."""
    (lo,) = domain.space(name).ip("addr", "show", "lo")
    return [one["local"] for one in lo["addr_info"] if one["scope"] == "global"]

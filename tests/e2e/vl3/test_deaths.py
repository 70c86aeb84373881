"""Routers that die with all they had: members keep what they have, and everybody reaches them."""

import asyncio
import json
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.vl3.domain import Domain, Member, joined, routes, unreachable
from tests.e2e.vl3.test_changes import granted
from tests.e2e.wires.nodes import Program
from tests.support.spaces import Space, ip
from tests.support.wait import until

LASTING = Path(__file__).with_name("lasting.py")


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


async def test_a_router_whose_namespace_is_taken_away_ends_and_its_members_move(
    domain: Domain,
) -> None:
    """Its own sockets for names in there would keep it, and it would serve on in no place."""
    domain.lend()
    dying = domain.route("r1")
    outages = domain.directory / "outages.r2"
    domain.route("r2", NSM_OUTAGE_LOG=str(outages))
    assert outages.exists(), "what becomes of its wires to others is written down"
    await joined(domain, "r1", "r2")
    moving, staying = domain.member("m3", near="r1"), domain.member("m4", at="r2")
    before = [moving.addresses, staying.addresses]
    ip("netns", "del", domain.space("r1").name)
    ip("netns", "add", domain.space("r1").name)
    assert dying.ended() != 0
    assert "was taken away; make it again" in dying.words
    domain.programs.remove(dying)  # that it says so, as an error, is right
    await until(lambda: moving.router == "r2", "its member to be at another router", bar=2)
    await reached([moving, staying])
    assert [moving.addresses, staying.addresses] == before


class Lasting:
    """A TCP connection from one member to another while things happen to their routers."""

    def __init__(self, one: Member, other: Member, family: int) -> None:
        (own,), (address,) = (
            [text for text in each.addresses if (":" in text) == (family == 6)]
            for each in (one, other)
        )
        self._receiver = self._start(other, "receive", address)
        assert self._heard() == {"listening": True}
        self._sender = self._start(one, "send", address, own)

    def _start(self, member: Member, *words: str) -> "subprocess.Popen[str]":
        command = ["ip", "netns", "exec", member.space.name, sys.executable, str(LASTING), *words]
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def _heard(self) -> dict[str, Any]:
        return said(self._receiver)

    def came(self) -> int:
        """How many bytes have come."""
        assert self._receiver.stdin is not None
        self._receiver.stdin.write("?\n")
        told = self._heard()
        assert "came" in told, f"it is over already: {told}"
        return int(told["came"])

    async def on(self, least: int) -> None:
        """Wait until so much has come."""
        await until(lambda: self.came() >= least, "the connection to go on", bar=3, record=False)

    def end(self) -> None:
        """Let it end, and wait: all came, over the sockets of the beginning."""
        assert self._sender.stdin is not None
        self._sender.stdin.write("go on\n")
        sent = said(self._sender)
        got = self._heard()
        while "came" in got:
            got = self._heard()
        for one in (self._sender, self._receiver):
            assert one.wait(10) == 0
        assert got["total"] == 20_000_000
        assert got["sha256"] == sent["sha256"]
        assert sent["before"] == sent["after"]
        assert got["before"] == got["after"]
        assert got["after"][1:] == sent["after"][:0:-1]

    def kill(self) -> None:
        """Whatever is left of it."""
        for one in (self._sender, self._receiver):
            one.kill()
            one.communicate()


def said(program: "subprocess.Popen[str]") -> dict[str, Any]:
    assert program.stdout is not None
    ready, _, _ = select.select([program.stdout], [], [], 30)
    assert ready, "it says nothing"
    return json.loads(program.stdout.readline() or "{}")


@pytest.mark.parametrize("family", [4, pytest.param(6, marks=pytest.mark.long)])
async def test_one_tcp_connection_lives_through_deaths_of_its_router(
    domain: Domain, family: int
) -> None:
    """First its process, which comes back and nobody noticed; then its namespace, for good."""
    domain.lend()
    routers = {name: domain.route(name) for name in ("r1", "r2")}
    await joined(domain, "r1", "r2")
    near, far = domain.member("m1", near="r1"), domain.member("m3", near="r2")
    before = [near.addresses, far.addresses]
    await reached([near, far])
    for one, other in ((near, far), (far, near)) if family == 6 else ((far, near),):
        router = near.router
        dying = routers[router]
        lasting = Lasting(one, other, family)
        try:
            await lasting.on(2_000_000)
            dying.end(signal.SIGKILL)
            await lasting.on(lasting.came() + 3_000_000)  # while there is no router's process
            dying = domain.route(router)
            await until(lambda: granted(dying), "its member to be served again", bar=3)  # noqa: B023
            assert lasting.came() < 18_000_000, "it would be over before the death of its router"
            die(dying, domain.space(router))
            await asyncio.to_thread(lasting.end)
        finally:
            lasting.kill()
        assert near.router != router
        assert [near.addresses, far.addresses] == before
        routers[router] = domain.route(router)
        await joined(domain, "r1", "r2")

"""Members of one network find each other by name, and all other names as before.

Asked are stock dig and libc (`getent`, by the resolv.conf that `ip netns exec` mounts); the names
of the company around are unbound's.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from nsm.kernel.topology import open_low_ports
from nsm.names import resolvconf
from tests.e2e.names.dig import dig
from tests.e2e.vl3.domain import Domain, Member, joined, unreachable
from tests.e2e.wires.nodes import Program
from tests.support.nameserver import nameserver
from tests.support.wait import until, write

NAMED = {"NSM_DNS_TEMPLATES": "{client}.net"}
COMPANY = "127.0.0.3"
BEFORE = f"search corp.example\nnameserver {COMPANY}\n"
SELF = "127.0.0.1"


class Places:
    """Members' places with a resolv.conf of their own, and the company's name server in each."""

    def __init__(self, domain: Domain, folder: Path, stack: AsyncExitStack) -> None:
        self.domain = domain
        self._folder = folder
        self._stack = stack

    async def member(self, place: str, **variables: str) -> Member:
        """A member that finds names; what it is told more is in variables."""
        at = variables.pop("at")
        return self.domain.member(place, at=at, NSM_RESOLV_CONF=str(self.file(place)), **variables)

    async def furnish(self, *places: str) -> None:
        """Have a place ready for members."""
        for place in places:
            name = self.domain.space(place).name
            self.domain.space(place).do("link", "set", "lo", "up")
            open_low_ports(name)
            resolvconf.private(name, BEFORE)
            self._stack.callback(resolvconf.forget, name)
            company = await self._stack.enter_async_context(
                nameserver(self._folder / place, COMPANY, 53, space=name)
            )
            await company.serve({"corp.example": "www A 192.0.2.80"})

    def file(self, place: str) -> Path:
        """The place's resolv.conf."""
        return Path(f"{resolvconf.NETNS}/{self.domain.space(place).name}/resolv.conf")


@pytest.fixture
async def places(domain: Domain, tmp_path: Path) -> AsyncIterator[Places]:
    async with AsyncExitStack() as stack:
        yield Places(domain, tmp_path, stack)
        domain.end_clients()


async def getent(member: Member, name: str) -> set[str]:
    """What libc makes of a name there."""
    done = await asyncio.to_thread(member.space.run, "getent", "ahosts", name)
    return {line.split()[0] for line in done.stdout.splitlines()}


async def back(member: Member, address: str) -> str:
    """What libc makes of an address there."""
    done = await asyncio.to_thread(member.space.run, "getent", "hosts", address)
    return " ".join(done.stdout.split()[1:])


async def seconds(member: Member, name: str) -> float:
    """How long libc needs for it."""
    began = asyncio.get_running_loop().time()
    assert await getent(member, name), name
    return asyncio.get_running_loop().time() - began


async def start(places: Places) -> tuple[dict[str, Program], Member, Member]:
    """Two joined routers, a member at each."""
    await places.furnish("m1", "m3")
    places.domain.lend()
    routers = {name: places.domain.route(name, **NAMED) for name in ("r1", "r2")}
    one = await places.member("m1", at="r1")  # as soon as there are names to be found
    three = await places.member("m3", at="r2", NSM_LOCAL_DNS_SERVER_ENABLED="true")
    return routers, one, three


async def test_members_of_two_routers_find_each_other_by_name_and_the_rest_as_before(
    places: Places,
) -> None:
    routers, one, three = await start(places)
    # from the first moment, whether or not the routers have met
    assert await getent(three, "m1.net") == set(one.addresses)
    await joined(places.domain, "r1", "r2")
    assert await unreachable([one, three]) == []
    for asker in (one, three):
        for name, other in (("m1", one), ("m3", three)):
            v4, v6 = other.addresses
            assert await getent(asker, f"{name}.net") == {v4, v6}
            assert await getent(asker, name) == {v4, v6}
            assert await back(asker, v4) == await back(asker, v6) == f"{name}.net"
            for how in ("+notcp", "+tcp", "+noedns"):
                heard = await dig(asker.space, SELF, f"{name}.net", "A", how)
                assert (heard.status, heard.data) == ("NOERROR", [v4]), heard.text
                assert ("; EDNS: version: 0" in heard.text) == (how != "+noedns")
                heard = await dig(asker.space, SELF, f"{name.upper()}.NET.", "AAAA", how)
                assert heard.data == [v6], heard.text
            assert (await dig(asker.space, SELF, "-x", v6)).data == [f"{name}.net."]
        assert (await dig(asker.space, SELF, "r1.net")).data == ["172.16.0.0"]
        assert (await dig(asker.space, SELF, "-x", "172.16.1.0")).data == ["r2.net."]
        for name, kind, status in (
            ("none.net", "A", "NXDOMAIN"),
            ("m1.net", "TXT", "NOERROR"),
            ("none.corp.example", "A", "NXDOMAIN"),
        ):
            heard = await dig(asker.space, SELF, name, kind)
            assert (heard.status, heard.answer) == (status, []), heard.text
            assert any(" SOA " in line for line in heard.authority)
        for name in ("www.corp.example", "www"):
            assert await getent(asker, name) == {"192.0.2.80"}
    pinged = await asyncio.to_thread(one.space.run, "ping", "-c1", "-W2", "-6", "m3.net")
    assert pinged.returncode == 0, pinged.stdout + pinged.stderr

    assert three.program.end() == 0
    assert places.file("m3").read_text() == BEFORE
    assert await getent(three, "www") == {"192.0.2.80"}
    assert await getent(three, "m1.net") == set()
    heard = await dig(one.space, "172.16.0.0", "m3.net")
    assert heard.status == "NXDOMAIN"
    assert all("error" not in line for router in routers.values() for line in router.errors())


async def test_while_a_router_is_away_other_names_resolve_and_its_own_come_back(
    places: Places,
) -> None:
    routers, one, three = await start(places)
    await joined(places.domain, "r1", "r2")
    assert await getent(one, "m3.net") == set(three.addresses)
    usual = await seconds(one, "www.corp.example")
    routers["r1"].end(signal.SIGKILL)
    for asker in (one, three):
        slow = [await seconds(asker, name) for name in ("www.corp.example", "www")]
        write("other names while a router is killed", max(slow), 0.3)
        assert max(slow) < 1 + usual
    # whom it knew: not there, but nobody says that there is none
    assert (await dig(three.space, SELF, "m1.net")).status == "SERVFAIL"
    said = asyncio.create_task(statuses(three, "m1.net"))
    routers["r1"] = places.domain.route("r1", **NAMED)
    await until(said.done, "a name to be back with its router", bar=2)
    assert said.result() == {"SERVFAIL", "NOERROR"}
    assert await getent(three, "m1.net") == set(one.addresses)
    assert await getent(one, "m3.net") == set(three.addresses)


async def statuses(asker: Member, name: str) -> set[str]:
    """How its resolver answers until it has the name."""
    found: set[str] = set()
    while "NOERROR" not in found:
        found.add((await dig(asker.space, SELF, name)).status)
    return found


async def test_a_members_name_goes_with_it_to_another_router(places: Places) -> None:
    _, one, three = await start(places)
    await joined(places.domain, "r1", "r2")
    before = three.addresses
    heard = await dig(one.space, SELF, "m3.net", "A")
    assert (heard.data, heard.ttls) == (before[:1], {5})  # and then it is asked for again
    three.program.end()
    three = await places.member("m3", at="r1")
    assert not set(three.addresses) & set(before)
    for server in ("172.16.0.0", "172.16.1.0"):
        assert (await dig(one.space, server, "m3.net", "A")).data == three.addresses[:1]
    for address in before:
        assert (await dig(one.space, "172.16.1.0", "-x", address)).status == "NXDOMAIN"
    assert await getent(three, "m1.net") == set(one.addresses)


async def test_resolv_conf_comes_back_whatever_happens_to_the_client(places: Places) -> None:
    _, one, three = await start(places)
    led = places.file("m1").read_text()
    assert f"\nnameserver {SELF}\n" in led
    for member, place, again in ((one, "m1", "false"), (three, "m3", "true")):
        member.program.end(signal.SIGKILL)
        assert places.file(place).read_text() != BEFORE
        at = {"m1": "r1", "m3": "r2"}[place]
        new = await places.member(place, at=at, NSM_LOCAL_DNS_SERVER_ENABLED=again)
        assert (places.file(place).read_text() == BEFORE) == (again == "false")
        assert await getent(new, "www.corp.example") == {"192.0.2.80"}
        assert await getent(new, "m3.net") == (set(new.addresses) if again == "true" else set())
        new.program.end()
        assert places.file(place).read_text() == BEFORE


async def test_who_cannot_serve_names_is_a_member_all_the_same_unless_it_wants_them(
    places: Places,
) -> None:
    domain = places.domain
    machine = Path(resolvconf.PATH).read_text()
    domain.lend()
    domain.route("r1", **NAMED)
    await places.furnish("m1")
    closed = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
    assert domain.space("m1").run("sh", "-c", f"echo 1024 >{closed}").returncode == 0
    one = await places.member("m1", at="r1")
    assert await one.space.pings("172.16.0.0")
    assert said(one, "names of wires do not resolve here", "CAP_NET_BIND_SERVICE")
    assert await getent(one, "www") == {"192.0.2.80"}
    one.program.end()
    wanting = domain.asks(
        "m1",
        "kernel://net/nsm-1",
        NSM_RESOLV_CONF=str(places.file("m1")),
        NSM_LOCAL_DNS_SERVER_ENABLED="true",
    )
    assert wanting.ended() == 3
    assert "CAP_NET_BIND_SERVICE" in wanting.words
    assert places.file("m1").read_text() == BEFORE
    two = domain.member("m2", at="r1", NSM_RESOLV_CONF=resolvconf.PATH)
    assert await two.space.pings("172.16.0.0")
    assert said(two, "names of wires do not resolve here", "this machine's")
    assert Path(resolvconf.PATH).read_text() == machine


async def test_before_a_router_can_answer_for_names_members_are_told_to_wait(
    places: Places, tmp_path: Path
) -> None:
    domain = places.domain
    domain.lend()
    space = domain.space("r1")
    async with nameserver(tmp_path / "taken", "0.0.0.0", 53, space=space.name) as other:
        await other.serve({"corp.example": "www A 192.0.2.80"})
        domain.route("r1", **NAMED)
        asking = domain.asks("m1", "kernel://net/nsm-1?at=r1", name="m1")
        await until(
            lambda: any("DNS address is initializing" in one["error"] for one in asking.told),
            "a member to be refused",
            bar=2,
        )
    member = Member(asking.ready(), domain.space("m1"))
    heard = await dig(domain.space("m1"), "172.16.0.0", "m1.net", "A")
    assert heard.data == member.addresses[:1]


def said(member: Member, *words: str) -> bool:
    """Whether one line of its log has them all."""
    return any(all(word in line for word in words) for line in member.program.log)

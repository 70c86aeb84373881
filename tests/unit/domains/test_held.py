"""How long an answer is believed, who shares it, and what is none."""

import asyncio
from collections import Counter

import pytest

from nsm import resolve
from nsm.domains import SOON, Answer, Door, is_host
from nsm.errors import NotFoundError, UnavailableError
from nsm.resolve import Domains, Servers

NONE: Answer[str] = Answer(ttl=60, why="there is none")
DOWN = "nobody answers"
NAME = "registry.nsm-system.c2."


class Recorder(Servers):
    """Says what it was told to, and counts who asks."""

    def __init__(self, doors: Answer[Door], ttl: float = 60.0) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.said = doors
        self.hosts = {NAME: Answer(("10.0.0.1",), ttl)}
        self.most = self.busy = 0

    async def doors(self, name: str) -> Answer[Door]:
        self.asked[f"SRV {name}"] += 1
        self.busy += 1
        self.most = max(self.most, self.busy)
        for _ in range(5):
            await asyncio.sleep(0)
        self.busy -= 1
        return self.said

    async def addresses(self, name: str, kind: str) -> Answer[str]:
        self.asked[f"{kind} {name}"] += 1
        return self.hosts.get(name, NONE) if kind == "A" else NONE


def doors(*targets: str, ttl: float = 60.0) -> Answer[Door]:
    return Answer(tuple(Door(0, 0, 5002 + n, target) for n, target in enumerate(targets)), ttl)


def held(found: Domains) -> list[float]:
    return [round(one.ends - one.came, 3) for one in found._held.values()]


async def test_an_answer_is_asked_for_once_while_it_holds() -> None:
    servers = Recorder(doors("elsewhere."), ttl=20.0)
    found = Domains(None, servers)
    for name in ("c2", "C2", "c2."):
        assert await found.registry(name) == ("tcp://10.0.0.1:5002",)
    assert servers.asked == {f"{kind} {NAME}": 1 for kind in ("SRV", "A", "AAAA")}
    assert held(found) == [20.0]  # the shortest of all that it is made of
    found.doubt("C2")
    await found.registry("c2")
    assert servers.asked[f"SRV {NAME}"] == 2


async def test_what_holds_for_no_time_is_asked_again_but_shared_by_those_who_wait() -> None:
    servers = Recorder(doors("x.", ttl=0.0))
    found = Domains(None, servers)
    both = await asyncio.gather(*(found.registry("c2") for _ in range(50)))
    assert set(both) == {("tcp://10.0.0.1:5002",)}
    assert servers.asked[f"SRV {NAME}"] == 1
    await found.registry("c2")
    assert servers.asked[f"SRV {NAME}"] == 2
    assert held(found) == []
    assert found._asking == {}


async def test_that_there_is_none_is_an_answer_too() -> None:
    found = Domains(None, servers := Recorder(Answer(ttl=9999.0, why="c2 does not exist")))
    for _ in range(3):
        with pytest.raises(NotFoundError, match="'c2' has no registry in DNS: c2 does not exist"):
            await found.registry("c2")
    assert servers.asked[f"SRV {NAME}"] == 1
    assert held(found) == [resolve.LONGEST_NONE]


async def test_that_nobody_could_say_is_none_and_is_told_to_all_who_wait() -> None:
    found = Domains(None, servers := Recorder(Answer(why=DOWN, failed=True)))
    waiting = (found.registry("c2") for _ in range(20))
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(end) for end in ends} == {UnavailableError}
    assert servers.asked[f"SRV {NAME}"] == 1
    servers.said = doors("x.")
    assert await found.registry("c2") == ("tcp://10.0.0.1:5002",)


async def test_who_gives_up_takes_nobody_with_it() -> None:
    found = Domains(None, servers := Recorder(doors("x.")))
    first = asyncio.create_task(found.registry("c2"))
    others = [asyncio.create_task(found.registry("c2")) for _ in range(3)]
    await asyncio.sleep(0)
    first.cancel()
    assert await asyncio.gather(*others) == [("tcp://10.0.0.1:5002",)] * 3
    assert servers.asked[f"SRV {NAME}"] == 2
    assert found._asking == {}


async def test_targets_are_asked_where_the_name_itself_has_no_address() -> None:
    servers = Recorder(doors("a.", "b.", "none."))
    servers.hosts = {"a.": Answer(("10.0.0.5",), 30.0), "b.": Answer(("10.0.0.6",), 40.0)}
    found = Domains(None, servers)
    assert await found.registry("c2") == ("tcp://10.0.0.5:5002", "tcp://10.0.0.6:5003")
    assert held(found) == [30.0]
    servers.hosts, servers.said = {}, doors("a.", ttl=5.0)
    with pytest.raises(NotFoundError, match="'c3' has no registry in DNS: there is none"):
        await found.registry("c3")
    assert held(found) == [30.0, 5.0]
    servers.hosts, servers.said = {"a.": Answer(why=DOWN, failed=True)}, doors("a.", "b.")
    with pytest.raises(UnavailableError, match=f"where domain 'c4' has its registry: {DOWN}"):
        await found.registry("c4")
    # A target may be elsewhere: it is not asked where the name itself may have an address.
    servers.hosts = {
        "registry.nsm-system.c5.": Answer(why=DOWN, failed=True),
        "a.": Answer(("10.0.0.5",), 30.0),
    }
    with pytest.raises(UnavailableError, match=f"where domain 'c5' has its registry: {DOWN}"):
        await found.registry("c5")


async def test_targets_that_nobody_can_be_asked_about_cost_little_and_not_each_time() -> None:
    servers = Recorder(doors("a.", "b.", "c."))
    down: Answer[str] = Answer(why=DOWN, failed=True)
    servers.hosts = {"a.": Answer(("10.0.0.5",), 30.0), "b.": down, "c.": down}
    found = Domains(None, servers)
    for _ in range(2):
        assert await found.registry("c2") == ("tcp://10.0.0.5:5002",)
    assert [servers.asked[f"A {name}."] for name in "abc"] == [1, 1, 0]
    assert held(found) == [SOON]


async def test_who_answers_slowly_gives_way_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Recorder):
        async def addresses(self, name: str, kind: str) -> Answer[str]:
            await asyncio.Event().wait()
            return NONE

    monkeypatch.setattr(resolve, "ALL", 0.05)
    found = Domains(None, Slow(doors("a.")))
    with pytest.raises(UnavailableError, match=r"no answer to all questions within 0\.05 s"):
        await found.registry("c2")
    assert held(found) == []


async def test_no_port_and_no_hosts_address_is_nowhere_to_go() -> None:
    none = Answer((Door(0, 0, 0, "a."),), 60.0)
    with pytest.raises(NotFoundError, match="says that it is not offered"):
        await Domains(None, Recorder(none)).registry("c2")
    for address, host in (
        ("0.0.0.0", False), ("::", False), ("224.0.0.1", False), ("ff02::1", False),
        ("255.255.255.255", False), ("127.0.0.1", True), ("fe80::1", True), ("10.0.0.0", True),
    ):  # fmt: skip
        assert is_host(address) == host


async def test_a_target_of_nothing_says_that_it_is_not_offered() -> None:
    found = Domains(None, Recorder(doors(".")))
    with pytest.raises(NotFoundError, match="says that it is not offered"):
        await found.registry("c2")


async def test_an_address_is_a_registry_and_no_door() -> None:
    found = Domains(None, servers := Recorder(doors("x.")))
    assert await found.registry("//10.0.0.9:5002") == ("tcp://10.0.0.9:5002",)
    with pytest.raises(NotFoundError, match="is a registry's address, and nothing more"):
        await found.manager_proxy("//10.0.0.9:5002")
    assert not servers.asked


async def test_only_so_much_is_held_and_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve, "MOST_HELD", 100)
    found = Domains(None, servers := Recorder(Answer(ttl=60.0, why="none")))
    many = (found.registry(f"c{n}") for n in range(500))
    await asyncio.gather(*many, return_exceptions=True)
    assert len(found._held) == 100
    assert servers.most == resolve.AT_ONCE

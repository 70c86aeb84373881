"""Which address plan lends what, and which families a domain turns out to have."""

import asyncio

import pytest

from endpoints.vl3 import lending
from endpoints.vl3.lending import Lending
from nsm.errors import UnavailableError


class Asked:
    """Stands for the streams to address plans: tells what the test says they answered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.streams: dict[tuple[str, int], dict] = {}
        self.ended: set[tuple[str, int]] = set()
        self.lent: list[str] = []
        self.absent: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []
        monkeypatch.setattr(lending, "keep_prefix", self._keep)

    async def _keep(self, peers, url, *, family, **told):
        self.streams[url, family] = told
        try:
            await asyncio.Event().wait()
        finally:
            self.ended.add((url, family))

    def spawn(self, work, name):
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    async def end(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def start(self, *urls: str, families=()) -> "Asked":
        Lending(
            urls,
            "",
            families,
            on_lent=lambda _url, prefix, _domain: self.lent.append(prefix),
            on_absent=self.absent.append,
        ).start(None, self)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        return self

    async def answer(self, url: str, family: int, prefix: str, *domain: str) -> None:
        self.streams[url, family]["on_lent"](prefix, domain)
        await asyncio.sleep(0)


@pytest.fixture
async def plans(monkeypatch):
    made = Asked(monkeypatch)
    yield made
    await made.end()


async def test_a_family_the_pool_lacks_is_left_out(plans) -> None:
    asked = await plans.start("a")
    assert set(asked.streams) == {("a", 4), ("a", 6)}
    asked.streams["a", 6]["on_failure"](UnavailableError("there is no IPv6"))
    await asked.answer("a", 4, "172.16.1.0/24", "172.16.0.0/16")
    assert (asked.lent, asked.absent, asked.ended) == (["172.16.1.0/24"], [6], {("a", 6)})


async def test_of_what_was_named_nothing_is_left_out(plans) -> None:
    asked = await plans.start("a", families=(4, 6))
    await asked.answer("a", 4, "172.16.1.0/24", "172.16.0.0/16")
    assert (asked.absent, asked.ended) == ([], set())


async def test_upstreams_plan_lends_of_its_one_family_whatever_it_is_asked(plans) -> None:
    asked = await plans.start("a")
    await asked.answer("a", 6, "172.16.1.0/24")
    assert (asked.lent, asked.absent, asked.ended) == ([], [6], {("a", 6)})
    await asked.answer("a", 4, "172.16.2.0/24")
    assert asked.lent == ["172.16.2.0/24"]


async def test_two_plans_of_a_family_each_are_one_domain(plans) -> None:
    asked = await plans.start("a", "b")
    await asked.answer("a", 4, "172.16.1.0/24", "172.16.0.0/16")
    assert asked.absent == []  # the other may have it
    await asked.answer("b", 6, "2001:db8::/112", "2001:db8::/64")
    assert (asked.lent, asked.absent) == (["172.16.1.0/24", "2001:db8::/112"], [])
    assert asked.ended == {("a", 6), ("b", 4)}

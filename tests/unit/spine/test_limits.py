"""Who is let in, and who is next: `nsm.limits`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack

import pytest

from nsm.errors import ExhaustedError
from nsm.limits import KEPT, PART, STEPS, Bounds, Places
from tests.support.wait import until

FLOOD, CALM = ("spiffe://td/flood", "spiffe://td/flood"), ("spiffe://td/calm", "spiffe://td/calm")


class Crowd:
    """Requests that stay until they are told to go; order is who was let in."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.order: list[str] = []
        self.refused: list[ExhaustedError] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, name: str, whose: tuple[str, str], step: int = STEPS) -> None:
        """Returns when it is in, waits, or was refused."""
        self._ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name, whose, step))
        await settled()

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await self.tasks[name]
        await settled()

    async def _stay(self, name: str, whose: tuple[str, str], step: int) -> None:
        try:
            async with self.places.entered(whose, step) as ticket, self.places.place(ticket):
                self.order.append(name)
                await self._ends[name].wait()
        except ExhaustedError as why:
            self.refused.append(why)

    async def disperse(self) -> None:
        """Everybody gives up."""
        for task in self.tasks.values():
            task.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)


@pytest.fixture
async def gather() -> AsyncIterator[Callable[[int], Crowd]]:
    crowds: list[Crowd] = []

    def gathered(at_once: int) -> Crowd:
        crowds.append(Crowd(Places("hop", Bounds(at_once, in_all=100))))
        return crowds[-1]

    yield gathered
    for crowd in crowds:
        await crowd.disperse()
        assert (crowd.places.working, crowd.places.waiting) == (0, 0)


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_has_least_under_way_is_next_and_then_who_came_first(
    gather: Callable[[int], Crowd],
) -> None:
    crowd = gather(4)
    for number in range(6):
        await crowd.ask(f"flood-{number}", FLOOD)
    assert crowd.order == ["flood-0"], "a quarter of four places is one"
    others = [(f"spiffe://td/{n}", f"spiffe://td/{n}") for n in range(3)]
    for n, whose in enumerate(others):
        await crowd.ask(f"other-{n}", whose)
    assert crowd.order[1:] == ["other-0", "other-1", "other-2"]
    await crowd.ask("calm-0", CALM)
    assert (crowd.places.working, crowd.places.waiting) == (4, 6)
    await crowd.end("other-0")
    assert crowd.order[-1] == "calm-0", "though five of the flood's came before it"
    await crowd.end("flood-0")
    assert crowd.order[-1] == "flood-1"


async def test_behind_one_peer_each_client_has_its_part(gather: Callable[[int], Crowd]) -> None:
    crowd = gather(8)
    manager = "spiffe://td/nsmgr"
    for number in range(5):
        await crowd.ask(f"flood-{number}", (manager, "spiffe://td/flood"))
    await crowd.ask("calm-0", (manager, "spiffe://td/calm"))
    assert crowd.order == ["flood-0", "flood-1", "calm-0"]


async def test_a_peer_that_names_many_clients_waits_behind_one_that_has_few(
    gather: Callable[[int], Crowd],
) -> None:
    crowd = gather(4)
    liar = "spiffe://td/liar"
    for number in range(8):
        await crowd.ask(f"lie-{number}", (liar, f"spiffe://td/{number}"))
    await crowd.ask("full", ("spiffe://td/last", "spiffe://td/last"))
    await crowd.ask("calm-0", CALM)
    assert (crowd.places.working, crowd.order[-1]) == (4, "full")
    await crowd.end("lie-0")
    assert crowd.order[-1] == "calm-0"


async def test_who_invents_clients_never_has_all_the_places(gather: Callable[[int], Crowd]) -> None:
    """Nor a peer that hangs: what it asks for lasts until its deadlines."""
    crowd = gather(8)
    for number in range(20):
        await crowd.ask(f"lie-{number}", ("spiffe://td/liar", f"spiffe://td/{number}"))
    assert len(crowd.order) == 8 - 8 // PART
    await crowd.ask("calm-0", CALM)
    assert crowd.order[-1] == "calm-0", "without waiting for any of the liar's to end"


async def test_as_many_wait_as_the_queue_is_long(gather: Callable[[int], Crowd]) -> None:
    crowd = gather(4)
    crowd.places = Places("hop", Bounds(4, in_all=100), "closes", variable="", queue=50)
    for number in range(52):
        await crowd.ask(f"flood-{number}", FLOOD)
    assert (crowd.places.working, crowd.places.waiting) == (1, 50)
    (refused,) = crowd.refused
    assert "50 closes wait at hop" in refused.message
    assert "raise" not in refused.hint, "no setting bounds them"


async def test_who_comes_along_a_path_finds_a_place_where_all_who_begin_here_wait_for_others(
    gather: Callable[[int], Crowd],
) -> None:
    """Two nodes full of requests that wait for one another would wait until every deadline."""
    crowd = gather(2 * KEPT)
    for number in range(3 * KEPT):
        await crowd.ask(f"begins-{number}", (f"spiffe://td/{number}",) * 2, step=1)
    taken = len(crowd.order)
    assert KEPT < taken < 2 * KEPT
    for step in range(2, STEPS + 1):  # each may wait for who comes after it
        await crowd.ask(f"step-{step}", (f"spiffe://td/step-{step}",) * 2, step)
        assert crowd.order[-1] == f"step-{step}"
    for number in range(2 * KEPT):
        await crowd.ask(f"last-{number}", (f"spiffe://td/last-{number}",) * 2)
    assert crowd.places.working == 2 * KEPT
    await crowd.end("begins-0")
    assert crowd.order[-1].startswith("last-"), "what was kept stays kept"


async def test_one_more_than_a_client_may_have_is_refused_with_a_sentence() -> None:
    places = Places("nsmgr-east", Bounds(at_once=4, in_all=2))
    async with AsyncExitStack() as here:
        for _ in range(2):
            await here.enter_async_context(places.entered(FLOOD))
        with pytest.raises(ExhaustedError) as refused:
            await here.enter_async_context(places.entered(FLOOD))
        await here.enter_async_context(places.entered(CALM))
    assert str(refused.value) == (
        "spiffe://td/flood has 2 requests under way at nsmgr-east, which takes 2 of one client;"
        " wait for answers before asking for more, or raise NSM_MAX_REQUESTS_PER_CLIENT there"
    )
    assert not places._here, "nobody is remembered"


async def test_where_too_many_wait_who_has_most_of_them_loses_the_last(
    gather: Callable[[int], Crowd],
) -> None:
    crowd = gather(1)
    await crowd.ask("calm-0", CALM)
    for number in range(3):
        await crowd.ask(f"flood-{number}", FLOOD)
    await crowd.ask("calm-1", CALM)
    assert not crowd.refused
    await crowd.ask("calm-2", CALM)
    assert crowd.tasks["flood-2"].done()
    assert "4 requests wait at hop" in str(crowd.refused[0])
    assert "spiffe://td/flood has most of them, 3; ask again" in str(crowd.refused[0])
    assert crowd.places.waiting == 4


@pytest.mark.parametrize("moment", ["waits", "was let in"])
async def test_who_gives_up_gives_its_place_back(
    moment: str, gather: Callable[[int], Crowd]
) -> None:
    crowd = gather(1)
    for name in ("a", "b", "c"):
        await crowd.ask(name, CALM)
    if moment == "was let in":  # and has not run since
        crowd._ends["a"].set()
        await until(lambda: crowd.places.waiting == 1, "b to be let in", bar=0.1)
    crowd.tasks["b"].cancel()
    await settled()
    if moment == "waits":
        await crowd.end("a")
    assert crowd.order[-1] == "c"
    await crowd.end("c")
    assert (crowd.places.working, crowd.places.waiting) == (0, 0)
    assert not crowd.places._working
    assert not crowd.places._peers
    assert not crowd.places._here

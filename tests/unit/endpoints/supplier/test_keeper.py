"""One router, however many ask; and what becomes of it."""

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from endpoints.supplier import keeper as at_work
from endpoints.supplier.house import House
from endpoints.supplier.keeper import Keeper, State
from endpoints.supplier.route import SupplierRoute
from nsm.connections import Held
from nsm.errors import AbortedError, NotFoundError, UnavailableError
from nsm.model import Connection, Request
from nsm.undo import Undo
from tests.support.callers import Mesh
from tests.support.wait import until
from tests.unit.endpoints.supplier.conftest import STAYS, Registry, recipe, running

Keep = Callable[..., Keeper]


def starts(house: House, name: str = "r") -> int:
    """How often it said that it is here."""
    log = Path(house.log_of(recipe(name=name)))
    return log.read_text().count("here") if log.exists() else 0


async def test_nothing_runs_before_somebody_asks_and_one_for_all_who_do(
    house: House, keep: Keep, registry: Registry
) -> None:
    keeper = keep()
    await asyncio.sleep(0)
    assert (keeper.state, starts(house)) == (State.ABSENT, 0)
    assert "not known yet" in keeper.waiting()
    await asyncio.gather(*(keeper.there() for _ in range(20)))
    assert registry.watched == 1, "not once for each"
    await keeper.there()
    assert (keeper.state, starts(house)) == (State.THERE, 1)


async def test_it_is_there_when_it_is_ready_and_registered(
    house: House, keep: Keep, registry: Registry
) -> None:
    registry.there.clear()
    keeper = keep()
    asking = asyncio.create_task(keeper.there())
    await until(lambda: starts(house) == 1, "it to be started", bar=0.5)
    assert not asking.done()
    assert "router r was started" in keeper.waiting()
    registry.say("r")
    await asking
    registry.say()  # the registry has begun anew: it comes back by itself
    asking = asyncio.create_task(keeper.there())
    await asyncio.sleep(0.05)
    assert not asking.done()
    registry.say("r")
    await asking
    assert starts(house) == 1


async def test_an_asker_who_goes_does_not_take_the_start_along(house: House, keep: Keep) -> None:
    keeper = keep()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(keeper.there(), 0.001)
    await until(lambda: keeper.state is State.THERE, "the router, all the same", bar=0.5)


async def test_one_that_ends_because_it_is_idle_is_started_when_it_is_asked_for(
    house: House, keep: Keep
) -> None:
    keeper = keep("echo here; echo serving >$NSM_HEALTH_FILE; sleep 0.2")
    await keeper.there()
    await until(lambda: keeper.state is State.ABSENT, "its end to be seen", bar=0.5)
    await asyncio.sleep(0.05)
    assert starts(house) == 1
    assert not running(Path(house.folder))
    await keeper.there()
    assert starts(house) == 2


async def test_who_asks_while_it_ends_gets_the_next(
    house: House, keep: Keep, registry: Registry
) -> None:
    keeper = keep("echo here; echo serving >$NSM_HEALTH_FILE; sleep 0.2")
    await keeper.there()
    registry.say()  # it takes its registration back first
    asking = asyncio.create_task(keeper.there())
    await until(lambda: starts(house) == 2, "the next", bar=1)
    registry.say("r")
    await asking


async def test_one_that_dies_has_members_and_is_started_at_once(
    house: House, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "PAUSES", (0.05,))
    keeper = keep()
    await keeper.there()
    (pid,) = running(Path(house.folder))
    os.kill(pid, signal.SIGKILL)
    await until(lambda: starts(house) == 2, "it to be started again", bar=0.5)
    await keeper.there()


async def test_one_that_fails_is_told_with_its_last_words_and_rests_longer_each_time(
    house: House, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "PAUSES", (0.2, 30.0))
    keeper = keep("echo here; echo 'cannot bind to 53'; exit 3")
    words = r"router r of net ended with 3 after .* s; its log ends: here \| cannot bind to 53; see"
    with pytest.raises(UnavailableError, match=words):
        await keeper.there()
    with pytest.raises(UnavailableError, match=r"bind to 53.*started again in 0\.\d s"):
        await keeper.there()
    assert starts(house) == 1, "not while it rests"
    await until(lambda: keeper._due < asyncio.get_running_loop().time(), "the pause", bar=0.3)
    with pytest.raises(UnavailableError, match="started again in 30"):
        await keeper.there()
    assert starts(house) == 2


async def test_a_place_that_cannot_be_is_told_too(keep: Keep) -> None:
    with pytest.raises(UnavailableError, match="namespace /nowhere/n of router r of net"):
        await keep(namespace="/nowhere/n").there()


async def test_the_next_life_takes_over_what_runs(
    house: House, keep: Keep, registry: Registry
) -> None:
    house.start(replace(recipe(), argv=(), environment={"CODE": STAYS})).release()
    await until(lambda: starts(house) == 1, "a router of an earlier life", bar=0.5)
    keeper = keep()
    await keeper.there()
    assert starts(house) == 1
    (pid,) = running(Path(house.folder))
    registry.say()
    os.kill(pid, signal.SIGKILL)
    await until(lambda: keeper.state is State.ABSENT, "its end to be seen", bar=0.5)
    os.waitpid(pid, 0)
    assert starts(house) == 1, "it took its registration back: it ended in order"


async def test_what_died_while_nobody_looked_is_started_again_if_it_did_not_say_goodbye(
    house: House, keep: Keep, registry: Registry
) -> None:
    child = house.start(recipe())
    os.kill(child.mark.pid, signal.SIGKILL)
    assert await child.ended() == -9
    child.release()
    keeper = keep()
    await until(lambda: keeper.state is State.THERE, "the router again", bar=0.5)


async def test_a_registry_that_is_away_is_waited_for(
    keep: Keep, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(at_work, "AGAIN", 0.02)
    registry.silent = True
    asking = asyncio.create_task(keep().there())
    await asyncio.sleep(0.1)
    assert not asking.done()
    registry.silent = False
    await asking


# --- what a request is answered ------------------------------------------------------------------


async def asked(keeper: Keeper, service: str = "net", within: float = 3.0) -> None:
    route = SupplierRoute("supplier", {"net": keeper})
    until_when = asyncio.get_running_loop().time() + within
    caller = Mesh().call("nsc", deadline=until_when)
    async with Undo() as undo:
        await route.establish(Request(Connection(id="c", service=service)), Held("c"), caller, undo)


async def test_a_request_is_refused_in_upstreams_words_when_the_router_is_there(keep: Keep) -> None:
    words = "cannot provide required networkservice: endpoint created as r"
    with pytest.raises(AbortedError, match=words):
        await asked(keep(STAYS))


async def test_a_request_is_answered_in_time_whatever_the_router_does(keep: Keep) -> None:
    keeper = keep("exec sleep 600")
    keeper._registry.there.clear()  # type: ignore[attr-defined]
    with pytest.raises(UnavailableError, match=r"router r was started .* no more time is left"):
        await asyncio.wait_for(asked(keeper, within=0.3), 0.3)


async def test_what_it_has_no_recipe_for_it_does_not_start(keep: Keep) -> None:
    with pytest.raises(NotFoundError, match="has no router of 'net; id'; it has those of net"):
        await asked(keep(), "net; id")

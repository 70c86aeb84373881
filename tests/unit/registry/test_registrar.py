"""A registry at work: watch streams, expiry in time, and answers that wait for the store."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from nsm.caller import Caller
from nsm.errors import ExhaustedError, UnavailableError, UnsupportedError
from nsm.identity.authority import Authority
from nsm.identity.source import Handshake
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.offers import Limits, Offers
from nsm.registrar import Change, Gone, Registrar
from nsm.registration import Registration, RegistrationPath
from tests.support.wait import until

TD = Authority.create("td")
OWN = TD.issue(SpiffeId("td", "/r"))
PEER = TD.issue(SpiffeId("td", "/a"))
CALLER = Caller(Handshake(OWN, PEER.id, PEER.leaf, PEER.not_after))


def by(owner: str = "spiffe://td/a", *, seconds: float = 600) -> Registration:
    path = RegistrationPath(("t1", "t2", "stale"), 1)
    expires = time.time_ns() + int(seconds * SECOND)
    return Registration(CALLER, path, (owner, "spiffe://td/r"), expires)


def endpoint(name: str = "nse-1") -> Endpoint:
    return Endpoint(name=name, services=("icmp",))


@contextlib.asynccontextmanager
async def running(registrar: Registrar) -> AsyncGenerator[None, None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(registrar.run())
        yield
        task.cancel()


async def test_the_answer_is_the_endpoint_as_held_and_the_path_that_ends_here() -> None:
    registrar = Registrar(Offers())
    asked = replace(endpoint(), path_ids=("spiffe://td/a", "x", "stale"))
    held, path = await registrar.register_endpoint(asked, by())
    assert held.path_ids == ("spiffe://td/a", "spiffe://td/r")
    assert path == RegistrationPath(("t1", "t2"), 1)
    assert held.expires is not None
    assert 59 < (held.expires - time.time_ns()) / SECOND <= 60


async def test_an_endpoint_ends_with_its_callers_token() -> None:
    registrar = Registrar(Offers())
    held, _ = await registrar.register_endpoint(endpoint(), by(seconds=7))
    assert held.expires is not None
    assert 6 < (held.expires - time.time_ns()) / SECOND <= 7


async def test_an_endpoint_is_forgotten_when_its_time_has_come() -> None:
    registrar = Registrar(Offers(), period=SECOND // 5)
    async with running(registrar):
        await asyncio.sleep(0)  # it waits by now, for nothing
        await registrar.register_endpoint(endpoint("later"), by())
        await registrar.register_endpoint(
            replace(endpoint(), expires=time.time_ns() + SECOND // 20), by()
        )
        await until(lambda: len(registrar.offers.endpoints) == 1, "the first to end", bar=0.1)
        await until(lambda: len(registrar.offers.endpoints) == 0, "the second to end", bar=0.3)


async def test_a_watch_begins_with_what_is_there_and_goes_on() -> None:
    registrar = Registrar(Offers())
    await registrar.register_endpoint(endpoint(), by())
    seen = registrar.find_endpoints(Endpoint(services=("icmp",)), True, CALLER)
    async with contextlib.aclosing(seen):
        assert (await anext(seen)).item.name == "nse-1"
        await registrar.register_endpoint(endpoint("nse-2"), by())
        await registrar.unregister_endpoint(endpoint(), by())
        assert (await anext(seen)).item.name == "nse-2"
        last = await anext(seen)
        assert (last.item.name, last.deleted) == ("nse-1", True)
        assert last.item.services == ("icmp",)
    assert registrar.offers.endpoints.watching == 0


async def test_without_watch_a_find_ends() -> None:
    registrar = Registrar(Offers())
    await registrar.register_service(Service("icmp"), by())
    found = [one async for one in registrar.find_services(Service(), False, CALLER)]
    assert found == [Found(Service("icmp", "IP", path_ids=by().ids))]


async def test_a_slow_watcher_is_cut_with_a_sentence_and_others_are_not() -> None:
    registrar = Registrar(Offers(), behind=10, room=5)
    slow = registrar.find_endpoints(Endpoint(), True, CALLER)
    quick = registrar.find_endpoints(Endpoint(), True, CALLER)
    async with contextlib.aclosing(slow), contextlib.aclosing(quick):
        for n in range(25):
            _, heard = await asyncio.gather(
                registrar.register_endpoint(endpoint(f"nse-{n}"), by()), anext(quick)
            )
            assert heard.item.name == f"nse-{n}"
            if n == 0:
                assert (await anext(slow)).item.name == "nse-0"
        with pytest.raises(ExhaustedError) as cut:
            await anext(slow)
    assert str(cut.value) == "watcher too slow: 16 names behind; watch again"


async def test_the_room_that_watchers_share_comes_back_from_those_who_read_or_go() -> None:
    registrar = Registrar(Offers(), behind=2, room=3)

    async def watcher() -> AsyncGenerator[Found[Endpoint], None]:
        """One that watches by now, and has read what was there."""
        registrar.offers.endpoints.put(endpoint("first"))
        seen = registrar.find_endpoints(Endpoint(), True, CALLER)
        assert (await anext(seen)).item.name == "first"
        return seen

    for _ in range(3):
        seen = await watcher()
        for n in range(5):
            registrar.offers.endpoints.put(endpoint(f"nse-{n}"))
        assert [(await anext(seen)).item.name for _ in range(3)] == ["nse-0", "nse-1", "nse-2"]
        for n in range(3):
            registrar.offers.endpoints.put(endpoint(f"nse-{n}"))  # five again
        await seen.aclose()
        for n in range(5):
            registrar.offers.endpoints.remove(f"nse-{n}")


async def test_a_long_listing_completes_while_everything_in_it_is_refreshed() -> None:
    registrar = Registrar(Offers())
    for n in range(3000):
        registrar.offers.endpoints.put(endpoint(f"nse-{n}"))
    seen = registrar.find_endpoints(Endpoint(), True, CALLER)
    async with contextlib.aclosing(seen):
        told = [await anext(seen)]
        for again in range(3):
            for n in range(3000):
                registrar.offers.endpoints.put(replace(endpoint(f"nse-{n}"), expires=again))
        told += [await anext(seen) for _ in range(5999)]
    assert {f.item.name for f in told[:3000]} == {f.item.name for f in told[3000:]}
    assert {f.item.expires for f in told[3000:]} == {2}, "the newest of each, and once"


async def test_of_several_changes_of_one_name_the_newest_is_told() -> None:
    registrar = Registrar(Offers(), behind=1, room=0)
    registrar.offers.endpoints.put(endpoint())
    seen = registrar.find_endpoints(Endpoint(), True, CALLER)
    async with contextlib.aclosing(seen):
        await anext(seen)
        registrar.offers.endpoints.put(endpoint())
        registrar.offers.endpoints.remove("nse-1")
        assert (await anext(seen)).deleted
        registrar.offers.endpoints.put(endpoint())
        registrar.offers.endpoints.remove("nse-1")
        registrar.offers.endpoints.put(endpoint())
        assert not (await anext(seen)).deleted


async def test_only_so_many_may_watch() -> None:
    registrar = Registrar(Offers(Limits(watchers=1)))
    await registrar.register_service(Service("icmp"), by())
    first = registrar.find_services(Service(), True, CALLER)
    second = registrar.find_services(Service(), True, CALLER)
    async with contextlib.aclosing(first), contextlib.aclosing(second):
        await anext(first)
        with pytest.raises(ExhaustedError, match="NSM_MAX_WATCHERS"):
            await anext(second)
    assert [f async for f in registrar.find_services(Service(), False, CALLER)]


async def test_one_identity_has_only_so_many_watchers_and_leaves_room_for_others() -> None:
    registrar = Registrar(Offers(Limits(watchers_per_id=2)))
    await registrar.register_service(Service("icmp"), by())
    await registrar.register_endpoint(endpoint(), by())
    other = Caller(Handshake(PEER, OWN.id, OWN.leaf, OWN.not_after))
    async with contextlib.AsyncExitStack() as open_:

        async def watch(caller: Caller) -> AsyncGenerator[Found[Service], None]:
            seen = registrar.find_services(Service(), True, caller)
            await open_.enter_async_context(contextlib.aclosing(seen))
            await anext(seen)
            return seen

        first = await watch(CALLER)
        endpoints = registrar.find_endpoints(Endpoint(), True, CALLER)
        async with contextlib.aclosing(endpoints):
            await anext(endpoints)
            with pytest.raises(ExhaustedError, match=r"spiffe://td/a has 2 .*MAX_WATCHERS_PER_ID"):
                await watch(CALLER)
            await watch(other)
        await watch(CALLER)
        with pytest.raises(ExhaustedError):
            await watch(CALLER)
        await first.aclose()
        await watch(CALLER)


async def test_a_long_listing_lets_others_have_their_turn() -> None:
    registrar = Registrar(Offers())
    for n in range(5000):
        await registrar.register_endpoint(endpoint(f"nse-{n}"), by())
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        counting = group.create_task(count())
        found = [f async for f in registrar.find_endpoints(Endpoint(), False, CALLER)]
        counting.cancel()
    assert len(found) == 5000
    assert turns >= 9


async def test_names_of_other_domains_are_refused_where_nobody_knows_them() -> None:
    registrar = Registrar(Offers())
    says = "has nobody to ask there; .*NSM_PROXY_REGISTRY_URL is not set"
    with pytest.raises(UnsupportedError, match=f"'nse@far' is of another domain.*{says}"):
        await registrar.register_endpoint(endpoint("nse@far"), by())
    with pytest.raises(UnsupportedError, match=says):
        await registrar.register_endpoint(replace(endpoint(), services=("x@far",)), by())
    with pytest.raises(UnsupportedError, match=says):
        await registrar.unregister_service(Service("x@far"), by())
    with pytest.raises(UnsupportedError, match=says):
        await anext(registrar.find_services(Service("x@far"), False, CALLER))
    with pytest.raises(UnsupportedError, match=says):
        await anext(registrar.find_endpoints(Endpoint(services=("x@far",)), True, CALLER))


class Broken:
    """A store on a disk that is full for a while."""

    def __init__(self) -> None:
        self.kept: list[Change] = []
        self.full = False

    async def keep(self, *changes: Change) -> None:
        await asyncio.sleep(0)
        if self.full:
            raise UnavailableError("the disk is full")
        self.kept.extend(changes)


async def test_what_cannot_be_kept_is_refused_and_not_served() -> None:
    broken = Broken()
    registrar = Registrar(Offers(), keeper=broken)
    first, _ = await registrar.register_endpoint(endpoint(), by())
    await registrar.register_service(Service("icmp"), by())
    broken.full = True
    with pytest.raises(UnavailableError):
        await registrar.register_endpoint(replace(endpoint(), url="tcp://1:1"), by())
    with pytest.raises(UnavailableError):
        await registrar.unregister_endpoint(endpoint(), by())
    with pytest.raises(UnavailableError):
        await registrar.register_endpoint(endpoint("nse-2"), by())
    with pytest.raises(UnavailableError):
        await registrar.unregister_service(Service("icmp"), by())
    with pytest.raises(UnavailableError):
        await registrar.register_service(Service("vpn"), by())
    assert list(registrar.offers.endpoints) == [first]
    assert [s.name for s in registrar.offers.services] == ["icmp"]
    broken.full = False
    await registrar.unregister_endpoint(endpoint(), by())
    await registrar.unregister_endpoint(endpoint(), by())  # not there: fine, nothing to keep
    assert broken.kept[-1] == Gone(Endpoint, "nse-1")
    assert len(broken.kept) == 3


async def test_expiry_goes_on_when_the_store_does_not() -> None:
    broken = Broken()
    registrar = Registrar(Offers(), period=SECOND // 20, keeper=broken)
    await registrar.register_endpoint(endpoint(), by())
    broken.full = True
    async with running(registrar):
        await until(lambda: len(registrar.offers.endpoints) == 0, "the first to end", bar=0.1)
        broken.full = False
        await registrar.register_endpoint(endpoint("nse-2"), by())
        await until(lambda: Gone(Endpoint, "nse-2") in broken.kept, "the second to end", bar=0.1)


async def test_a_clock_that_is_set_back_lengthens_no_registration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nsm.registrar._LOOK", 0.1)  # seconds until it sees that, at most
    back = 0
    registrar = Registrar(Offers(), period=SECOND // 5, clock=lambda: time.time_ns() - back)
    async with running(registrar):
        await registrar.register_endpoint(endpoint(), by())
        back = 3600 * SECOND
        await until(lambda: len(registrar.offers.endpoints) == 0, "an hour not to pass", bar=0.6)


class Held:
    """A store that answers when it is told, in the order it was asked."""

    def __init__(self) -> None:
        self.asked: list[asyncio.Future[None]] = []

    async def keep(self, *_: Change) -> None:
        self.asked.append(asyncio.get_running_loop().create_future())
        await self.asked[-1]


@pytest.mark.parametrize(
    ("kept", "url"),
    [("", "0"), ("1", "1"), ("2", "2"), ("12", "2")],
    ids=["neither", "the first only", "the second only", "both"],
)
async def test_of_two_changes_of_a_name_at_once_what_is_kept_is_served(kept: str, url: str) -> None:
    """The two come at once, and either of them is kept or not."""
    store = Held()
    registrar = Registrar(Offers(), keeper=store)

    async def asked(url: str) -> None:
        with contextlib.suppress(UnavailableError):
            await registrar.register_endpoint(replace(endpoint(), url=url), by())

    async with asyncio.TaskGroup() as group:
        group.create_task(asked("0"))
        await until(lambda: len(store.asked) == 1, "the first to be asked for", bar=0.1)
        store.asked[0].set_result(None)
    async with asyncio.TaskGroup() as group:
        group.create_task(asked("1"))
        group.create_task(asked("2"))
        await until(lambda: len(store.asked) == 3, "both to be asked for", bar=0.1)
        for which, answer in zip("12", store.asked[1:], strict=True):
            if which in kept:
                answer.set_result(None)
            else:
                answer.set_exception(UnavailableError("the disk is full"))
    held = registrar.offers.endpoints.get("nse-1")
    assert held is not None
    assert held.url == url


async def test_two_registrations_of_a_new_name_that_both_fail_leave_none() -> None:
    broken = Broken()
    broken.full = True
    registrar = Registrar(Offers(), keeper=broken)
    both = [registrar.register_endpoint(endpoint(), by()) for _ in range(2)]
    assert all(await asyncio.gather(*both, return_exceptions=True))
    assert len(registrar.offers.endpoints) == 0

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest

from nsm.errors import (
    AbortedError,
    DeadlineError,
    DeniedError,
    ExhaustedError,
    InternalError,
    InvalidError,
    NotFoundError,
    UnavailableError,
)
from nsm.hop import Established, Hop
from nsm.limits import Bounds, Places
from nsm.model import (
    SECOND,
    Connection,
    Event,
    EventType,
    Path,
    Request,
    Segment,
    Selector,
    State,
)
from tests.support.wait import until

ASKED = Connection(id="c0", service="vpn", path=Path((Segment("nsc", "c0"),)))


class Route:
    """Writes down what is asked of it, and does what the test says."""

    def __init__(self):
        self.log = []
        self.fail = None
        self.hang = False
        self.next_url = ""
        self.entered = asyncio.Event()
        self.left = asyncio.Event()
        self.leaving = None
        self.holding = None
        self.stuck = None
        self.withdrawn = None

    async def establish(self, asked, held, caller, undo):
        conn = asked.connection
        undo.add("take back", self.take_back)
        self.log.append("establish")
        self.entered.set()
        if self.hang:
            await asyncio.Event().wait()
        if self.fail:
            raise self.fail
        if self.holding:
            await self.holding.wait()
        held.memory = "memory"
        return Established(conn, self.next_url)

    async def take_back(self):
        await asyncio.sleep(0)
        self.log.append("take back")

    async def withdraw(self, conn, memory, caller):
        self.log.append(f"withdraw {memory} {'caller' if caller else 'lease'}")
        self.withdrawn = conn
        self.left.set()
        if self.stuck:
            raise self.stuck
        if self.leaving:
            await self.leaving.wait()
            self.log.append("withdrawn")


class World:
    def __init__(self, mesh):
        self.mesh = mesh
        self.route = Route()
        self.tasks = []
        self.hop = Hop("hop", self.route, lifetime=600 * SECOND, spawn=self.spawn)

    def spawn(self, coro, name):
        self.tasks.append(asyncio.create_task(coro, name=name))
        return self.tasks[-1]

    async def request(self, conn=ASKED, who="nsc", **call):
        return await self.hop.request(Request(conn), self.mesh.call(who, **call))


@pytest.fixture
async def world(mesh):
    world = World(mesh)
    yield world
    world.hop.stop()
    await asyncio.gather(*world.tasks, return_exceptions=True)


async def test_an_answer_is_at_the_callers_segment_and_every_segment_vouches(world):
    made = await world.request()
    assert (made.id, made.index, made.state) == ("c0", 0, State.UP)
    assert [s.name for s in made.segments] == ["nsc", "hop"]
    assert all(s.token and s.expires for s in made.segments)
    assert len(world.hop.connections) == 1
    assert len(world.hop.leases) == 1


async def test_a_path_that_ends_here_is_cut_behind_us(world):
    stale = (Segment("nsc", "c0"), Segment("hop", "h"), Segment("gone", "g"))
    made = await world.request(Connection(id="c0", path=Path(stale)))
    assert [s.name for s in made.segments] == ["nsc", "hop"]


async def test_a_path_that_goes_on_keeps_what_the_next_hops_added(world):
    world.route.next_url = "unix:next"
    stale = (Segment("nsc", "c0"), Segment("hop", "h"), Segment("next", "n"))
    made = await world.request(Connection(id="c0", path=Path(stale)))
    assert len(made.segments) == 3


async def test_who_has_our_name_is_told_so_before_two_hops_become_one(world):
    named = (Segment("nsc", "c0"), Segment("hop", "h"))
    for asked in (
        Connection(id="h", path=Path(named, 1)),
        Connection(id="h", path=Path(named[1:])),
    ):
        with pytest.raises(InvalidError, match=r"spiffe://td/proxy and spiffe://td/hop, .* 'hop'"):
            await world.request(asked, who="proxy")
    assert world.route.log == []


async def test_a_refused_request_takes_back_what_it_did_and_holds_nothing(world):
    world.route.fail = NotFoundError("no endpoint")
    with pytest.raises(NotFoundError):
        await world.request()
    assert world.route.log == ["establish", "take back"]
    assert (len(world.hop.connections), len(world.hop.leases)) == (0, 0)


async def test_a_failed_refresh_keeps_the_connection(world):
    made = await world.request()
    world.route.fail = UnavailableError("gone")
    with pytest.raises(UnavailableError):
        await world.request(made)
    assert len(world.hop.connections.established()) == 1
    assert len(world.hop.leases) == 1


async def test_cancelled_twice_it_still_takes_everything_back(world):
    world.route.hang = True
    task = asyncio.create_task(world.request())
    await world.route.entered.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert world.route.log == ["establish", "take back"]
    assert len(world.hop.connections) == 0


async def test_close_takes_down_what_was_made_and_may_be_repeated(world):
    made = await world.request()
    await world.hop.close(made, world.mesh.call("nsc"))
    await world.hop.close(made, world.mesh.call("nsc"))
    assert world.route.log == ["establish", "withdraw memory caller", "withdraw None caller"]
    assert (len(world.hop.connections), len(world.hop.leases)) == (0, 0)


async def test_a_close_ends_the_request_that_is_under_way(world):
    world.route.hang = True
    task = asyncio.create_task(world.request())
    await world.route.entered.wait()
    inside = Segment("hop", next(iter(world.hop.connections._held)))
    closing = Connection(id="c0", service="vpn", path=Path((Segment("nsc", "c0"), inside)))
    await world.hop.close(closing, world.mesh.call("nsc"))
    with pytest.raises(AbortedError, match="closed by spiffe://td/nsc"):
        await task
    assert world.route.log[:2] == ["establish", "take back"]
    assert len(world.hop.connections) == 0


async def test_a_request_ends_at_its_callers_deadline(world):
    world.route.hang = True
    soon = asyncio.get_running_loop().time() + 0.05
    with pytest.raises(DeadlineError, match="of 'vpn' was not there"):
        await world.request(deadline=soon)
    assert world.route.log == ["establish", "take back"]


async def test_reselecting_lets_go_of_the_old_endpoint_before_it_asks_for_a_new_one(world):
    made = await world.request()
    await world.request(replace(made, state=State.RESELECT_REQUESTED))
    assert world.route.log == ["establish", "withdraw memory caller", "establish"]


async def test_what_nobody_refreshes_is_taken_down_when_the_token_before_us_ends(world):
    await world.request(lifetime=SECOND + SECOND // 2)
    await until(lambda: "withdraw memory lease" in world.route.log, "a lease to end", bar=1.0)
    assert len(world.hop.connections) == 0


async def test_those_who_watch_hear_up_down_and_gone(world):
    seen = world.hop.events.watch(Selector(), world.mesh.svid("nsc").id)
    assert (await anext(seen)).connections == {}
    made = await world.request()
    assert (await anext(seen)).type == EventType.UPDATE
    await world.hop.close(made, world.mesh.call("nsc"))
    assert (await anext(seen)).type == EventType.DELETE
    await seen.aclose()


async def test_who_asked_can_be_told_to_ask_again(world):
    made = await world.request()
    seen = world.hop.events.watch(Selector(), world.mesh.svid("nsc").id)
    await anext(seen)
    await world.hop.want_again(made.segments[1].id)
    (told,) = (await asyncio.wait_for(anext(seen), 5)).connections.values()
    assert told.state == State.REFRESH_REQUESTED
    assert (await world.request(made)).state == State.UP
    assert [held.made.state for held in world.hop.connections.established()] == [State.UP]
    await world.hop.want_again("nobody's")
    await seen.aclose()


async def test_being_told_to_ask_again_while_asking_is_not_forgotten(mesh):
    """The next hop may have answered before it changed its mind: that answer is still on its
    way when the news of it arrive, by another stream."""
    world, told = World(mesh), asyncio.Queue()

    async def follow(url, selector):
        while True:
            yield await told.get()

    world.hop = Hop("hop", world.route, lifetime=600 * SECOND, spawn=world.spawn, monitor=follow)
    world.route.next_url = "unix:next"
    first = await world.request()
    seen = world.hop.events.watch(Selector(), mesh.svid("nsc").id)
    await anext(seen)
    world.route.entered.clear()
    world.route.holding = asyncio.Event()
    other = replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),)))
    asking = asyncio.create_task(world.request(other))
    await world.route.entered.wait()
    (own,) = [held.id for held in world.hop.connections._held.values() if held.made is None]
    path_ = Path((Segment("nsc", "c1"), Segment("hop", own), Segment("next", "n")), 2)
    news = Connection(id="n", state=State.REFRESH_REQUESTED, path=path_)
    await told.put(Event(EventType.UPDATE, {"n": news}))
    await until(lambda: world.hop.connections.get(own).again, "the news to arrive", record=False)
    world.route.holding.set()
    assert (await asking).state == State.UP
    states = {held.id: held.made.state for held in world.hop.connections.established()}
    assert states == {own: State.REFRESH_REQUESTED, first.segments[1].id: State.UP}
    (conn,) = (await anext(seen)).connections.values()
    assert (conn.id, conn.state) == (own, State.REFRESH_REQUESTED)
    await seen.aclose()
    world.hop.stop()
    await asyncio.gather(*world.tasks, return_exceptions=True)


async def test_news_that_no_hop_would_take_as_a_request_are_none(world):
    world.route.next_url = "unix:next"
    made = await world.request()
    own = made.segments[1].id
    before = world.hop.connections.get(own).made
    path_ = Path((*made.segments[:2], *(Segment("x", "x"),) * 100), 2)
    world.hop._changed(own, Connection(id="n", state=State.UP, path=path_))
    assert world.hop.connections.get(own).made == before


# ---- who may ---------------------------------------------------------------------------------


async def test_without_a_token_nothing_happens(world):
    with pytest.raises(DeniedError, match=r"no sufficient privileges$"):
        await world.request(token=False)
    assert world.route.log == []
    assert len(world.hop.connections) == 0


async def test_an_expired_token_is_refused(world):
    with pytest.raises(DeniedError, match=r"no sufficient privileges$"):
        await world.request(lifetime=-60 * SECOND)


async def test_a_token_made_for_another_hop_is_refused(world):
    call = world.mesh.call("nsc")
    stolen = world.mesh.call("nsc", to="elsewhere")
    replayed = replace(call, token=stolen.token)
    with pytest.raises(DeniedError, match=r"no sufficient privileges$"):
        await world.hop.request(Request(ASKED), replayed)


async def test_a_token_somebody_else_signed_is_refused(world):
    theirs = world.mesh.call("nsc").token
    with pytest.raises(DeniedError, match=r"no sufficient privileges$"):
        await world.hop.request(Request(ASKED), replace(world.mesh.call("mallory"), token=theirs))


async def test_somebody_elses_connection_id_opens_nothing(world):
    made = await world.request()
    guessed = Connection(
        id="m0", service="vpn", path=Path((Segment("mallory", "m0"), made.segments[1]))
    )
    with pytest.raises(DeniedError, match="was asked for by spiffe://td/nsc, not by"):
        await world.request(guessed, who="mallory")
    with pytest.raises(DeniedError, match="was asked for by spiffe://td/nsc, not by"):
        await world.hop.close(guessed, world.mesh.call("mallory"))
    assert len(world.hop.connections.established()) == 1
    assert world.route.log == ["establish"]


async def test_the_recorded_previous_hop_may_close_though_the_rest_of_the_path_is_stale(world):
    long_ago = time.time_ns() - 60 * SECOND
    nsc = world.mesh.call("nsc", to="nsmgr")
    path = Path((Segment("nsc", "c0", nsc.token, nsc.token_expires), Segment("nsmgr", "m0")), 1)
    made = await world.request(Connection(id="m0", path=path), who="nsmgr")
    stale = world.mesh.call("nsc", to="nsmgr", lifetime=-60 * SECOND)
    segments = (replace(made.segments[0], token=stale.token, expires=long_ago), *made.segments[1:])
    closing = replace(made, path=Path(segments, 1))
    with pytest.raises(DeniedError):
        await world.request(closing, who="nsmgr")
    await world.hop.close(closing, world.mesh.call("nsmgr"))
    assert len(world.hop.connections) == 0


async def test_a_replaced_manager_may_take_over_what_begins_at_the_same_workload(world):
    def through(manager):
        nsc = world.mesh.call("nsc", to=manager)
        first = Segment("nsc", "c0", nsc.token, nsc.token_expires)
        return Connection(
            id=f"{manager}-0", path=Path((first, Segment(manager, f"{manager}-0")), 1)
        )

    made = await world.request(through("nsmgr-old"), who="nsmgr-old")
    again = through("nsmgr-new")
    again = replace(again, path=Path((*again.segments, made.segments[2]), 1))
    refreshed = await world.request(again, who="nsmgr-new")
    assert refreshed.segments[2].id == made.segments[2].id
    assert len(world.hop.connections) == 1


async def test_a_caller_that_says_not_until_when_is_refused_and_nothing_stays(world):
    call = replace(world.mesh.call("nsc"), token_expires=None)
    body = Segment("nsc", "c0", call.token, None)
    with pytest.raises(InvalidError, match="expiration for the previous path segment"):
        await world.hop.request(Request(Connection(id="c0", path=Path((body,)))), call)
    assert world.route.log == ["establish", "take back"]
    assert len(world.hop.connections) == 0


async def test_no_token_stands_in_what_a_connection_prints(world):
    made = await world.request()
    token = made.segments[0].token
    assert token
    assert token not in repr(made)
    assert token not in repr(world.mesh.call("nsc"))


# ---- what must not stop half-way ----------------------------------------------------------


async def test_a_close_that_is_cancelled_still_takes_down_what_was_made(world):
    made = await world.request()
    world.route.leaving = asyncio.Event()
    closing = asyncio.create_task(world.hop.close(made, world.mesh.call("nsc")))
    await world.route.left.wait()
    closing.cancel()
    await asyncio.sleep(0)
    assert not closing.done()
    world.route.leaving.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert world.route.log[-1] == "withdrawn"
    assert (len(world.hop.connections), len(world.hop.leases)) == (0, 0)


async def test_what_could_not_be_taken_down_is_held_told_and_tried_again(world):
    made = await world.request()
    watching = world.hop.events.watch(Selector(), world.mesh.svid("nsc").id)
    await anext(watching)
    world.route.stuck = InternalError("the kernel is busy")
    with pytest.raises(InternalError):
        await world.hop.close(made, world.mesh.call("nsc"))
    assert (len(world.hop.connections), len(world.hop.leases)) == (1, 1)
    assert next(iter((await anext(watching)).connections.values())).state == State.DOWN
    world.route.stuck = None
    world.hop.leases.again(world.hop.connections.established()[0].id, 0.0)
    await until(lambda: len(world.hop.connections) == 0, "the second try", bar=0.1)
    assert world.route.log[-2:] == ["withdraw memory caller", "withdraw memory lease"]
    await watching.aclose()


async def test_a_reselect_goes_on_although_the_old_next_hop_cannot_be_told(world):
    made = await world.request()
    world.route.stuck = UnavailableError("its forwarder is not registered")
    again = await world.request(replace(made, state=State.RESELECT_REQUESTED))
    assert again.state == State.UP
    assert world.route.log[-2:] == ["withdraw memory caller", "establish"]


async def test_a_reselect_that_fails_says_that_the_wire_is_down(mesh):
    world = World(mesh)
    world.hop = Hop(
        "hop", world.route, lifetime=600 * SECOND, spawn=world.spawn, monitor=never_a_word
    )
    world.route.next_url = "unix:next"
    made = await world.request()
    world.route.fail = NotFoundError("nobody serves it")
    with pytest.raises(NotFoundError):
        await world.request(replace(made, state=State.RESELECT_REQUESTED))
    assert [held.made.state for held in world.hop.connections.established()] == [State.DOWN]
    world.hop.stop()


async def never_a_word(url, selector):
    await asyncio.Event().wait()
    yield


async def test_an_expired_lease_is_taken_down_however_many_wait_for_their_turn(world):
    made = await world.request()
    id_ = made.segments[1].id
    world.route.fail = UnavailableError("not now")
    world.route.hang = True
    waiting = [asyncio.create_task(world.request(made)) for _ in range(17)]
    await until(lambda: world.hop.connections.get(id_).waiting == 16, "a queue", bar=0.1)
    world.hop.leases.again(id_, 0.0)
    await until(lambda: id_ not in world.hop.leases, "the end of a lease", bar=0.1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await until(lambda: len(world.hop.connections) == 0, "the wire to be gone", bar=0.1)


async def test_the_way_behind_us_is_what_we_hold_and_not_what_a_caller_says(world):
    world.route.next_url = "unix:next"
    behind = Segment("next", "n-mine")
    made = await world.request(
        Connection(id="c0", path=Path((Segment("nsc", "c0"), Segment("hop", "h"), behind)))
    )
    lie = replace(made, path=Path((*made.segments[:2], Segment("next", "n-theirs"))))
    assert (await world.request(lie)).segments[2] == behind
    await world.hop.close(lie, world.mesh.call("nsc"))
    assert [segment.id for segment in world.route.withdrawn.segments] == ["c0", "h", "n-mine"]


async def test_a_workload_that_names_anothers_wire_through_their_manager_gets_nothing(world):
    def through_the_manager(who, *behind):
        call = world.mesh.call(who, to="nsmgr")
        first = Segment(who, f"{who}-0", call.token, call.token_expires)
        path = Path((first, Segment("nsmgr", f"{who}-m"), *behind), 1)
        return Connection(id=f"{who}-m", service="vpn", path=path)

    made = await world.request(through_the_manager("victim"), who="nsmgr")
    theirs = through_the_manager("mallory", made.segments[2])
    with pytest.raises(DeniedError, match="begins at spiffe://td/victim, not at spiffe://td/mal"):
        await world.request(theirs, who="nsmgr")
    with pytest.raises(DeniedError, match="begins at spiffe://td/victim, not at spiffe://td/mal"):
        await world.hop.close(theirs, world.mesh.call("nsmgr"))
    assert world.route.log == ["establish"]


async def test_a_flood_of_closes_waits_for_its_turn_and_each_still_ends_its_request(world):
    """Requests under way end at once; what is taken down, and how many are here, is bounded."""
    world.hop.closes = Places("hop", Bounds(at_once=4, in_all=3), "closes", variable="")
    made = [
        await world.request(replace(ASKED, id=f"c{n}", path=Path((Segment("nsc", f"c{n}"),))))
        for n in range(3)
    ]
    world.route.log.clear()
    world.route.leaving = asyncio.Event()
    world.route.hang = True
    refresh = asyncio.create_task(world.request(made[2]))
    await world.route.entered.wait()
    closing = [asyncio.create_task(world.hop.close(one, world.mesh.call("nsc"))) for one in made]
    await until(lambda: world.hop.closes.waiting == 2, "two to wait behind the first", bar=0.1)
    with pytest.raises(AbortedError, match="was closed by"):
        await refresh
    assert [one for one in world.route.log if one.startswith("withdraw ")] == [
        "withdraw memory caller"
    ], "one client has a quarter of four places"
    with pytest.raises(ExhaustedError, match="has 3 closes under way at hop") as refused:
        await world.hop.close(made[0], world.mesh.call("nsc"))
    assert refused.value.hint == "wait for answers before asking for more"
    for task in closing[1:]:
        task.cancel()  # who gave up waiting has closed all the same
    world.route.leaving.set()
    await asyncio.gather(*closing, return_exceptions=True)
    assert (world.hop.closes.working, world.hop.closes.waiting) == (0, 0)
    assert len(world.hop.connections) == 0


async def test_a_workload_that_invents_where_its_requests_begin_is_refused_at_its_own_bound(world):
    world.hop = Hop("hop", world.route, lifetime=600 * SECOND, spawn=world.spawn, door=True,
                    places=Places("hop", Bounds(at_once=8, in_all=2)))  # fmt: skip
    world.route.hang = True
    caller = replace(world.mesh.call("liar"), unix=True)

    def begun_by(name):
        token = world.mesh.call(name, to="liar")
        first = Segment(name, f"{name}-0", token.token, token.token_expires)
        path = Path((first, Segment("liar", f"{name}-1")), 1)
        return Request(Connection(id=f"{name}-1", service="vpn", path=path))

    asking = [asyncio.create_task(world.hop.request(begun_by(f"x{n}"), caller)) for n in range(2)]
    await until(lambda: world.hop.places.working == 2, "two to be worked on", bar=0.1)
    with pytest.raises(ExhaustedError, match=r"^spiffe://td/liar has 2 requests under way"):
        await world.hop.request(begun_by("x2"), caller)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_a_close_ends_the_wait_for_a_place_and_a_full_house_takes_no_wire_down(world):
    made = await world.request()
    world.hop.places = Places("hop", Bounds(at_once=1, in_all=2))
    world.route.hang = True
    busy = asyncio.create_task(
        world.request(replace(ASKED, id="c1", path=Path((Segment("nsc", "c1"),))))
    )
    await until(lambda: world.hop.places.working == 1, "somebody to have the place", bar=0.1)
    refresh = asyncio.create_task(world.request(made))
    await until(lambda: world.hop.places.waiting == 1, "a refresh to wait", bar=0.1)
    with pytest.raises(ExhaustedError, match="has 2 requests under way at hop"):
        await world.request(replace(ASKED, id="c2", path=Path((Segment("nsc", "c2"),))))
    assert [one.made.state for one in world.hop.connections.established()] == [State.UP]
    await world.hop.close(made, world.mesh.call("nsc"))
    with pytest.raises(AbortedError, match="was closed by"):
        await refresh
    assert world.hop.places.waiting == 0
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)
    assert (world.hop.places.working, len(world.hop.connections)) == (0, 0)

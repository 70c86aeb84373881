"""A client and the manager it sees: how a wire is got, kept, found again and given back."""

import asyncio
import contextlib
import os
import time
from dataclasses import replace

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nsm.client import Change, Client, Settings, Wish
from nsm.descriptors import Descriptors
from nsm.endpoint import Endpoint, EndpointRoute, FromPools
from nsm.errors import (
    DeniedError,
    ExhaustedError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)
from nsm.heal import Cause
from nsm.identity.tokens import issue
from nsm.ipam import Pools
from nsm.model import SECOND, DNSConfig, DNSContext, Event, EventType, IPContext, Segment, State
from nsm.nsurl import awareness_groups, parse
from nsm.rpc import services, wire
from tests.support.wait import until

SHORT = 3 * SECOND  # tokens that make a refresh due about every half second


class Witness(EndpointRoute):
    """What a manager does with a request, as far as its client can tell; keeps what it saw."""

    def __init__(self, **options) -> None:
        self.asked = []
        self.refuse = None
        self.hangs = False
        super().__init__("manager", FromPools(Pools([["10.0.0.0/24"]])), **options)

    async def establish(self, asked, held, caller, undo):
        with Descriptors() as fds:
            await fds.claim_all(caller.fds, asked.preferences, 2)
            url = asked.preferences[0].get("inodeURL")
            found = os.fstat(fds.get(url))
            assert (found.st_dev, found.st_ino) == os.stat("/proc/self/ns/net")[2:0:-1]
        self.asked.append(asked)
        if self.hangs:
            await asyncio.Event().wait()
        if self.refuse:
            raise self.refuse
        return await super().establish(asked, held, caller, undo)


@contextlib.asynccontextmanager
async def managed(authority, door, route=None, **options):
    """A manager at door, and what it sees."""
    manager = Endpoint("manager", ["x"], source=authority.source("/mgr"), listen=door, **options)
    manager.route = route = route or Witness()
    async with manager:
        yield manager, route


class Asking:
    """A client and what it says of its wires."""

    def __init__(self, authority, door, name="app", **settings) -> None:
        self.changes = []
        self.client = Client(
            name,
            source=authority.source("/app"),
            manager=door,
            settings=Settings(
                **{
                    "on_change": lambda what, _, error: self.changes.append((what, error)),
                    "dial_timeout": 1,
                    "request_timeout": 3,
                }
                | settings,
            ),
        )

    @property
    def kinds(self):
        return [what for what, _ in self.changes]


async def test_a_wire_has_its_interface_addresses_and_our_namespace(authority, door):
    asking = Asking(authority, door, labels={"podName": "p", "app": "default"})
    async with managed(authority, door) as (manager, seen):
        async with (
            asking.client as client,
            client.connect("kernel://echo/nsm-1?app=x") as wire,
        ):
            assert wire.interface == "nsm-1"
            assert [str(one) for one in wire.addresses] == ["10.0.0.1/32"]
            assert [str(one) for one in wire.peer_addresses] == ["10.0.0.0/32"]
            assert [route.prefix for route in wire.routes] == ["10.0.0.0/32"]
            assert wire.endpoint == "manager"
            assert wire.id == "app-nsm-1"
            assert wire.up
            assert {"identity", "dial", "look", "calling"} < set(wire.stages)
            assert len(manager.connections) == 1
        (asked,) = seen.asked
        assert asked.connection.service == "echo"
        assert asked.connection.labels == {"podName": "p", "app": "x"}
        assert asked.connection.context.ip == IPContext()
        assert [one.name for one in asked.connection.segments] == ["app", "manager"]
        assert asked.preferences[0].get("name") == "nsm-1"
        assert manager.connections == (), "the block's end did not close the wire"
        assert asking.kinds == [Change.UP, Change.CLOSED]


async def test_without_a_name_each_wire_gets_one_and_an_id(authority, door):
    async with (
        managed(authority, door),
        Asking(authority, door).client as client,
        client.connect("kernel://echo") as a,
        client.connect("kernel://echo/") as b,
    ):
        assert a.interface.startswith("echo-")
        assert len({a.interface, b.interface}) == len({a.id, b.id}) == 2


@pytest.mark.parametrize("how", ["error", "cancelled", "cancelled twice"])
async def test_the_wire_is_closed_however_its_block_ends(authority, door, how):
    async with managed(authority, door) as (manager, _), Asking(authority, door).client as client:
        inside = asyncio.Event()

        async def hold() -> None:
            async with client.connect("kernel://echo/nsm-1"):
                inside.set()
                if how == "error":
                    raise ZeroDivisionError
                await asyncio.Event().wait()

        holding = asyncio.create_task(hold())
        await inside.wait()
        if how != "error":
            holding.cancel()
        if how == "cancelled twice":
            await asyncio.sleep(0)
            holding.cancel()
        with pytest.raises((ZeroDivisionError, asyncio.CancelledError)):
            await holding
        assert manager.connections == ()
        assert client.wires == ()


async def test_it_is_refreshed_in_time_with_its_namespace_and_stays_the_same(authority, door):
    asking = Asking(authority, door, lifetime=SHORT, request_timeout=0.5)
    async with managed(authority, door, lifetime=SHORT) as (manager, seen):
        async with asking.client as client, client.connect("kernel://echo/nsm-1") as wire:
            before = wire.connection
            await until(lambda: len(seen.asked) >= 4, "three refreshes of a short wire", bar=2.5)
            assert wire.connection.ip == before.ip
            assert wire.connection.mechanism == before.mechanism
            assert seen.asked[-1].connection.mechanism.get("name") == "nsm-1"
            expiries = [one.expires for one in wire.connection.segments]
            assert min(expiries) > min(one.expires for one in before.segments)
            assert len(manager.connections) == 1
        assert asking.kinds == [Change.UP, Change.CLOSED]


async def test_what_the_mesh_refuses_leaves_the_block_with_its_sentence(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (manager, seen), asking.client as client:
        seen.refuse = NotFoundError("network service 'echo' is not found", hint="create it")
        with pytest.raises(NotFoundError, match="network service 'echo' is not found; create it"):
            async with client.connect("kernel://echo/nsm-1"):
                pass
        assert asking.kinds == [Change.REFUSED]
        assert manager.connections == ()
        assert client.wires == ()


async def test_with_patience_what_may_pass_is_tried_again(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (_, seen), asking.client as client:
        seen.refuse = NotFoundError("no endpoint yet")

        async def relent() -> None:
            await until(lambda: len(seen.asked) >= 2, "a second try", bar=1)
            seen.refuse = None

        relenting = asyncio.create_task(relent())
        async with client.connect("kernel://echo/nsm-1", patience=10):
            await relenting
        assert asking.kinds[:2] == [Change.REFUSED] * 2
        assert asking.kinds[-2:] == [Change.UP, Change.CLOSED]


async def test_with_patience_what_cannot_pass_is_not_tried_again(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (_, seen), asking.client as client:
        seen.refuse = InvalidError("no such thing")
        with pytest.raises(InvalidError):
            async with client.connect("kernel://echo/nsm-1", patience=10):
                pass
        assert len(seen.asked) == 1


@pytest.mark.parametrize(
    ("url", "error", "sentence"),
    [
        ("echo", InvalidError, "names no mechanism"),
        ("memif://echo", UnsupportedError, "mechanism 'memif' of memif://echo is not one"),
        ("kernel://echo/sixteen-bytes-xx", InvalidError, "has 16 bytes"),
    ],
)
async def test_what_cannot_be_asked_for_is_refused_here(authority, door, url, error, sentence):
    async with managed(authority, door) as (_, seen), Asking(authority, door).client as client:
        with pytest.raises(error, match=sentence):
            async with client.connect(url):
                pass
        assert seen.asked == []


async def test_a_manager_elsewhere_is_refused_before_anything_is_done(authority):
    with pytest.raises(InvalidError, match=r"'tcp://127\.0\.0\.1:1' is not on a unix socket"):
        Client("app", source=authority.source("/app"), manager="tcp://127.0.0.1:1")


async def test_a_manager_that_is_not_there_is_named(authority, door):
    async with Asking(authority, door).client as client:
        with pytest.raises(UnavailableError, match=r"door\.sock"):
            async with client.connect("kernel://echo/nsm-1"):
                pass


async def test_one_client_holds_a_name_once(authority, door):
    async with managed(authority, door), Asking(authority, door).client as client:
        async with client.connect("kernel://echo/nsm-1"):
            with pytest.raises(TakenError, match="holds a wire app-nsm-1 already, to 'echo'"):
                async with client.connect("kernel://ping/nsm-1"):
                    pass
        assert client.wires == ()


async def test_an_answer_whose_tokens_do_not_prove_themselves_is_refused_and_closed(
    authority, door, monkeypatch
):
    """The manager's own token, signed with a key that is not its certificate's."""
    forger = authority.svid("/mgr")

    def forged(svid, audience, lifetime, **more):
        return issue(forger, audience, lifetime, **more)

    monkeypatch.setattr("nsm.policy.tokens.issue", forged)
    async with managed(authority, door) as (manager, seen), Asking(authority, door).client as app:
        with pytest.raises(DeniedError, match=r"no sufficient privileges"):
            async with app.connect("kernel://echo/nsm-1"):
                pass
        assert len(seen.asked) == 1
        assert manager.connections == (), "what was refused was not closed"


async def test_an_address_in_use_is_refused_and_closed(authority, door):
    async def careless(conn):
        if conn.id and len(seen.asked) > 1:
            ip = replace(conn.context.ip, src_ip_addrs=("10.0.0.1/32",))
            return replace(conn, context=replace(conn.context, ip=ip))
        return conn

    seen = Witness(answer=careless)
    async with (
        managed(authority, door, seen) as (manager, _),
        Asking(authority, door).client as c,
        c.connect("kernel://echo/nsm-1"),
    ):
        with pytest.raises(PreconditionError, match=r"IP 10.0.0.1/32 is excluded, but it was"):
            async with c.connect("kernel://echo/nsm-2"):
                pass
        assert len(manager.connections) == 1


async def test_wires_exclude_one_anothers_addresses_unless_they_are_of_one_group(authority, door):
    aware = awareness_groups("[kernel://echo/nsm-1,kernel://echo/nsm-3]")
    asking = Asking(authority, door, awareness=aware)
    async with (
        managed(authority, door) as (_, seen),
        asking.client as client,
        client.connect("kernel://echo/nsm-1") as first,
        client.connect("kernel://echo/nsm-2"),
        client.connect("kernel://echo/nsm-3"),
    ):
        excluded = [one.connection.ip.excluded_prefixes for one in seen.asked]
        assert excluded == [
            (),
            ("10.0.0.1/32", "10.0.0.0/32"),
            ("10.0.0.3/32", "10.0.0.2/32"),
        ]
        assert first.connection.ip.excluded_prefixes == ()


# --- what an earlier life left


def elsewhere(conn):
    """The same in another network namespace."""
    return replace(conn, mechanism=conn.mechanism.with_(inodeURL="inode://4/1"))


async def leave_behind(authority, door, url="kernel://echo/nsm-1", id_="app-0"):
    """A wire whose client died without a word; returns its connection."""
    async with Asking(authority, door).client as client, client.connect(url, id_=id_) as wire:
        conn, wire.made = wire.connection, None
    return conn


async def test_a_wire_of_an_earlier_life_is_taken_over(authority, door):
    async with managed(authority, door) as (manager, _):
        before = await leave_behind(authority, door)
        assert len(manager.connections) == 1
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo/nsm-1", id_="app-0") as wire,
        ):
            assert [s.id for s in wire.connection.segments] == [s.id for s in before.segments]
            assert wire.connection.ip == before.ip
            assert wire.interface == "nsm-1"
            assert len(manager.connections) == 1
        assert manager.connections == ()


@pytest.mark.parametrize("url", ["kernel://ping/nsm-1", "kernel://echo/nsm-2"])
async def test_one_that_is_not_wanted_any_more_is_closed(authority, door, url):
    async with managed(authority, door) as (manager, _):
        before = await leave_behind(authority, door)
        async with (
            Asking(authority, door).client as client,
            client.connect(url, id_="app-0") as wire,
        ):
            assert wire.connection.segments[1].id != before.segments[1].id
            assert len(manager.connections) == 1


async def test_one_in_another_namespace_is_left_alone(authority, door):
    async with managed(authority, door) as (manager, _):
        await leave_behind(authority, door)
        (held,) = manager._hop.connections.established()
        held.made = elsewhere(held.made)
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo/nsm-2", id_="app-0"),
        ):
            assert len(manager.connections) == 2
        assert len(manager.connections) == 1


@pytest.mark.parametrize("dead", ["first", "last"])
async def test_beside_one_that_died_with_its_namespace_the_living_one_is_taken_over(
    authority, door, dead
):
    """A manager holds the dead one until its lease ends, and tells both in no certain order."""
    async with managed(authority, door) as (manager, _):
        before = [
            await leave_behind(authority, door, f"kernel://echo/nsm-{turn}", id_=f"app-{turn}")
            for turn in range(2)
        ]
        old = before[0] if dead == "first" else before[1]
        for held in manager._hop.connections.established():
            segments = (replace(held.made.segments[0], id="app-0"), held.made.segments[1])
            held.made = replace(held.made, path=replace(held.made.path, segments=segments))
            if held.id == old.segments[1].id:
                held.made = replace(elsewhere(held.made), state=State.DOWN)
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo", id_="app-0") as wire,
        ):
            (lives,) = (one for one in before if one is not old)
            assert wire.connection.segments[1].id == lives.segments[1].id
            assert len(manager.connections) == 2


async def test_the_end_of_a_dead_one_with_the_same_id_is_no_wire_s_end(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (manager, seen):
        await leave_behind(authority, door)
        (dead,) = manager._hop.connections.established()
        dead.made = elsewhere(dead.made)
        async with (
            asking.client as client,
            client.connect("kernel://echo/nsm-2", id_="app-0") as wire,
        ):
            await watched(manager)
            manager._hop.leases.release(dead.id)
            await manager._hop.expire(dead.id)
            (held,) = manager._hop.connections.established()
            manager._hop._asked_again(held)  # what is told after it is heard after it
            await until(lambda: len(seen.asked) == 3, "a refresh that was asked for", bar=0.5)
            assert seen.asked[-1].connection.state == State.UP
            assert wire.up
        assert asking.kinds == [Change.UP, Change.CLOSED]


async def test_one_that_is_down_and_whose_end_does_not_answer_is_led_elsewhere(authority, door):
    async with managed(authority, door) as (manager, seen):
        before = await leave_behind(authority, door)
        (held,) = manager._hop.connections.established()
        manager._hop._down(held)
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo/nsm-1", id_="app-0") as wire,
        ):
            assert wire.up
        again = seen.asked[-1].connection
        assert again.state == State.RESELECT_REQUESTED
        assert [s.id for s in again.segments] == [s.id for s in before.segments]
        assert manager.connections == ()


async def test_one_that_is_refused_is_not_forgotten(authority, door):
    """Asked for as something new, it would meet its own interface."""
    async with managed(authority, door) as (_, seen):
        before = await leave_behind(authority, door)
        seen.refuse = UnavailableError("its endpoint is away")
        asking = Asking(authority, door)

        async def relent() -> None:
            await until(lambda: len(seen.asked) >= 3, "two tries", bar=1)
            seen.refuse = None

        relenting = asyncio.create_task(relent())
        async with (
            asking.client as client,
            client.connect("kernel://echo/nsm-1", id_="app-0", patience=10) as wire,
        ):
            await relenting
            assert [s.id for s in wire.connection.segments] == [s.id for s in before.segments]
        tries = [[s.id for s in one.connection.segments] for one in seen.asked[1:]]
        assert tries == [[s.id for s in before.segments]] * len(tries)


# --- what the manager tells


async def test_a_wire_the_manager_deleted_is_asked_for_again_from_anybody(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (manager, seen):
        async with asking.client as client, client.connect("kernel://echo/nsm-1") as wire:
            await watched(manager)
            (held,) = manager._hop.connections.established()
            manager._hop.leases.release(held.id)
            await manager._hop.expire(held.id)
            await until(lambda: len(seen.asked) == 2 and wire.up, "a deleted wire is back", bar=0.5)
            again = seen.asked[1].connection
            assert again.state == State.RESELECT_REQUESTED
            assert (again.mechanism, again.endpoint) == (None, "")
            assert [s.name for s in again.segments] == ["app", "manager"]
        assert asking.kinds == [Change.UP, Change.DOWN, Change.UP, Change.CLOSED]


async def test_silence_of_who_is_being_left_is_no_loss_of_what_comes_after(authority, door):
    """A hop closed the wire, and its pings fall silent while another is still being asked for."""

    class Slow(Witness):
        async def establish(self, asked, held, caller, undo):
            if asked.connection.state == State.RESELECT_REQUESTED:
                wire.news.fell_silent()
            return await super().establish(asked, held, caller, undo)

    asking = Asking(authority, door)
    async with managed(authority, door, Slow()) as (manager, seen):
        async with asking.client as client, client.connect("kernel://echo/nsm-1") as wire:
            await watched(manager)
            (held,) = manager._hop.connections.established()
            manager._hop.events.publish(EventType.DELETE, held.made, held.previous)
            await until(lambda: len(seen.asked) >= 2 and wire.up, "a deleted wire is back", bar=0.5)
            wire.refresh()
            await until(lambda: len(seen.asked) >= 3, "whatever came after", bar=0.5)
        assert asking.kinds == [Change.UP, Change.DOWN, Change.UP, Change.CLOSED]


async def test_every_loss_says_its_cause_when_it_began_and_what_healing_took(authority, door):
    told = []
    asking = Asking(
        authority, door, on_change=lambda what, wire, _: told.append((what, wire.trouble))
    )
    async with (
        managed(authority, door) as (manager, seen),
        asking.client as client,
        client.connect("kernel://echo/nsm-1") as wire,
    ):
        await watched(manager)
        assert wire.trouble is None
        (held,) = manager._hop.connections.established()
        before = time.monotonic()
        manager._hop._down(held)
        await until(lambda: len(seen.asked) == 2 and wire.up, "a wire that was down", bar=0.5)
        manager._hop.events.publish(EventType.DELETE, held.made, held.previous)
        await until(lambda: len(seen.asked) == 3 and wire.up, "one that is gone", bar=0.5)
    (_, first), (down, lost), (up, healed), (_, gone), (_, back), _ = told
    assert first is None
    assert (down, up) == (Change.DOWN, Change.UP)
    assert (lost.cause, lost.endpoint, lost.healed) == (Cause.CONTROL, "manager", 0.0)
    assert before < lost.began <= lost.noticed < healed.healed
    assert (healed.began, healed.cause, healed.tries) == (lost.began, lost.cause, 1)
    assert {"unnoticed", "unasked", "calling", "manager"} <= set(healed.stages)
    assert 0 < healed.seconds < 10
    assert gone.cause == back.cause == Cause.DELETED


async def test_a_wire_the_manager_calls_down_is_asked_for_again_as_it_is(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (manager, seen):
        async with asking.client as client, client.connect("kernel://echo/nsm-1") as wire:
            await watched(manager)
            (held,) = manager._hop.connections.established()
            manager._hop._down(held)
            await until(lambda: len(seen.asked) == 2 and wire.up, "a wire that was down", bar=0.5)
            assert seen.asked[1].connection.endpoint == "manager"
            assert seen.asked[1].connection.mechanism.type == "KERNEL"
        assert asking.kinds == [Change.UP, Change.DOWN, Change.UP, Change.CLOSED]


async def test_a_manager_may_ask_for_a_refresh(authority, door):
    asking = Asking(authority, door)
    async with managed(authority, door) as (manager, seen):
        async with asking.client as client, client.connect("kernel://echo/nsm-1"):
            await watched(manager)
            (held,) = manager._hop.connections.established()
            wanted = replace(held.made, state=State.REFRESH_REQUESTED)
            manager._hop.events.publish(EventType.UPDATE, wanted, held.previous)
            await until(lambda: len(seen.asked) == 2, "a refresh that was asked for", bar=0.5)
        assert asking.kinds == [Change.UP, Change.CLOSED]


async def test_a_try_that_fails_further_on_is_not_the_reason_for_the_next(authority, door):
    """The hops that took it say so, and then that it is down: both are news."""

    times = []

    class Halfway(Witness):
        async def establish(self, asked, held, caller, undo):
            times.append(time.monotonic())
            if self.refuse:
                for state in (State.UP, State.DOWN):
                    news = replace(held.made, state=state)
                    manager._hop.events.publish(EventType.UPDATE, news, held.previous)
            return await super().establish(asked, held, caller, undo)

    asking = Asking(authority, door)
    async with (
        managed(authority, door, Halfway()) as (manager, seen),
        asking.client as client,
        client.connect("kernel://echo/nsm-1") as wire,
    ):
        await watched(manager)
        seen.refuse = TakenError("a route is there")
        wire.refresh()
        await until(lambda: len(seen.asked) == 7, "tries that fail", bar=2, record=False)
        assert times[6] - times[2] > 0.8 * (0.2 + 0.3 + 0.5 + 0.8)  # the first news is heeded
        seen.refuse = None
        await until(lambda: wire.up, "the wire is up again", bar=1)


async def test_a_wish_names_the_endpoint_and_shapes_each_request(authority, door):
    answers, more = [], ["10.7.0.0/32"]

    def shaped(context):
        return replace(context, mtu=1400, ip=replace(context.ip, src_ip_addrs=tuple(more)))

    wish = Wish(endpoint="manager", shape=shaped, on_answer=lambda wire: answers.append(wire.mtu))
    async with (
        managed(authority, door) as (_, seen),
        Asking(authority, door).client as client,
        client.connect("kernel://echo/nsm-1", wish=wish) as wire,
    ):
        more.append("10.7.0.1/32")
        wire.refresh()
        await until(lambda: len(answers) == 2, "a refresh that was asked for", bar=0.5)
    assert [one.connection.endpoint for one in seen.asked] == ["manager", "manager"]
    assert [one.connection.context.mtu for one in seen.asked] == [1400, 1400]
    assert [one.connection.context.ip.src_ip_addrs for one in seen.asked] == [
        ("10.7.0.0/32",),
        ("10.7.0.0/32", "10.7.0.1/32"),
    ]


async def test_a_wire_that_may_lead_to_one_endpoint_is_not_led_to_another(authority, door):
    async with managed(authority, door) as (manager, seen):
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo/nsm-1", wish=Wish(endpoint="manager")),
        ):
            await watched(manager)
            (held,) = manager._hop.connections.established()
            manager._hop.events.publish(EventType.DELETE, held.made, held.previous)
            await until(lambda: len(seen.asked) == 2, "a wire that was asked for again", bar=0.5)
        assert seen.asked[1].connection.state == State.RESELECT_REQUESTED
        assert seen.asked[1].connection.endpoint == "manager"


async def test_what_an_endpoint_said_of_names_is_not_carried_to_another(authority, door):
    async with managed(authority, door) as (manager, seen):
        own = DNSConfig(("10.9.0.1",), ("echo",))
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo/nsm-1") as wire,
        ):
            assert wire.made
            said = replace(wire.made.context, dns=DNSContext((own,)))
            wire.made = replace(wire.made, context=said)
            await watched(manager)
            (held,) = manager._hop.connections.established()
            manager._hop.events.publish(EventType.DELETE, held.made, held.previous)
            await until(lambda: len(seen.asked) == 2, "a wire that was asked for again", bar=0.5)
        assert seen.asked[1].connection.state == State.RESELECT_REQUESTED
        assert seen.asked[1].connection.context.dns is None


async def test_a_wire_led_elsewhere_is_not_led_on_where_the_old_ends_words_cannot_go_at_once(
    authority, door
):
    class Moving(Witness):
        async def establish(self, asked, held, caller, undo):
            if asked.connection.state == State.RESELECT_REQUESTED:
                self._name, self.addresses = "other", FromPools(Pools([["10.5.0.0/24"]]))
            made = await super().establish(asked, held, caller, undo)
            if asked.connection.state == State.RESELECT_REQUESTED:
                self.refuse = UnavailableError("its forwarder was killed")
            return made

    asking = Asking(authority, door)
    async with managed(authority, door, Moving()) as (manager, seen):
        async with asking.client as client, client.connect("kernel://echo/nsm-1") as wire:
            await watched(manager)
            (held,) = manager._hop.connections.established()
            manager._hop.events.publish(EventType.DELETE, held.made, held.previous)
            await until(lambda: len(seen.asked) >= 3, "a try to clear up", bar=0.5)
            assert seen.asked[2].connection.context.ip.dst_ip_addrs == ("10.5.0.0/32",)
            seen.refuse = None
            await until(
                lambda: wire.connection.ip.dst_ip_addrs == ("10.5.0.0/32",),
                "what the old endpoint said to be gone",
                bar=1,
            )
            assert (wire.up, wire.endpoint) == (True, "other")
        states = [one.connection.state for one in seen.asked]
        assert states.count(State.RESELECT_REQUESTED) == 1, states
        assert wire.trouble.endpoint == "manager"


async def test_a_wire_that_was_left_stands_for_the_next_life(authority, door):
    async with managed(authority, door) as (manager, _):
        for _ in range(2):
            async with (
                Asking(authority, door).client as client,
                client.connect("kernel://echo", id_="app-0") as wire,
            ):
                wire.leave()
            assert len(manager.connections) == 1


async def test_a_wire_that_is_being_taken_over_is_closed_by_a_stop_as_well(authority, door):
    async with managed(authority, door) as (manager, seen):
        async with (
            Asking(authority, door).client as client,
            client.connect("kernel://echo", id_="app-0") as wire,
        ):
            wire.leave()

        async def again():
            async with (
                Asking(authority, door).client as client,
                client.connect("kernel://echo", id_="app-0"),
            ):
                pass

        seen.hangs = True
        second = asyncio.create_task(again())
        await until(lambda: len(seen.asked) == 2, "the wire to be asked for again", bar=0.5)
        second.cancel()
        await asyncio.wait({second})
        assert manager.connections == ()


async def test_a_manager_that_was_restarted_gets_the_wire_again(authority, door):
    asking = Asking(authority, door)
    async with contextlib.AsyncExitStack() as outer:
        second = await outer.enter_async_context(contextlib.AsyncExitStack())
        first = contextlib.AsyncExitStack()
        manager, _ = await first.enter_async_context(managed(authority, door))
        client = await outer.enter_async_context(asking.client)
        wire = await outer.enter_async_context(client.connect("kernel://echo/nsm-1"))
        await watched(manager)
        ids = [segment.id for segment in wire.connection.segments]
        await first.aclose()
        manager, seen = await second.enter_async_context(managed(authority, door))
        await until(lambda: manager.connections, "a restarted manager has the wire", bar=1)
        await until(lambda: wire.up, "the wire is up again")
        assert [segment.id for segment in wire.connection.segments] == ids
        assert [str(one) for one in wire.addresses] == ["10.0.0.1/32"]
        assert seen.asked[0].connection.state == State.UP, "a working wire was given up"
    assert manager.connections == ()


async def test_a_stream_that_was_ended_on_purpose_means_nothing(authority, door, monkeypatch):
    streams = []

    async def cancelled(self, stream):
        await stream.recv_message()
        streams.append(stream)
        await stream.send_message(wire.to_pb(Event(EventType.INITIAL_STATE_TRANSFER, {})))
        raise GRPCError(Status.CANCELLED, "closed on purpose")

    monkeypatch.setattr(services.Monitors, "MonitorConnections", cancelled)
    asking = Asking(authority, door)
    async with (
        managed(authority, door) as (_, seen),
        asking.client as client,
        client.connect("kernel://echo/nsm-1"),
    ):
        await until(lambda: len(streams) >= 3, "a stream opened three times", bar=1)
        assert len(seen.asked) == 1
    assert asking.kinds == [Change.UP, Change.CLOSED]


async def test_while_the_manager_is_away_a_refresh_is_tried_again_and_the_wire_stays(
    authority, door
):
    asking = Asking(authority, door)
    async with contextlib.AsyncExitStack() as outer:
        second = await outer.enter_async_context(contextlib.AsyncExitStack())
        first = contextlib.AsyncExitStack()
        manager, _ = await first.enter_async_context(managed(authority, door))
        client = await outer.enter_async_context(asking.client)
        wire = await outer.enter_async_context(client.connect("kernel://echo/nsm-1"))
        await watched(manager)
        await first.aclose()
        began = time.monotonic()
        await until(lambda: wire.news.waiting, "a refresh that failed", bar=0.5)
        assert wire.up, "the kernel still carries it"
        await second.enter_async_context(managed(authority, door))
        await until(lambda: not wire.news.waiting, "the wire is refreshed again", bar=1)
        assert time.monotonic() - began < 10


async def test_a_mesh_that_is_busy_is_asked_again_and_the_wire_is_not_called_down(authority, door):
    """Who holds more wires than may be asked for at once asks for all when its manager is back."""
    asking = Asking(authority, door)
    async with (
        managed(authority, door) as (manager, seen),
        asking.client as client,
        client.connect("kernel://echo/nsm-1") as wire,
    ):
        await watched(manager)
        seen.refuse = ExhaustedError("128 requests under way")
        wire.refresh()
        await until(lambda: len(seen.asked) == 3, "two tries", bar=1)
        seen.refuse = None
        await until(lambda: not wire.news.waiting, "the wire is refreshed again", bar=1)
        assert asking.kinds == [Change.UP]


async def test_a_wire_that_cannot_be_closed_says_what_will_end_it(authority, door, monkeypatch):
    monkeypatch.setattr("nsm.client.CLOSE_WITHIN", 0.5)
    stack = contextlib.AsyncExitStack()
    manager, _ = await stack.enter_async_context(managed(authority, door))
    async with Asking(authority, door).client as client:
        wire = client.connect("kernel://echo/nsm-1")
        await wire.__aenter__()
        await watched(manager)
        await stack.aclose()
        with pytest.raises(PreconditionError, match="it ends by itself when its tokens expire"):
            await wire.__aexit__(None, None, None)


async def watched(manager) -> None:
    """The client's monitor stream is open at the manager."""
    await until(lambda: len(manager._hop.events), "a monitor stream", bar=0.5)


def test_the_url_of_a_wire_reads_back():
    assert str(parse("kernel://echo/nsm-1?app=x")) == "kernel://echo/nsm-1?app=x"
    assert Segment("app", "app-0").token == ""

"""A service's rules are edited: which wires are led elsewhere, and how they get there."""

import asyncio
from dataclasses import replace

import pytest

from forwarder.edits import Edits
from nsm.errors import UnavailableError
from nsm.model import (
    Context,
    Destination,
    Endpoint,
    Found,
    IPContext,
    Match,
    Service,
    State,
)
from tests.support.callers import Mesh
from tests.unit.forwarder.test_route import ASKED, Endpoints, Forwarder, Kernel

OLD = IPContext(src_ip_addrs=("172.16.1.101/32",), dst_ip_addrs=("172.16.1.100/32",))
WITH_ADDRESSES = replace(ASKED, context=Context(ip=OLD))


def rules(colour: str) -> Service:
    to = Destination({"colour": colour} if colour else {})
    return Service("vpn", "ETHERNET", (Match(routes=(to,)),))


class Registry:
    """What the manager says; it knows a service only after being asked so many times."""

    def __init__(self, service: Service, late: int = 0) -> None:
        self.services = [service]
        self.late = late
        self.before: list[Service] = []

    async def find_services(self, query):
        if self.late:
            self.late -= 1
            return self.before
        return self.services

    async def find_endpoints(self, query, *, fds):
        return [
            Endpoint("e-a", ("vpn",), {"vpn": {"colour": "blue"}}, "unix:/a"),
            Endpoint("e-b", ("vpn",), {"vpn": {"colour": "green"}}, "unix:/b"),
        ]


@pytest.fixture
async def forwarder():
    made = Forwarder(Mesh(), Kernel(), Endpoints())
    yield made
    made.hop.stop()
    await asyncio.gather(*made.tasks)


def leave(forwarder):
    (held,) = forwarder.hop.connections.established()
    forwarder.hop.route.leave(held.id)


async def test_a_wire_that_leaves_goes_where_the_rules_lead_before_the_old_one_is_closed(forwarder):
    made = await forwarder.request(WITH_ADDRESSES)
    assert (made.endpoint, made.ip.src_ip_addrs) == ("e-a", OLD.src_ip_addrs)
    leave(forwarder)
    del forwarder.mesh.listed["e-a"]
    asked = listen(forwarder)
    moved = await forwarder.request(made)
    assert moved.endpoint == "e-b"
    assert moved.ip.src_ip_addrs == OLD.src_ip_addrs  # which e-b can give it
    (told,) = asked
    assert len(told.segments) == told.index + 1  # a way of its own, or closing ends both
    assert told.id == told.segments[-1].id != made.segments[1].id
    assert told.state == State.UP
    assert moved.segments[1].id == made.segments[1].id  # of which who asks sees nothing
    assert moved.segments[-1].id == "id at unix:/b"
    ((old, leg),) = forwarder.kernel.placed
    assert (old, bool(leg)) == ("", True)
    await forwarder.said_goodbye()
    assert forwarder.mesh.log[-2:] == [("request", "unix:/b"), ("close", "unix:/a")]
    assert forwarder.mesh.closed.id == made.segments[1].id
    assert len(forwarder.kernel.wires) == 1
    again = await forwarder.request(moved)
    assert (again.endpoint, asked[-1].id) == ("e-b", told.id)
    await forwarder.close(again)
    assert forwarder.mesh.closed.id == told.id
    assert not forwarder.kernel.wires


async def test_addresses_that_the_new_endpoint_cannot_give_do_not_stay(forwarder):
    made = await forwarder.request(WITH_ADDRESSES)
    leave(forwarder)
    del forwarder.mesh.listed["e-a"]
    asked = listen(forwarder)
    forwarder.mesh.gives = IPContext(src_ip_addrs=("10.2.0.1/32",), dst_ip_addrs=("10.2.0.0/32",))
    moved = await forwarder.request(made)
    assert moved.ip.src_ip_addrs == ("10.2.0.1/32",)
    assert moved.ip.dst_ip_addrs == ("10.2.0.0/32",)
    assert len({one.id for one in asked}) == 1
    assert len(asked) == 2


async def test_who_did_not_hear_of_a_move_means_what_stands(forwarder):
    made = await forwarder.request()
    leave(forwarder)
    forwarder.mesh.listed = {"e-b": "unix:/b"}
    await forwarder.request(made)
    forwarder.mesh.listed |= {"e-a": "unix:/a"}
    assert (await forwarder.request(made)).endpoint == "e-b"  # the answer was lost
    assert (await forwarder.request(made)).endpoint == "e-b"


async def test_a_reselect_goes_to_another_endpoint_before_it_lets_go(forwarder):
    made = await forwarder.request()
    moved = await forwarder.request(reselecting(made))
    assert moved.endpoint == "e-b"
    assert len(forwarder.kernel.placed) == 1
    await forwarder.said_goodbye()
    assert forwarder.mesh.log[-2:] == [("request", "unix:/b"), ("close", "unix:/a")]


async def test_a_reselect_where_there_is_nobody_else_asks_the_old_one_to_make_it_anew(forwarder):
    made = await forwarder.request()
    forwarder.mesh.listed = {"e-a": "unix:/a"}
    asked = listen(forwarder)
    assert (await forwarder.request(reselecting(made))).endpoint == "e-a"
    (told,) = asked
    assert told.state == State.RESELECT_REQUESTED
    assert [one.id for one in told.segments] == [one.id for one in made.segments]
    assert ("close", "unix:/a") not in forwarder.mesh.log


async def test_a_reselect_that_finds_nobody_destroys_nothing(forwarder):
    made = await forwarder.request()
    forwarder.mesh.listed = {"e-a": "unix:/a", "e-b": "unix:/b"}
    forwarder.mesh.dead |= {"unix:/a", "unix:/b"}
    with pytest.raises(UnavailableError):
        await forwarder.request(reselecting(made))
    assert forwarder.kernel.wires == {made.segments[1].id}
    assert ("close", "unix:/a") not in forwarder.mesh.log
    forwarder.mesh.dead.clear()
    assert (await forwarder.request(made)).endpoint == "e-a"


async def test_of_a_node_that_may_have_died_others_are_asked_last(forwarder):
    forwarder.mesh.listed = {"e-a": "tcp://10.0.0.2:5001"}
    forwarder.mesh.payload = "IP"
    made = await forwarder.request()
    forwarder.mesh.listed |= {"e-c": "tcp://10.0.0.2:5001", "e-d": "tcp://10.0.0.3:5001"}
    forwarder.mesh.dead.add("tcp://10.0.0.2:5001")
    forwarder.mesh.log.clear()
    assert (await forwarder.request(reselecting(made))).endpoint == "e-d"
    assert forwarder.mesh.log[0] == ("request", "tcp://10.0.0.3:5001")


def reselecting(conn):
    return replace(conn, state=State.RESELECT_REQUESTED, endpoint="", mechanism=None)


def listen(forwarder):
    """What endpoints are asked from now on."""
    asked = []
    ask = forwarder.mesh.request

    async def asking(url, request, **how):
        asked.append(request.connection)
        return await ask(url, request, **how)

    forwarder.mesh.request = asking
    return asked


async def test_where_nobody_takes_it_it_stays(forwarder):
    made = await forwarder.request()
    leave(forwarder)
    forwarder.mesh.listed = {"e-b": "unix:/b"}
    forwarder.mesh.dead.add("unix:/b")
    assert (await forwarder.request(made)).endpoint == "e-a"
    forwarder.mesh.log.clear()
    assert (await forwarder.request(made)).endpoint == "e-a"
    assert forwarder.mesh.log == [("request", "unix:/a")]  # it left once
    assert len(forwarder.kernel.wires) == 1


async def test_who_asked_for_an_endpoint_by_name_keeps_it(forwarder):
    made = await forwarder.request(replace(ASKED, endpoint="e-a"))
    leave(forwarder)
    del forwarder.mesh.listed["e-a"]
    assert (await forwarder.request(made)).endpoint == "e-a"
    assert ("request", "unix:/b") not in forwarder.mesh.log


async def states(forwarder, registry, *told) -> list[State]:
    """Those of the wires once all that was told is judged."""
    edits = Edits(forwarder.hop, forwarder.hop.route, registry, forwarder.spawn)
    for found in told:
        edits.heard(found)
    while forwarder.tasks:
        await forwarder.tasks.pop()
    return [held.made.state for held in forwarder.hop.connections.established()]


@pytest.mark.parametrize(
    ("before", "now", "state"),
    [
        ("blue", "green", State.REFRESH_REQUESTED),
        ("", "green", State.REFRESH_REQUESTED),
        ("blue", "", State.UP),
        ("blue", "blue", State.UP),
        ("blue", "red", State.UP),
    ],
    ids=["to another", "to one of them", "to anybody", "as before", "to nobody"],
)
async def test_only_wires_that_would_lead_elsewhere_are_asked_for_again(
    forwarder, before, now, state
):
    await forwarder.request()
    told = (Found(rules(before)), Found(rules(now)))
    assert await states(forwarder, Registry(rules(now)), *told) == [state]


async def test_what_was_never_heard_before_is_no_edit_nor_is_an_end(forwarder):
    await forwarder.request()
    registry = Registry(rules("green"))
    assert await states(forwarder, registry, Found(rules("green"))) == [State.UP]
    gone = (Found(rules("blue")), Found(rules("green"), deleted=True))
    assert await states(forwarder, registry, *gone) == [State.UP]


async def test_one_that_was_asked_for_by_name_is_not_asked_for_again(forwarder):
    await forwarder.request(replace(ASKED, endpoint="e-a"))
    told = (Found(rules("blue")), Found(rules("green")))
    assert await states(forwarder, Registry(rules("green")), *told) == [State.UP]


async def test_a_manager_that_hears_later_is_waited_for(forwarder):
    await forwarder.request()
    registry = Registry(rules("green"), late=2)
    registry.before = [rules("blue")]
    told = (Found(rules("blue")), Found(rules("green")))
    assert await states(forwarder, registry, *told) == [State.REFRESH_REQUESTED]
    assert registry.late == 0


async def test_what_is_edited_twice_is_judged_by_the_last(forwarder):
    await forwarder.request()
    told = (Found(rules("blue")), Found(rules("green")), Found(rules("blue")))
    assert await states(forwarder, Registry(rules("blue")), *told) == [State.UP]

"""What a proxy remembers of where endpoints are met, and for how long."""

import asyncio

import pytest

from nsm.errors import ExhaustedError
from nsm.model import SECOND
from nsmgr.proxy import names as module
from nsmgr.proxy.names import FOUND, Names


class Clock:
    now = 1000 * SECOND

    def __call__(self):
        return self.now


async def test_what_was_found_ends_and_is_replaced_and_is_forgotten_where_nobody_answers():
    clock = Clock()
    names = Names(clock)
    names.find("nse@two", "tcp://a:1")
    assert names.found("nse@two") == "tcp://a:1"
    names.find("nse@two", "tcp://b:1")
    assert names.found("nse@two") == "tcp://b:1"
    names.lose("nse@two", "tcp://a:1")
    assert names.found("nse@two") == "tcp://b:1", "that is another's failure"
    names.lose("nse@two", "tcp://b:1")
    assert names.found("nse@two") == ""
    names.find("nse@two", "tcp://b:1")
    clock.now += FOUND
    assert names.found("nse@two") == ""


async def test_what_was_found_ends_with_the_endpoint():
    clock = Clock()
    names = Names(clock)
    names.find("nse@two", "tcp://a:1", clock.now + SECOND)
    clock.now += SECOND
    assert names.found("nse@two") == ""


async def test_no_more_is_remembered_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    names = Names(Clock())
    for name in "abca":
        names.find(name, f"tcp://{name}")
    assert [names.found(name) for name in "abc"] == ["tcp://a", "", "tcp://c"]


async def test_no_more_registers_than_there_is_room_for_and_what_ended_makes_room(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    clock = Clock()
    names = Names(clock)
    for name in "abb":
        names.register(name, f"tcp://{name}", clock.now + SECOND)
    with pytest.raises(ExhaustedError, match="2 endpoints are registered"):
        names.register("c", "tcp://c", clock.now + SECOND)
    assert [names.registered(name) for name in "abc"] == ["tcp://a", "tcp://b", ""]
    clock.now += SECOND
    names.register("c", "tcp://c", clock.now + SECOND)
    assert names.registered("c") == "tcp://c"


async def test_a_registration_ends_with_itself_and_is_no_finding():
    clock = Clock()
    names = Names(clock)
    names.register("nse@three", "tcp://m:1", clock.now + SECOND)
    names.lose("nse@three")
    assert names.registered("nse@three") == "tcp://m:1"
    assert names.found("nse@three") == ""
    clock.now += SECOND
    assert names.registered("nse@three") == ""
    names.register("nse@three", "tcp://m:1", clock.now + SECOND)
    names.unregister("nse@three")
    assert names.registered("nse@three") == ""


async def test_who_waits_for_a_registration_gets_it_when_it_comes():
    names = Names()
    assert await names.comes("nse@three", 0.0) == ""
    waiting = asyncio.create_task(names.comes("nse@three", 5.0))
    await asyncio.sleep(0)
    far = names._clock() + 60 * SECOND
    names.register("other@three", "tcp://o:1", far)
    await asyncio.sleep(0)
    names.register("nse@three", "tcp://m:1", far)
    assert await waiting == "tcp://m:1"

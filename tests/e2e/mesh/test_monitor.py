"""MonitorConnections as stock grpcio sees it: whose connections, and all that becomes of them."""

import json
import os
import signal
from typing import Any

import pytest

from labs import state
from labs.alive import Mark, started
from tests.e2e.mesh.conftest import Asker, Mesh
from tests.support.wait import until

EVERYTHING: dict[str, Any] = {}


class Watching:
    """A monitor stream of somebody, for a block."""

    def __init__(self, who: Asker, to: str, selector: dict[str, Any]) -> None:
        self._who, self._to, self._selector = who, to, selector
        self._name = f"{to} {json.dumps(selector)}"

    async def __aenter__(self) -> "Watching":
        self._who.have("watch", name=self._name, selector=self._selector, to=self._to)
        await until(lambda: self.events, "the initial transfer", record=False)
        assert self.events[0]["type"] == "INITIAL_STATE_TRANSFER"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._who.have("unwatch", name=self._name)

    @property
    def heard(self) -> dict[str, Any]:
        return self._who.have("heard", name=self._name)["heard"]

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.heard["events"]

    @property
    def initial(self) -> dict[str, Any]:
        return self.events[0]["connections"]

    def of(self, id_: str, kind: str) -> list[dict[str, Any]]:
        """What events of that kind said of the connection that the hop calls id_."""
        told = [event["connections"] for event in self.events if event["type"] == kind]
        return [connections[id_] for connections in told if id_ in connections]


@pytest.fixture
def operator(mesh: Mesh) -> Asker:
    return mesh.askers["operator"]


@pytest.fixture
def manager(mesh: Mesh) -> Asker:
    """Somebody with the certificate of node-1's manager."""
    return mesh.askers["manager"]


@pytest.mark.parametrize("to", ["manager", "forwarder"])
async def test_a_stream_begins_with_what_there_is_be_it_nothing(alice, to):
    async with Watching(alice, to, EVERYTHING) as stream:
        assert stream.events == [{"type": "INITIAL_STATE_TRANSFER", "connections": {}}]


async def test_a_wire_is_told_when_it_comes_is_refreshed_and_goes(alice, manager):
    async with (
        Watching(alice, "manager", EVERYTHING) as near,
        Watching(manager, "forwarder", EVERYTHING) as far,
    ):
        wire = alice.have("connect", url="kernel://echo/nsm-1")
        _, at_manager, at_forwarder, _ = [hop["id"] for hop in wire["path"]]
        for stream, id_ in ((near, at_manager), (far, at_forwarder)):
            await until(lambda: stream.of(id_, "UPDATE"), "the first update")  # noqa: B023
            (made,) = stream.of(id_, "UPDATE")
            assert made["state"] == "UP"
            assert made["service"] == "echo"
            names = [name for name, _ in made["path"]]
            assert names == ["alice", "nsmgr-node-1", "forwarder-node-1", "responder"]
        alice.have("refresh", wire=wire["wire"])
        for stream, id_ in ((near, at_manager), (far, at_forwarder)):
            await until(lambda: len(stream.of(id_, "UPDATE")) == 2, "the refresh")  # noqa: B023
            before, after = stream.of(id_, "UPDATE")
            assert after["path"] == before["path"]
            assert min(after["expires"]) >= min(before["expires"])
            assert after["expires"] != before["expires"]
        alice.have("close", wire=wire["wire"])
        for stream, id_ in ((near, at_manager), (far, at_forwarder)):
            await until(lambda: stream.of(id_, "DELETE"), "the end")  # noqa: B023
            assert stream.events[-1]["type"] == "DELETE"


async def test_what_was_there_before_is_in_the_initial_transfer(alice):
    wire = alice.have("connect", url="kernel://echo/nsm-1")
    async with Watching(alice, "manager", EVERYTHING) as stream:
        assert list(stream.initial) == [wire["path"][1]["id"]]
    alice.have("close", wire=wire["wire"])


@pytest.mark.parametrize(
    ("selector", "seen"),
    [
        ({"pathSegments": [{"name": "alice"}]}, True),
        ({"pathSegments": [{"id": "alice-nsm-1"}]}, True),
        ({"pathSegments": [{"name": "nsmgr-node-1"}, {"name": "forwarder-node-1"}]}, True),
        ({"pathSegments": [{"name": "alice"}, {"name": "forwarder-node-1"}]}, False),
        ({"pathSegments": [{"name": "bob"}]}, False),
        ({"networkServices": ["echo", "tiny"]}, True),
        ({"networkServices": ["tiny"]}, False),
    ],
    ids=str,
)
async def test_a_selector_chooses_by_any_run_of_the_path_and_by_service(alice, selector, seen):
    wire = alice.have("connect", url="kernel://echo/nsm-1")
    async with Watching(alice, "manager", selector) as stream:
        assert bool(stream.initial) == seen
    alice.have("close", wire=wire["wire"])


async def test_everybody_sees_only_what_is_theirs(alice, bob, manager):
    async with (
        Watching(bob, "manager", EVERYTHING) as at_manager,
        Watching(bob, "forwarder", EVERYTHING) as at_forwarder,
        Watching(manager, "manager", EVERYTHING) as as_manager,
    ):
        wire = alice.have("connect", url="kernel://echo/nsm-1")
        own = bob.have("connect", url="kernel://echo/nsm-1")
        alice.have("close", wire=wire["wire"])
        bob.have("close", wire=own["wire"])
        id_ = own["path"][1]["id"]
        await until(lambda: at_manager.of(id_, "DELETE"), "the end of what is bob's")
        others = [set(event["connections"]) - {id_} for event in at_manager.events]
        assert not any(others), "bob sees alice's wire"
        assert not any(event["connections"] for event in at_forwarder.events)
        assert not any(event["connections"] for event in as_manager.events)
        token = json.dumps(at_manager.events)
        assert "eyJ" not in token


async def test_observers_see_all_that_goes_through_their_manager(alice, bob, operator):
    first = alice.have("connect", url="kernel://echo/nsm-1")
    async with Watching(operator, "manager", EVERYTHING) as stream:
        assert first["path"][1]["id"] in stream.initial
        assert len(stream.initial) == 2, "alice's wire, and that of the lab's own client"
        second = bob.have("connect", url="kernel://echo/nsm-1")
        id_ = second["path"][1]["id"]
        await until(lambda: stream.of(id_, "UPDATE"), "bob's wire")
        bob.have("close", wire=second["wire"])
        alice.have("close", wire=first["wire"])
        await until(lambda: stream.of(id_, "DELETE"), "the end of bob's wire")
    async with Watching(operator, "forwarder", EVERYTHING) as stream:
        assert stream.initial == {}, "the forwarder was told of no observers"


@pytest.mark.parametrize(("to", "process"), [("forwarder", "forwarder"), ("manager", "nsmgr")])
async def test_a_stream_ends_unavailable_when_its_process_stops(mesh, to, process):
    """On a node of its own: nobody else is disturbed. Last, because it does not come back."""
    carol = mesh.askers["carol"]
    pid = state.born(mesh.paths)[f"node-3/{process}"].mark.pid
    mark = Mark(pid, started(pid))
    async with Watching(carol, to, EVERYTHING) as stream:
        os.kill(pid, signal.SIGTERM)
        await until(lambda: stream.heard["code"], "the stream's end")
        assert stream.heard["code"] == "UNAVAILABLE"
        assert "stop" in stream.heard["text"]
        assert "its wires stay" in stream.heard["text"]
        await until(lambda: not mark.alive, "the process's end")
    mesh.stopped.add(f"node-3/{process}")

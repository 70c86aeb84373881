"""Another endpoint for a wire that stands, as Go clients ask for it (`wire.md` §3.6).

They Close and Request again, or Request with RESELECT_REQUESTED on an id that is
established; either way with the same path and ids.
"""

from typing import Any

import pytest

from tests.e2e.mesh.conftest import Asker, Mesh, asked
from tests.support.wait import until

ENDS = ("first", "second")


def names(answer: dict[str, Any]) -> list[str]:
    return [hop["name"] for hop in answer["path"]["pathSegments"]]


def ids(answer: dict[str, Any]) -> list[str]:
    return [hop["id"] for hop in answer["path"]["pathSegments"]]


def again(alice: Asker, made: dict[str, Any]) -> dict[str, Any]:
    """What upstream's client sends to have another endpoint: no endpoint, no mechanism."""
    connection = {**made, "state": "RESELECT_REQUESTED"}
    connection.pop("networkServiceEndpointName")
    connection.pop("mechanism")
    return {**asked(alice, "both"), "connection": connection}


def held(serving: Asker) -> dict[str, int]:
    return {name: len(serving.have("serves", name=name)["held"]) for name in ENDS}


@pytest.fixture
def both(serving):
    """Two endpoints of one service, with addresses that tell them apart."""
    for number, name in enumerate(ENDS):
        serving.have("serve", name=name, offers=["both"], prefixes=[[f"172.17.{number}.0/24"]])
    yield serving
    for name in ENDS:
        serving.have("end", name=name)


def stands(mesh: Mesh, answer: dict[str, Any]) -> str:
    """Which endpoint the wire leads to, by the kernel's routes; packets flow there."""
    (route,) = mesh.ip("alice", "-4", "route")
    assert mesh.pings("alice", route["dst"])
    (address,) = (
        info["local"] for link in mesh.ip("alice", "-4", "address", "show", "nsm-1")
        for info in link["addr_info"]
    )  # fmt: skip
    assert address.rpartition(".")[0] == route["dst"].rpartition(".")[0]
    return ENDS[int(route["dst"].split(".")[2])]


@pytest.mark.parametrize("closed", [True, False], ids=["close-then-reselect", "on-a-live-id"])
async def test_upstreams_ways_to_reselect_are_both_taken(mesh, alice, both, closed):
    made = alice.have("call", method="Request", message=asked(alice, "both"))["answer"]
    before = names(made)[-1]
    assert stands(mesh, made) == before
    if closed:
        alice.have("call", method="Close", message=made)
        assert mesh.links("alice") == set()
    message = again(alice, made)
    message["connection"]["context"] = {}
    other = alice.have("call", method="Request", message=message)["answer"]
    after = names(other)[-1]
    assert after != before
    assert stands(mesh, other) == after
    assert other.get("state", "UP") == "UP"
    assert other["path"]["pathSegments"][2]["metrics"]["probe"] == "proven"
    assert ids(other)[:2] == ids(made)[:2], "the same ids at the same hops"
    await until(lambda: held(both) == {before: 0, after: 1}, "the first is told", bar=0.5)
    await until(lambda: len(mesh.links("serving")) == 1, "nothing is left of the first", bar=0.5)
    assert len(mesh.links("alice")) == 1
    alice.have("call", method="Close", message=other)
    assert held(both) == {before: 0, after: 0}


def test_a_reselect_with_the_old_context_brings_the_new_ends_addresses(mesh, alice, both):
    """Go clients keep the context; what the dead endpoint gave must not stay as their answer."""
    made = alice.have("call", method="Request", message=asked(alice, "both"))["answer"]
    other = alice.have("call", method="Request", message=again(alice, made))["answer"]
    assert names(other)[-1] != names(made)[-1]
    own = {
        info["local"] for link in mesh.ip("alice", "-4", "address", "show", "nsm-1")
        for info in link["addr_info"]
    }  # fmt: skip
    told = {one.partition("/")[0] for one in other["context"]["ipContext"]["srcIpAddrs"]}
    assert own == told
    routes = {route["dst"] for route in mesh.ip("alice", "-4", "route")}
    prefix = f"172.17.{ENDS.index(names(other)[-1])}."
    reached = [dst for dst in routes if dst.startswith(prefix)]
    assert reached
    assert all(mesh.pings("alice", dst) for dst in reached)
    alice.have("call", method="Close", message=other)

"""Which endpoint a request gets, by its service's matches in a real registry (`wire.md` §7.2)."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.mesh.conftest import Asker, Mesh

Offer = Callable[..., None]
PATH = {"metadata": [["path", "{}"]]}


@pytest.fixture(scope="module", autouse=True)
def _ways_are_open(mesh: Mesh) -> None:
    """From node-1 to node-3: what was dialled once stays open."""
    carol, alice = mesh.askers["carol"], mesh.askers["alice"]
    carol.have("serve", name="on-3", offers=["opening"])
    for _ in range(2):
        alice.have("close", wire=served_by(alice, "opening")[1])
    carol.have("end", name="on-3")


@pytest.fixture
def offer(alice: Asker) -> Iterator[Offer]:
    """Register a service with matches; it is forgotten afterwards."""
    made: list[dict[str, Any]] = []

    def offered(name: str, *matches: dict[str, Any]) -> None:
        made.append({"name": name, "payload": "ETHERNET", "matches": list(matches)})
        alice.have("call", method="RegisterService", message=made[-1], **PATH)

    yield offered
    for service in made:
        alice.have("call", method="UnregisterService", message=service, **PATH)


def served_by(who: Asker, service: str, interface: str = "nsm-1") -> tuple[str, str]:
    """A wire's endpoint, and its id to close it by."""
    wire = who.have("connect", url=f"kernel://{service}/{interface}")
    return wire["path"][-1]["name"], wire["wire"]


def test_three_to_one_between_two_endpoints(alice, serving, offer):
    to = [({"part": "large"}, 3), ({"part": "small"}, 1)]
    offer("shared", {"routes": [{"destinationSelector": by, "weight": w} for by, w in to]})
    for part in ("large", "small"):
        serving.have(
            "serve", name=part, offers=["shared"], labels={"part": part}, register_service=False
        )
    got = [served_by(alice, "shared", f"n-{n}") for n in range(8)]
    assert Counter(name for name, _ in got) == {"large": 6, "small": 2}
    assert {name for name, _ in got[:4]} == {"large", "small"}, "each four have both"
    held = {part: serving.have("serves", name=part)["held"] for part in ("large", "small")}
    assert {part: len(ids) for part, ids in held.items()} == {"large": 6, "small": 2}
    for _, wire in got:
        alice.have("close", wire=wire)
    for part in ("large", "small"):
        serving.have("end", name=part)


def test_a_template_in_a_selector_prefers_this_node(mesh, alice, serving, offer):
    """And who finds nobody on its node goes to the other one, by the match behind."""
    carol = mesh.askers["carol"]
    here = {"routes": [{"destinationSelector": {"nodeName": "{{.nodeName}}"}}], "fallthrough": True}
    offer("close-by", here, {"routes": [{"destinationSelector": {}}]})
    for who, name in ((serving, "on-1"), (carol, "on-3")):
        who.have("serve", name=name, offers=["close-by"], register_service=False)
    for who, expected in ((alice, "on-1"), (carol, "on-3")):
        for _ in range(2):
            name, wire = served_by(who, "close-by")
            who.have("close", wire=wire)
            assert name == expected
    serving.have("end", name="on-1")
    name, wire = served_by(alice, "close-by")
    assert name == "on-3"
    assert mesh.ip("alice", "-d", "link", "show", "nsm-1")[0]["linkinfo"]["info_kind"] == "vxlan"
    alice.have("close", wire=wire)
    carol.have("end", name="on-3")

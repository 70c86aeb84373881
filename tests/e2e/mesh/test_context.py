"""What the manager adds to a request on its way: labels, an empty context, excluded prefixes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.mesh.conftest import Mesh, asked
from tests.support.wait import until


class Excluded:
    """The excluded prefixes of node-1's manager."""

    def __init__(self, mesh: Mesh) -> None:
        self.file = Path(mesh.paths.node("node-1", "excluded_prefixes.yaml"))
        self._log = next(log for log in mesh.logs() if log.name == "node-1.nsmgr")

    def read(self) -> int:
        lines = self._log.read_text().splitlines()
        return sum("file read" in line and "excluded prefixes" in line for line in lines)

    async def become(self, *prefixes: str) -> None:
        """Write them as an operator does, and wait until the manager has read them."""
        before = self.read()
        new = self.file.with_suffix(".new")
        new.write_text(f"prefixes: [{', '.join(prefixes)}]\n")
        os.replace(new, self.file)
        await until(lambda: self.read() > before, "the excluded prefixes to be read", bar=2.5)


@pytest.fixture
def excluded(mesh: Mesh) -> Iterator[Excluded]:
    made = Excluded(mesh)
    yield made
    made.file.unlink(missing_ok=True)


def addresses(mesh: Mesh, place: str, name: str) -> set[str]:
    return {
        info["local"]
        for link in mesh.ip(place, "-4", "address", "show", "dev", name)
        for info in link.get("addr_info", ())
    }


async def test_a_manager_excludes_prefixes_and_a_change_moves_addresses_at_the_next_refresh(
    mesh, alice, bob, excluded
):
    wire = alice.have("connect", url="kernel://echo/nsm-1")
    (own,), (far,) = wire["src"], wire["dst"]
    assert addresses(mesh, "alice", "nsm-1") == {own}
    index = mesh.ip("alice", "link", "show", "nsm-1")[0]["ifindex"]
    await excluded.become(f"{own}/32", f"{far}/32")
    assert addresses(mesh, "alice", "nsm-1") == {own}, "no wire moves by itself"
    alice.have("refresh", wire=wire["wire"])
    await until(lambda: own not in addresses(mesh, "alice", "nsm-1"), "the addresses to move")
    (moved,) = addresses(mesh, "alice", "nsm-1")
    (route,) = mesh.ip("alice", "-4", "route")
    assert route["dst"] not in (own, far)
    assert mesh.pings("alice", route["dst"])
    assert mesh.ip("alice", "link", "show", "nsm-1")[0]["ifindex"] == index
    everywhere = {
        info["local"] for link in mesh.ip("responder", "-4", "address")
        for info in link["addr_info"]
    }  # fmt: skip
    assert far not in everywhere
    other = bob.have("connect", url="kernel://echo/nsm-1")
    assert not {own, far, moved} & {*other["src"], *other["dst"]}
    bob.have("close", wire=other["wire"])
    alice.have("close", wire=wire["wire"])


async def test_labels_excluded_prefixes_and_a_context_reach_the_endpoint(mesh, alice, excluded):
    """As stock grpcio asks: without a context, and with a label of the manager's own."""
    far = mesh.askers["far"]
    far.have("tunnels", name="far-1", service="one", listen="tcp://198.18.0.2:6001", vnis=[])
    await excluded.become("10.77.0.0/16", "fd77::/32")
    for labels in ({}, {"nodeName": "mine", "app": "web"}):
        message = asked(alice, "one", labels=labels)
        made = alice.have("call", method="Request", message=message)
        alice.have("call", method="Close", message=made["answer"])
        assert made["answer"]["labels"] == {"nodeName": "node-1", "clusterName": "home"} | labels
    first, second = far.have("tunneled", name="far-1")["seen"]
    assert first["labels"] == {"nodeName": "node-1", "clusterName": "home"}
    assert second["labels"] == {"nodeName": "mine", "clusterName": "home", "app": "web"}
    assert first["excluded"] == second["excluded"] == ["10.77.0.0/16", "fd77::/32"]
    far.have("end", name="far-1")

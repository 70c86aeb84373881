"""Two nodes agree on a VXLAN network identifier (VNI) that is free on both (`wire.md` §2.2).

The kernel lets a VNI stand once for each underlay and UDP port, whoever made the
tunnel. So who asks proposes one that is free here, who answers overrides one that is
taken there, and they give up after three rounds. What was agreed is read from the
kernel's devices.
"""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from nsm.kernel.topology import enter_named
from tests.e2e.mesh.conftest import OWN, Asker, Mesh, is_sentence

PROPOSED = 1001  # odd: from the higher address to the lower


@pytest.fixture
def far(mesh: Mesh) -> Asker:
    return mesh.askers["far"]


@contextmanager
def foreign_tunnel(mesh: Mesh, vni: int, towards: str = "198.18.0.9") -> Iterator[None]:
    """A VXLAN device of somebody else's in node-1's underlay."""
    command = ["ip", "-n", mesh.namespace("node-1"), "link"]
    words = ["type", "vxlan", "id", str(vni), "dstport", "4789", "local", "198.18.0.1"]
    subprocess.run([*command, "add", "theirs", *words, "remote", towards], check=True)
    try:
        yield
    finally:
        subprocess.run([*command, "del", "theirs"], check=True)


def tunnels(mesh: Mesh, place: str) -> dict[str, int]:
    """The VNI of each VXLAN device in there, by the device's name."""
    return {
        link["ifname"]: link["linkinfo"]["info_data"]["id"]
        for link in mesh.ip(place, "-d", "link", "show", "type", "vxlan")
    }


def from_node_2(mesh: Mesh, vni: int) -> dict[str, Any]:
    """What node-1's manager passes on to its forwarder for a client of node-2's."""
    token = mesh.askers["alice"].have("mint")["token"]
    until_then = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 300))
    return {
        "connection": {
            "id": "node-1-1",
            "networkService": "echo",
            "path": {
                "index": 1,
                "pathSegments": [
                    {**OWN, "token": token, "expires": until_then},
                    {"name": "nsmgr-node-1", "id": "node-1-1"},
                ],
            },
        },
        "mechanismPreferences": [
            {
                "cls": "REMOTE",
                "type": "VXLAN",
                "parameters": {
                    "src_ip": "198.18.0.2",
                    "src_port": "4789",
                    "MTU": "1446",
                    **({"vni": str(vni)} if vni else {}),
                },
            }
        ],
    }


@contextmanager
def answered(mesh: Mesh, vni: int) -> Iterator[int]:
    """What node-1's forwarder answers to that proposal, and its kernel has; closed afterwards."""
    manager, before = mesh.askers["manager"], tunnels(mesh, "responder")
    made = manager.have("call", method="Request", message=from_node_2(mesh, vni), to="forwarder")
    parameters = made["answer"]["mechanism"]["parameters"]
    agreed = int(parameters["vni"])
    assert parameters["dst_ip"] == "198.18.0.1"
    (device,) = tunnels(mesh, "responder").items() - before.items()
    assert device[1] == agreed
    yield agreed
    closing = {**made["answer"], "path": {**made["answer"]["path"], "index": 1}}
    manager.have("call", method="Close", message=closing, to="forwarder")
    assert tunnels(mesh, "responder") == before


@pytest.mark.parametrize("vni", [PROPOSED, 1000], ids=["odd", "even"])
def test_a_proposed_vni_that_is_free_here_is_kept(mesh, vni):
    with answered(mesh, vni) as agreed:
        assert agreed == vni


def test_without_a_proposal_one_of_the_right_parity_is_drawn(mesh):
    with answered(mesh, 0) as agreed:
        assert agreed % 2 == 1


def test_a_proposed_vni_that_is_taken_here_is_overridden(mesh):
    with foreign_tunnel(mesh, PROPOSED), answered(mesh, PROPOSED) as agreed:
        assert agreed != PROPOSED
        assert agreed % 2 == 1
    with answered(mesh, PROPOSED) as agreed:
        assert agreed == PROPOSED, "it is free again"


def test_the_vni_of_another_wire_of_ours_is_overridden_too(mesh, alice, far):
    far.have("tunnels", name="far-1", service="one", listen="tcp://198.18.0.2:6001", vnis=[])
    wire = alice.have("connect", url="kernel://one/nsm-1")["wire"]
    taken = tunnels(mesh, "alice")["nsm-1"]
    with answered(mesh, taken) as agreed:
        assert agreed != taken
    alice.have("close", wire=wire)
    far.have("end", name="far-1")


def test_who_asks_proposes_a_vni_that_is_free_here(mesh, alice, far):
    far.have("tunnels", name="far-1", service="one", listen="tcp://198.18.0.2:6001", vnis=[])
    wire = alice.have("connect", url="kernel://one/nsm-1")["wire"]
    (proposed,) = far.have("tunneled", name="far-1")["proposed"]
    assert tunnels(mesh, "alice") == {"nsm-1": proposed}
    assert proposed % 2 == 0
    alice.have("refresh", wire=wire)
    alice.have("close", wire=wire)
    assert far.have("tunneled", name="far-1")["held"] == []
    far.have("end", name="far-1")


def test_two_responders_that_hand_out_one_vni_both_get_a_wire(mesh, alice, bob, far):
    """They keep identifiers apart only among their own tunnels; the clash is at who asks."""
    for name, service, port in (("far-1", "one", 6001), ("far-2", "two", 6002)):
        far.have("tunnels", name=name, service=service, listen=f"tcp://198.18.0.2:{port}",
                 vnis=[5000, 7000], keeps=False)  # fmt: skip
    first = alice.have("connect", url="kernel://one/nsm-1")["wire"]
    second = bob.have("connect", url="kernel://two/nsm-1")["wire"]
    assert tunnels(mesh, "alice") == {"nsm-1": 5000}
    assert tunnels(mesh, "bob") == {"nsm-1": 7000}
    seen = far.have("tunneled", name="far-2")
    assert len(seen["proposed"]) == 2
    assert not {0, 5000} & set(seen["proposed"]), "what is proposed is free"
    assert (seen["closed"], len(seen["held"])) == (1, 1)
    alice.have("close", wire=first)
    bob.have("close", wire=second)
    for name in ("far-1", "far-2"):
        assert far.have("tunneled", name=name)["held"] == []
        far.have("end", name=name)


def test_after_three_rounds_the_refusal_says_port_and_vni(mesh, alice, far):
    far.have("tunnels", name="far-1", service="one", listen="tcp://198.18.0.2:6001",
             vnis=[5000] * 9, keeps=False)  # fmt: skip
    with foreign_tunnel(mesh, 5000):
        before = mesh.kernel()
        answer = alice.ask("connect", url="kernel://one/nsm-1")
        is_sentence(answer, "ALREADY_EXISTS", "VNI 5000", "UDP port 4789", "another VNI")
        assert mesh.kernel() == before
    seen = far.have("tunneled", name="far-1")
    assert len(seen["proposed"]) == 3
    assert len(set(seen["proposed"])) == 3
    assert seen["closed"] >= 3
    assert seen["held"] == []
    far.have("end", name="far-1")


def test_a_tunnel_port_held_by_a_program_is_told_with_the_port(mesh, alice, far):
    def hold() -> socket.socket:
        enter_named(mesh.namespace("node-1"))
        held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        held.bind(("0.0.0.0", 4789))
        return held

    far.have("tunnels", name="far-1", service="one", listen="tcp://198.18.0.2:6001", vnis=[])
    words = "UDP port 4789", "is held by python", f"(pid {os.getpid()})", "NSM_VXLAN_PORT"
    with ThreadPoolExecutor(1) as there, there.submit(hold).result():
        before = mesh.kernel()
        answer = alice.ask("connect", url="kernel://one/nsm-1")
        is_sentence(answer, "ALREADY_EXISTS", *words)
        assert far.have("tunneled", name="far-1")["held"] == []
        message = from_node_2(mesh, PROPOSED)
        answer = mesh.askers["manager"].ask(
            "call", method="Request", message=message, to="forwarder"
        )
        is_sentence(answer, "ALREADY_EXISTS", *words)
        assert mesh.kernel() == before
    wire = alice.have("connect", url="kernel://one/nsm-1")["wire"]
    alice.have("close", wire=wire)
    far.have("end", name="far-1")

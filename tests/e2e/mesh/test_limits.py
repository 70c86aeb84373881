"""One client that floods, and peers that hang, cost themselves: the others are served.

That nothing is left of them, in the kernel, of descriptors and of processes, is what the
fixtures of this folder ask after every test.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.mesh.conftest import Mesh, is_sentence
from tests.support.wait import until, write

FLOOD = 200
TAKEN = 128  # of one client, by default
MIB = 1024
MOST_FLOODS = 20  # until the heap has all that it needs for one
BETWEEN = ("node-1/nsmgr", "node-1/forwarder")


def pss(mesh: Mesh) -> dict[str, int]:
    """KiB of each process between client and endpoint."""
    found = {}
    for name in BETWEEN:
        with open(f"/proc/{mesh.pid(name)}/smaps_rollup") as file:
            found[name] = next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return found


def fds(mesh: Mesh) -> dict[str, int]:
    return {name: len(os.listdir(f"/proc/{mesh.pid(name)}/fd")) for name in BETWEEN}


def wired(asker, url, *, what, bar=1.0):
    """Have a wire and close it; what it took is written down."""
    began = time.monotonic()
    made = asker.have("connect", url=url, request_timeout=20.0)
    write(what, time.monotonic() - began, bar)
    asker.have("close", wire=made["wire"])
    return time.monotonic() - began


def growing(memory: list[dict[str, int]]) -> list[str]:
    """Who has 2 MiB more than three floods ago; all, as long as there were but five."""
    if len(memory) < 6:
        return list(BETWEEN)
    return [name for name in BETWEEN if memory[-1][name] - memory[-4][name] >= 2 * MIB]


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module", autouse=True)
def _ways(mesh: Mesh) -> None:
    """Between nodes, connections are kept: each that is needed here was used once."""
    for who in ("alice", "carol"):
        made = mesh.askers[who].have("connect", url="kernel://packets")
        mesh.askers[who].have("close", wire=made["wire"])


async def test_a_client_that_floods_is_refused_with_a_sentence_and_the_others_are_served(
    mesh: Mesh, alice, bob, serving
):
    serving.have("serve", name="picky", offers=["picky"], gate=True)
    memory: list[dict[str, int]] = []
    while growing(memory) and len(memory) < MOST_FLOODS:
        quiet = fds(mesh)
        alice.have("flood", url="kernel://picky", count=FLOOD)
        await until(
            lambda: len(alice.have("refused")["refused"]) >= FLOOD - TAKEN,
            "what is too much of a flood to be refused",
            bar=1.0,
        )
        for answer in alice.have("refused")["refused"]:
            assert answer["code"] == "RESOURCE_EXHAUSTED", answer
        is_sentence(
            answer, "RESOURCE_EXHAUSTED", "spiffe://home.test/client/alice", "128 requests",
            "wait for answers", "NSM_MAX_REQUESTS_PER_CLIENT",
        )  # fmt: skip
        for name, count in fds(mesh).items():
            assert count - quiet[name] < TAKEN, f"{name} has {count} descriptors open"
        took = wired(bob, "kernel://echo/nsm-1", what="a wire beside a flood of 200 requests")
        assert took < 10.0
        asked = serving.have("serves", name="picky")["asked"]
        assert 0 < asked <= TAKEN // 4, "no client has more than its part"
        began = time.monotonic()
        alice.have("calm")
        await until(
            lambda: not serving.have("serves", name="picky")["held"], "a flood to be gone", bar=1.0
        )
        write("128 requests taken back", time.monotonic() - began, 2.0)
        memory.append(pss(mesh))
        serving.have("end", name="picky")
        serving.have("serve", name="picky", offers=["picky"], gate=True)
    serving.have("end", name="picky")
    told = {name: [one[name] for one in memory] for name in BETWEEN}
    print(f"PSS after each flood, in KiB: {told}")
    assert not growing(memory), f"with every flood: {told}"


async def test_an_endpoint_that_hangs_costs_those_who_ask_for_it(mesh: Mesh, alice, bob, serving):
    serving.have("serve", name="other", offers=["other"])
    with frozen(mesh.pid("node-1/responder")):
        alice.have("flood", url="kernel://echo", count=40)
        took = wired(bob, "kernel://other", what="a wire beside an endpoint that hangs")
        assert took < 10.0
        alice.have("calm")
    wired(bob, "kernel://echo/nsm-1", what="a wire of an endpoint that hung")
    serving.have("end", name="other")


async def test_a_forwarder_that_hangs_costs_its_own_node(mesh: Mesh, alice):
    carol = mesh.askers["carol"]
    with frozen(mesh.pid("node-1/forwarder")):
        alice.have("flood", url="kernel://packets", count=40)
        took = wired(carol, "kernel://packets", what="a wire beside a node whose forwarder hangs")
        assert took < 10.0
        late = alice.ask("connect", url="kernel://packets", request_timeout=1.0)
        is_sentence(late, "DEADLINE_EXCEEDED", "no answer from", "nsm.io.sock in time")
        alice.have("calm")
    wired(alice, "kernel://packets", what="a wire through a forwarder that hung", bar=2.0)


@pytest.mark.parametrize("how", ["says nothing", "half a TLS hello"])
async def test_a_peer_that_connects_and_hangs_holds_up_nobody(mesh: Mesh, alice, how):
    """Connections that nobody goes on with are let go, the oldest first, and time out."""
    socks = []
    before = fds(mesh)
    try:
        for _ in range(300):
            socks.append(sock := socket.socket(socket.AF_UNIX))
            sock.settimeout(5)
            sock.connect(mesh.paths.node("node-1", "nsm.io.sock"))
            if how != "says nothing":
                sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        await until(
            lambda: fds(mesh)["node-1/nsmgr"] - before["node-1/nsmgr"] <= 2 * 256 + 8,
            "no more handshakes to be held than may be", bar=0.5,
        )  # fmt: skip
        assert wired(alice, "kernel://echo", what="a wire beside 300 peers that hang") < 10.0
    finally:
        for sock in socks:
            sock.close()

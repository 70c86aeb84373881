"""What is met elsewhere than before is found there: nobody sticks to a URL that was right once."""

import signal

import pytest
import yaml

from tests.e2e.interdomain.domains import ADDRESSES, ALONE, DOORS, Domains, requests, write
from tests.e2e.interdomain.test_wires import STEADY
from tests.e2e.wires.nodes import Program, far_end, identity, link
from tests.support.wait import until

MOVED = 5014


async def told(app: Program) -> dict[str, object]:
    """What a client told last."""
    return (await until(lambda: app.told, "the client has told", record=False))[-1]


async def carries(mesh: Domains, app: Program) -> bool:
    """Whether the far end of a client's wire answers."""
    (far,) = (await told(app))["dst"]
    return await mesh.space("app").pings(far.partition("/")[0])


async def test_a_proxy_that_is_met_elsewhere_now_is_found_there(mesh: Domains):
    """Its old URL is in the other proxy's memory, as found and as a wire's next hop."""
    client, there = mesh.space("app"), mesh.space("pong")
    app = mesh.client("app", "kernel://frames@two/nsm-1", **STEADY)
    before = identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", there))
    closed = closes(mesh, "frames@two")
    everybody = {name: ADDRESSES[node] for name, node in {**DOORS, "three": ALONE}.items()}
    for port, variables in (
        (MOVED, {"NSM_LISTEN_ON": f"tcp://{ADDRESSES['b']}:{MOVED}"}),
        (0, {}),
    ):
        assert mesh.now["b/nsmgr-proxy"].end() == 0
        mesh.start("b/nsmgr-proxy", **variables).ready()
        for cluster in DOORS:
            mesh.know(cluster, ports={"two": port} if port else {}, **everybody)
        granted = requests([mesh.now["b/nsmgr-proxy"]])
        await until(
            lambda granted=granted: requests([mesh.now["b/nsmgr-proxy"]])[0] >= granted[0] + 2,
            "refreshes at the new place",
            bar=4,
        )
        fresh = mesh.client("app", "kernel://packets@two/fresh", name="fresh")
        assert await carries(mesh, fresh)
        assert fresh.end() == 0, fresh.words
        assert await carries(mesh, app)
    ends = identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", there))
    assert ends == before
    assert closes(mesh, "frames@two") == closed, "it was found by asking, not by choosing anew"
    assert app.end() == 0, app.words


async def test_a_domain_is_met_at_another_of_its_addresses_where_one_is_dead(mesh: Domains):
    """Its registry and its proxy alike; the dead ones come first, on a node that has neither."""
    file = mesh.domains_file("one")
    before = file.read_text()
    known = yaml.safe_load(before)
    for door in ("registry", "nsmgr-proxy"):
        (alive,) = known["two"][door]
        known["two"][door] = [alive.replace(ADDRESSES["b"], ADDRESSES["b2"]), alive]
    try:
        write(file, yaml.safe_dump(known))
        app = mesh.client("app", "kernel://frames@two/nsm-1")
        assert await carries(mesh, app)
        assert app.end() == 0, app.words
    finally:
        write(file, before)


def closes(mesh: Domains, service: str) -> int:
    """How many Closes for a service came to the proxy of domain one."""
    words = "NetworkService/Close", f'"service": "{service}"'
    return sum(all(word in line for word in words) for line in mesh.now["a/nsmgr-proxy"].log)


@pytest.mark.long
@pytest.mark.parametrize("killed", [True, False], ids=["its-manager-is-dead", "its-manager-lives"])
async def test_an_endpoint_that_moved_to_another_node_is_met_there_at_the_next_request(
    mesh: Domains, killed: bool
):
    proxy = mesh.now["b/nsmgr-proxy"]
    mover = mesh.mover("here")
    app = mesh.client("app", "kernel://moving@two/nsm-1", **STEADY)
    assert (await told(app))["path"][6]["name"] == "forwarder-b"
    assert await carries(mesh, app)
    closed = closes(mesh, "moving@two")
    if killed:
        mesh.now["b/nsmgr"].end(signal.SIGKILL)
    assert mover.end(signal.SIGKILL) == -signal.SIGKILL
    moved = mesh.mover("there")
    try:
        await until(
            lambda: [
                one
                for one in app.told
                if one["event"] == "up" and one["path"][6]["name"] == "forwarder-b2"
            ],
            "the wire over the other node",
            bar=6,
        )
        assert await carries(mesh, app)
        assert closes(mesh, "moving@two") == closed, "it was found by asking, not by choosing anew"
        fresh = mesh.client("app", "kernel://moving@two/fresh", name="fresh")
        assert (await told(fresh))["path"][6]["name"] == "forwarder-b2"
        assert await carries(mesh, fresh)
        assert fresh.end() == 0, fresh.words
        assert mesh.now["b/nsmgr-proxy"] is proxy
        assert app.end() == 0, app.words
        assert mesh.space("there").links() == set()
    finally:
        if killed:
            mesh.start("b/nsmgr").ready()
    # What the dead manager's forwarder had ends with its lease, or was closed.
    await until(lambda: mesh.space("here").links() == set(), "the end of the old half", bar=13)
    assert moved.end() == 0, moved.words

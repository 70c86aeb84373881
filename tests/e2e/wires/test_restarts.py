"""Any process of the mesh may stop or be killed under traffic: no wire notices."""

import signal

import pytest

from tests.e2e.wires.nodes import Nodes, addresses, far_end, flow, identity, link, tentative
from tests.support.spaces import kernel_state
from tests.support.wait import until

# A lease outlasts what a test takes to start a process again on a busy machine, and is
# much shorter than the module: that the wire lives to its end shows that refreshes work.
STEADY = {"NSM_MAX_TOKEN_LIFETIME": "6s", "NSM_REQUEST_TIMEOUT": "1500ms"}
VICTIMS = (
    "one/nsmgr",
    "two/nsmgr",
    "one/forwarder",
    "two/forwarder",
    "one/registry",
    "two/pong",
    "one/issuer",
)


@pytest.fixture(scope="module")
def steady(mesh: Nodes):
    """A wire that is there before the first victim falls, and after the last."""
    client, endpoint = mesh.space("app"), mesh.space("pong")
    app = mesh.now["app/steady"] = mesh.client(
        "app", "kernel://echo/steady", name="steady", **STEADY
    )
    before = identity(link(client, "steady")), identity(far_end(client, "steady", endpoint))
    yield app
    assert (
        identity(link(client, "steady")),
        identity(far_end(client, "steady", endpoint)),
    ) == before, "the wire was made anew meanwhile"
    downs = [one for one in app.told if one["event"] != "up"]
    assert app.end() == 0
    assert [one["event"] for one in app.told].count("closed") == 1
    assert client.links() == endpoint.links() == set()
    print("said to be down meanwhile:", len(downs))


def grants(nodes: Nodes) -> list[int]:
    """How many requests each manager granted."""
    granted = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return [
        sum(all(word in line for word in granted) for line in nodes.now[manager].log)
        for manager in ("one/nsmgr", "two/nsmgr")
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
@pytest.mark.parametrize("victim", VICTIMS, ids=lambda name: name.replace("/", "-"))
async def test_a_process_of_the_mesh_goes_and_comes_back_and_no_packet_is_lost(
    nodes: Nodes, steady, victim: str, number: int
):
    client, endpoint, near = nodes.space("app"), nodes.space("pong"), nodes.space("near")
    await until(lambda: not tentative(client, endpoint), "the kernel's own addresses", bar=2)
    before = kernel_state(client, endpoint, near)
    wire = identity(link(client, "steady")), identity(far_end(client, "steady", endpoint))
    leaving = nodes.client("app", "kernel://echo/leaving", name="leaving")
    beside = nodes.client("near", "kernel://echo/leaving", name="beside")
    with flow(client, "172.16.1.0") as echoes, flow(endpoint, own(client)) as back:
        code = nodes.now[victim].end(number)
        assert code == (0 if number == signal.SIGTERM else -number), nodes.now[victim].words
        assert client.links() == {"steady", "leaving"}
        nodes.start(victim).ready()
        # Close after the restart, before anybody refreshed what is closed.
        assert leaving.end() == 0, leaving.words
        assert beside.end() == 0, beside.words
        assert client.links() == {"steady"}
        assert len(endpoint.links()) == 1
        assert near.links() == set()
        fresh = [
            nodes.client("app", "kernel://echo/fresh", name="fresh"),
            nodes.client("near", "kernel://echo/fresh", name="fresh-near"),
        ]
        for place in (client, near):
            (address,) = addresses(place, "fresh")
            assert await endpoint.pings(address)
        for one in fresh:
            assert one.end() == 0, one.words
        granted = grants(nodes)  # from here on only one client is there to ask for any
        await until(
            lambda: all(a > b for a, b in zip(grants(nodes), granted, strict=True)),
            f"a refresh after {victim} came back",
            bar=3,
        )
        assert (
            identity(link(client, "steady")),
            identity(far_end(client, "steady", endpoint)),
        ) == wire
    for counts in (echoes, back):
        assert counts.received == counts.sent > 20, f"lost {counts.sent - counts.received}"
    assert kernel_state(client, endpoint, near) == before


@pytest.mark.long
async def test_a_registry_may_be_away_for_longer_than_anything_lives(nodes: Nodes):
    client, endpoint, near = nodes.space("app"), nodes.space("pong"), nodes.space("near")
    nodes.now["one/registry"].end()
    nodes.start("one/registry", NSM_EXPIRE_PERIOD="2s").ready()
    for name in ("one/forwarder", "two/forwarder", "two/pong"):  # what they told lives as long
        nodes.now[name].end()
        nodes.start(name).ready()
    apps = [
        nodes.client("app", "kernel://echo/far", name="far", **STEADY),
        nodes.client("near", "kernel://echo/beside", name="beside", **STEADY),
    ]
    before = [
        identity(device)
        for place, name in ((client, "far"), (near, "beside"))
        for device in (link(place, name), far_end(place, name, endpoint))
    ]

    async def refreshed(times: int) -> None:
        granted = grants(nodes)
        await until(
            lambda: all(a >= b + times for a, b in zip(grants(nodes), granted, strict=True)),
            f"{times} refreshes of each without a registry",
            bar=3 * times,
        )

    (address,) = addresses(client, "far")
    with flow(client, "172.16.1.0") as echoes, flow(endpoint, address) as back:
        nodes.now["one/registry"].end(signal.SIGKILL)
        await refreshed(6)  # each lives a third of a token's life: that is two of them
        for node in ("one", "two"):  # and who comes back meanwhile has nobody to ask
            for name in (f"{node}/nsmgr", f"{node}/forwarder"):
                nodes.now[name].end(signal.SIGKILL)
            nodes.start(f"{node}/nsmgr").ready()
            nodes.start(f"{node}/forwarder")
        await refreshed(3)
        nodes.start("one/registry").ready()
        await refreshed(1)
    for counts in (echoes, back):
        assert counts.received == counts.sent > 200, f"lost {counts.sent - counts.received}"
    after = [
        identity(device)
        for place, name in ((client, "far"), (near, "beside"))
        for device in (link(place, name), far_end(place, name, endpoint))
    ]
    assert after == before
    for app in apps:
        assert app.end() == 0, app.words


def own(client) -> str:
    (address,) = addresses(client, "steady")
    return address

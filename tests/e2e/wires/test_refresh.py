"""A wire over time: refreshed it stays what it is, and it ends when its lease does."""

import asyncio
import signal
import time
from collections import Counter

import pytest

from tests.e2e.wires.nodes import (
    Nodes,
    addresses,
    far_end,
    flow,
    identity,
    lasting,
    link,
    nothing_more,
)
from tests.support.spaces import kernel_state
from tests.support.wait import until, write

# Tokens of a few seconds, so that a wire is refreshed about every second and its
# lease ends (lifetime less the request's deadline) soon after the last refresh.
LIFETIME, DEADLINE = 4.0, 1.0
SHORT = {"NSM_MAX_TOKEN_LIFETIME": f"{LIFETIME}s", "NSM_REQUEST_TIMEOUT": f"{DEADLINE}s"}
# For many wires at once: a lease outlasts what asking for all of them takes on a busy machine.
LONGER = {"NSM_MAX_TOKEN_LIFETIME": "8s", "NSM_REQUEST_TIMEOUT": "2s"}
THREADS = 16
MESH = ("one/nsmgr", "one/forwarder", "two/nsmgr", "two/forwarder", "two/pong", "one/registry")


@pytest.fixture
def places(nodes: Nodes):
    """The client's and the endpoint's namespace; afterwards they are as before."""
    client, endpoint = nodes.space("app"), nodes.space("pong")
    before = kernel_state(client, endpoint)
    yield client, endpoint
    nodes.end_clients()
    assert kernel_state(client, endpoint) == before


def requests(nodes: Nodes, manager: str = "one/nsmgr") -> int:
    """How many requests a manager granted."""
    granted = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return sum(all(word in line for word in granted) for line in nodes.now[manager].log)


async def test_a_hundred_refreshes_change_nothing_lose_nothing_and_leak_nothing(nodes, places):
    client, endpoint = places
    names = [f"w-{n}" for n in range(20)]
    app = nodes.client("app", *(f"kernel://echo/{name}" for name in names), **LONGER)
    mesh = [nodes.now[name] for name in MESH]

    def ends() -> list[object]:
        both = [(link(client, name), far_end(client, name, endpoint)) for name in names]
        shown = [(identity(near), identity(far)) for near, far in both]
        return [*shown, *(addresses(client, name) for name in names)]

    def held() -> dict[str, Counter[str]]:
        return {one.name: Counter(one.fds) for one in mesh}

    granted = requests(nodes)
    await until(lambda: requests(nodes) >= granted + 20, "the first refreshes", bar=4)
    before, held_before, granted = ends(), await lasting(held), requests(nodes)
    memory = {one.name: one.pss for one in mesh}
    with flow(client, "172.16.1.0") as echoes:
        await until(lambda: requests(nodes) >= granted + 100, "a hundred refreshes", bar=12)
        assert ends() == before
        await nothing_more(held, held_before, "as many file descriptors as before")
        assert all(one.threads <= THREADS for one in mesh)  # as many as its pools may have
    print({one.name: one.pss - memory[one.name] for one in mesh})
    assert echoes.received == echoes.sent > 50
    assert app.end() == 0


async def test_a_tunnel_that_ends_elsewhere_than_the_far_manager_stays_what_it_is(nodes, places):
    """As where managers listen on a pod's address and tunnels end at the node's."""
    client, endpoint = places
    node = nodes.space("two")
    node.do("addr", "add", "198.18.0.200/24", "dev", "eth0")
    nodes.now["two/forwarder"].end()
    nodes.start("two/forwarder", NSM_TUNNEL_IP="198.18.0.200").ready()
    try:
        app = nodes.client("app", "kernel://echo/nsm-1", **SHORT)

        def ends() -> tuple[object, ...]:
            near, far = link(client, "nsm-1"), far_end(client, "nsm-1", endpoint)
            return identity(near), identity(far)

        before, granted = ends(), requests(nodes)
        assert link(client, "nsm-1")["linkinfo"]["info_data"]["remote"] == "198.18.0.200"
        with flow(client, "172.16.1.0") as echoes:
            await until(lambda: requests(nodes) >= granted + 3, "three refreshes", bar=4)
            assert ends() == before
        assert echoes.received == echoes.sent > 10
        assert app.end() == 0
    finally:
        nodes.now["two/forwarder"].end()
        node.do("addr", "del", "198.18.0.200/24", "dev", "eth0")
        nodes.start("two/forwarder").ready()


async def test_a_killed_clients_wire_lasts_as_long_as_its_lease_and_no_longer(nodes, places):
    client, _ = places
    app = nodes.client("app", "kernel://pair/nsm-1", **SHORT)
    single = nodes.space("single")
    far = far_end(client, "nsm-1", single)["ifname"]
    granted = requests(nodes)
    await until(lambda: requests(nodes) > granted, "a refresh", bar=1.5)
    with flow(client, "172.16.2.0") as echoes:
        assert app.end(signal.SIGKILL) == -signal.SIGKILL
        killed = time.monotonic()
        # The last refresh was up to 1.2 x 0.2 lifetimes ago, and tokens expire at whole seconds.
        least = LIFETIME - DEADLINE - 0.24 * LIFETIME - 1
        while time.monotonic() - killed < least:
            assert client.links() == {"nsm-1"}
            assert single.links() == {far}
            await asyncio.to_thread(client.run, "ping", "-n", "-c1", "-i1", "-W1", "172.16.2.0")
    assert echoes.received == echoes.sent > 10
    await until(
        lambda: not client.links() and not single.links(), "the end of a lease", bar=LIFETIME
    )
    lasted = time.monotonic() - killed
    assert lasted < LIFETIME
    write("a killed client's wire lasted", lasted, LIFETIME)
    # The pool has room for one: its address is free again, so the endpoint heard of the close.
    again = nodes.client("app", "kernel://pair/nsm-1")
    assert addresses(client, "nsm-1") == ["172.16.2.1"]
    assert again.end() == 0


async def test_a_client_more_patient_than_its_tokens_last_keeps_its_wire(nodes, places):
    client, endpoint = places
    app = nodes.client(
        "app", "kernel://echo/nsm-1", NSM_MAX_TOKEN_LIFETIME="4s", NSM_REQUEST_TIMEOUT="15s"
    )
    before = identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", endpoint))
    granted = requests(nodes)
    await until(lambda: requests(nodes) > granted + 2, "three refreshes", bar=3)
    assert (
        identity(link(client, "nsm-1")),
        identity(far_end(client, "nsm-1", endpoint)),
    ) == before
    assert [one["event"] for one in app.told] == ["up"]
    assert app.end() == 0


async def test_a_client_started_again_under_its_name_takes_its_wires_over(nodes, places):
    client, endpoint = places
    url = "kernel://echo/nsm-1"
    first = nodes.client("app", url, name="lasting")
    before = identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", endpoint))
    had = addresses(client, "nsm-1")
    with flow(client, "172.16.1.0") as echoes:
        assert first.end(signal.SIGKILL) == -signal.SIGKILL
        second = nodes.client("app", url, name="lasting", **SHORT)
        assert (
            identity(link(client, "nsm-1")),
            identity(far_end(client, "nsm-1", endpoint)),
        ) == before
        assert addresses(client, "nsm-1") == had
        # What it keeps now is its own: refreshes go on, and its Close is the wire's end.
        granted = requests(nodes)
        await until(lambda: requests(nodes) > granted + 1, "two refreshes", bar=2)
    assert echoes.received == echoes.sent > 10
    assert second.end() == 0
    assert client.links() == endpoint.links() == set()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
async def test_a_client_that_is_told_to_end_takes_its_wires_back_on_both_nodes(
    nodes, places, number
):
    client, endpoint = places
    app = nodes.client("app", "kernel://echo/nsm-1", "kernel://echo/nsm-2", "kernel://pair/nsm-3")
    assert len(client.links()) == 3
    assert len(endpoint.links()) == 2
    assert app.end(number) in (0, 130)
    assert client.links() == endpoint.links() == nodes.space("single").links() == set()


async def test_an_endpoint_that_is_told_to_end_is_found_by_nobody_and_its_wires_stay(nodes, places):
    client, _ = places
    app = nodes.client("app", "kernel://echo/nsm-1")
    before = identity(link(client, "nsm-1"))
    with flow(client, "172.16.1.0") as echoes:
        assert nodes.now["two/pong"].end() == 0
        quick = {"NSM_PATIENCE": "100ms", "NSM_REQUEST_TIMEOUT": "3s"}
        late = nodes.asks("near", "kernel://echo/nsm-1", **quick)
        assert late.ended() == 1
        assert "echo" in late.words
        assert nodes.space("near").links() == set()
        nodes.start("two/pong").ready()
        other = nodes.client("near", "kernel://echo/nsm-1")
        assert addresses(nodes.space("near"), "nsm-1") != addresses(client, "nsm-1")
        assert identity(link(client, "nsm-1")) == before
    assert echoes.received == echoes.sent > 10
    assert other.end() == 0
    assert app.end() == 0

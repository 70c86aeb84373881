"""What the lane is there for is really there, as stock tools see it."""

import asyncio
import re
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.spaces import Space, space


@pytest.fixture
def cable() -> Iterator[tuple[Space, Space]]:
    """Two namespaces joined by a cable: 192.0.2.1 and 192.0.2.2 on eth0."""
    with ExitStack() as stack:
        here, there = (stack.enter_context(space(hint)) for hint in ("here", "there"))
        here.do("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", there.name)
        for number, end in enumerate((here, there), 1):
            end.do("address", "add", f"192.0.2.{number}/24", "dev", "eth0")
            end.do("link", "set", "eth0", "up")
        yield here, there


def wg(at: Space, *words: str, told: str = "") -> str:
    command = ["ip", "netns", "exec", at.name, "wg", *words]
    done = subprocess.run(command, input=told, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.needs_kernel("wireguard")
async def test_two_ends_of_wireguard_shake_hands(cable: tuple[Space, Space]) -> None:
    private = [wg(end, "genkey") for end in cable]
    public = [wg(end, "pubkey", told=key) for end, key in zip(cable, private, strict=True)]
    for number, end in enumerate(cable):
        end.do("link", "add", "wg0", "type", "wireguard")
        wg(
            end, "set", "wg0", "private-key", "/dev/stdin", "listen-port", "51820",
            "peer", public[1 - number], "allowed-ips", "0.0.0.0/0",
            "endpoint", f"192.0.2.{2 - number}:51820", told=private[number],
        )  # fmt: skip
        end.do("address", "add", f"10.9.0.{number + 1}/24", "dev", "wg0")
        end.do("link", "set", "wg0", "up")
    here, there = cable
    assert await here.pings("10.9.0.2")
    for end in (here, there):
        _, shaken = wg(end, "show", "wg0", "latest-handshakes").split()
        assert int(shaken) > 0


@pytest.mark.needs_kernel("netem")
async def test_a_delay_of_20_ms_delays_20_ms(cable: tuple[Space, Space]) -> None:
    here, _ = cable
    assert await here.pings("192.0.2.2")  # the neighbour is known
    here.run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "20ms")
    done = await asyncio.to_thread(here.run, "ping", "-n", "-c20", "-i0.05", "192.0.2.2")
    times = [float(found) for found in re.findall(r"time=([\d.]+) ms", done.stdout)]
    assert len(times) == 20
    assert 20.0 <= statistics.median(times) < 25.0


@pytest.mark.needs_kernel("netem")
async def test_of_30_percent_loss_some_is_lost(cable: tuple[Space, Space]) -> None:
    here, _ = cable
    assert await here.pings("192.0.2.2")
    here.run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "loss", "30%")
    done = await asyncio.to_thread(here.run, "ping", "-n", "-q", "-c200", "-i0.01", "192.0.2.2")
    found = re.search(r"(\d+) received", done.stdout)
    assert found
    assert 100 < int(found[1]) < 180  # 140 and six deviations


@pytest.mark.needs_kernel("vrf")
async def test_what_is_in_a_vrf_is_reached_through_it_only(cable: tuple[Space, Space]) -> None:
    here, there = cable
    here.do("link", "add", "red", "type", "vrf", "table", "100")
    here.do("link", "set", "red", "up")
    here.do("link", "set", "eth0", "master", "red")
    assert await here.pings("192.0.2.2", "-I", "red")
    assert not await here.pings("192.0.2.2")
    assert {route["dev"] for route in here.ip("route", "show", "vrf", "red")} == {"eth0"}
    assert there.ip("neighbour")


@pytest.mark.needs_kernel("vlan")
async def test_a_vlan_joins_those_with_its_tag_only(cable: tuple[Space, Space]) -> None:
    here, there = cable
    for number, end in enumerate(cable, 1):
        for tag in (5, 5 + number):
            end.do("link", "add", "link", "eth0", "name", f"v{tag}", "type", "vlan", "id", str(tag))
            end.do("address", "add", f"10.{min(tag, 6)}.0.{number}/24", "dev", f"v{tag}")
            end.do("link", "set", f"v{tag}", "up")
    assert await here.pings("10.5.0.2")
    assert not await here.pings("10.6.0.2")
    assert [link["linkinfo"]["info_data"]["id"] for link in there.ip("link", "show", "v7")] == [7]


@pytest.mark.needs_kernel("dummy")
async def test_a_dummy_holds_an_address_that_others_reach(cable: tuple[Space, Space]) -> None:
    here, there = cable
    there.do("link", "add", "d0", "type", "dummy")
    there.do("address", "add", "203.0.113.7/32", "dev", "d0")
    there.do("link", "set", "d0", "up")
    here.do("route", "add", "203.0.113.7/32", "via", "192.0.2.2")
    assert await here.pings("203.0.113.7")

"""A wire of ours is what `ip` and `wg` would have made, but for its owner's marks."""

import array
import fcntl
import socket
import struct

import pytest

from bench import wires
from bench.offloads import offloads
from bench.same import MAY_DIFFER, compared, differences
from bench.wires import stage
from nsm.kernel.namespaces import Home

pytestmark = pytest.mark.kernel
SIOCETHTOOL, GRO = 0x8946, 0x2C  # ETHTOOL_SGRO


@pytest.mark.parametrize(
    "kind",
    [
        "veth",
        "vxlan",
        pytest.param("wireguard", marks=[pytest.mark.needs_kernel("wireguard"), pytest.mark.long]),
        "wireguard-go",
    ],
)
async def test_a_wire_and_its_twin_by_hand_are_the_same_objects(kind):
    assert await differences(kind) == []


async def test_one_more_setting_on_either_is_a_difference(monkeypatch):
    more = "link set {name} txqueuelen 999\nrule add pref 7 lookup 7\n"
    monkeypatch.setattr(wires, "NEIGHBOURS", wires.NEIGHBOURS + more)
    found = await differences("veth")
    assert "client link wire-1: txqlen is 1000, by hand 999" in found
    assert any(line.startswith("server rule: only by hand: {'priority': 7") for line in found)


async def test_one_more_entry_of_forwarding_and_one_queue_more_are_differences(monkeypatch):
    more = "bridge -n {space} fdb append 00:00:00:00:00:00 dst 192.0.2.9 dev {name}\n"
    more += "tc -n {space} qdisc add dev {name} root pfifo\n"
    monkeypatch.setattr(wires, "VXLAN", wires.VXLAN + more)
    found = await differences("vxlan")
    assert any(one.startswith("client fdb: only by hand:") and "192.0.2.9" in one for one in found)
    assert any(one.startswith("server qdisc") and "pfifo" in one for one in found)


def test_an_offload_that_is_switched_on_is_seen_and_only_that_one():
    with stage() as where:
        before = offloads(where.near)
        number = array.array("I", [GRO, 1])
        with (
            Home() as home,
            open(f"/run/netns/{where.near}") as space,
            home.inside(space.fileno()),
            socket.socket() as asking,
        ):
            order = struct.pack("16sP16x", b"eth0", number.buffer_info()[0])
            fcntl.ioctl(asking, SIOCETHTOOL, order)
        after = offloads(where.near)
    assert [one["ifname"] for one in before] == ["lo", "eth0"]
    both = ({"near offloads": told} for told in (before, after))
    assert compared(*both) == ["near offloads eth0: rx-gro is off, by hand on"]


def test_what_may_differ_may_only_differ_as_it_is_said():
    ours = {"client link": [{"ifname": "a", "group": "default", "ifalias": "mine", "ifindex": 7}]}
    by_hand = {"client link": [{"ifname": "a", "group": "default", "ifindex": 8}]}
    assert compared(ours, by_hand) == ["client link a: ifalias is mine, by hand absent"]
    marked = [{**ours["client link"][0], "ifalias": "nsm:some-wire:src", "group": "1314120485"}]
    assert compared({"client link": marked}, by_hand) == []
    assert all(rule.because for rule in MAY_DIFFER)

"""A wire of ours is what `ip` and `wg` would have made, but for its owner's marks."""

import pytest

from bench import wires
from bench.same import MAY_DIFFER, compared, differences

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize(
    "kind",
    [
        "veth",
        "vxlan",
        pytest.param("wireguard", marks=pytest.mark.needs_kernel("wireguard")),
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


def test_what_may_differ_may_only_differ_as_it_is_said():
    ours = {"client link": [{"ifname": "a", "group": "default", "ifalias": "mine", "ifindex": 7}]}
    by_hand = {"client link": [{"ifname": "a", "group": "default", "ifindex": 8}]}
    assert compared(ours, by_hand) == ["client link a: ifalias is mine, by hand absent"]
    marked = [{**ours["client link"][0], "ifalias": "nsm:some-wire:src", "group": "1314120485"}]
    assert compared({"client link": marked}, by_hand) == []
    assert all(rule.because for rule in MAY_DIFFER)

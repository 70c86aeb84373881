"""What of an earlier life is believed: what stands on the node before what a workload shows."""

from dataclasses import replace

import pytest

from forwarder.recovery import Recovery
from nsm.kernel.ensure import Place
from nsm.kernel.messages import Device
from nsm.kernel.owner import Mark
from nsm.kernel.state import OWN
from nsm.kernel.sweep import Found

DEVICE = Device(7, "nsm-1", "", 1450, True, 0, "", "vxlan", 0, None)


class Kernel:
    def __init__(self, *found):
        self.found = found

    async def find(self):
        return self.found

    async def remove_found(self, found):
        assert not found


def one(nsid, kind, *, hop=False, vni=0):
    device = replace(DEVICE, kind=kind, vni=vni, port=4789 if vni else 0)
    return Found(Place(nsid, 7), Mark("id-1", "src", hop=hop), device)


async def known(*found):
    recovery = Recovery(Kernel(*found))
    await recovery.look()
    return recovery


@pytest.mark.parametrize("forged", [one(5, "vxlan", vni=666), one(5, "vxlan", hop=True, vni=666)])
async def test_an_identifier_is_not_taken_from_a_workload_that_is_to_have_none(forged):
    there = await known(forged)
    assert there.vxlan("id-1", hop=True) == (0, 0)
    both = await known(forged, one(OWN, "vxlan", hop=True, vni=42))
    assert both.vxlan("id-1", hop=True) == (42, 4789)


async def test_a_tunnel_that_stands_in_its_workload_keeps_its_identifier():
    recovery = await known(one(5, "vxlan", vni=42))
    assert recovery.vxlan("id-1", hop=False) == (42, 4789)
    recovery.settled("id-1")
    assert recovery.vxlan("id-1", hop=False) == (0, 0)


async def test_where_a_tunnel_stands_is_told_only_where_nobody_else_can_have_made_it_so():
    nothing = await known()
    assert nothing.hop("id-1", encrypted=False) is nothing.hop("id-1", encrypted=True) is None
    frames = await known(one(5, "vxlan", vni=42))
    assert frames.hop("id-1", encrypted=False) is False
    for kind in ("tun", "wireguard", "vxlan"):
        there = await known(one(5, kind))
        assert there.hop("id-1", encrypted=True) is None
    apart = await known(one(5, "veth"), one(OWN, "wireguard", hop=True))
    assert apart.hop("id-1", encrypted=True) is True
    shown = await known(one(5, "wireguard", hop=True))  # a workload says so of its own
    assert shown.hop("id-1", encrypted=True) is None

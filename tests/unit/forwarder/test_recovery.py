"""What of an earlier life is believed: what stands on the node before what a workload shows."""

from dataclasses import replace

import pytest

from forwarder.recovery import Recovery
from nsm.kernel.ensure import Place
from nsm.kernel.messages import Device
from nsm.kernel.owner import Mark
from nsm.kernel.state import OWN, Namespace
from nsm.kernel.sweep import Found

NODE = 3  # the number the node's namespace has for itself
APP = Namespace(77, 5)
DEVICE = Device(7, "nsm-1", "", 1450, True, 0, "", "vxlan", 0, None)


class Kernel:
    def __init__(self, *found):
        self.found = found

    async def find(self):
        return self.found

    async def own_number(self):
        return NODE

    async def remove_found(self, found):
        self.removed = found


def one(nsid, kind, *, hop=False, vni=0, far=None):
    device = replace(DEVICE, kind=kind, vni=vni, port=4789 if vni else 0, far=far)
    return Found(Place(nsid, 7), Mark("id-1", "src", hop=hop), device)


OURS = one(5, "vxlan", vni=42, far=NODE)
APART = one(OWN, "vxlan", hop=True, vni=42)
FORGED = {
    "no tunnel": one(5, "bridge"),
    "stands in the workload": one(5, "vxlan", vni=666),
    "stands elsewhere": one(5, "vxlan", vni=666, far=NODE + 1),
    "of a namespace that ends": one(5, "vxlan", vni=666, far=OWN),
    "says it is the tunnel itself": one(5, "vxlan", hop=True, vni=666),
    "in another workload": one(6, "vxlan", vni=666, far=NODE),
}


async def known(*found):
    recovery = Recovery(Kernel(*found))
    await recovery.look()
    assert not recovery._kernel.removed
    return recovery


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("hop", [False, True])
async def test_what_a_workload_can_have_made_itself_says_nothing(forged, hop):
    there = await known(forged)
    assert there.hop("id-1", APP, encrypted=False) is None
    assert there.vxlan("id-1", APP, hop=hop) == (0, 0)
    both = await known(forged, APART)
    assert both.hop("id-1", APP, encrypted=False) is True
    assert both.vxlan("id-1", APP, hop=hop) == (42, 4789)


async def test_a_tunnel_that_stands_in_its_workload_keeps_its_identifier():
    recovery = await known(OURS)
    assert recovery.hop("id-1", APP, encrypted=False) is False
    assert recovery.vxlan("id-1", APP, hop=False) == (42, 4789)
    assert recovery.vxlan("id-1", APP, hop=True) == (0, 0)
    recovery.settled("id-1")
    assert recovery.vxlan("id-1", APP, hop=False) == (0, 0)


async def test_one_in_the_nodes_own_namespace_stands_where_it_is():
    recovery = await known(one(OWN, "vxlan", vni=42))
    here = Namespace(1, OWN)
    assert recovery.hop("id-1", here, encrypted=False) is False
    assert recovery.vxlan("id-1", here, hop=False) == (42, 4789)


async def test_before_a_node_has_a_number_nothing_stands_on_it():
    class Unnumbered(Kernel):
        async def own_number(self):
            return OWN

    recovery = Recovery(Unnumbered(FORGED["of a namespace that ends"]))
    await recovery.look()
    assert recovery.hop("id-1", APP, encrypted=False) is None


async def test_where_an_encrypted_tunnel_stands_is_told_only_of_one_on_the_node():
    assert (await known()).hop("id-1", APP, encrypted=True) is None
    for kind in ("tun", "wireguard", "vxlan"):
        there = await known(one(5, kind, far=NODE))
        assert there.hop("id-1", APP, encrypted=True) is None
    apart = await known(one(5, "veth"), one(OWN, "wireguard", hop=True))
    assert apart.hop("id-1", APP, encrypted=True) is True
    shown = await known(one(5, "wireguard", hop=True))  # a workload says so of its own
    assert shown.hop("id-1", APP, encrypted=True) is None


def end(nsid, side, kind, **mark):
    return Found(Place(nsid, 7), Mark("id-1", side, **mark), replace(DEVICE, kind=kind))


async def test_a_wire_that_another_has_replaced_is_taken_away_and_not_known():
    old = [
        end(5, "src", "veth", beside=True, leg="0a1b2c3d"),
        end(6, "dst", "veth", leg="0a1b2c3d"),
    ]
    apart = [
        end(5, "src", "macvlan", beside=True, leg="4e5f6a7b"),
        end(OWN, "src", "vxlan", hop=True, leg="4e5f6a7b"),
    ]
    new = [end(5, "src", "veth", leg="8c9d0e1f"), end(7, "dst", "veth", leg="8c9d0e1f")]
    kernel = Kernel(*old, *apart, *new)
    recovery = Recovery(kernel)
    assert await recovery.look() == 1
    assert kernel.removed == [*old, *apart]
    assert recovery.leg("id-1") == "8c9d0e1f"


@pytest.mark.parametrize(
    "victims",
    [
        [end(5, "src", "veth"), end(6, "dst", "veth")],
        [end(5, "src", "macvlan"), end(OWN, "src", "vxlan", hop=True)],
        [end(6, "dst", "vxlan")],
        [end(6, "dst", "wireguard")],
        [end(6, "dst", "veth"), end(OWN, "dst", "wireguard", hop=True)],
    ],
    ids=["local", "its client here", "its endpoint here", "encrypted", "encrypted, apart"],
)
async def test_nobody_takes_another_s_wire_away_by_what_is_written_in_its_own_namespace(victims):
    forged = [end(9, "src", "dummy", beside=True), end(9, "dst", "dummy", hop=True, beside=True)]
    for written in (forged[:1], forged):
        await known(*victims, *written)

from ipaddress import ip_address

import pytest

from forwarder.mechanisms import vxlan
from forwarder.remote import Span, Vxlan, VxlanHalf
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel.state import Namespace, VxlanTunnel

HERE = Namespace(cookie=1, nsid=-1)
ONE, TWO = ip_address("10.0.0.1"), ip_address("10.0.0.2")


def agreed(**more):
    return vxlan.answer(vxlan.offer(ONE, 4789, 1446).with_(**more), TWO, 4789, 1400, 7712)


def test_both_sides_see_the_same_tunnel_from_their_own_end():
    assert vxlan.tunnel(agreed(), "src", 4789, HERE) == VxlanTunnel(7712, ONE, TWO, HERE, 4789)
    assert vxlan.tunnel(agreed(), "dst", 4789, HERE) == VxlanTunnel(7712, TWO, ONE, HERE, 4789)


def test_an_offer_says_no_identifier_unless_it_proposes_one_and_the_lower_mtu_counts():
    assert "vni" not in vxlan.offer(ONE, 4789, 1446).parameters
    assert vxlan.offer(ONE, 4789, 1446, 99).get("vni") == "99"
    assert agreed().get("MTU") == "1400"
    assert agreed().parameters["src_ip"] == "10.0.0.1"


@pytest.mark.parametrize("text", ["", "somewhere", "0.0.0.0", "224.0.0.1", "::"])
def test_an_address_no_tunnel_can_end_at_is_refused(text):
    with pytest.raises(InvalidError, match="NSM_TUNNEL_IP"):
        vxlan.tunnel(agreed().with_(dst_ip=text), "src", 4789, HERE)


def test_one_device_has_one_port_for_both_directions():
    with pytest.raises(
        UnsupportedError, match="the other node uses UDP port 4790 and this one 4789"
    ):
        vxlan.tunnel(agreed().with_(dst_port="4790"), "src", 4789, HERE)


@pytest.mark.parametrize(("src", "dst"), [("10.0.0.1", "fd00::2"), ("fd00::1", "10.0.0.2")])
def test_a_tunnel_of_two_families_is_refused(src, dst):
    for side in ("src", "dst"):
        with pytest.raises(UnsupportedError, match="NSM_TUNNEL_IP on both nodes"):
            vxlan.tunnel(agreed().with_(src_ip=src, dst_ip=dst), side, 4789, HERE)


@pytest.mark.parametrize("vni", ["0", "", "16777216", "x"])
def test_without_an_identifier_there_is_no_tunnel(vni):
    with pytest.raises(InvalidError, match="no network identifier"):
        vxlan.tunnel(agreed().with_(vni=vni), "src", 4789, HERE)


async def test_a_far_manager_may_have_an_address_no_tunnel_ends_at():
    """It is what we know of its node before that has answered, through a forwarded port say."""
    there, asked = ip_address("127.0.0.1"), []

    class Kernel:
        async def vni_free(self, vni, local, remote, *, port):
            asked.append((local, remote))
            return True

    half = VxlanHalf(
        Vxlan(Kernel(), None, None, 0), Span("id", "src", ONE, there, 1450, False), 7, 4789
    )
    await half.draw_vni(half.offer().with_(dst_ip=str(there)))
    assert asked == [(ONE, there)]
    with pytest.raises(InvalidError, match=r"dst_ip is '127\.0\.0\.2'"):
        await half.is_free(half.offer().with_(dst_ip="127.0.0.2"))

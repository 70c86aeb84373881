"""Which addresses another node may say its tunnel ends at."""

import pytest

from forwarder.mechanisms import ends
from nsm import mechanisms
from nsm.errors import InvalidError
from nsm.model import Mechanism


def said(text):
    return Mechanism(mechanisms.REMOTE, mechanisms.VXLAN).with_(src_ip=text)


@pytest.mark.parametrize(
    "text",
    ["10.0.0.1", "192.0.2.1", "100.64.0.1", "169.254.7.1", "8.8.8.8", "fd00::1", "2001:db8::1"],
)
def test_what_a_node_may_have(text):
    assert str(ends.address(said(text), mechanisms.SRC_IP)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "nonsense", "10.0.0.1/24", "10.0.0",
        "0.0.0.0", "0.0.0.1", "0.255.255.255",
        "127.0.0.1", "127.255.0.1", "::1",
        "224.0.0.1", "239.1.1.1", "ff02::1",
        "240.0.0.1", "255.255.255.255",
        "::", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "::10.0.0.1",
        "fe80::1", "fe80::1%eth0", "2001:db8::1%eth0",
    ],
)  # fmt: skip
def test_what_means_ourselves_or_nobody_is_refused_and_named(text):
    with pytest.raises(InvalidError, match="no address a tunnel can end at") as told:
        ends.address(said(text), mechanisms.SRC_IP)
    assert f"src_ip is {text!r}" in str(told.value)
    assert "NSM_TUNNEL_IP" in str(told.value)

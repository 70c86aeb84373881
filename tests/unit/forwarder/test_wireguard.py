"""What two nodes say of a WireGuard tunnel, and what is refused of it (`wire.md` §2.2)."""

import base64
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forwarder.mechanisms import wireguard
from nsm.errors import InvalidError, NsmError, UnsupportedError
from nsm.kernel.keys import Key
from nsm.kernel.state import Namespace, WireguardTunnel

HERE = Namespace(cookie=1, nsid=-1)
ONE, TWO = ip_address("10.0.0.1"), ip_address("10.0.0.2")
OURS, THEIRS = Key(bytes(range(32))), Key(bytes(range(1, 33)))
NEAR = wireguard.Own("src", OURS, ONE, 51820, "kernel", HERE)
FAR = wireguard.Own("dst", THEIRS, TWO, 51977, "userspace", HERE)
ANSWERED = {"ip": "dst_ip", "port": "dst_port", "key": "dst_public_key"}
ASKED = {"ip": "src_ip", "port": "src_port", "key": "src_public_key"}


def agreed(**more):
    return wireguard.answer(wireguard.offer(NEAR, 1440), FAR, 1420).with_(**more)


def test_each_side_says_address_port_and_public_key_in_the_protocols_words():
    offer = wireguard.offer(NEAR, 1440)
    assert (offer.cls, offer.type) == ("REMOTE", "WIREGUARD")
    assert offer.parameters == {
        "src_ip": "10.0.0.1",
        "src_port": "51820",
        "src_public_key": OURS.public,
        "MTU": "1440",
    }
    assert len(base64.b64decode(offer.get("src_public_key"))) == 32
    assert agreed().parameters == {
        **offer.parameters,
        "dst_ip": "10.0.0.2",
        "dst_port": "51977",
        "dst_public_key": THEIRS.public,
        "MTU": "1420",
    }


def test_the_lower_mtu_counts_and_nothing_said_is_no_limit():
    for asked, own, lowest in (("1400", 1440, "1400"), ("1440", 1400, "1400"), ("x", 1400, "1400")):
        offer = wireguard.offer(NEAR, 9000).with_(MTU=asked)
        assert wireguard.answer(offer, FAR, own).get("MTU") == lowest


def test_both_sides_see_the_same_tunnel_from_their_own_end():
    near = wireguard.tunnel(agreed(), NEAR)
    assert near == WireguardTunnel(
        key=OURS, peer=THEIRS.public, local=ONE, remote=TWO, remote_port=51977,
        underlay=HERE, port=51820, engine="kernel", keepalive=wireguard.KEEPALIVE,
    )  # fmt: skip
    assert wireguard.tunnel(agreed(), FAR) == WireguardTunnel(
        key=THEIRS, peer=OURS.public, local=TWO, remote=ONE, remote_port=51820,
        underlay=HERE, port=51977, engine="userspace", keepalive=0,
    )  # fmt: skip


def test_only_who_asked_keeps_the_tunnel_alive():
    assert wireguard.tunnel(agreed(), NEAR).keepalive > 0
    assert wireguard.tunnel(agreed(), FAR).keepalive == 0


def test_no_private_key_is_in_what_is_said_or_shown():
    private = [form for key in (OURS, THEIRS) for form in (key.secret.hex(), _text(key.secret))]
    shown = (repr(agreed()), repr(NEAR), repr(FAR), repr(wireguard.tunnel(agreed(), NEAR)))
    assert not [form for form in private for text in shown if form in text]


@pytest.mark.parametrize("side", ["asked", "answered"])
@pytest.mark.parametrize(
    ("what", "text", "words"),
    [
        ("ip", "", "NSM_TUNNEL_IP"),
        ("ip", "somewhere", "NSM_TUNNEL_IP"),
        ("ip", "0.0.0.0", "NSM_TUNNEL_IP"),
        ("ip", "224.0.0.1", "NSM_TUNNEL_IP"),
        ("ip", "fe80::1", "NSM_TUNNEL_IP"),
        ("ip", "fd00::1%eth0", "NSM_TUNNEL_IP"),
        ("port", "", "no UDP port"),
        ("port", "0", "no UDP port"),
        ("port", "65536", "no UDP port"),
        ("port", "-1", "no UDP port"),
        ("port", "9" * 5000, "no UDP port"),
        ("port", "51820; reboot", "no UDP port"),
        ("key", "", "public key"),
        ("key", "AAAA", "public key"),
        ("key", base64.b64encode(bytes(32)).decode(), "public key"),
        ("key", base64.b64encode(bytes(33)).decode(), "public key"),
        ("key", THEIRS.public[:-1], "public key"),
        ("key", "=" * 44, "public key"),
        ("key", "k" * 60_000, "public key"),
        ("key", THEIRS.public[:-2] + "\n=", "public key"),
    ],
)
def test_what_no_tunnel_can_be_made_of_is_refused_with_a_sentence(side, what, text, words):
    own, keys = (FAR, ASKED) if side == "asked" else (NEAR, ANSWERED)
    with pytest.raises(InvalidError, match=words) as refused:
        wireguard.tunnel(agreed(**{keys[what]: text}), own)
    said = str(refused.value)
    assert keys[what] in said
    assert len(said) < 400
    if side == "asked":  # and it is said before anybody else is asked
        with pytest.raises(InvalidError, match=words):
            wireguard.asker(agreed(**{keys[what]: text}))


def test_a_far_end_with_our_own_key_is_refused():
    with pytest.raises(InvalidError, match="this node's own public key"):
        wireguard.tunnel(agreed(dst_public_key=OURS.public), NEAR)
    with pytest.raises(InvalidError, match="this node's own public key"):
        wireguard.tunnel(agreed(src_public_key=THEIRS.public), FAR)


@pytest.mark.parametrize(("own", "far"), [(ONE, "fd00::2"), (ip_address("fd00::1"), "10.0.0.2")])
def test_a_tunnel_of_two_families_is_refused(own, far):
    with pytest.raises(UnsupportedError, match="NSM_TUNNEL_IP on both nodes"):
        wireguard.tunnel(agreed(dst_ip=far), replace(NEAR, local=own))


texts = st.text(max_size=80) | st.sampled_from(["51820", "10.0.0.9", "fd00::9", THEIRS.public])


@given(st.fixed_dictionaries(dict.fromkeys(ANSWERED.values(), texts)))
def test_whatever_is_answered_is_a_tunnel_of_that_or_a_sentence(said):
    try:
        made = wireguard.tunnel(agreed(**said), NEAR)
    except NsmError:
        return
    assert made.remote == ip_address(said["dst_ip"])
    assert 0 < made.remote_port < 1 << 16
    assert base64.b64decode(made.peer) == base64.b64decode(said["dst_public_key"])
    assert (made.key, made.port, made.local) == (OURS, 51820, ONE)


def _text(raw):
    return base64.b64encode(raw).decode()

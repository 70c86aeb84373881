"""What a WireGuard device is told is the difference, and what it has is read as a whole."""

from dataclasses import replace

import pytest

from nsm.kernel.keys import Key
from nsm.kernel.state import End, Namespace, Wireguard
from nsm.kernel.wireguard import Change, Peer, PeerChange, Settings, difference, found

pytestmark = pytest.mark.unit

HERE, UNDER = Namespace(1, 1, 1, "client"), Namespace(2, 2, 2, "node")
OURS = Key(b"\1" * 32)
ONE, TWO, THREE = (Key(bytes([n]) * 32).public for n in (2, 3, 4))
END = End(HERE, "nsm-1", "", 1420, 78, "nsm:id:src:on=2:to=192.0.2.2%3A51820")
DEVICE = Wireguard(END, "kernel", UNDER, OURS, 51820, ONE, "192.0.2.2:51820", 10)


def test_a_fresh_device_is_told_everything() -> None:
    peer = PeerChange(ONE, new=True, endpoint="192.0.2.2:51820", keepalive=10)
    assert difference(DEVICE) == Change(OURS, 51820, (peer,))
    assert not difference(DEVICE, DEVICE)


def test_a_new_far_end_comes_before_the_old_one_goes() -> None:
    told = difference(replace(DEVICE, peer=TWO), DEVICE).peers
    assert [(one.public, one.new, one.remove) for one in told] == [
        (TWO, True, False),
        (ONE, False, True),
    ]


def test_who_begins_speaks_from_its_new_port_at_once_and_the_other_end_does_not() -> None:
    peers = (PeerChange(ONE, keepalive=0), PeerChange(ONE, keepalive=10))
    assert difference(replace(DEVICE, port=9), DEVICE) == Change(port=9, peers=peers)
    quiet = replace(DEVICE, keepalive=0)
    assert difference(replace(quiet, port=9), quiet) == Change(port=9)


def test_a_stranger_goes_and_the_far_end_is_not_touched() -> None:
    told = difference(DEVICE, replace(DEVICE, strangers=(THREE,)))
    assert told == Change(peers=(PeerChange(THREE, remove=True),))


def test_half_made_is_seen_as_half_made_and_taken_back_as_far_as_it_goes() -> None:
    half = replace(DEVICE, key=None, port=0, peer="", far="", keepalive=0)
    assert difference(DEVICE, half) == difference(DEVICE)
    assert difference(half, DEVICE) == Change(peers=(PeerChange(ONE, remove=True),))


@pytest.mark.parametrize(
    ("peers", "peer", "strangers"),
    [
        ((), "", ()),
        ((Peer(ONE, "192.0.2.9:1", 10, 7, True),), ONE, ()),
        ((Peer(TWO, "192.0.2.9:1", 10, 7, True),), TWO, ()),
        (
            (Peer(TWO, "192.0.2.9:1", 10, 7, False), Peer(ONE, "192.0.2.9:1", 10, 7, True)),
            ONE,
            (TWO,),
        ),
        ((Peer(ONE, "", 10, 0, True),), "", ()),
        ((Peer(ONE, "192.0.2.9:1", 10, 0, False),), "", ()),
        ((Peer(TWO, "192.0.2.9:1", 10, 0, False),), "", (TWO,)),
    ],
    ids=["none", "whole", "another", "two", "nowhere", "closed", "another-closed"],
)
def test_what_is_there_is_read_as_who_wants_one_far_end_needs_it(
    peers: tuple[Peer, ...], peer: str, strangers: tuple[str, ...]
) -> None:
    seen = found(END, "kernel", UNDER, Settings(OURS, 51820, peers), ONE, "192.0.2.2:51820")
    assert (seen.peer, seen.strangers) == (peer, strangers)
    # a far end that roamed is where it said it is, as far as anybody wants to change that
    assert seen.far == ("192.0.2.2:51820" if peer else "")
    told = difference(DEVICE, seen).peers
    assert [one.public for one in told if one.new] == ([] if peer == ONE else [ONE])
    gone = {one.public for one in peers} - {ONE}
    assert {one.public for one in told if one.remove} == gone

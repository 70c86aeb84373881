"""Whose silence is whose: a node that died, or a network of our own that is cut."""

import pytest

from forwarder.farnodes import AT_ONCE, DEAD, HEARD, between, together
from nsm import mechanisms
from nsm.model import Mechanism

LAST = 1000.0  # when the node in doubt was heard last
JUDGED = LAST + DEAD
ECHO = 0.5


@pytest.mark.parametrize(
    ("others", "ours"),
    [
        pytest.param([], False, id="nobody else was ever there"),
        pytest.param([LAST - 60], False, id="who was there died long before"),
        pytest.param([JUDGED - ECHO], False, id="somebody else answers"),
        pytest.param([LAST, LAST - ECHO, JUDGED - ECHO], False, id="one of three answers"),
        pytest.param([LAST - ECHO], True, id="the only other fell silent an echo before"),
        pytest.param([LAST + ECHO], True, id="and an echo later"),
        pytest.param([LAST + ECHO, LAST, LAST - 60], True, id="all who were there at that time"),
        pytest.param([LAST + 1.4], False, id="the other fell silent by itself"),
    ],
)
def test_a_node_is_judged_unless_all_who_answered_fell_silent_at_once(others, ours):
    assert together(LAST, others, 0.0, JUDGED) is ours


def test_a_node_that_was_cut_off_for_long_and_returns_gives_the_others_their_time():
    """Whoever died meanwhile is judged once somebody else has answered for long enough."""
    back = LAST + 60.0
    assert together(LAST, [LAST], back, back), "nobody has answered yet"
    assert together(LAST, [back + AT_ONCE / 2], back, back + AT_ONCE / 2 + HEARD + 0.1), (
        "one answer, and silence again: it was cut off once more"
    )
    for seconds in (0.2, 1.0, DEAD):
        assert not together(LAST, [back + seconds - 0.1], back, back + seconds)


@pytest.mark.parametrize(
    ("src", "dst", "side", "way"),
    [
        ("192.0.2.1", "192.0.2.2", "dst", ("192.0.2.2", "192.0.2.1")),
        ("192.0.2.1", "192.0.2.2", "src", ("192.0.2.1", "192.0.2.2")),
        ("192.0.2.1", "2001:db8::2", "dst", None),
        ("192.0.2.1", "", "dst", None),
    ],
)
def test_a_tunnel_says_which_node_is_the_far_one(src, dst, side, way):
    told = Mechanism(mechanisms.REMOTE, "VXLAN").with_(
        **{mechanisms.SRC_IP: src, mechanisms.DST_IP: dst}
    )
    assert between(told, side) == way


def test_a_wire_of_one_node_comes_from_no_other():
    assert between(Mechanism(mechanisms.LOCAL, mechanisms.KERNEL), "dst") is None

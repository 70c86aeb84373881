"""On which wires packets may be lost while chaos breaks something, and on which none."""

import pytest

from labs.chaos import _Between
from labs.schedule import Fault
from labs.wires import Wire


def wire(client: str, endpoint: str, nodes: tuple[str, str], network: str = "") -> Wire:
    ends = (("172.16.0.1",), ("172.16.0.2",)) if client != "second" else (("172.16.1.1",), ())
    return Wire(
        f"{client}-0", client, "svc", "home", endpoint, nodes, "nsm-1", "vxlan", 1450, *ends,
        1.0, network=network,
    )  # fmt: skip


BESIDE = _Between((wire("beside", "hub", ("one", "one")),))
BEHIND = _Between((wire("behind", "hub", ("two", "one")),))
MEMBERS = _Between(
    (
        wire("first", "router-1", ("one", "one"), "flat@home"),
        wire("second", "router-2", ("two", "two"), "flat@home"),
    )
)


def test_packets_are_between_the_ends_of_a_wire_or_two_members():
    assert (BEHIND.places, BEHIND.addresses) == (("behind", "hub"), ("172.16.0.1", "172.16.0.2"))
    assert MEMBERS.places == ("first", "second")
    assert MEMBERS.addresses == ("172.16.0.1", "172.16.1.1")
    assert (str(BEHIND), str(MEMBERS)) == ("behind - hub (vxlan)", "first - second (flat@home)")


@pytest.mark.parametrize(
    ("do", "who", "cut"),
    [
        ("kill", ("client:beside", "router:router-1"), []),
        ("freeze", ("forwarder@one",), []),
        ("restart", ("nsmgr@one", "endpoint:hub"), []),
        ("restart", ("client:beside",), [BESIDE]),
        ("restart", ("client:second",), [MEMBERS]),
        ("unplug", ("two",), [BEHIND, MEMBERS]),
        ("rate", ("one",), [BEHIND, MEMBERS]),
        ("unplug", ("three",), []),
        ("partition", ("one",), [BEHIND, MEMBERS]),
        ("partition", ("one", "two"), []),
        ("partition", ("three",), []),
        ("reboot", ("one",), [BESIDE, BEHIND, MEMBERS]),
        ("reboot", ("two",), [BEHIND, MEMBERS]),
        ("reboot", ("three",), []),
    ],
)
def test_only_who_is_cut_off_or_dead_or_was_told_to_end_may_lose_packets(do, who, cut):
    fault = Fault(do, who, 1.0, 1.0)
    assert [one for one in (BESIDE, BEHIND, MEMBERS) if one.cut_by(fault)] == cut

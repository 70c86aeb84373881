"""The forwarder's capabilities: what its unit gives is what it needs, each for something named."""

import re
from collections.abc import Iterator

import pytest

from forwarder import rights
from nsm.kernel.namespaces import have_handles
from tests.e2e.systemd.machine import Machine
from tests.e2e.systemd.mesh import PAGE, setting, unit_file
from tests.e2e.systemd.rights import UNIT, Tried, dropped

MAY_NOT_START = {"start"}
LOST = {  # what does not work without it, where the forwarder does not ask at its start
    "CAP_NET_ADMIN": MAY_NOT_START,
    "CAP_NET_BROADCAST": MAY_NOT_START,
    "CAP_SYS_ADMIN": {
        "wires of before",
        "a wire on this node",
        "a wire between nodes",
        "an encrypted wire",
        "a tunnel kept from who may misuse it",
    },
    "CAP_SYS_PTRACE": {"a tunnel kept from who may misuse it"},
}
# A wire of before that cannot be refreshed is not known again: what ends of it is luck.
LUCK = {"CAP_SYS_ADMIN": {"the end of a workload", "close"}}
ALL = set(LOST)


@pytest.fixture
def tried(machines: tuple[Machine, Machine]) -> Iterator[Tried]:
    """Wires are there already, made with all rights; afterwards none is."""
    made = Tried(*machines)
    yield made
    made.clear()


def test_unit_program_and_page_name_the_same_capabilities():
    unit = unit_file(UNIT)
    assert set(unit["CapabilityBoundingSet"].split()) == ALL
    assert unit["AmbientCapabilities"] == unit["CapabilityBoundingSet"]
    assert set(rights.NEEDED) == set(rights.WITHOUT) == ALL
    table = re.findall(r"^\| `(CAP_\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(table) == sorted(ALL)


def test_with_exactly_these_rights_and_as_an_ordinary_user_everything_works(machines, tried):
    east, _ = machines
    with dropped(east, ALL, asked=True):
        assert tried.everything() == {}
        status = east.status(UNIT)
        wanted = sum(1 << bit for bit in rights.NEEDED.values())
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(status[kind], 16) == wanted, kind
        assert status["NoNewPrivs"] == "1"
        assert "0" not in status["Uid"].split()


@pytest.mark.parametrize(
    "right",
    [pytest.param(r, marks=pytest.mark.long if r == "CAP_SYS_ADMIN" else ()) for r in sorted(ALL)],
)
def test_without_one_of_them_something_does_not_work(machines, tried, right):
    with dropped(machines[0], ALL - {right}, asked=False):
        failed = tried.everything()
    assert set(failed) - LUCK.get(right, set()) == LOST[right], failed


@pytest.mark.parametrize("right", sorted(ALL))
def test_without_one_of_them_the_forwarder_says_at_its_start_which_and_what_for(machines, right):
    east, _ = machines
    with dropped(east, ALL - {right}, asked=True):
        east.run("systemctl", "restart", UNIT, wrong=True)
        said = east.show(UNIT, "StatusText")
    assert said.startswith("cannot run: forwarder 'forwarder-east-")
    assert f" lacks {right}: without {right} {rights.WITHOUT[right]}; " in said
    assert ("NSM_ISOLATION=hop" in said) == (right == "CAP_SYS_PTRACE" and have_handles())


def test_who_does_not_ask_who_is_in_a_workload_need_not_see_it(machines, tried):
    east, _ = machines
    with (
        dropped(east, ALL - {"CAP_SYS_PTRACE"}, asked=True),
        setting(east, "forwarder", "NSM_ISOLATION=hop"),
    ):
        failed = tried.everything()
    if have_handles():
        assert failed == {
            "a wire between nodes": "a macvlan"
        }  # a hop for everybody, as it was told
    else:
        assert set(failed) == MAY_NOT_START

"""What earlier labs and wires left is found by their marks, and no live wires are taken for it.

In here others may run whom the doctor does not see: it has a PID namespace of its own. What
it says where it sees everybody is judged in the lane, where nobody else is.
"""

import sys

import pytest

from nsm.kernel import owner
from tests.kernel.doctor.world import AS_NOBODY, HERE, NSMCTL, Told, doctor, inside

pytestmark = pytest.mark.long

LAB = f"{sys.executable} -P {HERE}/lab.py"
GROUP = owner.group("forwarder-of-yore")
DEVICES = (
    f"ip netns add left; ip -n left link add nsm-1 group {GROUP} type veth peer name nsm-2"
    f" group {GROUP}; ip -n left link add innocent type veth peer name nsm-9"
)


# --- labs ------------------------------------------------------------------------------------


def test_a_lab_whose_engine_died_while_it_made_it_is_told_with_what_clears_it():
    told = doctor(f"{LAB} crashed making")
    assert told.code == 0
    assert told.line("labs") == (
        "note",
        "crashed: left by an engine that ended, or that runs outside of this PID namespace",
        "nsmctl lab down crashed, if nobody runs it there",
    )
    cleared = doctor(f"{LAB} crashed making; {NSMCTL} lab down crashed")
    assert cleared.line("labs") == ("ok", "none up, none left", "")


def test_a_lab_that_is_up_without_any_process_is_left_over_too():
    assert "gone: left by" in doctor(f"{LAB} gone up").line("labs")[1]


def test_several_are_told_with_what_clears_all():
    told = doctor(f"{LAB} one making; {LAB} two making; mkdir /run/vwire/labs/three")
    assert told.line("labs") == (
        "note",
        "one and 2 more: left by an engine that ended, or that runs outside of this PID namespace",
        "nsmctl lab down --all, if nobody runs them there",
    )


def test_a_state_that_cannot_be_read_is_left_over():
    broken = "mkdir -p /run/vwire/labs/odd; echo '{' >/run/vwire/labs/odd/state.json"
    assert doctor(broken).line("labs")[0] == "note"


# --- wires -----------------------------------------------------------------------------------


def unseen(devices: str) -> tuple[str, str, str]:
    return (
        "note",
        f"{devices} whose forwarder is not seen: it may run outside of this PID namespace",
        "ask on the host itself, as root: nsmctl doctor",
    )


def test_who_does_not_see_everybody_never_says_that_a_wire_is_to_be_removed():
    told = doctor(DEVICES)
    assert told.code == 0
    assert told.line("wires") == unseen("2 devices")


def test_nor_does_who_has_the_namespace_of_the_node_but_not_its_processes():
    """As in a pod with hostNetwork and without hostPID: the forwarder runs, in another pod."""
    forwarder = f"{sys.executable} -c 'import time; time.sleep(600)' -m forwarder"
    told = inside(
        f"ip link add nsm-1 group {owner.group('forwarder')} type bridge; {forwarder} &"
        " while ! grep -q forwarder /proc/$!/cmdline; do sleep 0.01; done;"
        f" {NSMCTL} doctor --json >/run/seen; unshare -p -f --mount-proc {NSMCTL} doctor --json;"
        " cat /run/seen >&2"
    )
    assert Told(0, told.err, "").line("wires") == ("ok", "1 device of running forwarders", "")
    assert told.line("wires") == unseen("1 device")


def test_hidden_processes_are_not_taken_for_ended_ones():
    told = inside(
        "mount -o remount,hidepid=2 /proc;"
        f" ip link add nsm-1 group {GROUP} type bridge; exec {AS_NOBODY} --json"
    )
    assert told.line("wires") == unseen("1 device")


def test_devices_are_found_in_namespaces_that_only_a_process_leads_to():
    nameless = (
        f"unshare -n sh -c 'ip link add nsm-1 group {GROUP} type bridge; echo made >/run/made;"
        " exec sleep 600' & while ! grep -q made /run/made; do sleep 0.01; done"
    )
    assert doctor(nameless).line("wires") == unseen("1 device")


def test_a_group_of_somebody_elses_is_not_ours():
    assert doctor("ip link add nsm-1 group 78 type bridge").line("wires") == ("ok", "none", "")

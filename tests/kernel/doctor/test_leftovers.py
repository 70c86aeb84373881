"""What earlier labs and wires left is found by their marks, and the fix takes it away."""

import sys

from nsm.kernel import owner
from tests.kernel.doctor.world import HERE, NSMCTL, doctor, inside

LAB = f"{sys.executable} -P {HERE}/lab.py"
GROUP = owner.group("forwarder-of-yore")
DEVICES = (
    f"ip netns add left; ip -n left link add nsm-1 group {GROUP} type veth peer name nsm-2"
    f" group {GROUP}; ip -n left link add innocent type veth peer name nsm-9"
)
REMOVAL = f"ip netns exec left ip link del group {GROUP}"


# --- labs ------------------------------------------------------------------------------------


def test_a_lab_whose_engine_died_while_it_made_it_is_told_with_what_clears_it():
    told = doctor(f"{LAB} crashed making")
    assert told.code == 0
    assert told.line("labs") == (
        "note", "crashed: left by an engine that ended", "nsmctl lab down crashed"
    )  # fmt: skip
    cleared = doctor(f"{LAB} crashed making; {NSMCTL} lab down crashed")
    assert cleared.line("labs") == ("ok", "none up, none left", "")


def test_a_lab_that_is_up_without_any_process_is_left_over_too():
    assert "gone: left by" in doctor(f"{LAB} gone up").line("labs")[1]


def test_several_are_told_with_what_clears_all():
    told = doctor(f"{LAB} one making; {LAB} two making; mkdir /run/vwire/labs/three")
    assert told.line("labs") == (
        "note", "one and 2 more: left by an engine that ended", "nsmctl lab down --all"
    )  # fmt: skip


def test_a_state_that_cannot_be_read_is_left_over():
    broken = "mkdir -p /run/vwire/labs/odd; echo '{' >/run/vwire/labs/odd/state.json"
    assert doctor(broken).line("labs")[0] == "note"


# --- wires -----------------------------------------------------------------------------------


def test_devices_with_our_mark_and_no_forwarder_are_told_with_what_removes_them():
    told = doctor(DEVICES)
    assert told.code == 0
    assert told.line("wires") == (
        "note",
        "2 devices in 1 namespace of forwarders that do not run",
        f"start them again, or: {REMOVAL}",
    )
    after = inside(f"{DEVICES}; {REMOVAL}; ip -n left -br link >&2; exec {NSMCTL} doctor --json")
    assert after.line("wires") == ("ok", "none", "")
    assert "innocent" in after.err  # which has no mark
    assert "nsm-9" in after.err


def test_devices_are_found_in_namespaces_that_only_a_process_leads_to():
    nameless = (
        f"unshare -n sh -c 'ip link add nsm-1 group {GROUP} type bridge; echo made >/run/made;"
        " exec sleep 600' & while ! grep -q made /run/made; do sleep 0.01; done; echo $!"
    )
    told = doctor(nameless)
    pid = told.err.split()[-1]
    assert told.line("wires")[1:] == (
        "1 device in 1 namespace of forwarders that do not run",
        f"start them again, or: nsenter -n -t {pid} ip link del group {GROUP}",
    )


def test_devices_of_the_node_itself_are_found():
    told = doctor(f"ip link add nsm-1 group {GROUP} type bridge")
    assert told.line("wires")[2] == f"start them again, or: ip link del group {GROUP}"


def test_a_group_of_somebody_elses_is_not_ours():
    assert doctor("ip link add nsm-1 group 78 type bridge").line("wires") == ("ok", "none", "")

"""`nsmctl doctor` in another kernel: what the host's cannot show, or must not be made to."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nsm.kernel import owner
from nsmctl.machine import host

ROOT = Path(__file__).parents[2]
NSMCTL = f"{sys.executable} -P -m nsmctl"
pytestmark = pytest.mark.needs_lane

GROUP = owner.group("forwarder-of-yore")
REMOVALS = "; ".join(f"ip netns exec {name} ip link del group {GROUP}" for name in ("a", "b"))
ASKED_AGAIN_AND_AGAIN = f"""
export PYTHONPATH={ROOT}
{NSMCTL} doctor --json >$LANE_OUT/first
echo $? >$LANE_OUT/code
{sys.executable} -c '
import ctypes, struct
steady = bytearray({host._TIMEX})  # no status bit, no error: as ntpd says it
struct.pack_into("=I", steady, 0, 0x1C)
ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(bytes(steady), len(steady)))
'
{NSMCTL} doctor --json >$LANE_OUT/second
for name in a b; do
    ip netns add $name
    ip -n $name link add nsm-1 group {GROUP} type veth peer name nsm-2 group {GROUP}
done
{sys.executable} -P {ROOT}/tests/kernel/doctor/lab.py crashed making
{NSMCTL} doctor --json >$LANE_OUT/left
{REMOVALS}
{NSMCTL} lab down crashed
{NSMCTL} doctor --json >$LANE_OUT/cleared
date -s @$(($(stat -c %Y {host.__file__}) - 9000)) >/dev/null
{NSMCTL} doctor --json >$LANE_OUT/third
"""


@pytest.mark.long
def test_a_machine_of_its_own_without_ipv6_with_clocks_right_and_wrong_and_with_what_is_left(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.lane", "-b", "ipv6.disable=1", "-o", str(tmp_path),
         "sh", "-c", ASKED_AGAIN_AND_AGAIN],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert (tmp_path / "third").exists(), f"{done.stdout}{done.stderr}"

    def line(ask: str, name: str) -> Any:
        lines = json.loads((tmp_path / ask).read_text())["lines"]
        (found,) = (one for one in lines if one["name"] == name)
        return found["level"], found["found"], found["fix"]

    assert line("first", "ipv6") == (
        "note", "the kernel has none: IPv4 wires only", "boot without ipv6.disable=1"
    )  # fmt: skip
    assert line("first", "wireguard") == ("ok", "in the kernel", "")
    assert line("first", "netem")[0] == "ok"
    assert (tmp_path / "code").read_text() == "0\n", (tmp_path / "first").read_text()
    level, found, fix = line("first", "clock")
    assert (level, fix) == ("note", "timedatectl set-ntp true, or install chrony")
    assert found.endswith(" UTC, and nobody keeps it right")
    assert line("second", "clock") == ("ok", "kept right", "")
    level, found, _ = line("third", "clock")
    assert level == "bad"
    assert found == f"behind by 2 h or more: {host.__file__} was written later"
    # where everybody who runs is seen, who is not seen does not run
    assert line("left", "wires") == (
        "note",
        "4 devices in 2 namespaces of forwarders that do not run",
        f"start them again, or: {REMOVALS}",
    )
    assert line("left", "labs") == (
        "note", "crashed: left by an engine that ended", "nsmctl lab down crashed"
    )  # fmt: skip
    assert line("cleared", "wires") == ("ok", "none", "")
    assert line("cleared", "labs") == ("ok", "none up, none left", "")

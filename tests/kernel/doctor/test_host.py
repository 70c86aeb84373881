"""The machine around the mesh: its Python, its clock, its disks, its fences."""

import os
import re
from pathlib import Path

import pytest

from nsmctl.machine import host
from tests.kernel.doctor.world import ALL_USERS, AS_NOBODY, FENCE, ROOT, doctor, inside

pytestmark = pytest.mark.long

STATE = "mkdir /var/lib/vwire;"


# --- Python ----------------------------------------------------------------------------------


def distribution(folder: Path, name: str, version: str, *lines: str) -> None:
    """Says that a package is installed there, as an older one in front of ours does."""
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir()
    text = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *lines, ""]
    (place / "METADATA").write_text("\n".join(text))


def test_a_package_of_another_version_is_told(tmp_path):
    distribution(tmp_path, "grpclib", "0.4.7")
    distribution(tmp_path, "rich", "12.6")
    told = doctor(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert told.code == 1
    level, found, fix = told.line("python")
    assert level == "bad"
    assert found.endswith("grpclib is 0.4.7, not ==0.4.9; rich is 12.6, not >=13")
    assert fix.startswith("install vwire again")


def test_a_package_that_is_missing_is_told(tmp_path):
    needs = "Requires-Dist: no-such-thing>=1"
    distribution(tmp_path, "vwire", "0.0.1", needs, 'Requires-Dist: grpcio>=99; extra == "dev"')
    told = doctor(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert told.line("python")[0] == "bad"
    assert told.line("python")[1].endswith(", but no-such-thing is missing")


def test_the_kernel_is_told():
    assert doctor().line("kernel") == ("ok", os.uname().release, "")


@pytest.mark.parametrize(
    ("code", "said"), [("ENOSYS", "Function not implemented"), ("EPERM", "Operation not permitted")]
)
def test_a_kernel_or_container_without_pidfds_is_a_line(code, said):
    """And no end of the others: they are asked as ever."""
    told = doctor(rights=f"{FENCE} {code} pidfd_open --")
    assert told.code == 1
    level, found, fix = told.line("kernel")
    assert (level, found) == ("bad", f"{os.uname().release}, which has no pidfd for us: {said}")
    assert fix.startswith("Linux 5.3 or newer")
    assert told.line("veth")[0] == "ok"


# --- clock -----------------------------------------------------------------------------------


def test_a_clock_behind_what_was_written_is_bad():
    told = doctor(f"{STATE} mkdir /var/lib/vwire/issuer; cd /var/lib/vwire/issuer;"
                  " touch -d '3 hours' authority.pem; touch -d '10 seconds' young")  # fmt: skip
    assert told.code == 1
    level, found, fix = told.line("clock")
    assert level == "bad"
    assert found == "behind by 2 h or more: /var/lib/vwire/issuer/authority.pem was written later"
    assert fix.startswith("timedatectl set-ntp true")


def test_a_clock_that_was_set_right_a_moment_ago_is_not_behind():
    told = doctor(f"{STATE} touch -d '4 minutes' /var/lib/vwire/young")
    assert told.line("clock")[0] != "bad"


def test_whether_a_clock_is_kept_right_is_the_kernels_word():
    kept = bool(host._kernel_clock() or 0) and not host._kernel_clock() & host._STA_UNSYNC
    level, found, fix = doctor().line("clock")
    if kept:
        assert (level, found) == ("ok", "kept right")
    else:
        assert level == "note"
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC, and nobody keeps it right", found)
        assert fix == "timedatectl set-ntp true, or install chrony"


def test_a_kernel_that_may_not_be_asked_for_its_clock_is_a_note():
    told = doctor(rights=f"{FENCE} EPERM clock_adjtime --")
    assert told.line("clock") == (
        "note", "whether it is kept right cannot be asked here", "on the host: timedatectl"
    )  # fmt: skip


# --- disks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "found", "fix"),
    [
        ("size=4m", r"\d MB free, {} needed", "make room below"),
        ("nr_inodes=500", r"room for \d+ more files, 1000 needed", "remove some in"),
        ("ro", r"{path} cannot be written", "mount -o remount,rw"),
    ],
)
def test_disks_without_room_are_bad(options, found, fix):
    disks = {"state-disk": ("/var/lib/vwire", "5 MB"), "run-disk": ("/run", "20 MB")}
    mounts = [f"mount -t tmpfs -o {options} none {path}" for path, _ in disks.values()]
    told = doctor(f"{STATE} {'; '.join(mounts)}")
    assert told.code == 1
    for name, (path, needed) in disks.items():
        level, said, do = told.line(name)
        assert level == "bad"
        assert re.fullmatch(found.format(needed, path=path), said), said
        assert do.startswith(fix)


def test_a_folder_that_is_yet_to_be_made_is_judged_by_the_one_above():
    told = doctor("mount -t tmpfs -o size=1m none /var/lib")
    assert told.line("state-disk")[2] == "make room below /var/lib"


# --- cgroups, user namespaces ----------------------------------------------------------------

CGROUP = "place=$(awk '/ - cgroup2 /{print $5; exit}' /proc/self/mountinfo);"


def test_cgroups_that_cannot_be_written_are_a_note():
    told = doctor(f"{CGROUP} mount -o remount,bind,ro $place")
    assert told.code == 0
    level, found, fix = told.line("cgroup")
    assert level == "note"
    assert re.fullmatch(r"nothing can be moved to /\S+: Read-only file system", found), found
    assert fix == "in a container, mount cgroups read-write"


def test_a_machine_with_old_cgroups_only_is_a_note():
    told = doctor(f"{CGROUP} umount -l $place")
    assert told.line("cgroup") == (
        "note", "no cgroup v2: what a service starts ends with it", "boot with cgroup v2"
    )  # fmt: skip


def test_user_namespaces_that_are_closed_are_a_note_with_the_setting():
    told = doctor("echo 0 >/proc/sys/user/max_user_namespaces", before=ALL_USERS)
    assert told.code == 0, told.out
    assert told.line("user-namespaces") == (
        "note",
        f"closed to ordinary users (user.max_user_namespaces): {host.WITHOUT}",
        "sysctl -w user.max_user_namespaces=10000",
    )


def test_where_they_are_closed_an_ordinary_user_tries_nothing_and_is_told_so():
    closed = "echo 0 >/proc/sys/user/max_user_namespaces"
    told = inside(f"{closed}; exec {AS_NOBODY} --json", before=ALL_USERS)
    assert told.code == 1
    for name in ("veth", "vxlan", "macvlan", "nft", "netem", "wireguard"):
        assert told.line(name)[:2] == ("note", "not tried: user 65534 may not"), name

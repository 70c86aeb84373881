"""The command itself: what it prints and ends with, and that nothing of it stays."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from nsmctl.machine import asking, questions
from tests.kernel.doctor.world import HERE, NSMCTL, doctor, inside

SLOW = "#!/bin/sh\nexec sleep 600\n"
SNAPSHOT = (
    "ip -d link; ip netns; ip netns list-id; ls /run /run/* /var/lib;"
    " grep -v ^nsfs /proc/mounts;"  # those of the host go when it takes them away
    " cat /proc/net/ip_tables_names; nft list ruleset; ls -R /sys/fs/cgroup | grep vwire-doctor;"
    " grep -r . /proc/sys/net/ipv4/conf /proc/sys/net/ipv6/conf; ls -d /proc/[0-9]* | wc -l"
)


@pytest.fixture
def slow(tmp_path: Path) -> str:
    """A PATH on which wireguard-go never answers."""
    program = tmp_path / "wireguard-go"
    program.write_text(SLOW)
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def test_the_keys_for_scripts_are_these():
    told = doctor().whole
    assert list(told) == ["ready", "bad", "notes", "seconds", "lines"]
    assert told["ready"] is True
    assert told["bad"] == 0
    assert told["notes"] == sum(line["level"] == "note" for line in told["lines"])
    assert [line["name"] for line in told["lines"]] == [one.name for one in questions.ALL]
    for line in told["lines"]:
        assert list(line) == ["name", "title", "level", "found", "fix"]
        assert line["level"] in ("ok", "note", "bad")
        assert line["found"]


def test_a_machine_that_can_is_exit_code_0_and_one_that_cannot_is_1():
    assert inside(f"exec {NSMCTL} doctor").code == 0
    told = inside(f"mount -t tmpfs -o size=1m none /var/lib; exec {NSMCTL} doctor")
    assert told.code == 1
    assert re.search(r"^bad +/var/lib/vwire .* fix: make room", told.out, re.MULTILINE)
    assert re.search(r"^1 bad, \d notes?$", told.out, re.MULTILINE)


def test_lines_fit_into_80_columns_and_hold_no_escape_codes_in_a_pipe():
    told = inside(f"mount -t tmpfs -o ro none /var/lib; exec {NSMCTL} doctor", TERM="xterm")
    assert "\x1b" not in told.out + told.err
    assert [line for line in told.out.splitlines() if len(line) > 80] == []
    assert told.out.count("\n") >= len(questions.ALL)
    assert told.err == ""


@pytest.mark.parametrize("colour", [True, False])
def test_a_terminal_gets_colours_unless_it_is_asked_not_to(colour):
    variables = {"TERM": "xterm", **({} if colour else {"NO_COLOR": "1"})}
    told = inside(f"exec script -qec '{NSMCTL} doctor' /dev/null", **variables)
    assert ("\x1b[32mok" in told.out) is colour
    if not colour:
        assert "\x1b" not in told.out
    assert re.search(r"veth .*for wires on one node", told.out)


def test_nothing_it_tries_stays():
    told = inside(
        f"set +e; mount -t tmpfs none /mnt;"
        f" shot() {{ {SNAPSHOT}; }}; shot >/mnt/before 2>&1;"
        f" {NSMCTL} doctor --json; shot >/mnt/after 2>&1;"
        " diff /mnt/before /mnt/after >&2 && wc -l </mnt/before >&2",
        TMPDIR="/run",
    )
    assert told.whole["ready"]
    assert int(told.err) > 50  # it looked


def test_what_takes_long_is_told_meanwhile_and_given_up(slow):
    start = time.monotonic()
    told = doctor(PATH=slow)
    assert time.monotonic() - start < 10 * asking.PATIENCE
    assert told.whole["seconds"] < 2 * asking.PATIENCE
    level, found, _ = told.line("wireguard-go")
    assert level == "note"
    assert "does not say its version" in found
    assert re.search(r"no answer yet: .*wireguard-go", told.err)
    assert told.line("veth")[0] == "ok"


def test_what_was_started_for_a_question_ends_with_it(slow):
    told = inside(f"{NSMCTL} doctor --json >/dev/null || :; ps -eo comm=", PATH=slow)
    assert set(told.out.split()) == {"sh", "ps"}


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", "130"), ("SIGKILL", "-9")])
def test_ctrl_c_and_kill_end_all_of_it(slow, signal, code):
    told = inside(
        f"{sys.executable} -P {HERE}/interrupt.py {signal} {NSMCTL} doctor;"
        " while pgrep sleep >/dev/null; do :; done; ps -eo comm=",
        PATH=slow,
    )
    assert told.out.split()[0] == code, told.out + told.err
    assert set(told.out.split()[1:]) == {"sh", "ps"}
    assert "Traceback" not in told.err

"""The targets of the Makefile a stranger types first, typed here."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.wait import write

ROOT = Path(__file__).parents[3]
STAMP = ROOT / ".venv" / "ready"
FIGURES = r"[\d.]+ +[\d.]+ +[\d.]+ +0/\d+"  # up, out, back, lost
WIRES = [
    ("near", "icmp-responder", "pong", "east-2", "veth", r"\d+"),
    ("far", "icmp-responder", "pong", "east-1→east-2", "vxlan", "1446"),
    ("far", "icmp-v6", "pong-v6", "east-1→east-2", "vxlan", "1446"),
    ("far-six", "icmp-responder", "pong-six", "six-1→six-2", "vxlan", "1426"),
    ("app", "private", "safe", "east-1→east-2", "wireguard", "1440"),
    ("app-six", "private", "safe-six", "six-1→six-2", "wireguard", "1420"),
]
STAGES = ("calling", "manager", "find", "forwarder", "kernel", "endpoint")


def make(*words: str, folder: Path = ROOT, patience: float = 120) -> subprocess.CompletedProcess:
    """As typed in a fresh shell: what another make around this test has set is not there."""
    theirs = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEFILES", "MAKEOVERRIDES")
    return subprocess.run(
        ["make", *words],
        env={name: value for name, value in os.environ.items() if name not in theirs},
        cwd=folder, capture_output=True, text=True, check=False, timeout=patience,
    )  # fmt: skip


def left_of(lab: str) -> list[str]:
    """What is on the machine under a lab's name, as `ip` and the file system tell."""
    told = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    files = Path("/run/vwire/labs").glob(lab)
    return [*re.findall(rf"^{lab}-\S*", told, re.MULTILINE), *map(str, files)]


def test_a_second_setup_does_nothing_and_takes_a_moment():
    first = make("setup", patience=600)
    assert first.returncode == 0, first.stderr
    before, start = STAMP.stat(), time.monotonic()
    second = make("setup")
    took = time.monotonic() - start
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert STAMP.stat().st_mtime_ns == before.st_mtime_ns
    assert os.access(ROOT / ".venv/bin/nsmctl", os.X_OK)
    write("a second make setup", took, 1.0)
    assert took < 10


def test_the_demo_shows_every_wire_and_what_one_costs_and_leaves_nothing():
    start = time.monotonic()
    done = make("demo")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    write("make demo", time.monotonic() - start, 20.0)
    columns = "client service endpoint nodes kind mtu up out back lost"
    assert re.search(rf"^{columns.replace(' ', ' +')} *$", done.stdout, re.MULTILINE), done.stdout
    for wire in WIRES:
        row = "^" + " +".join((*wire, FIGURES)) + " *$"
        assert re.search(row, done.stdout, re.MULTILINE), f"{row} is not in\n{done.stdout}"
    stages = r"^wire .*" + " +".join((*STAGES, "keys")) + r" *$"
    assert re.search(stages, done.stdout, re.MULTILINE)
    figures = r"^(?:near|far|far-six|app|app-six)-\d+((?: +[\d.]+){9,10}) *$"
    rows = re.findall(figures, done.stdout, re.MULTILINE)
    assert len(rows) == len(WIRES)
    assert re.search(r"^17 checks hold, 0 failed  .*left over: 0$", done.stdout, re.MULTILINE)
    assert "RED" not in done.stdout
    costs = done.stdout.partition("left over: 0")[2]
    for stage in ("request", "close", *STAGES):
        assert re.search(rf"^  {stage} +\d+\.\d\d$", costs, re.MULTILINE), stage
    for floor in ("its calls, bare", "one token", "raw netlink batch"):
        assert re.search(rf"^  {floor} +\d+\.\d\d\d$", costs, re.MULTILINE), floor
    for ratio in (r"programming a wire / .* bar 2\.0", r"request / .* bar 3\.0"):
        assert re.search(rf"^{ratio}  (holds|DOES NOT HOLD)$", costs, re.MULTILINE), ratio
    assert left_of("two-nodes") == []


def test_the_demo_is_red_where_a_check_is(tmp_path):
    """The target as it is, with a lab in which a check cannot hold."""
    (tmp_path / "nsmctl").write_text(
        "#!/bin/sh\n"
        f'[ "$*" = "lab run labs/two-nodes.yaml" ] && exec {ROOT}/.venv/bin/nsmctl'
        " lab run labs/broken/wire.yaml\n"
    )
    (tmp_path / "python").write_text(f"#!/bin/sh\ntouch {tmp_path}/measured\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    done = make("demo", f"BIN={tmp_path}")
    assert done.returncode == 2, f"{done.stdout}\n{done.stderr}"
    assert re.search(r"^RED ", done.stdout, re.MULTILINE)
    assert " 2 failed  " in done.stdout
    assert not (tmp_path / "measured").exists()
    assert left_of("broken-wire") == []


@pytest.mark.parametrize("target", ["", "help"])
def test_make_alone_lists_the_targets(target):
    told = make(*target.split())
    assert told.returncode == 0
    assert {"setup", "demo", "test", "check"} <= {
        line.split()[0] for line in told.stdout.splitlines()
    }


def test_clean_removes_what_was_made_and_nothing_else(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for made in (".venv/bin", "out", "vwire.egg-info", "nsm/__pycache__", ".mypy_cache"):
        (tmp_path / made).mkdir(parents=True)
    (tmp_path / "nsm/own.py").touch()
    done = make("clean", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert there == {"Makefile", "nsm", "nsm/own.py"}

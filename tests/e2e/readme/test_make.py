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
NETWORK = "orders-db@meet"
WIRES = {  # client and service: endpoint, nodes, kind, MTU
    ("app-e1", NETWORK): ("router", "east-1", "veth", "1340"),
    ("app-e1", "icmp-responder"): ("responder", "east-1→east-2", "vxlan", "1446"),
    ("app-e2", NETWORK): ("router", "east-2", "veth", "1340"),
    ("app-w1", NETWORK): ("router", "west-1", "veth", "1340"),
    ("app-w2", NETWORK): ("router", "west-1", "veth", "1340"),
}
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
    files = [*Path("/run/vwire/labs").glob(lab), *Path("/etc/netns").glob(f"{lab}-*")]
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
    write("make demo", time.monotonic() - start, 30.0)
    summary = r"^15 checks hold, 0 failed  .* last check after ([\d.]+) s .*left over: 0$"
    (last,) = re.findall(summary, done.stdout, re.MULTILINE)
    write("make demo: from `lab run` to the last check", float(last), 20.0)
    columns = "client service endpoint nodes kind mtu up out back lost"
    assert re.search(rf"^{columns.replace(' ', ' +')} *$", done.stdout, re.MULTILINE), done.stdout
    for names, rest in WIRES.items():
        row = "^" + " +".join((*names, *rest, FIGURES)) + " *$"
        assert re.search(row, done.stdout, re.MULTILINE), f"{row} is not in\n{done.stdout}"
    assert re.search(r"^wire .*" + " +".join(STAGES) + r" *$", done.stdout, re.MULTILINE)
    rows = re.findall(r"^app-[ew]\d-\d+((?: +[\d.]+){9}) *$", done.stdout, re.MULTILINE)
    assert len(rows) == len(WIRES)
    _, _, after = done.stdout.partition("\ncoming up, s: ")
    told = re.findall(r"([a-z' ]+) \d+\.\d", " ".join(after.partition("\nchecks")[0].split()))
    stages = {"registries", "address plans", "suppliers", "clients", "routers' wires"}
    assert stages <= {one.strip() for one in told}, told
    assert "RED" not in done.stdout
    costs = done.stdout.partition("left over: 0")[2]
    for stage in ("request", "close", *STAGES):
        assert re.search(rf"^  {stage} +\d+\.\d\d$", costs, re.MULTILINE), stage
    for floor in ("its calls, bare", "one token", "raw netlink batch"):
        assert re.search(rf"^  {floor} +\d+\.\d\d\d$", costs, re.MULTILINE), floor
    for ratio in (r"programming a wire / .* bar 2\.0", r"request / .* bar 3\.0"):
        assert re.search(rf"^{ratio}  (holds|DOES NOT HOLD)$", costs, re.MULTILINE), ratio
    assert left_of("two-clusters") == []


def test_the_demo_is_red_where_a_check_is(tmp_path):
    """The target as it is, with a lab in which a check cannot hold."""
    (tmp_path / "nsmctl").write_text(
        "#!/bin/sh\n"
        f'[ "$*" = "lab run labs/two-clusters.yaml" ] && exec {ROOT}/.venv/bin/nsmctl'
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

"""Labs that are in each other's way, or whose engine was killed: what a person reads and types."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsm.process import config
from tests.support.wait import until

ROOT = Path(__file__).parents[3]
# /run is where labs and names of namespaces are: with one of its own, `--all` means its own
MOUNT = "mount -t tmpfs none /run && mkdir /run/netns && echo there && exec cat"


class Island:
    """A machine whose only labs are the test's."""

    def __init__(self, pid: int) -> None:
        self._mount = ["nsenter", f"--mount=/proc/{pid}/ns/mnt"]

    def popen(self, *words: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self._mount, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **config.for_children()},
            cwd="/",
        )  # fmt: skip

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        with self.popen(*words) as running:
            out, errors = running.communicate(timeout=60)
        return subprocess.CompletedProcess(words, running.returncode, out, errors)

    def start(self, *words: str) -> "subprocess.Popen[str]":
        return self.popen(sys.executable, "-P", "-m", "nsmctl", *words)

    def nsmctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-P", "-m", "nsmctl", *words)

    def have(self, *words: str) -> str:
        """nsmctl, where it must work."""
        done = self.nsmctl(*words)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def namespaces(self) -> set[str]:
        told = json.loads(self.run("ip", "-j", "netns").stdout or "[]")
        return {one["name"] for one in told}

    def labs(self) -> dict[str, str]:
        """The phase of each."""
        return {one["lab"]: one["phase"] for one in json.loads(self.have("lab", "list", "--json"))}


@pytest.fixture
def island() -> Iterator[Island]:
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", MOUNT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as keeping:  # fmt: skip
        assert keeping.stdout
        assert keeping.stdout.readline() == "there\n"
        made = Island(keeping.pid)
        try:
            yield made
        finally:
            made.nsmctl("lab", "down", "--all")
            keeping.communicate()


@pytest.mark.long
def test_the_same_lab_twice_is_refused_with_since_when_and_what_to_do(island):
    island.have("lab", "up", "one-node")
    for verb in ("up", "run"):
        again = island.nsmctl("lab", verb, "one-node")
        assert again.returncode == 1, again.stdout + again.stderr
        said, hint = again.stderr.splitlines()[-2:]
        assert re.fullmatch(r"lab one-node is up since \d\d:\d\d, 1 of 1 nodes", said)
        assert hint == "  `nsmctl lab down one-node` or --replace"
    assert re.match(r"one-node  up .*  1 wire  healthy\n", island.have("lab", "list"))
    assert "is up after" in island.have("lab", "up", "one-node", "--replace")
    assert island.labs() == {"one-node": "up"}


@pytest.mark.long
def test_two_labs_of_one_file_stay_up_side_by_side_and_one_goes_without_the_other(island):
    for name in ("ours", "theirs"):
        island.have("lab", "up", "one-node", "--name", name)
    for name in ("ours", "theirs"):
        island.have("lab", "exec", "app", "--lab", name, "--", "ping", "-c1", "-W1", "172.16.1.0")
    which = island.nsmctl("lab", "status")
    assert which.returncode == 2
    assert which.stderr == "several labs are up: ours, theirs\n  say which\n"
    island.have("lab", "down", "ours")
    assert not [name for name in island.namespaces() if name.startswith("ours-")]
    island.have("lab", "exec", "app", "--", "ping", "-c1", "-W1", "172.16.1.0")
    assert "1 wire  healthy" in island.have("lab", "status")


def test_a_namespace_of_somebody_elses_is_named_and_left(island):
    assert island.run("ip", "netns", "add", "one-node-app").returncode == 0
    done = island.nsmctl("lab", "up", "one-node")
    assert done.returncode == 1
    said, hint = done.stderr.splitlines()[-2:]
    assert said == "network namespace one-node-app exists already, and is not of lab one-node"
    assert hint == "  `ip netns del one-node-app` if nobody needs it, or --name ANOTHER"
    assert island.namespaces() == {"one-node-app"}
    island.have("lab", "up", "one-node", "--name", "another")
    island.have("lab", "down")
    island.run("ip", "netns", "del", "one-node-app")


@pytest.mark.long
@pytest.mark.parametrize(("at", "phase"), [("registries", "crashed"), ("check: ", "up")])
async def test_a_killed_engine_is_told_of_and_all_labs_go(island, at, phase):
    island.have("lab", "up", "one-node", "--name", "whole")
    killed(island, "lab", "run", "one-node", "--name", "killed", at=at)
    assert island.labs() == {"killed": phase, "whole": "up"}
    inside = island.run("ip", "netns", "pids", "killed-node-1").stdout.split()
    assert inside
    told = json.loads(island.have("lab", "down", "--all", "--json"))
    assert {name: gone["left"] for name, gone in told.items()} == {"killed": [], "whole": []}
    assert island.namespaces() == set()
    assert island.labs() == {}
    await until(lambda: not any(map(_lives, inside)), "killed processes to be reaped")


def _lives(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def killed(island: Island, *words: str, at: str) -> None:
    """Start nsmctl, and kill it once its progress says so."""
    with island.start(*words) as engine:
        assert engine.stderr
        assert any(at in line for line in engine.stderr), f"it ended before {at!r}"
        engine.send_signal(signal.SIGKILL)


@pytest.mark.long
def test_what_a_killed_engine_left_is_cleared_by_the_next_up_which_says_so(island):
    killed(island, "lab", "up", "one-node", at="managers")
    assert island.have("lab", "list") == "one-node  its engine crashed: nsmctl lab down one-node\n"
    said = island.have("lab", "up", "one-node")
    assert re.match(r"one-node is up after [\d.]+ s  \(cleared what a crash had left\): ", said)
    assert "1 wire  healthy" in island.have("lab", "status")

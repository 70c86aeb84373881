"""`nsmctl chaos`: a minute of it, and that what does harm is told, written down, and done again.

VWIRE_CHAOS_SEED draws another schedule than the usual one.
"""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from labs import schedule
from labs.paths import Paths
from tests.e2e.labs.test_labs import nsmctl
from tests.support.wait import write

HERE = Path(__file__).parents[3]
SEED = os.environ.get("VWIRE_CHAOS_SEED", "17643")  # all kinds of faults in its first half minute
PAGE = (HERE / "docs/chaos.md").read_text()
SMALL = """\
name: NAME
topology:
  clusters: {home: {trust-domain: home.test}}
  nodes:
    node-1: {cluster: home}
    node-2: {cluster: home}
    lan: {kind: switch}
  links:
    - {endpoints: ["node-1:eth0", "lan:p1"]}
    - {endpoints: ["node-2:eth0", "lan:p2"]}
  underlay: {ipv4: 198.18.0.0/24}
services:
  echo: {payload: ethernet, endpoints: {pong: {on: node-1, prefixes: [172.16.1.0/24]}}}
clients:
  app:
    on: node-1
    connect: ["kernel://echo/nsm-1"]
    run: [{name: harmful, exec: "python3 HARM"}]
  asking: {on: node-1, netns-only: true}
checks:
  - {name: it answers, ping: {from: app, to: pong}, expect: {lost: 0}}
"""
HARM = """\
import os, time
while not os.path.exists("FAULTS"):  # as soon as the network is broken
    time.sleep(0.05)
"""
FORKS = f"{HARM}os.fork()\ntime.sleep(600)\n"  # nobody ends what it leaves


def test_a_minute_of_chaos_breaks_nothing_that_may_not_break(tmp_path: Path):
    name = f"chaos-{os.getpid()}"
    done = nsmctl(
        "chaos", "run", "chaos", "--seed", SEED, "--minutes", "1", "--name", name, "--json",
        folder=tmp_path, patience=200,
    )  # fmt: skip
    assert done.stdout, done.stderr
    said = json.loads(done.stdout)
    print(f"seed {SEED}: {len(said['faults'])} faults, {said['healed']}, {said['packets']}")
    assert done.returncode == 0, json.dumps(said["broke"], indent=1)
    assert said["seed"] == int(SEED)
    assert said["faults"]
    assert said["packets"]["arrived"] > 1000
    assert len(said["asked"]) == 3, "of each service of that cluster"
    assert all(one["made"] for one in said["asked"].values())
    assert not said["left"]
    assert not list(tmp_path.iterdir()), "nothing is written where nothing was found"
    if said["healed"]["n"]:
        write("a wire that was cut to carry again", said["healed"]["median_s"], 3.0)


@pytest.mark.parametrize(
    ("program", "invariant", "evidence"),
    [
        (HARM, "processes", "program:harmful .* has ended|app.harmful@node-1 .* has ended"),
        pytest.param(FORKS, "leftovers", "left: 1 process python3", marks=pytest.mark.long),
    ],
    ids=["ends", "forks"],
)
def test_what_does_harm_is_told_with_evidence_and_written_down_to_be_done_again(
    tmp_path: Path, program: str, invariant: str, evidence: str
):
    name = f"harm-{os.getpid()}"
    does = tmp_path / "harm.py"
    does.write_text(program.replace("FAULTS", Paths(name).faults))
    (tmp_path / "small.yaml").write_text(SMALL.replace("NAME", name).replace("HARM", str(does)))
    before = {"do": "freeze", "who": ["nsmgr@node-1"], "seconds": 0.1, "rest": 0.1}
    harm = {"do": "rate", "who": ["node-2"], "seconds": 1.0, "rest": 0.1, "bits": 10_000_000}
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"lab": "small.yaml", "faults": [before, harm, before]})
    )
    done = nsmctl("chaos", "replay", "mine.yaml", "--save", "found.yaml", folder=tmp_path)
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert f"does not hold: {invariant}, after fault 2:" in done.stdout, (done.stdout, done.stderr)
    assert re.search(evidence, done.stdout), done.stdout
    assert "again: nsmctl chaos replay found.yaml    logs: found.logs" in done.stdout
    assert re.search(r"1 of 3: freeze nsmgr@node-1 for 0\.1 s", done.stderr)
    found = yaml.safe_load((tmp_path / "found.yaml").read_text())
    assert found["faults"] == [before, harm], "what came after it did nothing"
    assert found["broke"]["invariant"] == invariant
    assert any(re.search(evidence, line) for line in found["broke"]["evidence"])
    assert (tmp_path / "found.logs" / "node-1.nsmgr").stat().st_size
    assert not os.path.exists(Paths(name).folder), "the lab is down"
    found["faults"] = [{"do": "kill", "who": ["nobody"]}]
    (tmp_path / "found.yaml").write_text(yaml.safe_dump(found))
    refused = nsmctl("chaos", "replay", "found.yaml", folder=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "found.yaml: fault 1: `who` is ['nobody']\n  some of issuer@node-1" in refused.stderr


def test_the_pages_commands_are_those_of_the_program_and_its_words_are_what_is_judged():
    commands = [
        shlex.split(line.strip().removeprefix("sudo ")) for line in PAGE.splitlines()
        if line.startswith("    sudo ")
    ]  # fmt: skip
    assert [words[:3] for words in commands[:2]] == [
        ["nsmctl", "chaos", "run"], ["nsmctl", "chaos", "replay"],
    ]  # fmt: skip
    for words in commands[:2]:
        helped = nsmctl(*words[1:3], "--help", folder=HERE).stdout
        for option in (word for word in words if word.startswith("--")):
            assert option in helped
    source = (HERE / "labs/chaos.py").read_text()
    judged = set(re.findall(r'BrokenError\(\s*"(\w+)"', source))
    assert judged | set(schedule.ODDS) == set(re.findall(r"(?m)^\| `(\w+)` \|", PAGE))


@pytest.mark.long
def test_soak_is_chaos_for_hours(tmp_path: Path):
    from tests.e2e.readme.test_make import make

    done = make("soak", "HOURS=0.03", f"SEED={SEED}", patience=400)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "faults in" in done.stdout
    assert re.search(r"forwarder@home-1 +[\d.]+ - [\d.]+", done.stdout)

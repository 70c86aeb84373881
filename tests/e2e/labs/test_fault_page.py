"""docs/labs.md on faults: every command of it, in its order, and what its tables say."""

import json
import re
import shlex
from pathlib import Path

import pytest

from labs import lab as labfile
from tests.e2e.labs.test_labs import nsmctl

HERE = Path(__file__).parents[3]
NAME = "faults-page"
PAGE = (HERE / "docs/labs.md").read_text().partition("## Faults")[2].partition("\n## ")[0]
COMMANDS = [
    shlex.split(line.strip().removeprefix("sudo nsmctl "))
    for line in PAGE.splitlines()
    if line.startswith("    sudo nsmctl ")
]
OF_PAGE = "kernel2ethernet2kernel"


def ours(words: list[str]) -> list[str]:
    """Beside whoever runs that lab by its own name."""
    more = ["--name", NAME] if words[:2] == ["lab", "up"] else []
    return [NAME if word == OF_PAGE else word for word in words] + more


@pytest.mark.long  # half a minute; tests/kernel/labs/test_faults.py has each fault in make test
def test_the_page_breaks_a_lab_in_every_way_and_nothing_of_it_is_left():
    assert len(COMMANDS) == 14
    try:
        said = {}
        for words in COMMANDS:
            done = nsmctl(*ours(words))
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            said[" ".join(words[1:3])] = done.stdout
    finally:
        nsmctl("lab", "down", NAME)
    killed = r"killed nsmgr@node-1 \(pid \d+\); back as \d+ after 0\.\d+ s\n.*lost 0 of \d{3}"
    assert re.search(killed, said["fault kill"]), said["fault kill"]
    parted = r"set apart node-1 \| node-2; back after 0\.\d+ s; lost \d+ of \d+ there, \d+ of"
    assert re.search(parted, said["fault partition"])
    assert "healthy" in said["status kernel2ethernet2kernel"]
    assert "left over: 0" in said["down kernel2ethernet2kernel"]


def test_the_pages_faults_are_those_there_are_and_its_file_can_be_read():
    told = set(re.findall(r"`([a-z-]+)`", "".join(re.findall(r"(?m)^\| (`.+?) \|", PAGE))))
    assert told == set(labfile.FAULTS)
    (example,) = re.findall(r"```yaml\n(.+?)```", PAGE, re.DOTALL)
    text = (HERE / "labs/parity/Kernel2Ethernet2Kernel.yaml").read_text().partition("checks:")[0]
    read = labfile.parse(text + example, "the page")
    assert [type(check.what) for check in read.checks] == [labfile.Faulty] * 5


@pytest.mark.long
def test_what_is_broken_for_ever_is_told_and_a_wrong_name_has_the_nearest():
    try:
        assert nsmctl("lab", "up", "one-node", "--name", NAME).returncode == 0
        done = nsmctl("lab", "fault", "stop", NAME, "registry@home", "--json")
        told = json.loads(done.stdout)
        assert [one["seconds"] for one in told["faults"]] == [None]
        assert told["traffic"]["lost_there"] == told["traffic"]["lost_back"] == 0
        status = nsmctl("lab", "status", NAME)
        assert status.returncode == 1
        assert "ended (0)" in status.stdout
        wrong = nsmctl("lab", "fault", "kill", NAME, "forwader@node-1")
        assert wrong.returncode == 1
        assert 'did you mean "forwarder@node-1"' in wrong.stderr
    finally:
        nsmctl("lab", "down", NAME)

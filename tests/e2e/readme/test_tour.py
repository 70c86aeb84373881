"""The README's five minutes, every command of it, as a person types them."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
BIN = str(Path(sys.executable).parent)
SAYS = {  # what a person must see, by the beginning of the command
    "nsmctl lab check": r"one-node",
    "nsmctl lab up": r"one-node is up",
    "nsmctl lab status": r"1 wires  healthy",
    "nsmctl lab exec app -- ip": r"nsm-1.*172\.16\.1\.1/32",
    "nsmctl lab exec app -- ping": r"1 received, 0% packet loss",
    "nsmctl connections": r"app-0 .*UP",
    "nsmctl path": r"forwarder-node-1",
    "nsmctl endpoints": r"responder",
    "nsmctl connect": r"1 received, 0% packet loss",
    "nsmctl lab logs": r"networkservice.NetworkService/Request",
    "nsmctl lab down": r"left over: 0",
}


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = "".join(BLOCK.findall(text))
    return [line.removeprefix("$ ") for line in blocks.splitlines() if line.startswith("$ ")]


def run(command: str) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "160"}
    done = subprocess.run(
        shlex.split(command),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture
def cleared():
    yield
    subprocess.run(
        [f"{BIN}/nsmctl", "lab", "down", "one-node"], capture_output=True, check=False, cwd=ROOT
    )


def test_the_tour_says_what_it_promises(cleared):
    tour = commands()
    assert {begins for begins in SAYS if not any(c.startswith(begins) for c in tour)} == set()
    for command in tour:
        begins = next(key for key in sorted(SAYS, key=len, reverse=True) if command.startswith(key))
        assert re.search(SAYS[begins], run(command)), f"$ {command}"

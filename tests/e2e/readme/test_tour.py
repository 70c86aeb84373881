"""The README's five minutes, every command of it, as a person types them."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BIN = str(Path(sys.executable).parent)
SAYS = {  # what a person must see, by the beginning of the command
    "nsmctl doctor": r"everything needed is here",
    "nsmctl lab check": r"one-node",
    "nsmctl lab up": r"one-node is up",
    "nsmctl lab status": r"1 wire  healthy",
    "nsmctl lab exec app -- ip": r"nsm-1.*172\.16\.1\.1/32",
    "nsmctl lab exec app -- ping": r"1 received, 0% packet loss",
    "nsmctl connections": r"app-0 .*UP",
    "nsmctl path": r"forwarder-node-1",
    "nsmctl endpoints": r"responder",
    "nsmctl connect": r"1 received, 0% packet loss",
    "nsmctl lab logs": r"networkservice.NetworkService/Request",
    "nsmctl lab down": r"left over: 0",
}
SAYS_INLINE = {
    "nsmctl lab run two-nodes": r"17 checks hold, 0 failed .* left over: 0",
    "nsmctl lab exec outsider -- python wire.py": r"^nsm-1 172\.16\.1\.\d/32$",
}
MAKE = {  # where each of the make lines is run
    "make demo": "test_make.py",
    "make setup": "test_make.py",
    "make help": "test_make.py",
    "make clean": "test_make.py",
    "make wheel": "tests/e2e/install",
    "make test": "this very run, in CI",
    "make soak": "tests/e2e/labs/test_chaos.py, by `make matrix`",
    "make parity": "tests/e2e/parity, some of it; the rest by `make matrix`",
    "make matrix": "by hand: it takes minutes and a network; its tests are there",
}


def blocks(language: str) -> list[str]:
    return [text for which, text in BLOCK.findall(README) if which == language]


def commands() -> list[str]:
    lines = "".join(blocks("console")).splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


def inline(program: str) -> set[str]:
    """Commands within the text: in backticks, or as an indented line up to its comment."""
    prose = BLOCK.sub("", README)
    found = re.findall(rf"`({program} [^`]+)`", prose)
    found += re.findall(rf"^    ({program} [^#\n]+?) *(?:#.*)?$", prose, re.MULTILINE)
    return set(found)


def run(command: str, folder: Path = ROOT) -> str:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "COLUMNS": "160"}
    done = subprocess.run(
        shlex.split(command),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=folder,
        timeout=120,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextmanager
def cleared() -> Iterator[None]:
    try:
        yield
    finally:
        subprocess.run(
            [f"{BIN}/nsmctl", "lab", "down", "one-node"], capture_output=True, check=False, cwd=ROOT
        )


def test_the_tour_says_what_it_promises():
    tour = commands()
    assert {begins for begins in SAYS if not any(c.startswith(begins) for c in tour)} == set()
    with cleared():
        for command in tour:
            begins = next(
                key for key in sorted(SAYS, key=len, reverse=True) if command.startswith(key)
            )
            assert re.search(SAYS[begins], run(command)), f"$ {command}"


ELSEWHERE = {  # what other tests run: e2e/install, e2e/trouble, e2e/systemd, e2e/labs
    "nsmctl chaos",
    "nsmctl define",
    "nsmctl explain",
    "nsmctl heal report",
    "nsmctl lab fault",
    "nsmctl lab run interdomain",
    "nsmctl leaks",
    "nsmctl vl3",
    "nsmctl --install-completion",
    "nsmctl lab down --all",
    "nsmctl systemd uninstall --purge",
}


def test_every_command_within_the_text_is_known_to_a_test():
    assert inline("nsmctl") == set(SAYS_INLINE) | ELSEWHERE
    assert inline("make") == set(MAKE)


def test_the_lines_of_python_do_as_printed_in_a_lab(tmp_path):
    (script,) = blocks("python")
    (tmp_path / "wire.py").write_text(script)
    command = "nsmctl lab exec outsider -- python wire.py"
    with cleared():
        run("nsmctl lab up one-node")
        assert re.match(SAYS_INLINE[command], run(command, tmp_path))
        # what it had is gone with it
        assert "nsm-1" not in run("nsmctl lab exec outsider -- ip -br link")


def test_the_lab_the_text_names_runs():
    command = "nsmctl lab run two-nodes"
    assert re.search(SAYS_INLINE[command], run(command))

"""Ctrl-C on a terminal, where more than one thread runs: nothing is taken back by halves."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from nsm.process import config

HERE = Path(__file__).parents[3]
COMMAND = [sys.executable, "-P", "-m", "nsmctl"]


def on_a_terminal(*words: str, ctrl_c_at: bytes) -> tuple[int, bytes]:
    """Exit code and output of nsmctl, interrupted from its terminal's keyboard at those words."""
    surroundings = {"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **config.for_children()}
    surroundings["NO_COLOR"] = "1"  # every step is a line; a moving one may skip the short ones
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [*COMMAND, *words], {**surroundings, "TERM": "xterm"})
    out, pressed = b"", False
    with contextlib.suppress(OSError):  # EIO: the other side has ended
        while data := os.read(terminal, 4096):
            out += data
            if ctrl_c_at in out and not pressed:
                pressed = True
                os.write(terminal, b"\x03")
    os.close(terminal)
    assert pressed, out
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), out


@pytest.mark.parametrize("verb", ["run", "down"])
def test_ctrl_c_on_a_terminal_while_a_lab_goes_lets_all_of_it_go(verb):
    at = b"the mesh"
    name = f"press-{os.getpid() % 10000}"
    if verb == "run":
        code, out = on_a_terminal("lab", "run", "one-node", "--name", name, ctrl_c_at=at)
    else:
        subprocess.run(
            [*COMMAND, "lab", "up", "one-node", "--name", name], capture_output=True, check=True,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)}, cwd="/",
        )  # fmt: skip
        code, out = on_a_terminal("lab", "down", name, ctrl_c_at=at)
    try:
        assert code == 130, out
        assert not os.path.exists(f"/run/vwire/labs/{name}"), out
        left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
        assert name not in left
    finally:
        subprocess.run(
            [*COMMAND, "lab", "down", name], capture_output=True, check=False,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)}, cwd="/",
        )  # fmt: skip

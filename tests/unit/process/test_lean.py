"""What runs on each node has not in memory what only `nsmctl` uses."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
LOOK = """
import importlib, sys
importlib.import_module(sys.argv[1] + ".__main__")
print(sorted({"rich", "typer"} & sys.modules.keys()))
import rich.text  # who wants it has it
"""


@pytest.mark.parametrize("program", ["nsmgr", "forwarder"])
def test_a_program_of_a_node_has_not_imported_what_draws_on_terminals(program):
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOOK, program],
        capture_output=True, text=True, check=False, timeout=60, env={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr

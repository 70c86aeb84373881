"""Taking down touches what is the lab's, and nothing else, whatever it finds.

What is written about a lab may be old, broken, or of somebody else; the numbers in it
may be another's by now.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import engine, state
from labs.paths import Paths
from nsm.errors import TakenError

HERE = Path(__file__).parents[3]


def nsmctl(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "nsmctl", *words], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)}, cwd="/", timeout=60,
    )  # fmt: skip


@pytest.fixture
def paths(request: pytest.FixtureRequest, tmp_path: Path) -> Paths:
    """A lab of its own, in a folder of labs of its own."""
    return Paths(f"d{os.getpid() % 10000}-{abs(hash(request.node.name)) % 1000}", str(tmp_path))


@pytest.fixture
def precious(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "victim" / "sub" / "precious"
    file.parent.mkdir(parents=True)
    file.write_text("x")
    yield file
    assert file.exists()


def written(paths: Paths, **more: object) -> None:
    """What a crashed engine left of a lab."""
    os.makedirs(paths.folder, exist_ok=True)
    crashed = {"pid": 999_999_999, "start": 5}
    facts = {"lab": paths.lab, "file": "f", "phase": "going", "since": 1, "engine": crashed}
    text = json.dumps({**facts, "namespaces": {}, "schema": state.SCHEMA, **more})
    Path(paths.state).write_text(text)


def taken_down(paths: Paths) -> engine.Gone:
    with state.locked(paths, create=False) as there:
        assert there
        return engine.down(paths)


@pytest.mark.parametrize("verb", ["down", "logs --lab", "status", "exec x true --lab"])
def test_a_labs_name_is_never_a_path(precious, verb):
    for name in (str(precious.parent.parent), ".", "x\n"):
        done = nsmctl("lab", *verb.split(), name)
        assert done.returncode == 2, (name, done.stdout, done.stderr)
        assert "name of 1 to 24 characters" in done.stderr


def test_a_folder_that_is_no_labs_is_left_as_it_is(paths):
    os.makedirs(paths.folder)
    own = Path(paths.folder, "precious")
    own.write_text("x")
    with pytest.raises(TakenError, match=r"no state\.json"):
        taken_down(paths)
    assert own.read_text() == "x"


def test_an_empty_folder_is_what_an_engine_left_that_died_at_once(paths):
    os.makedirs(paths.folder)
    assert taken_down(paths).left == ()
    assert not os.path.exists(paths.folder)

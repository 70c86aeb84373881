"""Taking down touches what is the lab's, and nothing else, whatever it finds.

What is written about a lab may be old, broken, or of somebody else; the numbers in it
may be another's by now.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import engine, state
from labs.paths import Paths
from nsm.errors import InternalError, TakenError
from nsm.kernel import namespaces, topology
from nsm.kernel.namespaces import create_named, delete_named, list_named

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


# --- numbers that are another's by now ---------------------------------------------------------


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[str]]:
    """Somebody in a network namespace of his own, which has no name."""
    running = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE, text=True
    )
    assert running.stdout
    running.stdout.readline()
    yield running
    running.kill()
    running.communicate()


def test_a_number_whose_name_is_gone_means_nobody(paths, stranger):
    inode = os.stat(f"/proc/{stranger.pid}/ns/net").st_ino
    written(paths, namespaces={paths.namespace("n"): inode})
    assert taken_down(paths).left == ()
    assert stranger.poll() is None


def test_a_namespace_another_made_under_a_labs_name_is_left_alone(paths):
    name = paths.namespace("n")
    create_named(name)
    inside = subprocess.Popen(["ip", "netns", "exec", name, "sleep", "600"])
    try:
        written(paths, namespaces={name: topology.cookie_named(name) + 1})
        assert taken_down(paths).left == ()
        assert inside.poll() is None
        assert name in list_named()
    finally:
        inside.kill()
        inside.wait()
        delete_named(name)


REUSES = """\
import ctypes, os, sys
libc = ctypes.CDLL(None)
while os.stat("/proc/self/ns/net").st_ino != int(sys.argv[1]):
    libc.unshare(0x40000000)
print(flush=True)
sys.stdin.read()
"""


def test_who_is_given_a_labs_number_after_it_is_not_left_of_it(paths, monkeypatch):
    name = paths.namespace("n")
    create_named(name)
    number = os.stat(f"/run/netns/{name}").st_ino
    born: list[subprocess.Popen[str]] = []

    def delete(gone: str) -> None:
        delete_named(gone)
        next_one = subprocess.Popen(
            [sys.executable, "-c", REUSES, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        born.append(next_one)
        assert next_one.stdout
        next_one.stdout.readline()

    monkeypatch.setattr(engine, "delete_named", delete)
    written(paths, namespaces={name: 0})
    try:
        assert taken_down(paths).left == ()
        assert os.stat(f"/proc/{born[0].pid}/ns/net").st_ino == number
        assert born[0].poll() is None
    finally:
        for one in born:
            one.communicate()


# --- what an engine left that died while it made namespaces ------------------------------------


def test_a_file_where_a_namespace_was_to_be_is_taken_away(paths):
    name = paths.namespace("n")
    create_named(name)  # so that there is a /run/netns
    delete_named(name)
    file = Path("/run/netns", name)
    file.touch()
    written(paths, namespaces={name: 0})
    try:
        assert taken_down(paths).left == ()
        assert not file.exists()
    finally:
        file.unlink(missing_ok=True)


class SlowLibc:
    """The C library, on a machine where unshare takes until a Ctrl-C has come."""

    def __init__(self) -> None:
        self._real = namespaces._libc

    def __getattr__(self, name: str) -> object:
        return getattr(self._real, name)

    def unshare(self, flags: int) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.3)
        return int(self._real.unshare(flags))


def test_a_ctrl_c_while_a_namespace_is_made_leaves_no_name_of_it(paths, monkeypatch):
    name = paths.namespace("n")
    monkeypatch.setattr(namespaces, "_libc", SlowLibc())
    try:
        with pytest.raises(KeyboardInterrupt):
            create_named(name)
        assert [t for t in threading.enumerate() if name in t.name] == []
        assert not os.path.lexists(f"/run/netns/{name}")
    finally:
        delete_named(name)


def test_a_namespace_that_cannot_be_finished_leaves_no_name_of_it(paths, monkeypatch):
    name = paths.namespace("n")

    def refused() -> None:
        raise OSError(errno.ENOBUFS, "no")

    monkeypatch.setattr(namespaces.Socket, "here", refused)
    try:
        with pytest.raises(InternalError, match="could not create"):
            create_named(name)
        assert not os.path.lexists(f"/run/netns/{name}")
    finally:
        delete_named(name)


def test_a_name_that_cannot_be_taken_away_is_told_as_left(paths, monkeypatch):
    name = paths.namespace("n")
    create_named(name)
    delete_named(name)
    file = Path("/run/netns", name)
    file.touch()
    monkeypatch.setattr(engine, "delete_named", lambda _: None)
    written(paths, namespaces={name: 0})
    try:
        assert taken_down(paths).left == (f"namespace {name}",)
        assert os.path.exists(paths.state)
    finally:
        file.unlink()

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

from labs import alive, engine, state
from labs.lab import parse
from labs.paths import Paths
from labs.processes import Stage
from nsm.errors import InternalError, InvalidError, TakenError
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


# --- saved files that are broken ---------------------------------------------------------------

LAB = """\
name: x
topology:
  clusters: {c: {}}
  nodes: {n: {cluster: c}, sw: {kind: switch}}
  links: [{endpoints: ["n:eth0", "sw:p1"]}]
  underlay: {ipv4: 198.18.0.0/24}
"""


@pytest.mark.parametrize("text", ["", "name: [", None])
def test_a_lab_whose_file_is_broken_is_still_taken_down(paths, stranger, text):
    name = paths.namespace("n")
    create_named(name)
    written(paths, namespaces={name: topology.cookie_named(name)})
    born = {"event": "born", "name": "n/nsmgr", "pid": stranger.pid}
    born["start"] = alive.started(stranger.pid)
    Path(paths.processes).write_text(json.dumps(born) + "\n")
    if text is not None:
        Path(paths.text).write_text(text)
    assert taken_down(paths).left == ()
    assert stranger.wait(1) == -signal.SIGTERM
    assert name not in list_named()
    assert not os.path.exists(paths.folder)


@pytest.mark.parametrize("text", ["", '{"trunc', "[]", '{"schema": SCHEMA}'])
def test_a_lab_whose_state_is_broken_is_taken_down_by_its_file(paths, text):
    name = paths.namespace("n")
    create_named(name)
    written(paths)
    Path(paths.state).write_text(text.replace("SCHEMA", str(state.SCHEMA)))
    Path(paths.text).write_text(LAB)
    try:
        assert taken_down(paths).left == ()
        assert name not in list_named()
        assert not os.path.exists(paths.folder)
    finally:
        delete_named(name)


def test_where_nothing_says_what_a_lab_had_made_it_is_left_with_a_sentence(paths):
    written(paths)
    Path(paths.state).write_text("")
    Path(paths.text).write_text("")
    with pytest.raises(InvalidError, match=r"lab\.yaml"):
        taken_down(paths)
    assert os.path.exists(paths.state)


def test_an_up_clears_a_lab_whose_file_is_broken(paths):
    written(paths)
    Path(paths.text).write_text("")
    lab = parse(LAB, "x.yaml", name=paths.lab)
    with state.locked(paths, create=True):
        try:
            standin = dict.fromkeys(Stage, "tests.support.standin")
            up = engine.up(lab, LAB, "x.yaml", root=paths.root, modules=standin)
            assert up.cleaned
        finally:
            engine.down(paths)


def test_an_up_leaves_a_lab_alone_that_lives_though_its_state_is_broken(paths, stranger):
    written(paths)
    Path(paths.state).write_text("")
    Path(paths.text).write_text(LAB)
    born = {"event": "born", "name": "n/nsmgr", "pid": stranger.pid}
    born["start"] = alive.started(stranger.pid)
    Path(paths.processes).write_text(json.dumps(born) + "\n")
    with state.locked(paths, create=True), pytest.raises(TakenError, match="--replace"):
        engine.up(parse(LAB, "x.yaml", name=paths.lab), LAB, "x.yaml", root=paths.root)
    assert stranger.poll() is None


def test_a_list_shows_broken_labs_as_such_and_the_others_too():
    names = [f"l{os.getpid() % 10000}-{what}" for what in ("file", "state", "well")]
    broken_file, broken_state, well = map(Paths, names)
    try:
        for one in (broken_file, broken_state, well):
            written(one)
            Path(one.text).write_text(LAB)
        Path(broken_file.text).write_text("")
        Path(broken_state.state).write_text('{"trunc')
        done = nsmctl("lab", "list")
        assert done.returncode == 0, done.stderr
        rows = {line.split()[0]: line for line in done.stdout.splitlines()}
        for name in names:
            assert f"nsmctl lab down {name}" in rows[name]
        told = {row["lab"]: row for row in json.loads(nsmctl("lab", "list", "--json").stdout)}
        assert told[names[1]]["phase"] == "broken"
        for name in names:
            assert nsmctl("lab", "down", name).returncode == 0
    finally:
        for one in (broken_file, broken_state, well):
            state.remove(one)


def test_all_labs_go_but_one_that_is_in_use_which_is_told(tmp_path):
    names = [f"a{os.getpid() % 10000}-{what}" for what in ("aa", "bb", "cc")]
    code = (
        "import sys, labs.paths, labs.state; labs.paths.ROOT = sys.argv.pop(1)\n"
        "labs.state.labs.__defaults__ = (labs.paths.ROOT,)\n"
        "labs.paths.Paths.__init__.__defaults__ = (labs.paths.ROOT,)\n"
        "from nsmctl.__main__ import main; main()"
    )  # a folder of labs of its own: others' must not go
    for name in names:
        written(Paths(name, str(tmp_path)))

    def down(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-c", code, str(tmp_path), "lab", "down", "--all", *more],
            capture_output=True, text=True, check=False, cwd="/", timeout=60,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)},
        )  # fmt: skip

    with state.locked(Paths(names[1], str(tmp_path)), create=False):
        done = down()
        told = down("--json")
    assert done.returncode == 1
    assert [line.split()[0] for line in done.stdout.splitlines()] == [names[0], names[2]]
    assert f"lab {names[1]} is being taken down" in done.stderr
    assert told.returncode == 1
    assert "is being taken down" in json.loads(told.stdout)[names[1]]["error"]
    assert os.listdir(tmp_path) == [names[1]]
    assert down().returncode == 0

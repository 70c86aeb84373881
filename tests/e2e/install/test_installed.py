"""The installed command, as somebody types it who has never met us."""

import base64
import hashlib
import json
import os
import re
import subprocess
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsm.process.origins import AGAIN, OURS
from tests.e2e.install.conftest import Installed
from tests.support.wait import write

POISON = "open({mark!r}, 'w').close()\nraise SystemExit('a stranger was run')\n"
NOBODY = ["--reuid=65534", "--regid=65534", "--clear-groups"]
# so that a Python below somebody's closed home can be reached; it opens nothing else
SEARCH = [
    f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")
]
ANYBODY = ["env", "-u", "HOME", "setpriv", *NOBODY, *SEARCH]


def name(base: str) -> str:
    """A lab's name of this run's own."""
    return f"{base}-{os.getpid() % 10000}"


@pytest.fixture
def poisoned(tmp_path: Path) -> Iterator[Path]:
    """A folder that holds modules of all our names, which tell when they are run."""
    for module in OURS:
        folder = tmp_path / "poison" / module
        folder.mkdir(parents=True)
        for file in ("__init__.py", "__main__.py"):
            (folder / file).write_text(POISON.format(mark=str(tmp_path / "was-run")))
    yield tmp_path / "poison"
    assert not (tmp_path / "was-run").exists()


# --- it works -----------------------------------------------------------------------------------


def test_a_lab_runs_in_a_folder_full_of_other_peoples_modules(installed: Installed, poisoned):
    done = installed.run("lab", "run", "one-node", "--name", name("inst"), cwd=poisoned)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"6 checks hold, 0 failed  up .* left over: 0", last), done.stdout
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("process", ["registry", "forwarder"])
def test_a_process_is_ours_whatever_lies_around(installed: Installed, poisoned, process):
    done = installed.run("run", process, "--help", cwd=poisoned)
    assert done.returncode == 0, done.stderr
    assert "NSM_LISTEN_ON" in done.stdout


def test_every_module_has_all_it_imports_but_what_is_an_extra(installed: Installed, wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = [one for one in archive.namelist() if one.endswith(".py")]
    modules = [one.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for one in files]
    code = (
        "import importlib, json, sys\n"
        "missing = {}\n"
        "for module in sys.argv[1:]:\n"
        "    try: importlib.import_module(module)\n"
        "    except ModuleNotFoundError as why: missing[module] = why.name\n"
        "print(json.dumps(missing))"
    )
    done = subprocess.run(
        [installed.python, "-P", "-c", code, *modules], cwd="/", env={}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    stubs = {module for module in modules if module.endswith("_pb2_grpc")}
    assert stubs
    assert json.loads(done.stdout) == dict.fromkeys({"nsm.grpcio", *stubs}, "grpc")


def test_uninstalled_it_leaves_nothing(installed: Installed):
    assert installed.run("--version").returncode == 0
    there = installed.files()
    assert "bin/nsmctl" in there
    installed.pip("uninstall", "--yes", "vwire")
    try:
        assert installed.files() == installed.needed
    finally:
        installed.pip("install", "--no-index", str(installed.wheel))
    assert installed.files() == there


# --- somebody else's module of one of our names -------------------------------------------------


@pytest.mark.parametrize("shadowed", ["nsm", "registry", "labs"])
@pytest.mark.parametrize("words", ["run registry", "lab run one-node", "--version"])
def test_what_shadows_a_module_of_ours_is_refused_with_its_path(
    installed: Installed, poisoned, tmp_path, shadowed, words
):
    (tmp_path / "path").mkdir()
    (poisoned / shadowed).rename(tmp_path / "path" / shadowed)
    done = installed.run(*words.split(), PYTHONPATH=str(tmp_path / "path"))
    assert done.returncode == 3, done.stdout + done.stderr
    where = f"{tmp_path}/path/{shadowed}/__init__.py"
    said, hint = done.stderr.splitlines()
    assert said == (
        f"the module '{shadowed}' comes from {where}, not from vwire in {installed.library}"
    )
    assert "PYTHONPATH" in hint


@pytest.mark.long
def test_a_package_installed_over_one_of_ours_is_named_with_the_way_back(
    installed: Installed, tmp_path
):
    other = foreign_wheel(tmp_path, {"forwarder/__init__.py": "", "forwarder/app.py": "x = 1\n"})
    try:
        installed.pip("install", "--no-index", str(other))
        done = installed.run("lab", "run", "one-node", "--name", name("over"))
        assert done.returncode == 3, done.stdout + done.stderr
        said, hint = done.stderr.splitlines()
        file = f"{installed.library}/forwarder/__init__.py"
        assert said == f"{file} is not vwire's: forwarder 1.0 was installed over it"
        assert AGAIN in hint
        installed.pip("uninstall", "--yes", "forwarder")
        done = installed.run("run", "forwarder", "--help")
        assert done.returncode == 3
        assert f"vwire in {installed.library} lacks its module 'forwarder'" in done.stderr
        assert AGAIN in done.stderr
    finally:
        again = ("install", "--no-index", "--force-reinstall", "--no-deps", str(installed.wheel))
        installed.pip(*again)
    assert installed.run("run", "forwarder", "--help").returncode == 0


@pytest.mark.long
def test_a_package_that_wrote_over_a_file_inside_is_named_and_so_is_what_it_took_along(
    installed: Installed, tmp_path
):
    """One without a module's beginning: it is no package to Python, and nothing of it is run."""
    other = foreign_wheel(tmp_path, {"forwarder/route.py": "x = 1\n"})
    try:
        installed.pip("install", "--no-index", str(other))
        done = installed.run("run", "registry", "--help")
        file = f"{installed.library}/forwarder/route.py"
        assert done.stderr.splitlines()[0] == (
            f"{file} is not vwire's: forwarder 1.0 was installed over it"
        )
        assert done.returncode == 3
        installed.pip("uninstall", "--yes", "forwarder")
        done = installed.run("run", "registry", "--help")
        said = f"vwire in {installed.library} lacks its file forwarder/route.py"
        assert done.stderr.splitlines()[0] == said
        assert AGAIN in done.stderr
    finally:
        again = ("install", "--no-index", "--force-reinstall", "--no-deps", str(installed.wheel))
        installed.pip(*again)
    patched = installed.library / "forwarder" / "ports.py"
    text = patched.read_text()
    try:
        patched.write_text(f"{text}\n# changed by hand, as one may\n")
        assert installed.run("run", "registry", "--help").returncode == 0
    finally:
        patched.write_text(text)


@pytest.mark.parametrize("module", ["nsmgr", "forwarder", "registry", "endpoints.responder"])
def test_a_program_refuses_an_nsm_that_is_a_strangers_before_it_is_run(
    installed: Installed, poisoned, tmp_path, module
):
    (tmp_path / "path").mkdir()
    (poisoned / "nsm").rename(tmp_path / "path" / "nsm")
    done = subprocess.run(
        [installed.python, "-P", "-m", module], capture_output=True, text=True, check=False,
        cwd="/", env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path / "path")},
    )  # fmt: skip
    where = f"{tmp_path}/path/nsm/__init__.py"
    assert done.stderr.splitlines()[0] == (
        f"the module 'nsm' comes from {where}, not from vwire in {installed.library}"
    )
    assert done.returncode == 3


def foreign_wheel(folder: Path, files: dict[str, str]) -> Path:
    """A distribution `forwarder` 1.0, as its author would put it on an index."""
    info = "forwarder-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: forwarder\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{path},sha256={_digest(text)},{len(text)}" for path, text in files.items()]
    made = folder / "forwarder-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,", ""]))
    return made


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


# --- without root -------------------------------------------------------------------------------


@pytest.fixture
def closed(installed: Installed) -> Path:
    """A folder in which nobody but root may write."""
    folder = installed.folder / "bin"
    assert folder.stat().st_mode & 0o777 == 0o755
    return folder


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--help", "Usage: nsmctl"),
        ("--version", "vwire 0.1.0, Network Service Mesh protocol of sdk "),
        ("lab check one-node", ": ok: "),
        ("lab schema", '"title": "A vwire lab"'),
        ("lab show one-node", "name: one-node"),
        ("lab list", ""),
        ("run registry --help", "NSM_LISTEN_ON"),
    ],
)
def test_reading_is_for_anybody_anywhere(installed: Installed, closed, words, says):
    done = installed.run(*words.split(), by=ANYBODY, cwd=closed)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert says in done.stdout


@pytest.mark.parametrize("words", ["lab run one-node", "lab up one-node", "lab down 'a b'"])
def test_making_is_refused_with_the_line_to_type(installed: Installed, closed, words):
    done = subprocess.run(
        [*ANYBODY, "sh", "-c", f"{installed.nsmctl} {words}"], capture_output=True, text=True,
        check=False, cwd=closed, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (3, "")
    line = f"sudo {installed.nsmctl} {words}"
    assert done.stderr == f"needs CAP_NET_ADMIN and CAP_SYS_ADMIN: {line}\n"


def test_started_as_a_module_the_line_to_type_does_so_too(installed: Installed, closed):
    words = "-P -m nsmctl lab run one-node"
    done = subprocess.run(
        [*ANYBODY, installed.python, *words.split()], capture_output=True, text=True, check=False,
        cwd=closed, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert done.returncode == 3
    assert done.stderr.endswith(f": sudo {installed.python} {words}\n")


# --- shells and pipes ---------------------------------------------------------------------------


SHOWN = 'eval "$(nsmctl --show-completion)"'
KEPT = 'nsmctl --install-completion >/dev/null && . "$HOME/.bashrc"'


def completed(installed: Installed, home: Path, *lines: str, set_up: str = SHOWN) -> list[str]:
    """What bash offers at Tab behind each line, once the command has set its completion up."""
    script = (
        f"{set_up} || exit\n"
        "complete -p nsmctl >/dev/null || exit\n"
        'for line in "$@"; do\n'
        "    read -ra COMP_WORDS <<<\"$line\"; [[ $line == *' ' ]] && COMP_WORDS+=('')\n"
        "    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()\n"
        "    _nsmctl_completion nsmctl\n"
        '    echo "${COMPREPLY[@]}"\n'
        "done\n"
    )
    path = f"{installed.folder}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", script, "bash", *lines], capture_output=True, text=True,
        check=False, cwd="/", env={"PATH": path, "HOME": str(home)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout.splitlines()


@pytest.mark.parametrize("set_up", [SHOWN, KEPT])
def test_bash_completes_verbs_and_labs(installed: Installed, tmp_path, set_up):
    lines = ("nsmctl lab ", "nsmctl lab run ", "nsmctl lab up two", "nsmctl run re")
    verbs, labs, *others = completed(installed, tmp_path, *lines, set_up=set_up)
    assert {"check", "run", "up", "down", "status"} <= set(verbs.split())
    assert {"one-node", "two-nodes"} <= set(labs.split())
    labs_, programs = others
    assert "two-nodes" in labs_.split()
    assert {"registry", "registry-proxy", "responder"} <= set(programs.split())


@pytest.mark.long
def test_bash_completes_what_is_up_and_who_is_in_it(installed: Installed, tmp_path):
    lab = name("tab")
    up = installed.run("lab", "up", "one-node", "--name", lab)
    try:
        assert up.returncode == 0, up.stderr
        down, places, *others = completed(
            installed,
            tmp_path,
            f"nsmctl lab down {lab[:3]}",
            f"nsmctl lab exec --lab {lab} ",
            f"nsmctl lab logs --lab {lab} node-1/n",
            f"nsmctl connections --lab {lab} -n ou",
        )
        assert lab in down.split()
        assert {"node-1", "app", "outsider"} <= set(places.split())
        assert others == ["node-1/nsmgr", "outsider"]
    finally:
        installed.run("lab", "down", lab)


@pytest.mark.parametrize(
    ("shell", "line", "offers"),
    [
        ("zsh", "nsmctl lab ru", r'\("run":".+"\)'),
        ("zsh", "nsmctl lab up two-n", r'\("two-nodes"\)'),
        ("fish", "nsmctl lab ru", r"run\t.+"),
        ("fish", "nsmctl lab up two-n", r"two-nodes"),
    ],
)
def test_other_shells_are_told_in_their_way(installed: Installed, shell, line, offers):
    """What their scripts run; those come from typer, and say the same variables."""
    script = installed.run("--version", _NSMCTL_COMPLETE=f"source_{shell}").stdout
    ask = {
        "_NSMCTL_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert all(variable in script for variable in ask if shell.upper() in variable)
    assert "_NSMCTL_COMPLETE" in script
    done = installed.run(**ask)
    assert done.returncode == 0, done.stderr
    assert re.search(offers, done.stdout), done.stdout


@pytest.mark.parametrize(
    "words", ["--help", "--version", "lab schema", "lab show two-nodes", "lab check one-node"]
)
def test_a_closed_pipe_is_no_reason_to_complain(installed: Installed, words):
    read, write_end = os.pipe()
    os.close(read)
    done = subprocess.run(
        [installed.nsmctl, *words.split()], stdout=write_end, stderr=subprocess.PIPE, check=False,
        env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    os.close(write_end)
    assert done.stderr == b""


def test_help_takes_a_moment(installed: Installed):
    start = time.monotonic()
    assert installed.run("--help").returncode == 0
    write("nsmctl --help", time.monotonic() - start, 0.5)

"""Exit codes and sentences where there is nothing to work on, or the machine says no."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from labs import lab, seats
from labs.paths import Paths
from nsm.errors import InvalidError
from nsmctl import mesh

HERE = Path(__file__).parents[3]
NO_LABS = "import labs.state as s; s.labs = lambda root='': []; "
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="looking into a lab needs root")


def nsmctl(*words: str, before: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{before}import sys; sys.argv = ['nsmctl', *{words!r}]\nimport nsmctl.__main__ as n\n"
    return subprocess.run(
        [sys.executable, "-P", "-c", f"{code}n.main()"], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)}, cwd="/", check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        pytest.param("lab down nope", marks=NEEDS_ROOT),
        pytest.param("lab down", marks=NEEDS_ROOT),
        pytest.param("lab status", marks=NEEDS_ROOT),
        pytest.param("lab status nope", marks=NEEDS_ROOT),
        pytest.param("lab exec app --lab nope -- true", marks=NEEDS_ROOT),
        "lab logs --lab nope",
        "lab logs",
        pytest.param("connections --lab nope", marks=NEEDS_ROOT),
    ],
)
def test_what_is_not_running_is_exit_code_4_whoever_is_asked(words):
    done = nsmctl(*words.split(), before=NO_LABS)
    assert done.returncode == 4, done.stdout + done.stderr
    assert done.stderr.startswith("lab nope is not up" if "nope" in words else "no lab is up")


@NEEDS_ROOT
def test_all_of_no_labs_is_nothing_to_do():
    done = nsmctl("lab", "down", "--all", before=NO_LABS)
    assert done.returncode == 0
    assert done.stdout == "no lab is up\n"


def test_a_switch_is_no_seat():
    two = lab.read(lab.find("two-nodes"))
    with pytest.raises(InvalidError, match="lan is a switch"):
        seats.take(two, Paths(two.name), "lan")


def test_what_the_machine_refuses_is_a_sentence():
    full = "import labs.state as s\ndef full(root=''): raise OSError(28, 'No space left', '/x')\n"
    done = nsmctl("lab", "list", before=f"{full}s.labs = full\n")
    assert done.returncode == 1
    assert done.stderr == "/x: No space left\n"


@NEEDS_ROOT
@pytest.mark.parametrize("lacks", ["sys_admin", "net_admin"])
def test_root_without_rights_is_told_which_it_lacks(lacks):
    done = subprocess.run(
        ["setpriv", f"--bounding-set=-{lacks}", f"--inh-caps=-{lacks}",
         sys.executable, "-P", "-m", "nsmctl", "lab", "up", "one-node"],
        capture_output=True, text=True, check=False, cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith(f"this root lacks CAP_{lacks.upper()}\n")


@NEEDS_ROOT
def test_what_the_kernel_does_not_let_us_do_is_exit_code_3():
    code = (
        "from nsm.kernel.namespaces import create_named\n"
        "from nsm.process.run import exit_code\n"
        "import sys\n"
        "try: create_named('denied-here')\n"
        "except Exception as why: print(why); sys.exit(exit_code(why))"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin",
         sys.executable, "-P", "-c", code],
        capture_output=True, text=True, check=False, cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert "CAP_SYS_ADMIN" in done.stdout
    assert done.returncode == 3


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
async def test_a_command_that_a_signal_ends_is_told_as_a_shell_would(script, code):
    assert await mesh._run(["sh", "-c", script]) == code


@pytest.mark.parametrize("between", [(), ("--",)])
def test_behind_a_process_its_own_options_stand(between):
    told = nsmctl("run", "registry", *between, "--help")
    assert told.returncode == 0, told.stderr
    assert "NSM_LISTEN_ON" in told.stdout
    checked = nsmctl("run", "issuer", *between, "--check")
    assert checked.returncode == 2
    assert "NSM_TRUST_DOMAIN" in checked.stderr


def test_without_a_process_the_help_is_the_verbs():
    for words in ("run --help", "run -h"):
        assert "nsmctl run registry" in nsmctl(*words.split()).stdout
    assert nsmctl("run").returncode == 2
    assert nsmctl("run", "nobody", "--help").returncode == 2

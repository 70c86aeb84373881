"""The command as a person meets it: help, exit codes, errors, and no escape codes in a pipe."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from nsmctl.command import app

HERE = Path(__file__).parents[3]
VERBS = [
    *(f"lab {v}" for v in ("check", "schema", "show", "run", "up", "down", "list", "status")),
    *(
        "lab exec",
        "lab logs",
        "connect",
        "services",
        "endpoints",
        "define",
        "connections",
        "path",
        "explain",
        "leaks",
        "heal report",
        "chaos run",
        "chaos replay",
        "run",
        "doctor",
        *(
            f"lab fault {v}"
            for v in (
                *("kill", "stop", "start", "freeze", "thaw", "end", "reboot", "link-down"),
                *("link-up", "rate", "partition", "fill", "mend"),
            )
        ),
        *(f"vl3 {v}" for v in ("create", "list", "show", "delete")),
        "systemd install",
        "systemd uninstall",
    ),
]
BECOMES_ANOTHER = ("lab exec", "run")  # whose output is its own


@functools.cache
def told_by_help(verb: str) -> subprocess.CompletedProcess:
    return nsmctl(*verb.split(), "--help")


def nsmctl(*words: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-m", "nsmctl", *words],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), **variables},
        cwd="/",
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    done = told_by_help(verb)
    assert done.returncode == 0
    assert "Example:" in done.stdout
    assert f"nsmctl {verb}" in done.stdout.partition("Example:")[2]
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_no_verb_is_missing_here():
    group = typer.main.get_command(app)
    rooms = {name: one.commands for name, one in group.commands.items() if hasattr(one, "commands")}
    rooms["lab fault"] = rooms["lab"].pop("fault").commands
    verbs = {name for name in group.commands if name not in rooms}
    verbs |= {f"{room} {name}" for room, inside in rooms.items() for name in inside}
    assert verbs == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_answers_in_json_or_says_why_not(verb):
    told = " ".join(told_by_help(verb).stdout.split())
    if verb in BECOMES_ANOTHER:
        assert "Become " in told
        assert "there is no --json" in told
        assert nsmctl(*verb.split(), "--json").returncode == 2
    else:
        assert "--json Answer in JSON." in told


def test_a_log_is_not_followed_in_json():
    done = nsmctl("lab", "logs", "--follow", "--json")
    assert done.returncode == 2
    assert "leave out -f" in json.loads(done.stdout)["hint"]


def test_the_variables_of_a_process_are_told_by_the_process_itself():
    told = nsmctl("run", "registry", "--", "--help")
    assert told.returncode == 0
    assert "NSM_LISTEN_ON" in told.stdout
    assert nsmctl("run", "nothing").returncode == 2


def test_a_mistake_in_a_file_is_exit_code_2_and_one_line_with_its_place(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("name: x\ntopology:\n  clusters: {c: {}}\n  nodes: {n: {custer: c}}\n")
    done = nsmctl("lab", "check", str(file))
    assert done.returncode == 2
    expected = f'{file}:4: topology.nodes.n: unknown key "custer"; did you mean "cluster"?\n'
    assert done.stderr == expected
    as_json = nsmctl("lab", "check", str(file), "--json")
    assert as_json.returncode == 2
    assert json.loads(as_json.stdout)["error"] == expected.strip()


def test_a_wrong_option_is_exit_code_2():
    assert nsmctl("lab", "check", "--colour").returncode == 2
    assert nsmctl("lab", "chek").returncode == 2


def test_the_schema_is_json_and_show_fills_defaults_in():
    assert json.loads(nsmctl("lab", "schema").stdout)["title"] == "A vwire lab"
    shown = json.loads(nsmctl("lab", "show", "one-node", "--json").stdout)
    assert shown["links"][0]["mtu"] == 1500
    assert shown["nodes"]["node-1"]["addresses"] == ["198.18.0.1/24"]
    assert "spiffe://home.test/client/app" in shown["identities"]


def test_a_shipped_lab_is_checked_by_name():
    done = nsmctl("lab", "check", "two-nodes")
    assert done.returncode == 0
    assert ": ok: 4 nodes, 2 clusters" in done.stdout


def test_asking_a_lab_that_is_not_up_is_exit_code_4():
    if os.geteuid() != 0:
        pytest.skip("looking into a lab needs root")
    done = nsmctl("lab", "status", "nothing-here")
    assert done.returncode == 4
    assert "lab nothing-here is not up" in done.stderr
    assert "nsmctl lab up nothing-here" in done.stderr
    logs = nsmctl("lab", "logs", "--lab", "nothing-here")
    assert logs.returncode == 4
    assert "lab nothing-here is not up" in logs.stderr


@pytest.mark.parametrize("words", ["lab run one-node", "lab up one-node", "lab down x"])
def test_without_root_the_exact_sudo_line_is_given(words):
    if os.geteuid() == 0:
        code = (
            "import os, sys; os.setgroups([]); os.setresuid(65534, 65534, 65534);"
            f"sys.argv = ['/opt/x/bin/nsmctl', *{words.split()!r}];"
            "from nsmctl.__main__ import main; main()"
        )
        # imported as root, because a checkout may lie where nobody may read
        warm = (
            "import labs.engine, nsmctl.__main__ as n, sys\n"
            "for words in (['lab', 'check', 'nothing'], ['--help']):\n"
            "    sys.argv = ['nsmctl', *words]\n"
            "    try: n.main()\n"
            "    except SystemExit: pass\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", warm + code], capture_output=True, text=True, check=False,
            cwd=HERE,
        )  # fmt: skip
    else:
        done = nsmctl(*words.split())
    assert done.returncode == 3
    assert "needs CAP_NET_ADMIN and CAP_SYS_ADMIN" in done.stderr
    assert f"/nsmctl {words}" in done.stderr
    assert "sudo " in done.stderr


def test_versions_are_told():
    done = nsmctl("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("vwire ")


def test_no_color_means_no_escape_codes_on_a_terminal_too():
    script = Path("/usr/bin/script")
    if not script.exists():
        pytest.skip("needs util-linux's script for a terminal")
    line = f"{sys.executable} -P -m nsmctl lab check nothing"
    done = subprocess.run(
        [script, "-qec", line, "/dev/null"], capture_output=True, text=True, check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), "NO_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "no lab file" in done.stdout
    assert "\x1b" not in done.stdout


def test_help_and_check_import_nothing_that_only_linux_has():
    code = (
        "import sys; sys.modules['fcntl'] = None\n"
        "sys.argv = ['nsmctl', 'lab', 'check', 'one-node']\n"
        "from nsmctl.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=HERE
    )
    assert done.returncode == 0, done.stderr

"""Asking: a question that hangs, dies or breaks is a line, and the others are answered."""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import typer

from nsm.errors import RightsError
from nsmctl import doctor, show
from nsmctl.machine import asking, questions
from nsmctl.machine.asking import Level, Line, Question, ask, ok
from tests.support.wait import until

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "doctor.md").read_text()


def fine() -> asking.Answer:
    return ok("fine")


def hangs() -> asking.Answer:
    subprocess.run(["sleep", "600"], check=True)
    return ok("never")


def breaks() -> asking.Answer:
    raise ZeroDivisionError("by what")


def refuses() -> asking.Answer:
    raise RightsError("`ip link add x` here: Operation not permitted", hint="ask somebody")


def dies() -> asking.Answer:
    os.kill(os.getpid(), signal.SIGKILL)
    return ok("never")


def leaves() -> asking.Answer:
    sys.exit(7)


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize(
    ("question", "found", "fix"),
    [
        (breaks, "cannot be told: ZeroDivisionError: by what", asking.FAULT),
        (refuses, "`ip link add x` here: Operation not permitted", "ask somebody"),
        (dies, "the process that looked died", "ask again; dmesg may say who killed it"),
        (leaves, "cannot be told: SystemExit: 7", asking.FAULT),
    ],
)
def test_a_question_without_an_answer_is_a_line_and_the_others_are_answered(
    question, found, fix, needed
):
    asked = [
        Question("before", "Before", fine),
        Question("odd", "Odd", question, needed=needed),
        Question("after", "After", fine),
    ]
    before, odd, after = ask(asked, patience=60)
    level = Level.BAD if needed else Level.NOTE
    assert odd == Line("odd", "Odd", level, found, fix)
    assert before == Line("before", "Before", Level.OK, "fine", "")
    assert after == Line("after", "After", Level.OK, "fine", "")


def test_a_slow_machine_is_no_bad_one():
    asked = [
        Question("before", "Before", fine),
        Question("slow", "Slow", hangs, needed=True),
        Question("after", "After", fine),
    ]
    before, slow, after = ask(asked, patience=1.5)
    assert (slow.level, slow.found) == (Level.NOTE, "no answer within 1.5 s")
    assert re.fullmatch(
        r"ask again when this machine has less to do \(load \d+\.\d\)", slow.fix
    ), slow.fix  # fmt: skip
    assert (before.found, after.found) == ("fine", "fine")


def test_all_are_asked_at_once():
    both = threading.Barrier(1)  # a process of its own has a copy: it waits for nobody
    reading, writing = os.pipe()

    def first() -> asking.Answer:
        return ok(os.read(reading, 1).decode())

    def second() -> asking.Answer:
        both.wait()
        os.write(writing, b"x")
        return ok("written")

    heard, written = ask([Question("a", "a", first), Question("b", "b", second)], patience=20)
    os.close(reading)
    os.close(writing)
    assert (heard.found, written.found) == ("x", "written")


def test_who_waits_is_told_for_whom_every_second():
    told: list[list[str]] = []
    lines = ask(
        [Question("a", "Quick", fine), Question("b", "Slow", hangs)],
        patience=1.5, waiting=lambda titles: told.append(list(titles)),
    )  # fmt: skip
    assert told == [["Slow"]]
    assert lines[1].found == "no answer within 1.5 s"


def test_what_a_question_prints_is_not_heard(capfd):
    def loud() -> asking.Answer:
        os.write(1, b"to output")
        os.write(2, b"to errors")
        return ok("said")

    assert ask([Question("a", "a", loud)])[0].found == "said"
    assert capfd.readouterr() == ("", "")


async def test_questions_end_with_whoever_asks_them(tmp_path):
    told = tmp_path / "pid"
    code = (
        "import os, time; from pathlib import Path; from nsmctl.machine.asking import *\n"
        f"def hangs():\n Path('{told}.new').write_text(str(os.getpid()))\n"
        f" os.rename('{told}.new', '{told}'); time.sleep(600)\n"
        "ask([Question('a', 'a', hangs)], patience=600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as asking_:
        await until(told.exists, "a question is being asked", bar=1.0)
        asked = os.pidfd_open(int(told.read_text()))
        asking_.kill()
    try:
        await until(lambda: select.select([asked], [], [], 0)[0], "it ends", bar=0.1)
    finally:
        os.close(asked)


# --- what is printed -------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_a_line_is_folded_where_it_does_not_fit_and_commands_stay_whole(
    capsys, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    fix = "sysctl -w net.ipv4.conf.all.rp_filter=2"
    doctor._print(
        [
            Line("a", "short", Level.OK, "fine", ""),
            Line("b", "filter", Level.NOTE, "strict on every device, which is too strict", fix),
        ]
    )
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "ok    short   fine"
    assert all(len(line) <= columns for line in rest) or columns < 80
    assert " ".join(" ".join(rest).split()) == (
        f"note filter strict on every device, which is too strict fix: {fix}"
    )
    assert all(re.match(r"note  filter  \S| {14}\S", line) for line in rest)
    assert len(rest) == {40: 4, 80: 2, 200: 1}[columns]


def test_a_machine_that_did_not_answer_in_time_is_not_told_to_have_everything(capsys, monkeypatch):
    asked = (Question("a", "Quick", fine), Question("b", "Slow", hangs, needed=True))
    monkeypatch.setattr(questions, "ALL", asked)
    monkeypatch.setattr(asking, "ask", partial(asking.ask, patience=1.0))
    with pytest.raises(typer.Exit) as ended:
        doctor.doctor()
    assert ended.value.exit_code == show.OK
    assert capsys.readouterr().out.endswith("nothing bad among what was answered in time, 1 note\n")


# --- the page --------------------------------------------------------------------------------


def test_the_page_explains_every_line_and_no_other():
    rows = re.findall(r"^\| \*\*(.+?)\*\* \|", PAGE, re.MULTILINE)
    assert rows == [question.title for question in questions.ALL]
    assert len({question.name for question in questions.ALL}) == len(questions.ALL)


def test_the_page_names_the_needed_ones():
    needed = {question.title for question in questions.ALL if question.needed}
    bad = set(re.findall(r"^\| \*\*(.+?)\*\* \|[^|]*\| bad", PAGE, re.MULTILINE))
    assert bad == needed


# --- where it cannot run ---------------------------------------------------------------------


def test_elsewhere_than_on_linux_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        show.MachineCannotError, match="a Linux machine; run it in a Linux VM"
    ) as no:
        doctor.doctor()
    assert show.exit_code(no.value) == 3


def older_python() -> list[str]:
    """A Python that is too old, or, where there is none, this one saying so of itself."""
    for minor in (10, 9, 8):
        for place in (
            Path("/usr/bin"),
            Path("/usr/local/bin"),
            *Path("~/.pyenv/versions").expanduser().glob("*/bin"),
        ):
            if (place / f"python3.{minor}").exists():
                return [str(place / f"python3.{minor}"), "-m", "nsmctl"]
    own = "import sys; sys.version_info = (3, 10, 0, 'final', 0); sys.version = '3.10.0 (x)'\n"
    return [
        sys.executable,
        "-c",
        own + "import runpy; runpy.run_module('nsmctl', run_name='__main__')",
    ]


def test_a_python_that_is_too_old_is_told_so_before_anything_breaks():
    start = time.monotonic()
    done = subprocess.run(
        [*older_python(), "doctor"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(
        r"nsmctl needs Python 3\.11 or newer, and this is 3\.(8|9|10)\.\d+: \S+\n"
        r"  make setup PYTHON=/path/to/python\n",
        done.stderr,
    ), done.stderr
    assert time.monotonic() - start < 30

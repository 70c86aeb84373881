"""What people see is what there is: an address is no emoji, and brackets are no markup."""

import json
import os
import subprocess
import sys

from nsm.errors import InvalidError, TakenError
from nsm.model import Destination, Match
from nsmctl import show

SAID = "fd00:1234::1 02:ab:cd:00:00:01 :on: [red]x[/red] \\[y]"


def test_a_line_says_what_it_was_given(capsys):
    show.line(SAID)
    assert capsys.readouterr().out == f"{SAID}\n"


def test_a_table_holds_what_it_was_given(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    show.table(":on: [b]", (":on: [b]", ">:on:"), [(SAID, SAID)])
    title, header, row = capsys.readouterr().out.splitlines()
    assert title.strip() == ":on: [b]"
    assert header.split() == [":on:", "[b]", ":on:"]
    assert row.strip() == f"{SAID} {SAID}"


def test_an_error_says_what_went_wrong(capsys):
    show.error(InvalidError(SAID, hint=SAID), json_wanted=False)
    assert capsys.readouterr().err == f"{SAID}\n  {SAID}\n"


def test_what_others_say_steers_no_terminal(capsys, monkeypatch):
    """An endpoint of another domain may be called anything."""
    monkeypatch.setenv("COLUMNS", "200")
    evil = "nse\x1b]52;c;cm0=\x07\x1b[2J\x9b31m\r\x08\u202egnp"
    show.line(evil)
    show.table("", ("name",), [(evil,)])
    show.error(InvalidError(evil, hint=evil), json_wanted=False)
    said = capsys.readouterr()
    text = said.out + said.err
    assert text.count(r"nse\x1b]52;c;cm0=\x07\x1b[2J\x9b31m\x0d\x08\u202egnp") == 4
    assert not any(ord(one) < 32 and one != "\n" for one in text)


def test_progress_says_what_is_being_done(capsys):
    with show.progress() as report:
        report(SAID)
    assert capsys.readouterr().err.endswith(f" s  {SAID}\n")


def test_progress_that_moves_says_it_too(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    with show.progress() as report:
        report(SAID)
    assert SAID in capsys.readouterr().err


def test_what_is_being_done_goes_on_where_nobody_reads_on():
    nobody, written = os.pipe()
    os.close(nobody)
    program = (
        "from nsmctl import show\n"
        "with show.progress() as report:\n"
        "    report('first')\n"
        "    report('second')\n"
        "print('all of it')\n"
    )
    try:
        run = [sys.executable, "-P", "-c", program]
        ended = subprocess.run(run, stdout=subprocess.PIPE, stderr=written, check=False, text=True)
    finally:
        os.close(written)
    assert (ended.returncode, ended.stdout) == (0, "all of it\n")


def test_what_could_not_be_taken_back_is_told_with_the_error(capsys):
    failure = TakenError("pool 'a' is there", hint="take another name")
    failure.add_note("and could not forget the pool 'b' again: gone")
    show.error(failure, json_wanted=False)
    assert capsys.readouterr().err == (
        "pool 'a' is there\n  and could not forget the pool 'b' again: gone\n  take another name\n"
    )
    show.error(failure, json_wanted=True)
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == "and could not forget the pool 'b' again: gone"


def test_rules_of_a_service_are_told_to_scripts_but_not_what_nobody_here_can_read(capsys) -> None:
    rule = Match({"at": "a"}, (Destination({"router": "a"}, unknown=b"\x01"),), unknown=b"\x02")
    show.as_json([rule])
    (told,) = json.loads(capsys.readouterr().out)
    assert told["routes"] == [{"selector": {"router": "a"}, "weight": 0}]
    assert "unknown" not in told

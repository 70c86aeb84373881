"""The last words of a program's log."""

from pathlib import Path

from nsm.process.words import last_words


def test_of_a_log_its_end_is_told_in_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(str(log)) == "(no log)"
    log.write_text("")
    assert last_words(str(log)) == "(empty log)"
    lines = [
        "not this",
        '{"event": "cannot run", "why": "no pool", "level": "error"}',
        " a | b",
        "[1]",
    ]
    log.write_text("\n".join(lines))
    assert last_words(str(log)) == "cannot run: no pool | a | b | [1]"
    assert last_words(str(log), lines=1) == "[1]"


def test_what_an_earlier_life_said_is_not_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("an earlier life\n")
    before = log.stat().st_size
    assert last_words(str(log), after=before) == "(empty log)"
    with log.open("a") as more:
        more.write("this one\n")
    assert last_words(str(log), after=before) == "this one"
    log.write_text("cut\n")
    assert last_words(str(log), after=before) == "cut", "it was emptied meanwhile"
    log.write_text("x" * 5000 + "\nlast\n")
    assert last_words(str(log), lines=1) == "last"

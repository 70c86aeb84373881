"""What `nsmctl heal report` says where there is little or nothing to sum up."""

import json
from pathlib import Path

import pytest

from nsmctl import heal

pytestmark = pytest.mark.unit


def test_a_file_that_is_not_there_is_named_beside_no_outage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, missing = tmp_path / "there", tmp_path / "missing"
    there.touch()
    heal.report([str(there), str(missing)])
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("no outage; not there: ")
    assert str(missing) in said.replace(" ", "")
    assert str(there) not in said.replace(" ", "")


def test_lines_that_are_no_outages_are_told_beside_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "outages"
    good = {"connection": "c", "service": "s", "cause": "data", "ended": 1, "noticed": 0.5,
            "healed": 1.5}  # fmt: skip
    bad = [{**good, "noticed": "\x1b[2Jsoon"}, *({**good, "cause": n} for n in range(9))]
    path.write_text("".join(json.dumps(one) + "\n" for one in (good, *bad)))
    heal.report([str(path)], json_=True)
    said = capsys.readouterr()
    (data,) = json.loads(said.out)
    assert (data["cause"], data["n"], data["healed_max"]) == ("data", 1, 1.5)
    first, *_, last = said.err.splitlines()
    assert "line 2 is no outage: `noticed` is " in first
    assert "\x1b" not in said.err
    assert last == "and 5 more lines are none"
    assert len(said.err.splitlines()) == 6

"""What `nsmctl heal report` says where there is nothing to sum up."""

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

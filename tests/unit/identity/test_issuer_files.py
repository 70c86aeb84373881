"""What the issuer makes of files that change under it."""

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nsm.errors import InvalidError
from nsm.identity.authority import Authority
from nsm.identity.issuer import _Files

GOOD = "- {id: spiffe://td.example/a, uid: 0}\n"


@pytest.fixture
def files(tmp_path: Path) -> _Files:
    (tmp_path / "entries").write_text(GOOD)
    (tmp_path / "others").mkdir()
    return _Files(tmp_path / "entries", tmp_path / "others", "td.example")


def test_what_did_not_change_is_not_read_again(files: _Files) -> None:
    assert len(files.first().entries) == 1
    assert files._again() is None


def test_a_wrong_file_is_complained_of_once(files: _Files, tmp_path: Path) -> None:
    files.first()
    (tmp_path / "entries").write_text("- wrong")
    (tmp_path / "others" / "other.example.pem").write_text("wrong")
    with capture_logs() as log:
        for _ in range(3):
            assert files._again() is None
    assert [line["log_level"] for line in log] == ["warning", "warning"]
    (tmp_path / "entries").write_text(GOOD + GOOD)
    known = files._again()
    assert known is not None
    assert len(known.entries) == 2


def test_a_wrong_bundle_at_the_start_is_refused(files: _Files, tmp_path: Path) -> None:
    (tmp_path / "others" / "other.example.pem").write_text("wrong")
    with pytest.raises(InvalidError, match=r"other\.example\.pem"):
        files.first()


def test_a_file_in_our_own_name_is_no_federated_bundle(files: _Files, tmp_path: Path) -> None:
    (tmp_path / "others" / "td.example.pem").write_bytes(
        Authority.create("td.example").bundle_pem()
    )
    assert not files.first().federated

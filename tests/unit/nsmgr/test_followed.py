"""A file that others write: what it says now, or said last."""

import os

import pytest

from nsm.errors import InvalidError
from nsmgr import followed
from nsmgr.followed import Followed


def test_a_file_that_cannot_be_looked_at_is_not_one_that_is_gone(tmp_path):
    """Where addresses outside are written, each would be its own from here on."""
    path = tmp_path / "map.yaml"
    path.write_text("one")
    file = Followed(str(path), str, "nothing", "a text")
    file.first()
    path.unlink()
    path.symlink_to(path)  # a loop of links: the kernel refuses to look
    for _ in range(3):
        file.read()
        assert file.value == "one"
    path.unlink()
    file.read()
    assert file.value == "nothing"
    path.write_text("two")
    file.read()
    assert file.value == "two"


def test_a_file_that_is_too_long_is_not_read_by_half(tmp_path, monkeypatch):
    monkeypatch.setattr(followed, "LARGEST", 8)
    path = tmp_path / "map.yaml"
    file = Followed(str(path), str, "nothing", "a text")
    path.write_text("12345678")
    file.read()
    path.write_text("123456789")
    os.utime(path, ns=(1, 1))
    file.read()
    assert file.value == "12345678"
    again = Followed(str(path), str, "nothing", "a text")
    with pytest.raises(InvalidError, match="more than 8 bytes"):
        again.first()

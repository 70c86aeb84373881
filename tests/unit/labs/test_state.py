"""A lab's folder, as others find it."""

import os
from pathlib import Path

import pytest

from labs import state
from labs.paths import Paths


@pytest.mark.parametrize("mask", [0o000, 0o077], ids=["nothing", "all"])
def test_folders_are_open_to_others_whatever_the_umask_takes_from_them(tmp_path, mask):
    """Services' users pass through /run/vwire, which a lab may be the first to make."""
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    paths = Paths("one", root=str(theirs / "vwire" / "labs"))
    before = os.umask(mask)
    try:
        with state.locked(paths, create=True):
            pass
    finally:
        os.umask(before)
    made = [Path(paths.folder), *Path(paths.folder).parents[:2]]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o755] * 3
    assert theirs.stat().st_mode & 0o777 == 0o700

"""Whose store `nsmctl leaks` believes."""

import os
import subprocess
from pathlib import Path

import pytest

from nsm.errors import NotFoundError
from nsmctl import leaks
from nsmctl.machine.leaks import unwritten

pytestmark = pytest.mark.unit
NOBODY = 65534


def test_a_process_that_only_calls_itself_a_forwarder_is_not_asked_what_is_held(
    tmp_path: Path,
) -> None:
    """Its store would hold nothing, and `--remove` take every wire away."""
    with subprocess.Popen(
        ["/bin/sh", "-c", "echo; read line", "-m", "forwarder"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "NSM_STORE": str(tmp_path / "empty.sqlite"), "NSM_NAME": "impostor"},
        user=NOBODY if os.geteuid() == 0 else None,
    ) as impostor:
        assert impostor.stdout is not None
        impostor.stdout.readline()
        try:
            found = [one.name for one in leaks._here()]
        except NotFoundError:
            found = []
        impostor.communicate(b"\n")
    assert "impostor" not in found


def test_what_has_no_lease_may_be_held_where_the_disk_is_full_or_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk that is not there: to make one takes a right that not everybody has."""
    store = tmp_path / "forwarder.sqlite"
    store.touch()
    assert unwritten(str(store)) == ""
    facts = list(os.statvfs(store))
    blocks, flags = 4, 8  # of the free ones that anybody may have; and the flags
    for place, value, why in ((blocks, 0, "full"), (flags, os.ST_RDONLY, "read-only")):
        told = [*facts[:place], value, *facts[place + 1 :]]
        monkeypatch.setattr(os, "statvfs", lambda _, told=told: os.statvfs_result(told))
        assert unwritten(str(store)).endswith(why)

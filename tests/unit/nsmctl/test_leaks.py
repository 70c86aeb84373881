"""Whose store `nsmctl leaks` believes."""

import os
import subprocess
from pathlib import Path

import pytest

from nsm.errors import NotFoundError
from nsmctl import leaks

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

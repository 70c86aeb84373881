"""Where the lane's kernel is kept, and who has none."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lane import kernel
from tests.lane.kernel import UnavailableError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"KERNEL_LANE_DIR": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/kernel-lane"),
        ({}, "/home/c/.cache/kernel-lane"),
    ],
)
def test_the_cache_is_where_one_says(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("KERNEL_LANE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/c")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(kernel.cache()) == folder


def test_a_kernel_of_another_configuration_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KERNEL_LANE_DIR", str(tmp_path))
    (tmp_path / "000000000000-6.1.1-1").mkdir()
    assert kernel.standing() is None
    ours = tmp_path / f"{kernel.key()}-6.1.1-1"
    ours.mkdir()
    assert kernel.standing() == ours
    assert kernel.built(print) == ours


def test_why_there_is_none_is_what_the_build_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "apt-cache").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").write_text("#!/bin/sh\necho no route; exit 100\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("KERNEL_LANE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    told: list[str] = []
    with pytest.raises(UnavailableError) as refused:
        kernel.built(told.append)
    assert refused.value.status == 3
    assert str(refused.value) == "apt-get update failed (offline?): no route"
    assert told[-1] == "lane: apt-get update"


def test_another_architecture_is_told_so() -> None:
    program = (
        "from tests.lane import kernel\n"
        "try: kernel.built(print)\n"
        "except kernel.UnavailableError as no: print(no.status, no)\n"
    )
    done = subprocess.run(
        ["setarch", "i686", sys.executable, "-c", program],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout == "3 user-mode Linux is for x86-64 only; this is i686\n"

"""`.ci/setup`, with stand-ins for Python and apt: what it finds missing, and how it installs."""

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parents[3]
PYTHON = """\
case "$*" in
  *ensurepip*) [ -e "$0.venv" ] ;;
  *"-m venv"*) echo making a venv; exit 9 ;;
esac
"""
APT = """\
echo "$@" >>"$0.log"
case "$*" in
  *update*) touch "$0.fresh" ;;
  *install*) [ -e "$0.fresh" ] || exit 100; touch "$(dirname "$0")/python.venv" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in (".ci/setup", ".ci/apt", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    programs = {"python": PYTHON, "apt-get": APT, "apt-cache": "", "id": "echo 0"}
    for name, text in programs.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    return tmp_path


def setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    bin_ = checkout / "bin"
    return subprocess.run(
        ["bash", str(checkout / ".ci/setup")], capture_output=True, text=True, check=False,
        env={"PATH": f"{bin_}:/usr/local/bin:/usr/bin:/bin", "PYTHON": str(bin_ / "python")},
        timeout=30,
    )  # fmt: skip


def test_what_lies_in_sbin_is_found_where_only_root_has_that_in_its_path(checkout):
    if not (os.path.exists("/usr/sbin/nft") or os.path.exists("/sbin/nft")):
        pytest.skip("this machine has no nft in sbin")
    (checkout / "bin/python.venv").touch()
    done = setup(checkout)
    assert "nftables" not in done.stdout + done.stderr
    assert "making a venv" in done.stdout


def test_packages_that_are_no_longer_where_they_were_are_asked_for_again(checkout):
    done = setup(checkout)
    assert "making a venv" in done.stdout, done.stderr
    asked = [line.split() for line in (checkout / "bin/apt-get.log").read_text().splitlines()]
    verbs = [word for words in asked for word in words if word in ("install", "update")]
    assert verbs == ["install", "update", "install"]

"""A fresh Debian 12, with nothing but make and a network: set up, used, cleaned.

Made by debootstrap once, kept in ~/.cache/vwire, and never changed: each run sees it
through an overlay.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.machines import ROOT, Machine, machine, network_of_this_machine

# It takes minutes and a network.
pytestmark = pytest.mark.long
CACHE = Path("~/.cache/vwire").expanduser()
HAS = "make,ca-certificates"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


@pytest.fixture(scope="module")
def debian() -> Path:
    """Debian's smallest base system."""
    base = CACHE / "bookworm"
    if not base.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = CACHE / f"bookworm.{os.getpid()}"
        try:
            subprocess.run(
                ["debootstrap", "--variant=minbase", f"--include={HAS}", "bookworm", fresh],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            fresh.rename(base)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return base


@pytest.fixture(scope="module")
def fresh(debian: Path) -> Iterator[Machine]:
    """That, with this machine's way to the network, and a checkout."""
    with machine(str(debian), network=True) as made:
        made.run("mkdir", "-p", "/src")
        made.put(Path("/etc/resolv.conf"), "/etc")
        made.put(Path(CERTIFICATES), os.path.dirname(CERTIFICATES))
        made.put(ROOT, "/src")
        yield made


def test_a_fresh_debian_is_set_up_runs_a_lab_and_is_cleaned_again(fresh: Machine):
    folder = f"/src/{ROOT.name}"
    make = ("make", "--no-print-directory", "-C", folder)
    done = fresh.run(*make, "setup", patience=900, **network_of_this_machine())
    assert done.returncode == 0, done.stdout + done.stderr
    first, *_, last = done.stdout.splitlines()
    for package in ("python3", "python3-venv", "iproute2", "nftables", "iputils-ping", "procps"):
        assert package in first.removeprefix("setup: will install with apt: ").split()
    assert last == "setup: done: .venv/bin/nsmctl"

    again = fresh.run(*make, "setup")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")

    ran = fresh.run(f"{folder}/.venv/bin/nsmctl", "lab", "run", "two-nodes", "--json", patience=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr

    before = fresh.run("find", folder, "-name", "*.egg-info", "-o", "-name", "__pycache__").stdout
    assert before
    assert fresh.run(*make, "clean").returncode == 0
    left = ("find", folder, "-name", ".venv", "-o", "-name", "*.egg-info", "-o", "-name", "*.pyc")
    assert fresh.run(*left).stdout == ""

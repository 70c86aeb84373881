"""`make setup` where apt is in use, or there is no network: the real apt, dpkg and pip.

On this machine's own files, seen through an overlay that is gone with the test.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.machines import ROOT, Machine, machine

PYTHON = os.path.realpath(sys._base_executable)
SETUP = ("bash", "/src/.ci/setup")
HOLD = """\
import fcntl, sys
lock = open("/var/lib/dpkg/lock-frontend", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
pytestmark = pytest.mark.skipif(not shutil.which("apt-get"), reason="needs Debian's apt")


@pytest.fixture(scope="module")
def offline() -> Iterator[Machine]:
    """This machine without a network, with a checkout that was not set up, and without nft."""
    with machine("/", network=False) as made:
        assert made.run("mkdir", "-p", "/src").returncode == 0
        for name in (".ci", "pyproject.toml", "requirements.lock"):
            made.put(ROOT / name, "/src")
        # apt's patience with a network is not what these tests are about
        impatient = """echo 'Acquire::Retries "0";' >/etc/apt/apt.conf.d/99-impatient"""
        assert made.run("sh", "-c", impatient).returncode == 0
        purged = made.run("dpkg", "--purge", "--force-depends", "nftables")
        assert purged.returncode == 0, purged.stderr
        yield made


@pytest.fixture
def held(offline: Machine) -> Iterator["subprocess.Popen[str]"]:
    """Somebody who holds dpkg's lock, as an apt-get does while it installs."""
    with subprocess.Popen(
        offline.command(PYTHON, "-c", HOLD),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holding:
        assert holding.stdout
        assert holding.stdout.readline() == "held\n"
        yield holding
        holding.communicate()


def test_without_a_network_it_says_what_is_missing_and_ends_with_3(offline):
    done = offline.run(*SETUP, PYTHON=PYTHON)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == "setup: will install with apt: nftables"
    assert done.stderr.splitlines()[-1] == (
        "setup: apt-get could not install nftables; see above."
        " Without a network, install them by other means"
    )


def test_a_lock_of_apts_is_waited_for_and_then_told_with_its_holder(offline, held):
    done = offline.run(*SETUP, PYTHON=PYTHON, APT_PATIENCE="1")
    assert done.returncode == 3, done.stdout + done.stderr
    who = rf"process {held.pid} \(python[\d.]*\)"
    waits = rf"setup: apt is in use by {who}: waiting until it ends \(at most 1 s\)"
    assert re.fullmatch(waits, done.stdout.splitlines()[-1])
    gives_up = rf"setup: apt was in use for 1 s by {who}; try again when it is done\n"
    assert re.fullmatch(gives_up, done.stderr)


@pytest.mark.long
def test_once_the_lock_is_free_it_goes_on(offline, held):
    with subprocess.Popen(
        offline.command(*SETUP, PYTHON=PYTHON), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    ) as running:  # fmt: skip
        assert running.stdout
        said = [next(line for line in running.stdout if "apt is in use" in line)]
        held.communicate()
        _, errors = running.communicate(timeout=60)
    assert len(said) == 1
    assert "apt-get could not install nftables" in errors  # for there is no network


def test_who_is_not_root_is_told_what_to_install(offline):
    nobody = ("setpriv", "--reuid=65534", "--clear-groups")
    sets = [f"--{one}=-all,+dac_read_search" for one in ("inh-caps", "ambient-caps")]
    done = offline.run(*nobody, *sets, *SETUP)
    assert done.returncode == 3, done.stdout + done.stderr
    says = r"setup: this machine lacks: (.*nftables.*); run: sudo apt-get install \1\n"
    assert re.fullmatch(says, done.stderr)


@pytest.mark.long
def test_an_index_that_cannot_be_reached_is_told(offline):
    there = (
        "sh",
        "-c",
        'ln -s /bin/true /usr/sbin/nft && bash "$@"; s=$?; rm /usr/sbin/nft; exit $s',
    )
    done = offline.run(*there, *SETUP, PYTHON=PYTHON, PIP_RETRIES="0")
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == (
        "setup: pip could not install requirements.lock; see above."
        " It needs the package index this once"
    )
    assert offline.run("test", "-e", "/src/.venv/ready").returncode == 1


def test_a_package_that_is_there_without_its_program_is_told(offline):
    offline.run("ln", "-s", "/bin/true", "/usr/sbin/nft")
    offline.run("mv", "/usr/bin/ping", "/usr/bin/gnip")
    done = offline.run(*SETUP, PYTHON=PYTHON)
    offline.run("mv", "/usr/bin/gnip", "/usr/bin/ping")
    offline.run("rm", "/usr/sbin/nft")
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1] == (
        "setup: apt installed iputils-ping, and there is still no iputils-ping"
    )

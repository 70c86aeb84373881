"""Another machine's files on this one: a root that may be changed, and is gone with the test."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOUNT = """\
set -e
mount -t tmpfs none /mnt
mkdir /mnt/changes /mnt/work /mnt/root
mount -t overlay overlay -o "lowerdir=$1,upperdir=/mnt/changes,workdir=/mnt/work" /mnt/root
mount -t proc proc /mnt/root/proc
mount -t tmpfs none /mnt/root/run
mount -t tmpfs none /mnt/root/tmp
mount --rbind /dev /mnt/root/dev
mount --rbind /sys /mnt/root/sys
echo there
exec cat
"""


@dataclass(frozen=True)
class Machine:
    """Where commands see another machine's files."""

    pid: int

    def command(self, *words: str, **variables: str) -> list[str]:
        """What runs words there, with these variables and no others."""
        path = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
        given = {"PATH": path, "HOME": "/root", **variables}
        space = [f"--mount=/proc/{self.pid}/ns/mnt", f"--net=/proc/{self.pid}/ns/net"]
        pairs = [f"{name}={value}" for name, value in given.items()]
        return ["nsenter", *space, "chroot", "/mnt/root", "env", "-i", *pairs, *words]

    def run(
        self, *words: str, patience: float = 60.0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, **variables), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False, timeout=patience,
        )  # fmt: skip

    def put(self, source: Path, target: str) -> None:
        """A copy of a file or folder there, as git would have it."""
        unwanted = (".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "out", "*.egg-info")
        words = ["tar", "c", *(f"--exclude={one}" for one in unwanted), source.name]
        with subprocess.Popen(words, cwd=source.parent, stdout=subprocess.PIPE) as packing:
            unpack = self.command("tar", "x", f"--directory={target}")
            subprocess.run(unpack, stdin=packing.stdout, check=True)
        assert packing.returncode == 0


@contextlib.contextmanager
def machine(base: str, *, network: bool) -> Iterator[Machine]:
    """A machine whose files are those below base until somebody changes them there."""
    words = ["unshare", "--mount", *(() if network else ("--net",)), "sh", "-c", MOUNT, "sh", base]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as keeping:
        assert keeping.stdin
        assert keeping.stdout
        if keeping.stdout.readline() != "there\n":
            _, said = keeping.communicate()
            with open("/proc/filesystems") as known:
                if "overlay" not in known.read().split():
                    pytest.skip("kernel lacks overlay")
            pytest.fail(said)
        try:
            yield Machine(keeping.pid)
        finally:
            keeping.stdin.close()
            keeping.wait(10)


def network_of_this_machine() -> Mapping[str, str]:
    """The variables by which programs here reach package indexes."""
    names = ("PIP_CERT", "PIP_INDEX_URL", "SSL_CERT_FILE", "http_proxy", "https_proxy", "no_proxy")
    return {name: os.environ[name] for name in names if name in os.environ}

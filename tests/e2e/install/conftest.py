"""vwire as a stranger has it: the wheel, installed into an environment that has nothing else.

What it needs is copied from this environment: exactly what the wheel's metadata asks
for, in the versions that are locked. pip then installs the wheel without an index, so a
requirement that is not told is one that is not there. With VWIRE_MATRIX the same is done
for every other Python of this machine, with what it needs from the package index.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nsm.process import config

ROOT = Path(__file__).parents[3]
OLDEST = (3, 11)
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "*.egg-info", "build", "dist", "out"
)
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input"]


@dataclass(frozen=True)
class Installed:
    """An environment with nothing but vwire and what that needs."""

    folder: Path
    wheel: Path
    needed: frozenset[str]  # the files of what it needs

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    @property
    def nsmctl(self) -> str:
        return str(self.folder / "bin" / "nsmctl")

    @property
    def library(self) -> Path:
        (found,) = self.folder.glob("lib/python3.*/site-packages")
        return found

    def files(self) -> frozenset[str]:
        """Everything there is, but what Python keeps of needed modules it has compiled."""
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return frozenset(one for one in found if not self._compiled(one))

    def _compiled(self, path: str) -> bool:
        above, pycache, _ = path.partition("__pycache__")
        return bool(pycache) and (not self.needed or above.rstrip("/") in self.needed)

    def pip(self, *words: str) -> str:
        """Its own pip could not do more: ours, told to work there."""
        verb, *rest = words
        done = subprocess.run(
            [*PIP, "--python", self.python, verb, *rest],
            capture_output=True, text=True, check=False, cwd="/", timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(
        self, *words: str, cwd: str | Path = "/", by: Sequence[str] = (), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """nsmctl as typed in a shell in which nothing of ours is set; by is who starts it."""
        return subprocess.run(
            [*by, self.nsmctl, *words], capture_output=True, text=True, check=False, cwd=cwd,
            env={"PATH": os.environ["PATH"], **config.for_children(), **variables}, timeout=120,
        )  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, as it would be cloned: building writes beside what it reads."""
    return Path(
        shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "vwire", ignore=NOT_SOURCE)
    )


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    """What `make wheel` makes of it."""
    return build(source, "make", "-o", "setup", "wheel", f"BIN={Path(sys.executable).parent}")


def build(folder: Path, *command: str) -> Path:
    """The one wheel that a command makes in a folder, below dist/."""
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={"PATH": os.environ["PATH"]},  # not what a make around this test has set
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (wheel,) = folder.glob("dist/*.whl")
    return wheel


def pythons() -> list[str]:
    """This Python; with VWIRE_MATRIX every other one as well that vwire is for."""
    own = getattr(sys, "_base_executable", sys.executable)
    if not os.environ.get("VWIRE_MATRIX"):
        return [own]
    patterns = ("/usr/bin/python3.*", "/usr/local/bin/python3.*", "~/.pyenv/versions/*/bin/python3")
    found = {_version(own): own}
    for pattern in patterns:
        for path in sorted(glob.glob(os.path.expanduser(pattern))):
            if (version := _version(path)) >= OLDEST and os.path.realpath(path) not in map(
                os.path.realpath, found.values()
            ):
                found.setdefault(version, path)
    return list(found.values())


def _version(python: str) -> tuple[int, ...]:
    """Its version as a tuple, or nothing if that is no Python (`python3.11-config`)."""
    if "config" in os.path.basename(python):
        return ()
    code = "import sys; print(*sys.version_info[:3])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, done.stdout.split()))


@pytest.fixture(scope="session", params=pythons(), ids=os.path.realpath)
def installed(request: pytest.FixtureRequest, wheel: Path) -> Iterator[Installed]:
    """The wheel in an environment of its own, where any user may go."""
    folder = Path(tempfile.mkdtemp(prefix="vwire-install-"))
    try:
        folder.chmod(0o755)
        subprocess.run([request.param, "-m", "venv", "--without-pip", folder], check=True)
        made = Installed(folder, wheel, frozenset())
        if request.param == pythons()[0]:
            copy_needed(wheel, made.library)
        else:
            made.pip("install", "--quiet", *map(str, required(wheel)))
        made = Installed(folder, wheel, made.files())
        made.pip("install", "--no-index", str(wheel))
        made.pip("check")
        yield made
    finally:
        shutil.rmtree(folder)


def required(wheel: Path) -> list[Requirement]:
    """What the wheel's metadata says it cannot do without."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (one for one in archive.namelist() if one.endswith(".dist-info/METADATA"))
        own = metadata.PathDistribution(zipfile.Path(archive, name.removesuffix("METADATA")))
        return _applying(own.requires or ())


def _applying(requirements: Sequence[str], extra: str = "") -> list[Requirement]:
    read = map(Requirement, requirements)
    return [one for one in read if not one.marker or one.marker.evaluate({"extra": extra})]


def copy_needed(wheel: Path, library: Path) -> None:
    """What it requires, and what that requires, from this environment into another."""
    todo, done = required(wheel), set()
    while todo:
        requirement = todo.pop()
        if (name := canonicalize_name(requirement.name)) in done:
            continue
        done.add(name)
        there = metadata.distribution(requirement.name)
        for extra in ("", *requirement.extras):
            todo += _applying(there.requires or (), extra)
        for file in there.files or ():
            if ".." not in file.parts and "__pycache__" not in file.parts:
                target = library / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(there.locate_file(file), target)

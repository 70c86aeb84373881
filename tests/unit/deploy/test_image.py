"""The image is built from what is here, and starts what the manifests start."""

import json
import re
import subprocess
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.e2e.deploy import pods
from tests.unit.test_house import PACKAGES, ROOT

FILE = ROOT / "deploy" / "Dockerfile"
LOCK = ROOT / "deploy" / "requirements.lock"
USED = {"FROM", "RUN", "COPY", "WORKDIR", "ENV", "USER", "ENTRYPOINT", "COMMENT"}


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """Instruction and value of each step."""
    parsed = DockerfileParser(str(FILE)).structure
    return [(one["instruction"], one["value"]) for one in parsed if one["instruction"] != "COMMENT"]


def test_the_dockerfile_has_the_instructions_there_are(steps: list[tuple[str, str]]) -> None:
    assert {instruction for instruction, _ in steps} <= USED
    assert steps[0][0] == "FROM"


def test_images_go_by_their_names_alone(steps: list[tuple[str, str]]) -> None:
    names = [value.split()[0] for instruction, value in steps if instruction == "FROM"]
    assert names == ["debian:bookworm-slim"] * 2


def test_each_command_is_one_a_shell_can_read(steps: list[tuple[str, str]]) -> None:
    for instruction, value in steps:
        if instruction == "RUN":
            subprocess.run(["sh", "-n", "-c", value], check=True)
            assert " && " in value  # or what fails first is forgotten


def test_the_image_starts_our_programs_as_nobody_in_particular(
    steps: list[tuple[str, str]],
) -> None:
    last = dict(steps)
    assert json.loads(last["ENTRYPOINT"]) == pods.ENTRYPOINT
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    assert "PATH=/opt/vwire/bin:" in last["ENV"]


def test_ping_asks_for_no_capability_that_pods_do_not_have(steps: list[tuple[str, str]]) -> None:
    (installs,) = [value for _, value in steps if "iputils-ping" in value]
    assert "&& setcap -r /usr/bin/ping" in installs


def test_all_that_the_wheel_is_made_of_is_copied(steps: list[tuple[str, str]]) -> None:
    sources = set()
    for instruction, value in steps:
        if instruction == "COPY" and not value.startswith("--from"):
            *names, target = value.split()
            sources |= set(names)
            assert all((ROOT / name).exists() for name in names)
            if (ROOT / names[0]).is_dir():
                assert target == f"{names[0]}/"
    assert set(PACKAGES) <= sources
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"]} <= sources
    links = [path for one in PACKAGES for path in (ROOT / one).rglob("*") if path.is_symlink()]
    assert {path.resolve().relative_to(ROOT).parts[0] for path in links} <= sources


def pins(path: Path) -> dict[str, str]:
    """What a lock says of each distribution: its version and digests."""
    found = re.findall(r"^([a-z0-9.-]+)==(.*(?:\n    --hash.*)+)", path.read_text(), re.MULTILINE)
    return dict(found)


def test_the_images_lock_is_of_the_projects_lock() -> None:
    every, own = pins(ROOT / "requirements.lock"), pins(LOCK)
    assert own
    assert {name: every.get(name) for name in own} == own
    assert not re.search(r"^\s*--(?!hash)|://|@ file", LOCK.read_text(), re.MULTILINE)


def test_the_images_lock_is_what_vwire_needs_and_what_builds_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    found: set[str] = set()
    while wanted:
        one = Requirement(wanted.pop())
        name = canonicalize_name(one.name)
        if name in found or (one.marker and not one.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        wanted += distribution(name).requires or []
    assert found == set(pins(LOCK))


def test_the_image_is_tagged_with_the_version_that_the_manifests_want() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    command = f"docker build --file deploy/Dockerfile --tag vwire:{project['version']} ."
    assert command in FILE.read_text().partition("\nFROM")[0]

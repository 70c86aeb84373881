"""Rules of the house that no other tool checks."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import bars

ROOT = Path(__file__).parents[2]
PACKAGES = ("nsm", "nsmgr", "forwarder", "registry", "endpoints", "labs", "nsmctl")
SOURCES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def written_by(pattern: str) -> set[str]:
    return {name(path) for path in SOURCES if re.search(pattern, path.read_text())}


def test_no_module_has_a_name_that_says_nothing() -> None:
    empty = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    assert [name(path) for path in SOURCES if path.stem in empty or path.parent.name in empty] == []


def test_every_module_says_why_it_is_there() -> None:
    silent = [
        name(path)
        for path in SOURCES
        if "nsm/proto" not in str(path)
        and (path.name != "__init__.py" or path.read_text().strip())
        and not path.read_text().lstrip("#! \n").startswith('"""')
    ]
    assert silent == []


def test_netlink_sockets_are_made_in_the_kernels_room_only() -> None:
    elsewhere = {one for one in written_by("AF_NETLINK") if not one.startswith("nsm/kernel/")}
    assert elsewhere == {"nsm/process/loopguard.py"}  # which tells on them


def test_tasks_are_created_where_somebody_waits_for_them_only() -> None:
    assert written_by(r"asyncio\.(create_task|ensure_future)\(") == {
        "nsm/process/tasks.py",
        "nsm/race.py",
        "nsm/undo.py",
    }


def test_the_wheel_holds_every_package_of_the_house() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert set(included) == {one for name in PACKAGES for one in (name, f"{name}.*")}
    assert project["project"]["scripts"] == {"nsmctl": "nsmctl.__main__:main"}


def test_the_lock_names_no_index_and_holds_a_hash_for_every_version() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"^\s*--(?!hash)|://|@ file", text, re.MULTILINE)
    pinned = re.findall(r"^([a-z0-9.-]+)==\S+ \\\n    --hash=sha256:", text, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^[^\s#]", text, re.MULTILINE))


def test_the_lock_holds_what_the_project_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {re.split(r"[<>=\[ ]", one)[0].lower() for one in asked}
    locked = set(
        re.findall(r"^([a-z0-9.-]+)==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    assert names - locked == set()


def test_what_must_not_change_without_notice_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(one.startswith("grpclib==") for one in project["dependencies"])
    assert any(one.startswith("grpcio-tools==") for one in project["optional-dependencies"]["dev"])


def test_every_make_target_is_explained() -> None:
    theirs = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # of a make that runs this test
    told = subprocess.run(
        ["make", "--no-print-directory", "help"],
        env={name: value for name, value in os.environ.items() if name not in theirs},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert {line.split()[0] for line in told.stdout.splitlines()} == set(phony[1].split())


def test_ci_runs_check_and_then_test() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line.startswith("make")] == ["make check", "make test"]


def test_bars_are_judged_by_the_wait_that_came_nearest() -> None:
    lines, over = bars.table({"a": [(0.1, 1.0), (0.5, 1.0)], "b": [(0.3, 0.2)]})
    assert over == 1
    assert lines == [
        "over     0.300 s  of   0.20 s     1 x  b",
        "ok       0.500 s  of   1.00 s     2 x  a",
    ]


@pytest.mark.parametrize("module", ["nsm", "nsm.errors", "nsm.model", "nsm.process.config"])
def test_importing_the_library_does_not_load_grpc_or_crypto(module: str) -> None:
    heavy = "{'grpc', 'grpclib', 'cryptography', 'typer', 'rich', 'google.protobuf'}"
    program = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "[]\n"

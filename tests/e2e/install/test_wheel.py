"""What is in the distribution, and what is not."""

import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

from tests.e2e.install.conftest import PIP, build

PACKAGES = {"endpoints", "forwarder", "labs", "nsm", "nsmctl", "nsmgr", "registry"}


def test_the_wheel_holds_our_packages_their_data_and_nothing_else(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.name == "vwire-0.1.0-py3-none-any.whl"
    info = "vwire-0.1.0.dist-info"
    assert {name.partition("/")[0] for name in names} == PACKAGES | {info}
    kinds = ("*.py", "*.pyi", "py.typed", "*.yaml", "*.json")
    ours = {
        str(path.relative_to(source))
        for package in PACKAGES
        for kind in kinds
        for path in (source / package).rglob(kind)
    }
    definitions = {f"nsm/proto/{path.name}" for path in (source / "protos").glob("*.proto")}
    units = {f"nsmctl/systemd/{path.name}" for path in (source / "deploy/systemd").glob("vwire-*")}
    assert "nsm/proto/networkservice.proto" in definitions
    assert {name for name in names if not name.startswith(info)} == ours | definitions | units


def test_only_nsmctl_is_put_on_path(wheel):
    with zipfile.ZipFile(wheel) as archive:
        told = ConfigParser()
        told.read_string(archive.read("vwire-0.1.0.dist-info/entry_points.txt").decode())
    assert told.sections() == ["console_scripts"]
    assert dict(told["console_scripts"]) == {"nsmctl": "nsmctl.__main__:main"}


def test_the_source_distribution_makes_the_same_wheel(source, wheel, tmp_path):
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=source, check=True, capture_output=True
    )
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path, filter="data")
    assert not tops & {"tests", "bench", "docs", "examples", "out"}
    again = build(
        tmp_path / sdist.name.removesuffix(".tar.gz"), *PIP, "wheel", "--quiet",
        "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir=dist", ".",
    )  # fmt: skip
    assert _content(again) == _content(wheel)


def _content(wheel: Path) -> dict[str, int]:
    with zipfile.ZipFile(wheel) as archive:
        return {one.filename: one.CRC for one in archive.infolist() if "RECORD" not in one.filename}

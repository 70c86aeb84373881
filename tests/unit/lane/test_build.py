"""tests/lane/build, with stand-ins for apt and the compiler: what it refuses and leaves."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lane import kernel

BUILD = Path(kernel.__file__).parent / "build"
SOURCE = "linux-source-6.1"
# what every machine has
TOOLS = """
    bash cat chmod cp df dirname env flock grep mkdir mkfifo mktemp mv nproc rm sed seq sh tail
    touch tr
"""
STAND_INS = {
    "apt-get": """
        echo "$@" >>"$here/apt.log"
        case "$*" in
          *download*) touch linux-source-6.1_9.9-1_all.deb ;;
          *install*) for tool in flex bison; do cp "$here/true" "$here/$tool"; done ;;
        esac
    """,
    "apt-cache": "echo Package",
    "busybox": "echo pivot_root",
    "dpkg-deb": "mkdir -p usr/src",
    "gcc": 'while [ "$1" != -o ]; do shift; done; touch "$2"',
    "id": "echo 0",
    "make": """
        case "$*" in
          *linux) echo made >>"$here/make.log"; [ ! -p "$here/wait" ] || read -r _ <"$here/wait"
            echo '  CC a.o'; touch linux ;;
        esac
    """,
    "strip": 'while [ "$1" != -o ]; do shift; done; touch "$2"',
    "tar": f"""
        mkdir -p {SOURCE}/scripts/kconfig
        printf '#!/bin/sh\\ncp "$3" .config\\n' >{SOURCE}/scripts/kconfig/merge_config.sh
        chmod +x {SOURCE}/scripts/kconfig/merge_config.sh
    """,
    **dict.fromkeys(("bc", "bison", "flex", "true", "xz"), ""),
}


class Machine:
    """A PATH with stand-ins, and a cache to build into."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.cache = folder / "cache of kernels"
        self.bin.mkdir()
        for tool in TOOLS.split():
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        for name, text in STAND_INS.items():
            self.has(name, text)

    def has(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(f'#!/bin/sh\nhere="{self.bin}"\n{text}\n')
        (self.bin / name).chmod(0o755)

    def lacks(self, name: str) -> None:
        (self.bin / name).unlink()

    @contextmanager
    def building(self) -> Iterator["subprocess.Popen[str]"]:
        process = subprocess.Popen(
            ["bash", str(BUILD), str(self.cache), "key", SOURCE], env={"PATH": str(self.bin)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:  # it waits for somebody, and so would we
                    os.killpg(process.pid, signal.SIGKILL)

    def build(self) -> tuple[int, str]:
        with self.building() as process:
            said, _ = process.communicate(timeout=30)
            return process.returncode, said

    def made(self) -> dict[str, set[str]]:
        """The folders in the cache, with what is in them."""
        folders = [path for path in self.cache.iterdir() if path.is_dir()]
        return {folder.name: {path.name for path in folder.iterdir()} for folder in folders}

    def asked(self, of: str) -> str:
        log = self.bin / f"{of}.log"
        return log.read_text() if log.exists() else ""


WHOLE = {"key-9.9-1": {"linux", "fpshim.so", "busybox", "config"}}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_it_is_whole_and_its_name_says_what_it_is_made_of(machine: Machine) -> None:
    status, said = machine.build()
    assert (status, machine.made()) == (0, WHOLE), said
    assert "compiling on" in said
    assert "install" not in machine.asked("apt")
    assert machine.build() == (0, "")
    assert machine.asked("make") == "made\n"


def test_packages_are_named_before_they_are_installed(machine: Machine) -> None:
    machine.lacks("flex")
    machine.lacks("bison")
    status, said = machine.build()
    assert (status, machine.made()) == (0, WHOLE), said
    assert "will install with apt: flex bison\n" in said
    assert "install --yes --no-install-recommends flex bison" in machine.asked("apt")


@pytest.mark.parametrize(
    ("stand_ins", "words"),
    [
        ({"id": "echo 1000", "flex": None}, "sudo apt-get install flex"),
        ({"apt-get": None}, "has no apt-get"),
        ({"df": "printf 'Avail\\n  17M\\n'"}, "takes 2500 MB in"),
        ({"apt-cache": "", "id": "echo 1000"}, "sudo apt-get update"),
        ({"apt-cache": ""}, f"knows no package {SOURCE}, which Debian 12 has"),
        ({"apt-cache": "", "apt-get": "echo no route; exit 100"}, "(offline?): no route"),
        ({"apt-get": "echo no route; exit 100"}, "update failed (offline?): no route"),
        (
            {"apt-get": 'case "$*" in *update*) ;; *) echo no route; exit 100 ;; esac'},
            f"download {SOURCE} failed: no route",
        ),
        (
            {"apt-cache": 'case "$*" in *flex*) echo Package ;; esac', "flex": None},
            f"knows no package {SOURCE}",
        ),
    ],
    ids=[
        "no root",
        "no apt",
        "no room",
        "no list",
        "no source",
        "offline",
        "no server",
        "gone from the server",
        "one is known",
    ],
)
def test_a_machine_that_cannot_is_told_why(
    machine: Machine, stand_ins: dict[str, str | None], words: str
) -> None:
    for name, text in stand_ins.items():
        if text is None:
            machine.lacks(name)
        else:
            machine.has(name, text)
    status, said = machine.build()
    assert status == 3, said
    assert words in said.splitlines()[-1]
    assert machine.made() == {}


def test_lists_that_are_old_are_fetched_anew(machine: Machine) -> None:
    """The package they name has been replaced on the server."""
    machine.has(
        "apt-get",
        """
        echo "$@" >>"$here/apt.log"
        case "$*" in
          *update*) touch "$here/fresh" ;;
          *) [ -e "$here/fresh" ] || exit 100; touch linux-source-6.1_9.9-1_all.deb ;;
        esac
        """,
    )
    status, said = machine.build()
    assert (status, machine.made()) == (0, WHOLE), said


def test_who_loses_apts_lock_to_another_tries_again(machine: Machine) -> None:
    """Also when the other one is gone by the time it looks who that was."""
    machine.has(
        "apt-get",
        """
        [ -e "$here/asked" ] || { touch "$here/asked"
          echo 'E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by 7' >&2; exit 100; }
        case "$*" in *update*) exit 100 ;; esac
        touch linux-source-6.1_9.9-1_all.deb
        """,
    )
    machine.has("sleep", "")
    status, said = machine.build()
    assert (status, machine.made()) == (0, WHOLE), said


def test_what_does_not_compile_leaves_its_words_and_nothing_else(machine: Machine) -> None:
    machine.has("make", 'case "$*" in *linux) echo "  CC a.o"; echo a.c:1: no; exit 2 ;; esac')
    status, said = machine.build()
    assert status == 1
    assert "the kernel does not compile" in said
    assert "a.c:1: no" in said
    assert machine.made() == {}


def test_an_option_that_make_drops_is_named(machine: Machine) -> None:
    machine.has("make", 'case "$*" in *olddef*) sed -i /CONFIG_WIREGUARD=/d .config ;; esac')
    status, said = machine.build()
    assert status == 1
    assert "make has dropped CONFIG_WIREGUARD=y ;" in said
    assert machine.made() == {}


def test_a_second_builder_waits_for_the_first(machine: Machine) -> None:
    os.mkfifo(machine.bin / "wait")
    with machine.building() as first:
        await_line(first, "compiling")
        with machine.building() as second:
            await_line(second, "somebody else is building it")
            (machine.bin / "wait").write_text("go on\n")
            assert (first.wait(20), second.wait(20)) == (0, 0)
    assert machine.made() == WHOLE
    assert machine.asked("make") == "made\n"


def test_of_a_killed_builder_nothing_stays(machine: Machine) -> None:
    os.mkfifo(machine.bin / "wait")
    with machine.building() as process:
        await_line(process, "compiling")
        os.killpg(process.pid, signal.SIGKILL)
    assert [name.partition(".")[0] for name in machine.made()] == ["building"]
    (machine.bin / "wait").unlink()
    status, said = machine.build()
    assert (status, machine.made()) == (0, WHOLE), said


def test_a_builder_told_to_end_cleans_up(machine: Machine) -> None:
    os.mkfifo(machine.bin / "wait")
    with machine.building() as process:
        await_line(process, "compiling")
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(20) != 0
    assert machine.made() == {}


def await_line(process: "subprocess.Popen[str]", words: str) -> None:
    """Read what it says until it says this."""
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    pytest.fail(f"it ended, and did not say {words!r}")

"""The lane as a tool: what comes out of it, what does not, and how it ends."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lane import kernel
from tests.support.processes import alive, below
from tests.support.wait import until, write

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.needs_lane, pytest.mark.long]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.lane", *words]


def lane(*words: str, folder: Path = ROOT, **variables: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*words), cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip


@contextmanager
def running(*options: str) -> Iterator["subprocess.Popen[str]"]:
    """A lane whose command has begun, and goes on for a minute with two processes."""
    program = "echo begun; sleep 60 & exec sleep 60"
    with subprocess.Popen(
        command(*options, "--", "sh", "-c", program), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("program", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("nonsense", 127)]
)
def test_the_exit_code_is_the_commands(program: str, status: int) -> None:
    start = time.monotonic()
    done = lane("sh", "-c", program)
    assert done.returncode == status, done.stderr
    write("a start of the lane, a command, its end", time.monotonic() - start, 2.0)


def test_all_of_the_output_comes_out() -> None:
    done = lane("sh", "-c", "sleep 99 & seq 50000; echo last >&2")
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 50001)) + "last\n"


def test_what_is_written_stays_inside_but_for_the_share(tmp_path: Path) -> None:
    """On paths a shell would stumble over: neither the kernel nor its first process does."""
    host, share = tmp_path / "of the host", tmp_path / "the $share"
    host.mkdir()
    (host / "kept").write_text("as it was")
    new = ROOT / "written-by-a-test-in-the-lane"
    program = f"""
        set -e
        touch '{new}' /usr/new /run/new; echo changed >>README.md; rm LICENSE
        [ ! -e '{host}' ]  # /tmp is its own
        echo shared >"$LANE_OUT/a b"; pwd >"$LANE_OUT/folder"
        echo "$LANE_GUEST $ODD" >"$LANE_OUT/say"
    """
    before = {name: (ROOT / name).read_bytes() for name in ("README.md", "LICENSE")}
    done = lane("-o", str(share), "bash", "-c", program, ODD='it\'s "so"; $0')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert {path.name: path.read_text() for path in share.iterdir()} == {
        "a b": "shared\n", "folder": f"{ROOT}\n", "say": "1 it's \"so\"; $0\n",
    }  # fmt: skip
    assert {name: (ROOT / name).read_bytes() for name in before} == before
    assert (host / "kept").read_text() == "as it was"
    assert not any(map(os.path.exists, (new, "/usr/new", "/run/new")))


def test_kernel_and_checkout_may_be_in_tmp(tmp_path: Path) -> None:
    """Which is empty inside."""
    standing = kernel.standing()
    assert standing
    shutil.copytree(standing, tmp_path / "cache" / standing.name)
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    (checkout / "file").write_text("as it was")
    program = "cat file; echo changed >file; ls .. | cat; ls ../.. | wc -l"
    done = lane("sh", "-c", program, folder=checkout, KERNEL_LANE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (0, "as it wasa checkout\n1\n"), done.stderr
    assert (checkout / "file").read_text() == "as it was"


def test_the_hosts_network_is_not_the_guests() -> None:
    namespaces = set(os.listdir("/run/netns")) if os.path.exists("/run/netns") else set()
    program = """
        ip -br link
        ip link set lo mtu 1234; ip netns add inside; sysctl -qw net.ipv4.ip_forward=1
        ip link add d0 type dummy; ip link set lo down
    """
    done = lane("sh", "-ec", program)
    assert done.returncode == 0, done.stdout
    assert re.fullmatch(r"lo +UNKNOWN +\S+ <LOOPBACK,UP,LOWER_UP> *\n", done.stdout)
    told = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    assert "d0" not in told
    assert Path("/sys/class/net/lo/mtu").read_text() == "65536\n"
    now = set(os.listdir("/run/netns")) if os.path.exists("/run/netns") else set()
    assert "inside" not in now - namespaces


def test_a_time_limit_ends_all_of_it() -> None:
    with running("-t", "3") as process:
        ours = below(process.pid)
        assert len(ours) > 4
        assert process.wait(20) == 124
        assert not alive(ours)
        assert process.stderr
        assert process.stderr.read() == "lane: stopped after 3 s\n"


def test_a_kernel_that_ends_first_is_told_with_its_last_words() -> None:
    done = lane("sh", "-c", "busybox poweroff -f")
    assert done.returncode == 125
    assert "lane: the kernel ended before the command did" in done.stderr
    assert "System halted" in done.stderr


def test_ctrl_c_ends_all_of_it() -> None:
    with running() as process:
        ours = below(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert not alive(ours)


async def test_of_a_lane_whose_starter_is_killed_no_process_stays() -> None:
    with running() as process:
        ours = below(process.pid)
        words = Path(f"/proc/{max(ours)}/cmdline").read_text().split("\0")
        process.kill()
        await until(lambda: not alive(ours), "a killed lane's processes are gone", bar=2.0)
    folder = next(word for word in words if word.startswith("lane=")).removeprefix("lane=")
    shutil.rmtree(folder)  # nobody was left to do it


def test_the_kernel_takes_words_for_its_command_line() -> None:
    program = "cat /proc/cmdline; ls /proc/sys/net/ipv6"
    done = lane("-b", "ipv6.disable=1", "-v", "sh", "-c", program)
    assert " ipv6.disable=1 " in done.stdout
    assert done.returncode == 2  # of ls: it is not there
    assert "System halted" in done.stderr


@pytest.mark.parametrize("words", [["-o", "/tmp/a,b", "true"], ["--nonsense"], ["-t", "x", "true"]])
def test_who_asks_wrongly_is_told_so(words: list[str]) -> None:
    done = lane(*words)
    assert done.returncode == 2, done.stdout
    assert done.stderr


def test_who_is_not_root_is_told_how() -> None:
    """Imported as root, because Python and the checkout may lie where nobody may read."""
    program = """
        import os
        from tests.lane import __main__ as lane
        os.setuid(65534)
        raise SystemExit(lane.main())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), "true"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert done.returncode == 3
    assert "sudo make lane" in done.stderr


def test_help_is_for_anybody_and_says_what_it_is() -> None:
    done = lane("--help")
    assert done.returncode == 0
    assert "make lane" in done.stdout
    assert "Exit code:" in done.stdout


async def test_without_a_command_it_is_a_shell_on_the_terminal() -> None:
    """Which has what was typed before it was there, and is afterwards as it was."""
    assert lane().stderr == "lane: a shell needs a terminal; say a COMMAND\n"
    ours, its = os.openpty()
    with open(ours, "r+b", buffering=0) as typist, open(its, "r+b", buffering=0) as terminal:
        os.set_blocking(ours, False)
        before = (termios.tcgetattr(terminal), fcntl.fcntl(terminal, fcntl.F_GETFL))
        typist.write(b"tty\n")
        with subprocess.Popen(
            command(), cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal,
            env={**os.environ, "HOME": "/", "KERNEL_LANE_DIR": str(kernel.cache())},  # no .bashrc
        ) as process:  # fmt: skip
            said = b""

            def has_said(words: bytes) -> bool:
                nonlocal said
                said += typist.read(65536) or b""
                return words in said

            try:
                await until(lambda: has_said(b"/dev/ttyS0"), "a shell answers", bar=3.0)
                typist.write(b"exit 5\n")
                await until(lambda: has_said(b"exit\r\n"), "a shell ends", bar=1.0, record=False)
                assert process.wait(20) == 5, said
            finally:
                process.terminate()
        assert (termios.tcgetattr(terminal), fcntl.fcntl(terminal, fcntl.F_GETFL)) == before


def test_who_shares_its_output_need_not_live_with_its_flags() -> None:
    """The guest writes without waiting; make and pytest, to the same pipe, do wait."""
    out, into = os.pipe()
    with open(out, "rb") as reader, open(into, "wb") as writer:
        flags = fcntl.fcntl(writer, fcntl.F_GETFL)
        with subprocess.Popen(
            command("--", "sh", "-c", "echo begun; exec sleep 60"), cwd=ROOT, stdout=writer
        ) as process:
            assert reader.readline() == b"begun\n"
            during = fcntl.fcntl(writer, fcntl.F_GETFL)
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130
        assert (during, fcntl.fcntl(writer, fcntl.F_GETFL)) == (flags, flags)


def test_a_guest_opens_more_files_than_a_login_shell_may() -> None:
    program = "find /usr/lib /usr/share -type f | head -600 | xargs cat >/dev/null && echo read"
    done = subprocess.run(
        ["prlimit", "--nofile=256:4096", *command("--", "sh", "-c", program)], cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.stdout == "read\n", done.stderr

"""What a real process of ours tells systemd, and that it is told even when that is hard."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).parents[3]
SOON = 20.0  # seconds any one word may take
PING = 100_000  # microseconds of a watchdog's patience


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    """Where words arrive, one a datagram, as at systemd's own socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(str(tmp_path / "notify"))
        made.settimeout(SOON)
        yield made


@dataclass
class Program:
    process: "subprocess.Popen[str]"
    ready: IO[str]  # NSM_READY_FD, on which it says so right after it told systemd

    def line(self) -> dict[str, Any]:
        """The next of its log."""
        assert self.process.stderr is not None
        found: dict[str, Any] = json.loads(self.process.stderr.readline())
        return found

    def ended(self, number: int = 0) -> tuple[int, str]:
        """Its exit code and the rest of its log, once it obeyed the signal."""
        assert self.process.stderr is not None
        self.process.send_signal(number)
        said = self.process.stderr.read()  # not communicate, which forgets what `line` read ahead
        return self.process.wait(SOON), said


@contextmanager
def program(mode: str, heard: socket.socket, **more: str) -> Iterator[Program]:
    read, write = os.pipe()
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "NSM_READY_FD": str(write),
        "NOTIFY_SOCKET": heard.getsockname(),
        **more,
    }
    with open(read) as ready, subprocess.Popen(
        [sys.executable, "-P", "-m", "tests.support.program", mode], env=environ,
        pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        os.close(write)
        try:
            yield Program(process, ready)
        finally:
            process.kill()


def words(heard: socket.socket) -> Iterator[str]:
    """One after another, as they come; TimeoutError if none does."""
    while True:
        yield heard.recv(1 << 16).decode()


def test_a_word_that_finds_systemds_socket_full_is_said_again(systemd):
    full = 0
    others = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with others, contextlib.suppress(BlockingIOError):
        while others.sendto(b"another service's", systemd.getsockname()):
            full += 1
    with program("wait", systemd) as one:
        assert one.ready.readline().startswith("program p-1 ready: ")
        heard = words(systemd)
        assert list(itertools.islice(heard, full)) == ["another service's"] * full
        assert next(heard).startswith("READY=1\nSTATUS=program p-1 ready: tcp://127.0.0.1:1")
        assert one.ended(signal.SIGTERM)[0] == 0
        assert next(heard) == "STOPPING=1\n"


def test_the_watchdog_hears_of_a_loop_that_turns(systemd):
    with program("wait", systemd, WATCHDOG_USEC=str(PING)) as one:
        heard = words(systemd)
        assert next(heard).startswith("READY=1\n")
        assert list(itertools.islice(heard, 5)) == ["WATCHDOG=1\n"] * 5
        assert one.ended(signal.SIGTERM)[0] == 0
        assert next(word for word in heard if word != "WATCHDOG=1\n") == "STOPPING=1\n"


def test_a_watchdog_that_waits_for_another_process_hears_nothing_of_this_one(systemd):
    with program("wait", systemd, WATCHDOG_USEC="1", WATCHDOG_PID="1") as one:
        heard = words(systemd)
        assert next(heard).startswith("READY=1\n")
        assert one.ended(signal.SIGTERM)[0] == 0
        assert next(heard) == "STOPPING=1\n"


def test_a_loop_that_hangs_is_silent_and_says_where_it_hung_when_it_is_ended(systemd):
    with program("hang", systemd, WATCHDOG_USEC=str(PING)) as one:
        heard = words(systemd)
        assert next(heard).startswith("READY=1\n")
        assert next(heard) == "WATCHDOG=1\n"  # with READY=1, before it hangs
        systemd.settimeout(10 * PING / 1e6)
        with pytest.raises(TimeoutError):
            next(heard)
        code, said = one.ended(signal.SIGABRT)
    assert code == -signal.SIGABRT
    assert "Aborted" in said
    assert 'tests/support/program.py", line' in said
    assert " in hang\n" in said


def test_who_cannot_run_says_why_in_one_line(systemd):
    with program("cannot", systemd) as one:
        assert one.ended()[0] == 3
    heard = words(systemd)
    assert next(heard) == "STOPPING=1\n"
    assert next(heard) == "STATUS=cannot run: needs CAP_NET_ADMIN; sudo nsmctl …\n"


def test_a_wrong_setting_is_told_in_one_line_though_the_program_never_began(systemd):
    with program("wait", systemd, NSM_STOP_GRACE="soon", NSM_LOG_LEVEL="loud") as one:
        assert one.ended()[0] == 2
    assert next(words(systemd)) == (
        "STATUS=cannot run: NSM_LOG_LEVEL is 'loud'; expected TRACE, DEBUG, INFO, WARN or ERROR;"
        " NSM_STOP_GRACE is 'soon'; expected a duration above zero such as 750ms or 10m\n"
    )


def test_a_start_that_waits_says_for_what_and_gets_more_time(systemd):
    with program("waits", systemd) as one:
        heard = words(systemd)
        assert next(heard) == (
            "EXTEND_TIMEOUT_USEC=120000000\nSTATUS=program p-1 waits: nobody is there\n"
        )
        assert next(heard).startswith("READY=1\nSTATUS=program p-1 ready")
        assert one.ended(signal.SIGTERM)[0] == 0
        assert next(heard) == "STOPPING=1\n"  # who serves waits for nothing any more


def test_a_systemd_that_is_away_costs_one_warning_and_is_told_when_it_is_back(systemd, tmp_path):
    away = str(tmp_path / "away")
    with program("wait", systemd, NOTIFY_SOCKET=away, WATCHDOG_USEC=str(PING)) as one:
        ready, warning = one.line(), one.line()
        assert ready["event"].startswith("program p-1 ready")
        assert warning["event"] == "NOTIFY_SOCKET cannot be told"
        assert (warning["address"], warning["why"]) == (away, "No such file or directory")
        assert one.ready.readline()  # two words went nowhere by now
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as back:
            back.settimeout(SOON)
            back.bind(away)
            assert list(itertools.islice(words(back), 3)) == ["WATCHDOG=1\n"] * 3
            code, said = one.ended(signal.SIGTERM)
    assert code == 0
    assert [json.loads(line)["event"] for line in said.splitlines()] == ["stopping"]

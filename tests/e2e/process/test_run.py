"""How a real process of ours starts, says so, stops and ends."""

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.wait import until

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-P", "-m", "tests.support.program"]


class Program:
    """A running program, and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process, ready: int) -> None:
        self.process = process
        self.ready_fd = ready
        self.out: list[str] = []
        self.log: list[dict[str, Any]] = []

    async def follow(self) -> None:
        async def lines(stream: asyncio.StreamReader | None, take: Any) -> None:
            assert stream is not None
            async for line in stream:
                take(line.decode().rstrip("\n"))

        async with asyncio.TaskGroup() as group:
            group.create_task(lines(self.process.stdout, self.out.append))
            group.create_task(
                lines(self.process.stderr, lambda line: self.log.append(json.loads(line)))
            )

    async def is_ready(self) -> str:
        """The line on NSM_READY_FD; empty if it ended without one."""
        return (await asyncio.to_thread(os.read, self.ready_fd, 4096)).decode()

    async def end(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()

    @property
    def events(self) -> list[str]:
        return [line["event"] for line in self.log]


@asynccontextmanager
async def program(mode: str, **more: str) -> AsyncIterator[Program]:
    read, write = os.pipe()
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "NSM_READY_FD": str(write)}
    process = await asyncio.create_subprocess_exec(
        *PROGRAM,
        mode,
        env=environ | more,
        pass_fds=[write],
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(write)
    running = Program(process, read)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(running.follow())
            try:
                yield running
            finally:
                if process.returncode is None:
                    process.kill()
                await process.wait()
    finally:
        os.close(read)


async def test_a_process_may_open_as_many_files_as_the_machine_lets_it() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))  # what it starts with
    try:
        async with program("wait") as one:
            await one.is_ready()
            assert resource.prlimit(one.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_process_that_crashes_writes_no_core_because_its_memory_holds_keys() -> None:
    limits = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (limits[1], limits[1]))
    try:
        async with program("wait") as one:
            await one.is_ready()
            assert resource.prlimit(one.process.pid, resource.RLIMIT_CORE) == (0, limits[1])
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, limits)


async def test_a_start_is_one_line_for_people_and_one_for_who_waits() -> None:
    async with program("wait") as one:
        line = await one.is_ready()
        one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 0
    said = "program p-1 ready: tcp://127.0.0.1:1, unix:///x; registry tcp://r:5002"
    assert line == f"{said}\n"
    assert one.events == [said, "stopping"]
    assert one.out == ["cleaned up"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_the_first_signal_ends_it_in_order(number: signal.Signals, code: int) -> None:
    async with program("wait") as one:
        await one.is_ready()
        one.process.send_signal(number)
        assert await one.end() == code
    assert one.out == ["cleaned up"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_a_signal_before_it_is_ready_cancels_the_start(
    number: signal.Signals, code: int
) -> None:
    async with program("never-ready") as one:
        await until(lambda: one.out, "a process starts")
        one.process.send_signal(number)
        assert await one.end() == code
        assert await one.is_ready() == ""
    assert one.out == ["starting", "cancelled", "cleaned up"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGINT, 130)])
async def test_the_second_signal_forces_it(number: signal.Signals, code: int) -> None:
    async with program("slow-end") as one:
        await one.is_ready()
        one.process.send_signal(number)
        await until(lambda: one.out, "a process begins to end")
        one.process.send_signal(number)
        assert await one.end() == code
    assert one.out == ["ending slowly", "cancelled", "cleaned up"]
    assert one.events[1:] == ["stopping", "stopped by force"]


async def test_an_orderly_stop_that_takes_too_long_is_forced() -> None:
    async with program("slow-end", NSM_STOP_GRACE="100ms") as one:
        await one.is_ready()
        one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 1
    assert one.events[1:] == ["stopping", "stopped by force"]


@pytest.mark.long
async def test_a_thread_that_waits_for_ever_does_not_keep_it() -> None:
    async with program("stuck-thread", NSM_STOP_GRACE="100ms") as one:
        await one.is_ready()
        one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 1
    assert one.events[-1] == "hangs, and is ended as it is"


@pytest.mark.parametrize(
    ("mode", "code", "why"),
    [
        ("taken", 1, "port 5001 is held by iperf (pid 7); set NSM_LISTEN_ON"),
        ("unavailable", 4, "no registry at tcp://r:5002"),
        ("several", 4, "no registry at tcp://r:5002"),
        ("cannot", 3, "needs CAP_NET_ADMIN; sudo nsmctl …"),
    ],
)
async def test_it_says_why_it_cannot_run_and_the_code_says_which_kind(
    mode: str, code: int, why: str
) -> None:
    async with program(mode) as one:
        assert await one.end() == code
        assert await one.is_ready() == ""
    assert {(line["event"], line["why"]) for line in one.log} == {("cannot run", why)}
    assert all("exception" not in line for line in one.log)


@pytest.mark.parametrize("mode", ["defect", "vital"])
async def test_a_defect_ends_it_with_its_trace(mode: str) -> None:
    async with program(mode) as one:
        assert await one.end() == 1
    assert one.events[-1] == "ended by a defect"
    assert "ZeroDivisionError: oops" in one.log[-1]["exception"]
    assert one.out[-1] == "cleaned up"


async def test_an_exception_nobody_waits_for_is_logged() -> None:
    async with program("stray-exception") as one:
        await until(lambda: len(one.log) > 1, "a stray exception is logged")
        one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 0
    assert "ZeroDivisionError" in one.log[1]["exception"]


async def test_wrong_settings_end_it_with_2_before_anything_starts() -> None:
    async def run(environ: Mapping[str, str], *more: str) -> tuple[int | None, str, str]:
        process = await asyncio.create_subprocess_exec(
            *PROGRAM,
            *more,
            "wait",
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environ},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    code, _, err = await run({"NSM_STOP_GRACE": "soon", "NSM_LOG_LEVEL": "loud"})
    assert (code, len(err.splitlines())) == (2, 2)
    code, out, _ = await run({"NSM_STOP_GRACE": "1m"}, "--check")
    assert code == 0
    assert "NSM_STOP_GRACE=1m  # environment" in out


async def test_sigusr1_logs_all_and_sigusr2_as_configured() -> None:
    async with program("wait", NSM_LOG_LEVEL="WARN") as one:
        await one.is_ready()
        one.process.send_signal(signal.SIGUSR1)
        await until(lambda: one.log, "a process changes its log level")
        assert one.log[0]["to"] == "TRACE"
        assert one.log[0]["tasks"] == {"_supervised": 1}
        assert one.log[0]["threads"] == {"MainThread": 1}
        one.process.send_signal(signal.SIGUSR2)
        await until(lambda: len(one.log) == 2, "a process changes its log level")
        assert one.log[1]["to"] == "WARN"
        one.process.send_signal(signal.SIGUSR1)
        await until(lambda: len(one.log) == 3, "a process changes its log level")
        one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 0
    assert one.events[3:] == ["stopping"]


@pytest.mark.parametrize("abstract", [False, True])
async def test_systemd_is_told_of_start_and_stop(tmp_path: Path, abstract: bool) -> None:
    address = f"\0{tmp_path}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(10)
        async with program("wait", NOTIFY_SOCKET=address.replace("\0", "@")) as one:
            first = await asyncio.to_thread(systemd.recv, 4096)
            one.process.send_signal(signal.SIGTERM)
            assert await one.end() == 0
        assert first.startswith(b"READY=1\nSTATUS=program p-1 ready: ")
        assert systemd.recv(4096) == b"STOPPING=1\n"


async def test_unknown_variables_are_named_at_the_start() -> None:
    async with program("wait", NSM_STOP_GRASE="1s") as one:
        await one.is_ready()
        one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 0
    assert one.events[0].endswith("did you mean NSM_STOP_GRACE?")


async def test_a_foreign_module_of_one_of_our_names_is_refused_with_its_path(
    tmp_path: Path,
) -> None:
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "__init__.py").touch()
    async with program("wait", PYTHONPATH=f"{tmp_path}:{ROOT}") as one:
        assert await one.end() == 3
    assert f"'registry' comes from {tmp_path}/registry/__init__.py" in one.log[0]["why"]


async def test_a_wrong_ready_fd_is_a_sentence() -> None:
    async with program("wait", NSM_READY_FD="97") as one:
        assert await one.end() == 2
    assert one.log[-1]["why"].startswith("NSM_READY_FD is 97, which cannot be written")


SEEN = {
    "open": "open '",
    "os-open": "open '/proc/self/ns/net'",
    "listdir": "os.listdir '",
    "scandir": "os.scandir '",
    "sqlite": "sqlite3.connect ':memory:'",
    "netlink": "a netlink socket was made",
    "netlink-bind": "socket.bind on a netlink socket",
    "subprocess": "subprocess.Popen 'true'",
    "resolve": "socket.getaddrinfo '127.0.0.1'",
    "namespace": "a socket was made in another network namespace",
}


@pytest.mark.parametrize("mode", SEEN)
async def test_the_loop_guard_tells_on_what_blocks_the_loop(mode: str, tmp_path: Path) -> None:
    told = tmp_path / "guard"
    async with program(mode, NSM_LOOP_GUARD=str(told)) as one:
        assert await one.end() == 0
    calls = [json.loads(line) for line in told.read_text().splitlines()]
    assert any(call["what"].startswith(SEEN[mode]) for call in calls), calls
    for call in calls:
        assert any("tests/support/program.py" in line for line in call["stack"])
    if mode not in {"subprocess", "resolve", "namespace"}:
        assert len(calls) == 1, "the same in a thread is fine"


@pytest.mark.parametrize("mode", ["quiet", "late-import", "stray-exception", "wait"])
async def test_the_loop_guard_is_silent_about_start_stop_imports_and_tracebacks(
    mode: str, tmp_path: Path
) -> None:
    told = tmp_path / "guard"
    async with program(mode, NSM_LOOP_GUARD=str(told)) as one:
        await one.is_ready()
        if mode in {"stray-exception", "wait"}:
            one.process.send_signal(signal.SIGTERM)
        assert await one.end() == 0
    assert told.read_text() == ""

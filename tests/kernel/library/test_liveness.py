"""Pings from a wire's own end, over real devices: answered, silent, stopped, not ours to send."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.support.spaces import space
from tests.support.wait import until, write

WATCH = """
import asyncio, ipaddress, json, os, sys, time
from nsm.liveness import Liveness, Rhythm

def say(what):
    fds = len(os.listdir("/proc/self/fd"))
    print(json.dumps({"what": what, "at": time.monotonic(), "fds": fds}), flush=True)

async def main():
    own, others = ([ipaddress.ip_interface(one) for one in text.split(",") if one]
                   for text in sys.argv[1:3])
    live = Liveness(Rhythm())
    running = asyncio.create_task(live.run())
    pulse = live.watch(own, others, lambda: say("silent"))
    say("watched" if pulse else "not watched")
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while order := (await reader.readline()).decode().strip():
        if order == "flows":
            say(str(await pulse.flows()))
        elif order == "answered":
            say(str(pulse.answered))
        elif order == "silent?":
            say(str(pulse.silent))
        elif order == "forget":
            live.forget(pulse)
            say("forgotten")
    running.cancel()

asyncio.run(main())
"""


class Watcher:
    """A process inside a namespace that watches one wire."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def hears(self, patience: float = 10.0) -> dict:
        while True:
            line = await asyncio.wait_for(self.process.stdout.readline(), patience)
            assert line, "it has ended"
            if line.startswith(b"{"):  # and no line of its log
                return json.loads(line)

    async def ask(self, order: str) -> str:
        self.process.stdin.write(order.encode() + b"\n")
        return (await self.hears())["what"]

    async def answered(self) -> None:
        async def has() -> bool:
            return await self.ask("answered") == "True"

        await until(has, "an answer", bar=0.5)


@contextlib.asynccontextmanager
async def watcher(here, own: str, others: str):
    process = await asyncio.create_subprocess_exec(
        "ip", "netns", "exec", here.name, sys.executable, "-P", "-c", WATCH, own, others,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    try:
        yield Watcher(process)
    finally:
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 10)


@pytest.fixture
def ends():
    """Two namespaces and a wire between, with addresses of both families."""
    with space("here") as here, space("far") as far:
        here.do("link", "add", "w0", "type", "veth", "peer", "name", "w0", "netns", far.name)
        for one, last in ((here, 1), (far, 2)):
            one.do("link", "set", "lo", "up")
            one.do("link", "set", "w0", "up")
            one.do("addr", "add", f"10.9.0.{last}/24", "dev", "w0")
            one.do("addr", "add", f"fd09::{last}/64", "dev", "w0", "nodad")
            one.run("sysctl", "-w", "net.ipv4.ping_group_range=0 2147483647")
        yield here, far


BOTH = "10.9.0.1/24,fd09::1/64", "10.9.0.2/24,fd09::2/64"


@pytest.mark.parametrize(
    "end",
    [
        ("far", "link", "set", "w0", "down"),
        ("far", "addr", "del", "fd09::2/64", "dev", "w0"),
        ("here", "link", "del", "w0"),
        ("here", "addr", "del", "10.9.0.1/24", "dev", "w0"),
    ],
    ids=["the far end", "one of two families", "our own device", "our own address"],
)
async def test_an_end_is_noticed_within_a_second(ends, end):
    here, far = ends
    async with watcher(here, *BOTH) as seen:
        assert (await seen.hears())["what"] == "watched"
        await seen.answered()
        assert await seen.ask("flows") == "True"
        before = time.monotonic()
        where, *what = end
        {"here": here, "far": far}[where].do(*what)
        told = await seen.hears()
        assert told["what"] == "silent"
        write("the end of a wire, noticed by pings", told["at"] - before, 1.0)
        assert await seen.ask("flows") == "False"
        assert await seen.ask("forget") == "forgotten"


async def test_a_process_that_was_stopped_takes_nobody_for_dead(ends):
    here, far = ends
    async with watcher(here, *BOTH) as seen:
        await seen.hears()
        await seen.answered()
        seen.process.send_signal(signal.SIGSTOP)
        await stopped(seen.process.pid)
        far.do("link", "set", "w0", "down")  # nobody answers while we cannot look
        await asyncio.to_thread(here.run, "ping", "-c1", "-W1", "10.9.0.2")
        far.do("link", "set", "w0", "up")
        far.do("addr", "add", "fd09::2/64", "dev", "w0", "nodad")  # it went with the link
        seen.process.send_signal(signal.SIGCONT)
        assert await seen.ask("flows") == "True"
        far.do("link", "set", "w0", "down")
        assert (await seen.hears())["what"] == "silent", "and a death is told all the same"


async def test_once_the_mesh_says_that_a_wire_is_down_little_silence_is_enough(ends):
    here, far = ends
    async with watcher(here, *BOTH) as seen:
        await seen.hears()
        await seen.answered()
        assert await seen.ask("flows") == "True"
        before = time.monotonic()
        far.do("link", "set", "w0", "down")
        told = await seen.hears()
        assert told["what"] == "silent"
        write("an end that the mesh told of, noticed by pings", told["at"] - before, 0.5)


async def stopped(pid: int) -> None:
    def is_stopped() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    await until(is_stopped, "a stopped process", bar=0.5, record=False)


async def test_where_no_ping_may_be_sent_nothing_is_watched(ends):
    here, _ = ends
    here.run("sysctl", "-w", "net.ipv4.ping_group_range=1 0")
    async with watcher(here, *BOTH) as seen:
        assert (await seen.hears())["what"] == "not watched"


async def test_who_never_answers_is_not_called_silent_and_its_sockets_close(ends):
    here, _ = ends
    async with watcher(here, BOTH[0], "10.9.0.77/24,fd09::77/64") as seen:
        before = (await seen.hears())["fds"]
        assert await seen.ask("flows") == "None"

        async def fds(order: bytes) -> int:
            seen.process.stdin.write(order)
            told = await seen.hears()
            assert told["what"] in ("False", "forgotten")
            return told["fds"]

        async def asked() -> bool:
            return await fds(b"silent?\n") == before + 2

        await until(asked, "a socket for each address", bar=0.5)
        assert await fds(b"forget\n") == before

"""A small process of ours for tests of how processes start, stop and end.

Its last argument says what its serve function does.
"""

import asyncio
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nsm.errors import PreconditionError, TakenError, UnavailableError
from nsm.process.config import Common, read
from nsm.process.run import Process, run

MODE = sys.argv.pop()
HERE = os.path.dirname(__file__)


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """program: waits to be stopped."""

    name: str = "p-1"
    """Its name."""

    mode: str = MODE
    """What it does."""


def say(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


async def serve(config: Config, process: Process) -> None:
    try:
        await MODES[config.mode](process)
    except asyncio.CancelledError:
        say("cancelled")
        raise
    finally:
        say("cleaned up")


async def wait(process: Process) -> None:
    process.ready(["tcp://127.0.0.1:1", "unix:///x"], registry="tcp://r:5002", empty="")
    await process.stopped()


async def waits(process: Process) -> None:
    process.waits("nobody is there")
    process.ready()
    process.waits("nobody is there now")
    await process.stopped()


async def never_ready(process: Process) -> None:
    say("starting")
    await asyncio.Event().wait()


async def slow_end(process: Process) -> None:
    process.ready()
    await process.stopped()
    say("ending slowly")
    await asyncio.Event().wait()


async def stuck_thread(process: Process) -> None:
    process.ready()
    work = asyncio.to_thread(time.sleep, 3600)
    await process.stopped()
    await work


async def hang(process: Process) -> None:
    process.ready()
    time.sleep(3600)


async def taken(process: Process) -> None:
    raise TakenError("port 5001 is held by iperf (pid 7)", hint="set NSM_LISTEN_ON")


async def unavailable(process: Process) -> None:
    raise UnavailableError("no registry at tcp://r:5002")


async def cannot(process: Process) -> None:
    raise PreconditionError("needs CAP_NET_ADMIN", hint="sudo nsmctl …")


async def defect(process: Process) -> None:
    raise ZeroDivisionError("oops")


async def vital(process: Process) -> None:
    process.ready()
    process.tasks.spawn(defect(process), "server of everything", vital=True)
    await process.stopped()


async def several(process: Process) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(unavailable(process))
        group.create_task(unavailable(process))


async def stray_exception(process: Process) -> None:
    process.ready()
    asyncio.get_running_loop().call_soon(lambda: 1 // 0)
    await process.stopped()


def in_loop(act: Callable[[], object]) -> Callable[[Process], Awaitable[None]]:
    async def after_start(process: Process) -> None:
        process.ready()
        act()
        await asyncio.to_thread(act)

    return after_start


async def bind_netlink(process: Process) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM) as netlink:
        process.ready()
        netlink.bind((0, 0))


def other_namespace() -> None:
    """As code that uses setns does, without the file it opens."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    assert libc.unshare(0x40000000) == 0, os.strerror(ctypes.get_errno())
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    assert libc.setns(home, 0x40000000) == 0
    os.close(home)


def late_import() -> None:
    import wave  # noqa: F401 - one that nothing else imports


MODES: dict[str, Callable[[Process], Awaitable[None]]] = {
    "wait": wait,
    "waits": waits,
    "never-ready": never_ready,
    "slow-end": slow_end,
    "stuck-thread": stuck_thread,
    "hang": hang,
    "taken": taken,
    "unavailable": unavailable,
    "cannot": cannot,
    "defect": defect,
    "vital": vital,
    "several": several,
    "stray-exception": stray_exception,
    "quiet": in_loop(lambda: None),
    "late-import": in_loop(late_import),
    "open": in_loop(lambda: open(__file__).close()),
    "os-open": in_loop(lambda: os.close(os.open("/proc/self/ns/net", os.O_RDONLY))),
    "listdir": in_loop(lambda: os.listdir(HERE)),
    "scandir": in_loop(lambda: os.scandir(HERE).close()),
    "sqlite": in_loop(lambda: sqlite3.connect(":memory:").close()),
    "netlink": in_loop(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()),
    "netlink-bind": bind_netlink,
    "subprocess": in_loop(lambda: subprocess.run(["true"], check=True)),
    "resolve": in_loop(lambda: socket.getaddrinfo("127.0.0.1", 1)),
    "namespace": in_loop(other_namespace),
}

if __name__ == "__main__":
    sys.exit(run("program", read(Config), serve))

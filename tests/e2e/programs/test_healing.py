"""A wire that dies is noticed and led elsewhere: what killed it, when, and what stays."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.programs.mesh import Mesh, Program, mesh, status
from tests.support.spaces import Space, answers, space
from tests.support.wait import until, write


@pytest.fixture
async def node(tmp_path: Path):
    async with mesh(tmp_path, {}) as made:
        yield made


@pytest.fixture
def here():
    with space("app") as made:
        yield made


class Ends:
    """Two endpoints of one service in a namespace each; their addresses tell them apart."""

    def __init__(self) -> None:
        self.program: dict[str, Program] = {}
        self.space: dict[str, Space] = {}
        self.prefix = {"nse-1": "10.9.0", "nse-2": "10.8.0"}
        self._stacks: dict[str, ExitStack] = {}

    async def start(self, node: Mesh, name: str) -> None:
        stack = self._stacks[name] = ExitStack()
        where = self.space[name] = stack.enter_context(space(name))
        pools = f"{self.prefix[name]}.0/24,fd{self.prefix[name][3]}::/64"
        self.program[name] = await node.responder(where, NSM_NAME=name, NSM_CIDR_PREFIX=pools)

    async def end(self, name: str) -> None:
        """The process is killed and its namespace goes."""
        await self.program.pop(name).kill()
        self._stacks.pop(name).close()

    def close(self) -> None:
        for one in self._stacks.values():
            one.close()


@pytest.fixture
async def ends(node):
    made = Ends()
    for name in made.prefix:
        await made.start(node, name)
    yield made
    for program in made.program.values():
        await program.end()
    made.close()


async def wired(node: Mesh, here: Space, **variables: str) -> tuple[Program, Path]:
    file = node.directory / "status"
    app = await node.client(here, "kernel://echo/nsm-1", NSM_STATUS_FILE=str(file), **variables)
    assert await app.ready(), app.log
    await until(lambda: status(file), "the first line", bar=0.1, record=False)
    assert await here.pings(status(file)[0]["dst"][0].partition("/")[0])
    return app, file


async def healed(file: Path, count: int) -> dict[str, Any]:
    """The line of that many healings."""

    def lines() -> list[dict[str, Any]]:
        return [one for one in status(file)[1:] if one["event"] == "up"]

    await until(lambda: len(lines()) >= count, "a healed wire", bar=2, record=False)
    return lines()[count - 1]


def told(here: Space) -> set[str]:
    """The networks of all IPv4 addresses at the interface, and of all ways into it."""
    (link,) = here.ip("-4", "addr", "show", "nsm-1")
    found = [i["local"] for i in link["addr_info"]] + [one["dst"] for one in here.ip("route")]
    return {one.rpartition(".")[0] for one in found}


async def test_where_a_namespace_or_the_way_to_it_goes_the_wire_is_led_elsewhere(node, here, ends):
    app, file = await wired(node, here)
    first = status(file)[0]["endpoint"]
    # Nobody is told that this device is down, but who pings through it and was answered before.
    so_far = answers(ends.space[first])
    await until(lambda: answers(ends.space[first]) > so_far, "the client's own ping", bar=0.5)
    (device,) = ends.space[first].links()
    ends.space[first].do("link", "set", device, "down")
    up = await healed(file, 1)
    assert (up["cause"], up["flowed"], up["was"]) == ("data", False, first), up
    write("an end that nobody tells of: noticed", up["unnoticed_ms"] / 1000, 1.0)
    write("an end that nobody tells of: healed", up["outage_ms"] / 1000, 2.0)
    assert told(here) == {ends.prefix[up["endpoint"]]}
    assert await here.pings(up["dst"][0].partition("/")[0])

    second = up["endpoint"]
    await ends.end(second)
    up = await healed(file, 2)
    assert up["was"] == second
    assert up["endpoint"] != second
    assert up["flowed"] is not True
    write("an endpoint's namespace is gone: healed", up["outage_ms"] / 1000, 2.0)
    assert told(here) == {ends.prefix[up["endpoint"]]}
    assert await here.pings(up["dst"][0].partition("/")[0])
    assert await app.end() == 0
    assert here.links() == set()


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many loops that want a processor each."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for one in loops:
            one.kill()
            one.wait()


async def standstill(program: Program, seconds: float) -> None:
    """A process stands still for so long."""
    program.process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    await until(lambda: time.monotonic() - began >= seconds, "its end", bar=seconds, record=False)
    program.process.send_signal(signal.SIGCONT)


@pytest.mark.long
async def test_a_minute_of_busy_processors_and_stopped_processes_heals_none_of_thirty_wires(
    node, here, ends
):
    file = node.directory / "status"
    services = ",".join(f"kernel://echo/w-{n}" for n in range(30))
    app = await node.client(here, services, NSM_STATUS_FILE=str(file))
    assert await app.ready(), app.log
    await until(lambda: len(status(file)) == 30, "30 lines", bar=0.2, record=False)
    indexes = {link["ifname"]: link["ifindex"] for link in here.ip("link")}
    stops, began = 0, time.monotonic()
    with busy(4):
        while time.monotonic() - began < 60:
            for one in (node.nsmgr, node.forwarder, node.registry, app):
                await standstill(one, 0.3)
                stops += 1
    assert stops > 100
    assert [one["event"] for one in status(file)] == ["up"] * 30, status(file)[30:]
    assert not any("not refreshed" in line for line in app.log), app.log
    assert {link["ifname"]: link["ifindex"] for link in here.ip("link")} == indexes
    # And they were watched all the time: one that ends is noticed.
    first = status(file)[0]
    device = next(
        link["ifname"]
        for link in ends.space[first["endpoint"]].ip("addr")
        if any(info["local"] == first["dst"][0].partition("/")[0] for info in link["addr_info"])
    )
    ends.space[first["endpoint"]].do("link", "set", device, "down")
    await until(lambda: len(status(file)) == 32, "a wire that ended is healed", bar=2)
    assert status(file)[31]["id"] == first["id"]
    await app.end()

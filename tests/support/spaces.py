"""Namespaces for tests, and the kernel's own word about them: `ip -j`, ping and /proc."""

import asyncio
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_numbers = itertools.count()


@dataclass(frozen=True)
class Space:
    """A named namespace, made by the stock `ip` command."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def ip(self, *words: str) -> list[dict[str, Any]]:
        """What `ip -j` says in there."""
        return ip("-n", self.name, *words)

    def do(self, *words: str) -> None:
        """Run `ip` in there."""
        subprocess.run(["ip", "-n", self.name, *words], check=True)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a program in there."""
        command = ["ip", "netns", "exec", self.name, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    async def pings(self, address: str, *options: str) -> bool:
        """Whether one stock ping comes back."""
        words = ("ping", "-n", "-c1", "-W2", *options, address)
        done = await asyncio.to_thread(self.run, *words)
        return done.returncode == 0

    def links(self) -> set[str]:
        """The names of the devices in there, its loopback aside."""
        return {link["ifname"] for link in self.ip("link")} - {"lo"}

    @contextmanager
    def fd(self, flags: int = os.O_PATH) -> Iterator[int]:
        """A way in, as a peer would send it."""
        opened = os.open(self.path, flags)
        try:
            yield opened
        finally:
            os.close(opened)


def ip(*words: str) -> list[dict[str, Any]]:
    """What `ip -j` says."""
    said = subprocess.run(["ip", "-j", "-d", *words], capture_output=True, text=True, check=True)
    found = [entry for entry in json.loads(said.stdout or "[]") if entry]
    for entry in found:
        if "addr_info" in entry:  # what the filter left out is an empty object
            entry["addr_info"] = [info for info in entry["addr_info"] if info]
    return found


@contextmanager
def space(hint: str = "t") -> Iterator[Space]:
    """A namespace for the block, gone afterwards."""
    made = Space(f"vw-{hint}-{os.getpid()}-{next(_numbers)}")
    subprocess.run(["ip", "netns", "add", made.name], check=True)
    try:
        subprocess.run(["ip", "-n", made.name, "link", "set", "lo", "up"], check=True)
        yield made
    finally:
        subprocess.run(["ip", "netns", "del", made.name], check=True)


@dataclass
class Workload:
    """A process in a network namespace of its own that nothing else keeps alive."""

    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ns(self) -> str:
        return f"/proc/{self.pid}/ns/net"

    def ip(self, *words: str) -> list[dict[str, Any]]:
        """What `ip -j` says in there."""
        command = ["nsenter", f"--net={self.ns}", "ip", "-j", "-d", *words]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        return [entry for entry in json.loads(said.stdout or "[]") if entry]

    def kill(self) -> None:
        """kill -9, and nobody collects it before the block ends: as with a dead container."""
        self.process.kill()


@contextmanager
def workload() -> Iterator[Workload]:
    """A workload for the block."""
    process = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "echo in; exec sleep 600"], stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        yield Workload(process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def holders(inode: int) -> list[str]:
    """What of this very process holds a network namespace: fds, threads, sockets' doors."""
    link = f"net:[{inode}]"
    found = []
    for task in Path("/proc/self/task").iterdir():
        if _target(task / "ns/net") == link:
            found.append(str(task))
    found += [str(fd) for fd in Path("/proc/self/fd").iterdir() if _target(fd) == link]
    return found


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def fds() -> set[str]:
    """What this process has open; sockets by kind only, their numbers differ."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        target = _target(fd)
        found.add(f"{fd.name} {target}" if target else "")
    return {entry for entry in found if entry and "/proc/" not in entry}


def answers(where: Space) -> int:
    """How many echoes over IPv4 it has answered."""
    names, counts = (
        line.split() for line in where.run("cat", "/proc/net/snmp").stdout.splitlines()
        if line.startswith("Icmp:")
    )  # fmt: skip
    return int(dict(zip(names, counts, strict=True))["OutEchoReps"])


def kernel_state(*spaces: Space) -> dict[str, object]:
    """Sets of all a wire leaves in namespaces, as stock `ip` sees them."""
    views: dict[str, Callable[[Space], object]] = {
        "links": lambda s: sorted(link["ifname"] for link in s.ip("link")),
        "addresses": lambda s: sorted(
            info["local"] for link in s.ip("addr") for info in link["addr_info"]
        ),
        "routes": lambda s: sorted(map(str, s.ip("route", "show", "table", "all"))),
        "routes6": lambda s: sorted(
            map(str, ip("-6", "-n", s.name, "route", "show", "table", "all"))
        ),
        "rules": lambda s: sorted(map(str, s.ip("rule"))),
        "rules6": lambda s: sorted(map(str, ip("-6", "-n", s.name, "rule"))),
        "neighbours": lambda s: sorted(  # but not how fresh they are: that changes by itself
            str({key: what for key, what in one.items() if key != "state"}) for one in s.ip("neigh")
        ),
    }
    return {f"{s.name} {what}": view(s) for s in spaces for what, view in views.items()}

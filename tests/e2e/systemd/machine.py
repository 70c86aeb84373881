"""Machines with a systemd of their own, made of namespaces: what units do, they really do there."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.wait import until

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
AGENT = "unix:///run/vwire/issuer/agent.sock"
PATH = "/opt/vwire/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
WALL = 120  # seconds any one command may take
UNDER_WAY = 5  # echoes of a tenth of a second that may be under way when a flow ends

# A cgroup is entered before the namespace that makes it look like the root of all.
_BORN = """
mount -t cgroup2 cgroup2 {tree} && mkdir {tree}/{name} && echo $$ >{tree}/{name}/cgroup.procs &&
umount {tree} && exec unshare --mount --propagation=slave --pid --cgroup --net --uts --ipc --fork \
  --kill-child bash {boot} {name} {source} {python} {packages}
"""
_BURIED = """
mount -t cgroup2 cgroup2 {tree} && find {tree}/{name} -depth -type d -exec rmdir {{}} +
"""


@dataclass
class Flow:
    """Echoes at a steady pace; known at the end: how many came back, and which did not."""

    received: int = 0
    lost: frozenset[int] = frozenset()


@dataclass(eq=False)
class Machine:
    """One that is up; process 1 is systemd."""

    name: str
    pid: int  # of process 1, as seen from here
    said: Path = field(repr=False)

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command in there."""
        doors = [f"--{kind}=/proc/{self.pid}/ns/{file}" for kind, file in _DOORS]
        return ["nsenter", *doors, "--", "env", "-i", f"PATH={PATH}", "LANG=C.UTF-8", *command]

    def run(self, *command: str, wrong: bool = False) -> str:
        """What a command says in there; AssertionError unless it succeeds, or fails if wrong."""
        done = subprocess.run(
            self.inside(*command),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False, timeout=WALL,
        )  # fmt: skip
        assert (done.returncode != 0) == wrong, f"{self.name}$ {' '.join(command)}\n{done.stdout}"
        return done.stdout

    def sh(self, script: str, *, wrong: bool = False) -> str:
        """What lines typed into a shell in there say."""
        return self.run("bash", "-euc", script, wrong=wrong)

    def show(self, unit: str, what: str) -> str:
        """One property of a unit, as systemd has it."""
        return self.run("systemctl", "show", "--value", f"--property={what}", unit).strip()

    def main_pid(self, unit: str) -> int:
        """The main process of a unit, by its number in there."""
        return int(self.show(unit, "MainPID"))

    def status(self, unit: str) -> dict[str, str]:
        """/proc/PID/status of a unit's main process."""
        text = self.run("cat", f"/proc/{self.main_pid(unit)}/status")
        return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)

    def journal(self, unit: str) -> str:
        """What a unit said, in all its lives."""
        return self._said(f"--unit={unit}")

    def granted(self, unit: str) -> set[str]:
        """The connections that a program of the mesh granted in its present life."""
        life = f"_SYSTEMD_INVOCATION_ID={self.show(unit, 'InvocationID')}"
        lines = self._said(life).splitlines()
        told = [json.loads(line) for line in lines if "NetworkService/Request" in line]
        return {one["connection"] for one in told if one.get("code") == "OK"}

    def _said(self, *which: str) -> str:
        # journald reads what a program wrote when it gets to it, and that may be after the
        # program ended: --sync waits until it has.
        self.run("journalctl", "--sync")
        return self.run("journalctl", "--no-pager", "--output=cat", *which)

    def kill(self, unit: str, number: int) -> None:
        """Send a signal to a unit's main process, from the outside of systemd's view."""
        self.run("kill", f"-{number}", str(self.main_pid(unit)))

    def start(self, unit: str, module: str, *properties: str, **variables: str) -> None:
        """Start one of our programs as a service, and wait until it is ready.

        It is a workload: in a network namespace of its own that ends with it, and, unless
        properties say otherwise, a user without any rights.
        """
        given = ("Type=notify", "PrivateNetwork=yes", "DynamicUser=yes", *properties)
        settings = {"SPIFFE_ENDPOINT_SOCKET": AGENT, "NSM_NAME": unit, **variables}
        self.run(
            "systemd-run", "--quiet", "--collect", f"--unit={unit}",
            *(f"--property={one}" for one in given),
            *(f"--setenv={name}={value}" for name, value in settings.items()),
            "/opt/vwire/bin/python", "-P", "-m", module,
        )  # fmt: skip

    def stop(self, *units: str) -> None:
        self.run("systemctl", "stop", *units)

    def within(self, unit: str, *command: str, wrong: bool = False) -> str:
        """What a command says in a unit's network namespace."""
        return self.run("nsenter", "-t", str(self.main_pid(unit)), "-n", *command, wrong=wrong)

    def link(self, unit: str, name: str = "nsm-1") -> dict[str, Any]:
        """A device of a unit's, as `ip -d -j link` has it; empty if it is not there."""
        found = self.links(unit)
        return next((one for one in found if one["ifname"] == name), {})

    def links(self, unit: str) -> list[dict[str, Any]]:
        """The devices of a unit's network namespace, its loopback aside."""
        told = json.loads(self.within(unit, "ip", "-d", "-j", "link"))
        return [one for one in told if one["ifname"] != "lo"]

    @contextlib.contextmanager
    def flow(self, unit: str, address: str) -> Iterator[Flow]:
        """Ping an address 50 times a second from a unit's namespace, for the block."""
        door = f"/proc/{self.pid}/root/proc/{self.main_pid(unit)}/ns/net"
        command = ["ping", "-n", "-i0.02", "-w100", address]
        counts = Flow()
        pinging = subprocess.Popen(["nsenter", f"--net={door}", *command], stdout=-1, text=True)
        try:
            yield counts
            assert pinging.poll() is None, "the block took longer than it was watched"
        finally:
            pinging.send_signal(signal.SIGINT)
            said, _ = pinging.communicate(timeout=WALL)
            back = {int(number) for number in re.findall(r" icmp_seq=(\d+) ttl=", said)}
            (sent,) = map(int, re.findall(r"^(\d+) packets transmitted", said, re.MULTILINE))
            counts.received = len(back)
            counts.lost = frozenset(range(1, sent - UNDER_WAY)) - back

    def pings(self, unit: str, name: str = "nsm-1") -> bool:
        """Whether whoever is at the far end of a unit's wire answers a stock ping."""
        routes = json.loads(self.within(unit, "ip", "-j", "-4", "route", "show", "dev", name))
        far = next(one["dst"] for one in routes if "/" not in one["dst"])
        ping = ["nsenter", "-t", str(self.main_pid(unit)), "-n", "ping", "-n", "-c1", "-W2", far]
        return (
            subprocess.run(self.inside(*ping), stdout=-3, timeout=WALL, check=False).returncode == 0
        )

    def active(self, *units: str) -> bool:
        """Whether all of them run."""
        return all(self.show(unit, "ActiveState") == "active" for unit in units)


_DOORS = (
    ("mount", "mnt"),
    ("pid", "pid"),
    ("cgroup", "cgroup"),
    ("net", "net"),
    ("uts", "uts"),
    ("ipc", "ipc"),
)


@contextlib.contextmanager
def machine(name: str) -> Iterator[Machine]:
    """A machine for the block; nothing of it is left."""
    name = f"{name}-{os.getpid()}"
    with tempfile.TemporaryDirectory(prefix="vwire-machine-") as folder:
        words = {
            "tree": f"{folder}/cgroup",
            "name": name,
            "boot": HERE / "boot.sh",
            "source": ROOT,
            "python": sys.base_prefix,
            "packages": sysconfig.get_path("purelib"),
        }
        os.mkdir(f"{folder}/cgroup")
        said = Path(folder) / "said"
        with said.open("wb") as out:
            process = subprocess.Popen(
                # whoever kills the tests kills it too
                ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "sh", "-c",
                 _BORN.format(**words)],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield _up(name, process, said)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(_first(process.pid) or process.pid, signal.SIGKILL)
            process.wait(WALL)
            subprocess.run(["unshare", "--mount", "sh", "-c", _BURIED.format(**words)], check=True)


def _up(name: str, process: "subprocess.Popen[bytes]", said: Path) -> Machine:
    """Wait until systemd has started all that is to be started."""
    found: list[Machine] = []

    def up() -> bool:
        assert process.poll() is None, f"{name} does not boot: {said.read_text()}"
        first = _first(process.pid)
        if _command(first) != "systemd":  # bash as yet, or nobody any more
            return False
        found[:] = [Machine(name, first, said)]
        words = found[0].inside("systemctl", "is-system-running", "--wait")
        done = subprocess.run(words, stdout=-1, stderr=-2, check=False, timeout=WALL)
        return done.stdout == b"running\n"

    wait(up, "a machine's systemd", bar=2)
    return found[0]


def wait(condition: Callable[[], object], what: str, *, bar: float = 1.0) -> None:
    """`until`, for tests without a loop."""
    asyncio.run(until(condition, what, bar=bar))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _first(unshare: int) -> int:
    """Process 1 of the machine whose PID namespace that process made; 0 before there is one."""
    try:
        return int(Path(f"/proc/{unshare}/task/{unshare}/children").read_text() or 0)
    except (FileNotFoundError, ProcessLookupError):
        return 0

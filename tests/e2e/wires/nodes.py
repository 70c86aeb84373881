"""Two nodes of real processes that a test may stop, kill and start again, one by one.

Who they are and what they are told comes from a lab file, so each has the group, the
namespace and the SPIFFE id a lab would give it; the nursery forks them, so one is
ready in a moment.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from labs import lab as labfile
from labs import processes
from labs.engine import _entries, _network
from labs.paths import Paths
from labs.processes import MODULES, Process, Stage
from nsm.kernel.namespaces import delete_named, list_named
from nsm.names import resolvconf
from tests.support.leaks import changed
from tests.support.pings import counted
from tests.support.spaces import Space
from tests.support.wait import until

ROOT = Path(__file__).parents[3]
ANYWHERE = 61_999  # a group that has an identity in whatever namespace it is
READY = 40.0  # seconds: ten times what a member that has a router started should take
MESH = (Stage.ISSUER, Stage.REGISTRY, Stage.MANAGER, Stage.FORWARDER, Stage.ENDPOINT)


def two_nodes(lab: str) -> str:
    """A lab's file whose topology is nodes `one` and `two` of cluster `east`."""
    return f"""{lab}
topology:
  clusters:
    east: {{trust-domain: east.test}}
  nodes:
    one: {{cluster: east}}
    two: {{cluster: east}}
    lan: {{kind: switch}}
  links:
    - {{endpoints: ["one:eth0", "lan:p1"]}}
    - {{endpoints: ["two:eth0", "lan:p2"]}}
  underlay: {{ipv4: 198.18.0.0/24}}
"""


@dataclass(eq=False)
class Program:
    """One life of a process."""

    name: str
    nodes: "Nodes" = field(repr=False)
    log_file: Path
    status_file: Path
    pid: int = 0
    said: str | None = None  # when it was ready
    status: int | None = None  # once it has ended
    _read: int = 0

    def ready(self) -> "Program":
        """Wait until it says so."""
        self.nodes.hear(lambda: self.said is not None or self.status is not None, READY)
        assert self.status is None, f"{self.name} ended with {self.status}: {self.words}"
        assert self.said, f"{self.name} is not ready: {self.words}"
        return self

    def send(self, number: int) -> None:
        assert self.status is None, f"{self.name} has ended: {self.words}"
        os.kill(self.pid, number)

    def ended(self) -> int:
        """Wait for its end; its exit code, or minus its signal."""
        self.nodes.hear(lambda: self.status is not None, READY)
        assert self.status is not None, f"{self.name} does not end: {self.words}"
        return self.status

    def end(self, number: int = signal.SIGTERM) -> int:
        self.send(number)
        return self.ended()

    @property
    def log(self) -> list[str]:
        return self.log_file.read_text().splitlines() if self.log_file.exists() else []

    @property
    def words(self) -> str:
        """The end of its log, for whoever reads why a test failed."""
        return "\n".join(self.log[-12:])

    def errors(self) -> list[str]:
        """What it logged as a defect, or printed past its log, since the last call."""
        lines, self._read = self.log[self._read :], len(self.log)
        return [
            line
            for line in lines
            if '"exception"' in line or '"level": "critical"' in line or not line.startswith("{")
        ]

    @property
    def told(self) -> list[dict[str, Any]]:
        """What became of a client's wires."""
        if not self.status_file.exists():
            return []
        return [json.loads(line) for line in self.status_file.read_text().splitlines()]

    @property
    def pss(self) -> int:
        """Its share of memory in bytes, as the kernel counts it, but for pages of files.

        Its part of those (the interpreter, libraries) grows when a process of somebody else
        ends that had them too.
        """
        lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        sizes = [line.split() for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
        assert len(sizes) == 2, "the kernel tells no Pss"
        return sum(int(size) for _, size, _ in sizes) * 1024

    @property
    def fds(self) -> list[str]:
        """What it has open, by kind: numbers of sockets differ, how many there are must not.

        But the way to its own socket: whoever watches its registration gets that with
        each renewal, and lets go of it within a minute.
        """
        own = "forwarder.sock" if "/forwarder" in self.name else "listen.on"
        kinds = []
        for entry in os.listdir(f"/proc/{self.pid}/fd"):
            with contextlib.suppress(FileNotFoundError):
                kinds.append(os.readlink(f"/proc/{self.pid}/fd/{entry}").split("[")[0])
        return sorted(
            kind for kind in kinds if "/nsmgr" in self.name or os.path.basename(kind) != own
        )

    @property
    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def after(self, offset: int) -> list[dict[str, Any]]:
        """What it logged from that place of its log on, as far as lines are whole."""
        with self.log_file.open("rb") as log:
            log.seek(offset)
            return [json.loads(line) for line in log if line.endswith(b"\n")]


class Nodes:
    """The lab's namespaces, and the processes that were started in them."""

    MORE_MODULES: tuple[str, ...] = ("tests.e2e.wires.holder", "tests.e2e.wires.far")
    STAGES: tuple[Stage, ...] = MESH

    def __init__(self, text: str, directory: Path, **variables: str) -> None:
        self.lab = labfile.parse(text, "nodes.yaml", name=f"w{os.getpid() % 10_000}")
        self.directory = directory
        self.guard = directory / "guard"
        self.paths = Paths(self.lab.name, str(directory))
        self._variables = {"NSM_LOOP_GUARD": str(self.guard), **variables}
        self.plan = processes.plan(self.lab, self.paths)
        self.programs: list[Program] = []
        self.now: dict[str, Program] = {}
        """Whoever lives of the mesh, by NODE/PROCESS."""
        self._nursery: subprocess.Popen[bytes]
        self._rest = b""
        self._guarded = 0

    def space(self, place: str) -> Space:
        return Space(self.paths.namespace(place))

    @contextlib.contextmanager
    def up(self) -> Iterator["Nodes"]:
        """All of the mesh and its endpoints, no client."""
        for folder in self.paths.folders(tuple(self.lab.nodes), tuple(self.lab.clusters)):
            os.makedirs(folder, exist_ok=True)
        command = [sys.executable, "-P", "-m", "labs.nursery", self.lab.name, self.paths.processes,
                   "-1"]  # fmt: skip
        modules = (*MODULES.values(), *self.MORE_MODULES)
        with contextlib.ExitStack() as stack:
            self._nursery = subprocess.Popen(
                [*command, *modules],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
                cwd="/",
                start_new_session=True,
            )
            stack.enter_context(self._nursery)
            stack.callback(self._end)
            _network(self.lab, self.paths)
            _entries(self.lab, self.paths, self.plan)
            for name, cluster in self.lab.clusters.items():
                file = Path(self.paths.cluster(name, "entries.json"))
                entries = json.loads(file.read_text())
                anywhere = f"spiffe://{cluster.trust_domain}/anywhere"
                file.write_text(json.dumps([*entries, {"id": anywhere, "gid": ANYWHERE}]))
            self.prepare()
            for stage in self.STAGES:
                of = [self.start(process.name) for process in self.plan.of(stage)]
                for program in of:
                    program.ready()
            yield self

    def prepare(self) -> None:
        """What is to be there before the first process starts; the network is."""

    def start(self, name: str, **variables: str) -> Program:
        """Start a process of the plan; it may be the second life of its name."""
        (process,) = (one for one in self.plan.processes if one.name == name)
        program = self.now[name] = self.bear(process, name, **variables)
        return program

    def client(
        self, place: str, *urls: str, name: str = "", privileged: bool = False, **variables: str
    ) -> Program:
        """Start a client in a client's place, under its identity, and wait for its wires."""
        return self.asks(place, *urls, name=name, privileged=privileged, **variables).ready()

    def asks(
        self, place: str, *urls: str, name: str = "", privileged: bool = False, **variables: str
    ) -> Program:
        """Start a client and do not wait. privileged: with all of root's capabilities."""
        name = name or f"c{len(self.programs)}"
        process = replace(self.process(place), privileged=privileged)
        status = self.paths.status(f"{name}-{len(self.programs)}")
        own = {"NSM_NAME": name, "NSM_NETWORK_SERVICES": ",".join(urls), "NSM_STATUS_FILE": status}
        program = self.bear(process, name, **own, **variables)
        program.status_file = Path(status)
        return program

    def process(self, place: str) -> Process:
        """What the plan has for a client's or an endpoint's place."""
        (process,) = (one for one in self.plan.processes if one.name.endswith(f"/{place}"))
        return process

    @contextlib.contextmanager
    def alone(self, place: str, name: str, **variables: str) -> Iterator[Program]:
        """A place's program in a namespace that nothing but the program keeps alive."""
        with contextlib.ExitStack() as stack:
            doomed = Space(self.paths.namespace(name))
            subprocess.run(["ip", "netns", "add", doomed.name], check=True)
            try:
                process = replace(self.process(place), namespace=doomed.name, gid=ANYWHERE)
                status = self.paths.status(f"{name}-{len(self.programs)}")
                own = {"NSM_NAME": name, "NSM_STATUS_FILE": status}
                program = self.bear(process, name, **own, **variables)
                program.status_file = Path(status)
                stack.callback(lambda: program.status is not None or program.end(signal.SIGKILL))
                program.ready()
            finally:
                subprocess.run(["ip", "netns", "del", doomed.name], check=True)
            yield program

    def bear(self, process: Process, name: str, **variables: str) -> Program:
        key = f"{name}#{len(self.programs)}"
        log = self.paths.log(key)
        environment = {**process.environment, **self._variables, **variables}
        order = replace(process, name=key, environment=environment, log=log).order()
        assert self._nursery.stdin is not None
        self._nursery.stdin.write(json.dumps(order).encode() + b"\n")
        self._nursery.stdin.flush()
        program = Program(key, self, Path(log), Path())
        self.programs.append(program)
        self.hear(lambda: program.pid, READY)
        return program

    def hear(self, wanted: Any, seconds: float) -> None:
        """Take in what the nursery tells until wanted() is true, or seconds are over."""
        out = self._nursery.stdout
        assert out is not None
        until = time.monotonic() + seconds
        while not wanted():
            patience = max(0.0, until - time.monotonic())
            if not select.select([out], [], [], patience)[0]:
                return
            data = os.read(out.fileno(), 1 << 16)
            assert data, "the nursery has ended"
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._note(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        for program in self.programs:
            if program.name == event["name"]:
                match event["event"]:
                    case "born":
                        program.pid = event["pid"]
                    case "ready":
                        program.said = event["says"]
                    case "ended":
                        program.status = event["status"]

    def guarded(self) -> list[str]:
        """What the processes' loop guards told since the last call."""
        lines = self.guard.read_text().splitlines() if self.guard.exists() else []
        new, self._guarded = lines[self._guarded :], len(lines)
        return new

    def end_clients(self) -> None:
        """Whom a failing test left."""
        self.hear(lambda: False, 0.0)
        for program in self.programs:
            if program not in self.now.values() and program.pid and program.status is None:
                program.end()

    def _end(self) -> None:
        """Clients first: they close their wires."""
        self.hear(lambda: False, 0.0)
        clients = [p for p in self.programs if p not in self.now.values()]
        for group in (clients, [*self.now.values()][::-1]):
            for program in group:
                if program.pid and program.status is None:
                    program.send(signal.SIGTERM)
            for program in group:
                self.hear(lambda p=program: p.status is not None, 10.0)
                if program.pid and program.status is None:
                    program.send(signal.SIGKILL)
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        for place in self.lab.places:
            resolvconf.forget(self.paths.namespace(place))
            if self.paths.namespace(place) in list_named():
                delete_named(self.paths.namespace(place))
        self._nursery.wait(20)


# --- what the kernel says -------------------------------------------------------------------


def link(space: Space, name: str) -> dict[str, Any]:
    """One device, as `ip -d -j link` has it."""
    (found,) = space.ip("link", "show", name)
    return found


def far_end(client: Space, name: str, endpoint: Space) -> dict[str, Any]:
    """The device at the other end of a wire: where the endpoint sends what is for the client."""
    (way,) = endpoint.ip("route", "get", addresses(client, name)[0])
    return link(endpoint, way["dev"])


def identity(device: dict[str, Any]) -> tuple[Any, ...]:
    """What must stay of a device as long as its wire is the same.

    Its number alone does not tell: what is made anew in its place is given the same.
    """
    info = device.get("linkinfo", {})
    data = info.get("info_data", {})
    mac = device.get("address")  # WireGuard has none
    kind = info.get("info_kind"), data.get("id"), data.get("port")
    return device["ifindex"], device["ifname"], mac, device["mtu"], *kind


def addresses(space: Space, name: str) -> list[str]:
    """A device's addresses, link-local ones aside; none where there is no such device."""
    of = (one["addr_info"] for one in space.ip("addr") if one["ifname"] == name)
    return sorted(i["local"] for infos in of for i in infos if i["scope"] != "link")


def tentative(*spaces: Space) -> bool:
    """Whether the kernel still tries out addresses it gave itself."""
    infos = [i for space in spaces for one in space.ip("addr") for i in one["addr_info"]]
    return any(info.get("tentative") for info in infos)


async def running(programs: Iterable[Program]) -> dict[str, Any]:
    """The tasks and threads of processes, by name, as each says when it gets SIGUSR2."""
    ends = [(one, one.log_file.stat().st_size) for one in programs]
    for one, _ in ends:
        one.send(signal.SIGUSR2)
    found: dict[str, Any] = {}

    def told() -> bool:
        for one, end in ends:
            for line in one.after(end):
                if "tasks" in line:
                    found[one.name] = {kind: line[kind] for kind in ("tasks", "threads")}
        return len(found) == len(ends)

    await until(told, "each process says what it runs", bar=0.5, record=False)
    return found


Look = Callable[[], Awaitable[Mapping[str, Any]]]


async def settled(look: Look) -> Mapping[str, Any]:
    """What look shows once nothing is under way any more: the same five times in a row."""
    seen: list[Mapping[str, Any]] = []

    async def quiet() -> bool:
        seen.append(await look())
        return len(seen) > 5 and all(one == seen[-1] for one in seen[-5:])

    await until(quiet, "nothing under way", bar=1)
    return seen[-1]


async def same(look: Look, before: Mapping[str, Any], what: str) -> None:
    """Wait until all is as it was; what is not is the failure's text."""
    now: Mapping[str, Any] = {}

    async def as_before() -> bool:
        nonlocal now
        now = await look()
        return now == before

    with contextlib.suppress(AssertionError):
        await until(as_before, what, bar=1)
    assert now == before, "\n".join([f"not {what}:", *changed(before, now)])


Held = Mapping[str, "Counter[str]"]


async def lasting(look: Callable[[], Held]) -> Held:
    """What look shows every time it is asked, ten times: what work in progress opens is not in it.

    For where the work never rests. How much of a kind is there at the least is what stays.
    """
    seen: list[Held] = []
    await until(lambda: seen.append(look()) or len(seen) > 10, "ten looks", bar=0.5, record=False)
    return reduce(_least, seen)


async def nothing_more(look: Callable[[], Held], before: Held, what: str) -> None:
    """Wait until no more stays than before; what does is the failure's text.

    Each look can only lower what is thought to stay, and what was leaked is in every look.
    """
    least = look()

    def more() -> dict[str, Counter[str]]:
        return {name: left for name in least if (left := least[name] - before[name])}

    def gone() -> bool:
        nonlocal least
        least = _least(least, look())
        return not more()

    with contextlib.suppress(AssertionError):
        await until(gone, what, bar=1)
    assert not (left := more()), f"not {what}: {left}"


def _least(one: Held, other: Held) -> Held:
    return {name: one[name] & other[name] for name in one}


@dataclass
class Flow:
    """Echoes at a steady pace; sent and received are known at the end (`pings.counted`)."""

    sent: int = 0
    received: int = 0


@contextlib.contextmanager
def flow(space: Space, address: str, interval: float = 0.02) -> Iterator[Flow]:
    """Ping an address 50 times a second for the block."""
    command = ["ping", "-n", f"-i{interval}", "-w100", address]
    counts = Flow()
    with tempfile.TemporaryFile("w+") as said:  # a pipe that nobody reads would stop it
        pinging = subprocess.Popen(["ip", "netns", "exec", space.name, *command], stdout=said)
        try:
            yield counts
            assert pinging.poll() is None, "the block took longer than it was watched"
        finally:
            pinging.send_signal(signal.SIGINT)
            pinging.wait(10)
            said.seek(0)
            counts.sent, counts.received = counted(said.read())

"""A mesh of real processes for tests that must leave it as it was, and what the kernel says of it.

Three nodes of one domain. Whatever a test does, links, addresses, routes, rules and
neighbours of every namespace, the processes, and what each has open are the same
before and after; `ip` and /proc say so, not we.
"""

import asyncio
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from labs import engine, processes, state
from labs.lab import parse
from labs.paths import Paths
from nsm.identity.authority import Authority, open_authority
from nsm.identity.spiffe import SpiffeId
from tests.support import secrets
from tests.support.wait import until

ROOT = Path(__file__).parents[3]
LAB = """\
name: NAME
topology:
  clusters: {home: {trust-domain: home.test}}
  nodes:
    node-1: {cluster: home}
    node-2: {cluster: home}
    node-3: {cluster: home}
    lan: {kind: switch}
  links:
    - {endpoints: ["node-1:eth0", "lan:p1"]}
    - {endpoints: ["node-2:eth0", "lan:p2"]}
    - {endpoints: ["node-3:eth0", "lan:p3"]}
  underlay: {ipv4: 198.18.0.0/24}
services:
  echo: {payload: ethernet, endpoints: {responder: {on: node-1, prefixes: [172.16.1.0/24]}}}
  tiny: {payload: ethernet, endpoints: {tiny-pool: {on: node-1, prefixes: [172.16.2.0/31]}}}
  packets: {payload: ip, endpoints: {packets-1: {on: node-2, prefixes: [172.16.3.0/24]}}}
clients:
  alice: {on: node-1, netns-only: true}
  bob: {on: node-1, netns-only: true}
  serving: {on: node-1, netns-only: true}
  mortal: {on: node-1, netns-only: true}
  carol: {on: node-3, netns-only: true}
  nsc: {on: node-1, connect: ["kernel://echo/nsm-1"]}  # the fifth of the five, beside every test
"""
DOMAIN = "home.test"
SEATS = {  # who asks: its SPIFFE id's path, and the node whose manager it knows
    "alice": ("client/alice", "node-1"),
    "bob": ("client/bob", "node-1"),
    "serving": ("client/serving", "node-1"),
    "mortal": ("client/mortal", "node-1"),
    "carol": ("client/carol", "node-3"),
    "operator": ("node/node-1/nsmctl", "node-1"),
    "manager": ("node/node-1/nsmgr", "node-1"),
    "far": ("node/node-2/nsmctl", "node-2"),
}
OBJECTS = ("link show", "address show", "route show table all", "rule show", "neighbour show")
VOLATILE = ("valid_life_time", "preferred_life_time", "used", "probes", "expires")
OWN = {"name": "raw", "id": "raw-1"}  # the first segment of every raw path
_numbers = itertools.count()


class Asker:
    """The test's end of one seat; see asker.py."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._buffer = b""
        self._answers: dict[int, dict[str, Any]] = {}

    def tell(self, do: str, **order: Any) -> int:
        """Give an order; its number is for `hear`."""
        number = next(_numbers)
        self._end.sendall(json.dumps({"n": number, "do": do, **order}).encode() + b"\n")
        return number

    def hear(self, number: int, patience: float = 30.0) -> dict[str, Any]:
        """What came of an order."""
        until = time.monotonic() + patience
        while number not in self._answers:
            self._end.settimeout(max(0.01, until - time.monotonic()))
            data = self._end.recv(1 << 20)
            assert data, "the asker has ended"
            *lines, self._buffer = (self._buffer + data).split(b"\n")
            for answer in map(json.loads, lines):
                self._answers[answer["n"]] = answer
        answer = self._answers.pop(number)
        assert answer["code"] != "DEFECT", answer
        return answer

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order and wait for what came of it."""
        return self.hear(self.tell(do, **order))

    def have(self, do: str, **order: Any) -> dict[str, Any]:
        """The same, where it must work."""
        answer = self.ask(do, **order)
        assert answer["code"] == "OK", answer
        return answer


class Mesh:
    """The lab, its askers, and what the kernel says of both."""

    def __init__(self, up: engine.Up, guard: Path) -> None:
        self.lab, self.paths, self.guard = up.lab, up.paths, guard
        self.plan = processes.plan(up.lab, up.paths)
        self.askers: dict[str, Asker] = {}
        self.stopped: set[str] = set()  # processes a test stopped on purpose

    def namespace(self, place: str) -> str:
        return self.paths.namespace(place)

    def url(self, node: str, what: str = "nsm.io.sock") -> str:
        return f"unix://{self.paths.node(node, what)}"

    @property
    def agent(self) -> str:
        return f"unix://{self.paths.cluster('home', 'spiffe.sock')}"

    @property
    def authority(self) -> Path:
        return Path(self.paths.cluster("home", "authority"))

    def pid(self, name: str) -> int:
        return state.born(self.paths)[name].mark.pid

    def entry(self, who: str) -> processes.Entry:
        """The registration of an SVID, by its SPIFFE id's path."""
        wanted = f"spiffe://{DOMAIN}/{who}"
        return next(e for e in self.plan.entries if e.spiffe_id == wanted)

    def process(self, name: str) -> processes.Process:
        """How the lab starts NODE/PROC."""
        return next(p for p in self.plan.processes if p.name == name)

    def seat(self, name: str) -> dict[str, Any]:
        """All that an asker is told."""
        who, node = SEATS[name]
        entry = self.entry(who)
        seat = {
            "name": name,
            "namespace": entry.namespace,
            "gid": entry.gid,
            "identity": self.agent,
            "registry": "tcp://198.18.0.1:5002",
        }
        for what, socket_, whose in (
            ("manager", "nsm.io.sock", "nsmgr"),
            ("forwarder", "forwarder.sock", "forwarder"),
        ):
            owner = self.entry(f"node/{node}/{whose}")
            seat |= {
                what: self.url(node, socket_),
                f"{what}_id": owner.spiffe_id,
                f"{what}_dns": owner.dns,
            }
        return seat

    def ip(self, place: str, *words: str) -> list[dict[str, Any]]:
        """What `ip -j` says in there."""
        command = ["ip", "-n", self.namespace(place), "-j", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [one for one in json.loads(done.stdout or "[]") if one]

    def links(self, place: str) -> set[str]:
        return {link["ifname"] for link in self.ip(place, "link")} - {"lo"}

    def pings(self, place: str, address: str) -> bool:
        inside = ["ip", "netns", "exec", self.namespace(place)]
        words = [*inside, "ping", "-n", "-c1", "-W2", address]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def logs(self) -> list[Path]:
        """What each process wrote so far."""
        return [Path(one.log) for one in self.plan.processes if Path(one.log).exists()]

    # --- what must be equal ---------------------------------------------------------------

    def kernel(self) -> dict[str, str]:
        """All that a wire leaves in any namespace of the lab, a line each."""
        running = []
        for place in self.lab.places:
            for family, objects in (("inet", OBJECTS), ("inet6", OBJECTS[2:4])):
                command = ["ip", "-n", self.namespace(place), "-f", family, "-j", "-batch", "-"]
                process = subprocess.Popen(
                    command if family == "inet6" else [*command[:3], *command[5:]],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                )  # fmt: skip
                assert process.stdin is not None
                process.stdin.write("\n".join(objects) + "\n")
                process.stdin.close()
                running.append((place, family, objects, process))
        return dict(
            line for place, family, objects, one in running
            for line in _lines(place, family, objects, one)
        )  # fmt: skip

    def open_files(self) -> dict[str, Counter[str]]:
        """What each process of the lab has open, by kind."""
        found = {}
        for name, child in state.born(self.paths).items():
            if child.mark.alive:
                found[name] = _open_files(child.mark.pid)
        return found

    def alive(self) -> set[str]:
        return {name for name, child in state.born(self.paths).items() if child.mark.alive}


def _lines(
    place: str, family: str, objects: Sequence[str], process: "subprocess.Popen[str]"
) -> Iterator[tuple[str, str]]:
    with process:
        assert process.stdout is not None
        said, decoder = process.stdout.read().strip(), json.JSONDecoder()
    assert process.returncode == 0, f"ip ended with {process.returncode} in {place}"
    for kind in objects:
        found, end = decoder.raw_decode(said)
        said = said[end:].strip()
        for one in found:
            if not one or (kind.startswith("neigh") and "PERMANENT" not in one["state"]):
                continue  # what the underlay resolves by itself comes and goes
            for info in one.get("addr_info", [one]):
                for key in VOLATILE:
                    info.pop(key, None)
            yield f"{place}: {family} {kind.split()[0]} {json.dumps(one, sort_keys=True)}", ""
    assert not said, said


def _open_files(pid: int) -> Counter[str]:
    found: Counter[str] = Counter()
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        try:
            target = os.readlink(f"{folder}/{number}")
        except FileNotFoundError:
            continue  # closed meanwhile
        if not target.removesuffix(" (deleted)").endswith((".sock", "/listen.on")):
            # A socket's own file comes back with each answer about it; that one pins nobody.
            found[re.sub(r"^(socket|pipe):\[\d+\]", r"\1", target)] += 1
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [
        *(f"gone: {line}" for line in sorted(before.keys() - now.keys())),
        *(f"new: {line}" for line in sorted(now.keys() - before.keys())),
    ]


def leaks(before: Mapping[str, Counter[str]], now: Mapping[str, Counter[str]]) -> list[str]:
    more = {name: files - before.get(name, Counter()) for name, files in now.items()}
    return [f"{name} has more open: {dict(files)}" for name, files in more.items() if files]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """The lab, up, with an asker in every seat; each path through it was used once."""
    name = f"mesh-{os.getpid()}-{next(_numbers)}"
    text = LAB.replace("NAME", name)
    lab, paths = parse(text, "mesh.yaml"), Paths(name)
    guard = tmp_path_factory.mktemp("guard") / "calls"
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(processes, "plan", _guarded(processes.plan, guard))
        with state.locked(paths, create=True):
            up = engine.up(lab, text, "mesh.yaml")
        stack.callback(_down, paths)
        made = Mesh(up, guard)
        stack.enter_context(_askers(made))
        for service in ("echo", "tiny", "packets"):
            wire = made.askers["alice"].have("connect", url=f"kernel://{service}")["wire"]
            made.askers["alice"].have("close", wire=wire)
        settled = until(
            lambda: "tentative" not in str(made.kernel()), "addresses to be nobody else's", bar=1.0
        )
        asyncio.run(settled)
        yield made
        told = secrets.told_by(made.logs())
        assert not told, f"a token or a key is in a log: {told}"


def _guarded(plan: Any, guard: Path) -> Any:
    """The lab's plan, with every process of ours telling on calls that block its loop.

    They log all they ever log, because what must not be in a log must not be in that.
    """

    def guarded(lab: Any, paths: Paths) -> processes.Plan:
        made: processes.Plan = plan(lab, paths)
        return replace(
            made,
            processes=tuple(
                replace(one, environment={**one.environment, **_telling(guard, one.stage)})
                for one in made.processes
            ),
        )

    return guarded


def _telling(guard: Path, stage: processes.Stage) -> Mapping[str, str]:
    told = {"NSM_LOOP_GUARD": str(guard), "NSM_LOG_LEVEL": "TRACE"}
    if stage is processes.Stage.FORWARDER:
        # because those who ask here are root with all rights, whom it gives no tunnel of their own
        told["NSM_ISOLATION"] = "in-place"
    return told


def _down(paths: Paths) -> None:
    with state.locked(paths, create=False) as there:
        assert there
        gone = engine.down(paths)
    assert not gone.left, gone
    assert not gone.killed, f"{gone.killed} processes did not end when they were asked to"


class _askers:  # noqa: N801 - used as a block
    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._ends: list[socket.socket] = []

    def __enter__(self) -> None:
        seats, given = [], []
        for name in SEATS:
            own, other = socket.socketpair()
            self._mesh.askers[name] = Asker(own)
            self._ends.append(own)
            given.append(other)
            seats.append({**self._mesh.seat(name), "fd": other.fileno()})
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.e2e.mesh.asker", json.dumps(seats)],
            pass_fds=[one.fileno() for one in given],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": "/tmp"},
        )
        for one in given:
            one.close()

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            end.close()
        try:
            assert self._process.wait(20) == 0
        finally:
            self._process.kill()
            self._process.wait()


@pytest.fixture(autouse=True)
async def _the_mesh_is_as_before(mesh: Mesh, _nothing_is_left: None) -> Any:
    """Equal kernel state, no more open files, everybody alive, nobody's loop blocked."""
    kernel, files, living = mesh.kernel(), mesh.open_files(), mesh.alive()
    yield

    found: list[str] = []

    def as_before() -> bool:
        found[:] = [
            *differences(kernel, mesh.kernel()),
            *leaks(files, mesh.open_files()),
            *(f"{name} has ended" for name in living - mesh.alive() - mesh.stopped),
        ]
        return not found

    try:
        await until(as_before, "the mesh to be as before", bar=0.5, record=False)
    except AssertionError:
        pytest.fail("\n".join(["the mesh is not as before:", *found]), pytrace=False)
    if mesh.guard.exists() and (told := mesh.guard.read_text()):
        mesh.guard.write_text("")
        pytest.fail(f"calls that block a loop:\n{told[:3000]}", pytrace=False)


def is_sentence(answer: dict[str, Any], code: str, *words: str) -> str:
    """That an answer is a refusal of that code in one line with these words; its text."""
    text: str = answer["text"]
    assert answer["code"] == code, answer
    assert not [word for word in words if word not in text], text
    assert "\n" not in text
    assert "Traceback" not in text
    assert "eyJ" not in text, "a token is in it"
    assert len(text) < 1000, f"nobody reads {len(text)} characters"
    print(f"{code}: {text}")
    return text


def asked(
    who: Asker, service: str = "echo", *, name: str = "nsm-1", **connection: Any
) -> dict[str, Any]:
    """A Request of stock grpcio's, who names its namespace by /proc."""
    pid = who.have("who")["pid"]
    return {
        "connection": {
            "id": "raw-1",
            "networkService": service,
            "path": {"index": 0, "pathSegments": [dict(OWN)]},
            **connection,
        },
        "mechanismPreferences": [
            {
                "cls": "LOCAL",
                "type": "KERNEL",
                "parameters": {"name": name, "inodeURL": f"file:///proc/{pid}/ns/net"},
            }
        ],
    }


class Started:
    """A program that is to fail, and its last words."""

    def __init__(
        self, mesh: Mesh, module: str, like: str, *, user: str = "", **variables: str
    ) -> None:
        process = mesh.process(like)
        environment = {
            k: v
            for k, v in process.environment.items()
            if k not in ("NSM_READY_FD", "NSM_LOOP_GUARD")
        }
        environment |= {"PYTHONPATH": str(ROOT), "NSM_LOG_LEVEL": "INFO", **variables}
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", process.namespace, "setpriv", f"--regid={process.gid}",
             "--clear-groups", *([f"--reuid={user}"] if user else []),
             sys.executable, "-P", "-m", *module.split()],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd="/",
        )  # fmt: skip

    def says(self, word: str) -> None:
        """Wait for a line with that word."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if word in line:
                return
        pytest.fail(f"it ended without saying {word!r}")

    def stopped(self) -> int:
        """Its exit code, once it obeyed."""
        self.process.terminate()
        self.process.communicate(timeout=10)
        return self.process.returncode

    def ends(self, patience: float = 30.0) -> tuple[int, str]:
        """Its exit code, and what it said."""
        try:
            said, _ = self.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            said, _ = self.process.communicate()
            pytest.fail(f"still runs after {patience} s: {said}")
        print(said)
        return self.process.returncode, said


def identity(
    folder: Path, authority: Authority, who: str, trusted: Authority, **times: int
) -> dict[str, str]:
    """A certificate of authority for who in files; trusted is whom its owner believes."""
    svid = authority.issue(SpiffeId.parse(who), **times)
    (folder / "cert.pem").write_bytes(b"".join(c.public_bytes(Encoding.PEM) for c in svid.chain))
    (folder / "key.pem").write_bytes(svid.key_pem())
    (folder / "bundle.pem").write_bytes(trusted.bundle_pem())
    files = {one: str(folder / f"{one}.pem") for one in ("cert", "key", "bundle")}
    return {**files, "id": who, "domain": trusted.trust_domain}


@pytest.fixture
def home(mesh: Mesh) -> Authority:
    return open_authority(mesh.authority, DOMAIN)


@pytest.fixture
def alice(mesh: Mesh) -> Asker:
    return mesh.askers["alice"]


@pytest.fixture
def bob(mesh: Mesh) -> Asker:
    return mesh.askers["bob"]


@pytest.fixture
def serving(mesh: Mesh) -> Asker:
    return mesh.askers["serving"]

"""The lab of the kill matrix: who is struck, what flows meanwhile, and what is counted then."""

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from labs import engine, faults, processes, state
from labs import lab as labfile
from labs.alive import Mark as Life
from labs.alive import started
from labs.faults import Faults
from labs.paths import Paths
from labs.processes import Stage
from labs.traffic import Couriers, Mark, Traffic
from labs.wires import Wire, whose
from labs.wires import wires as all_wires
from nsm.kernel import owner
from tests.e2e.kills.audit import Audit, look
from tests.support.wait import PATIENCE, until

ROOT: Final = Path(__file__).parents[3]
LAB: Final = Path(__file__).with_name("lab.yaml")
WIRES: Final = ("veth", "vxlan", "wireguard")
"""The clients, which are called as their wires."""
FLAT: Final = ("member-1", "member-2")
ENOUGH: Final = 400  # datagrams each way
HEALED: Final = 20  # datagrams that arrive after an outage: it is over
GONE: Final = 5.0  # seconds until nothing is left of the dead, as matrix.yaml has it
CLEAN: Final = 2.0  # seconds until wires need all there is, once everybody is back and was called
ANSWER: Final = 60.0  # seconds, several times what the caller's own limits come to
KEPT, MOVED, ANEW = "kept", "moved", "anew"
KINDS: Final = (KEPT, MOVED, ANEW)  # the graver the later


@dataclass(slots=True)
class Cell:
    """What was counted of one wire while somebody was struck."""

    kind: str
    numbers: dict[str, int] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)  # of numbers that are not 0

    def count(self, name: str, found: Sequence[object] | int, note: str = "") -> None:
        number = found if isinstance(found, int) else len(found)
        self.numbers[name] = number
        if number:
            self.notes[name] = note or "; ".join(
                map(str, found if not isinstance(found, int) else ())
            )


Row = tuple[str, ...]
"""Whom to strike at once."""


@dataclass(frozen=True, slots=True)
class Facts:
    """A wire, by what must not change of it."""

    interface: str
    addresses: tuple[str, ...]
    near: tuple[Any, ...]
    far: tuple[Any, ...]

    def changes(self, other: "Facts") -> list[str]:
        """What differs, in words."""
        return [
            f"{what} was {a}, is {b}"
            for what, a, b in (
                ("the interface", self.interface, other.interface),
                ("addresses", self.addresses, other.addresses),
                ("the client's device", self.near, other.near),
                ("the endpoint's device", self.far, other.far),
            )
            if a != b
        ]


class Stand:
    """The lab, its flows, and those who strike."""

    def __init__(self, name: str, root: str) -> None:
        self.text = LAB.read_text()
        self.lab = labfile.parse(self.text, str(LAB), name=name)
        self.paths = Paths(name, root)
        self.faults = Faults(self.lab, self.paths)
        self.audit = Audit(self.lab, self.paths)
        self._flows: dict[str, Traffic] = {}
        self._since: dict[str, Mark] = {}
        self._between: dict[str, tuple[str, str]] = {}
        self._registered: list[str] = []
        self._caller: subprocess.Popen[str] | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Stand":
        with contextlib.ExitStack() as stack:
            with state.locked(self.paths, create=True):
                stack.callback(self._down)
                engine.up(self.lab, self.text, str(LAB), root=self.paths.root)
            self._couriers = stack.enter_context(Couriers())
            stack.callback(self._hush)
            self._registered = self._call([])
            self.audit.remember()
            self._flow()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _down(self) -> None:
        with state.locked(self.paths, create=False):
            gone = engine.down(self.paths)
        assert not gone.left, gone.left

    # -- wires and flows --------------------------------------------------------------------

    def wires(self) -> dict[str, Wire]:
        """The wire of each client that has one."""
        return {wire.client: wire for wire in all_wires(self.lab, self.paths)}

    def _known(self) -> dict[str, Wire]:
        """Wires by the ids on their paths."""
        found: dict[str, Wire] = {}
        for client, wire in self.wires().items():
            for told in state.statuses(self.paths, client):
                found |= {hop["id"]: wire for hop in told["path"] if told["id"] == wire.id}
        return found

    def _waiting(self) -> dict[str, str]:
        """Where clients live whose wires are down because nobody serves them, by the paths' ids.

        They keep the interface and its addresses for whoever comes back.
        """
        ended = faults.standing(self.paths).ended
        found: dict[str, str] = {}
        for client in [client for client in self.lab.clients if client not in ended]:
            for told in state.statuses(self.paths, client):
                if told["event"] == "down" and not self._serving(told["service"]) - {*ended}:
                    found |= {hop["id"]: client for hop in told["path"]}
        return found

    def _serving(self, service: str) -> set[str]:
        """Who serves a network service, dead or alive."""
        endpoints = {one.name for one in self.lab.endpoints.values() if one.service == service}
        return endpoints | {one.name for one in self.lab.routers.values() if one.network == service}

    def others(self, wire: Wire) -> list[str]:
        """Who else serves a wire's service."""
        own = self.lab.endpoints[wire.endpoint].service
        return [
            e.name
            for e in self.lab.endpoints.values()
            if e.service == own and e.name != wire.endpoint
        ]

    def _flow(self) -> None:
        """Have traffic on every wire; where it is, it stays."""
        wires = self.wires()
        missing = [client for client in WIRES if client not in self._flows]
        places = {p for c in missing for p in (c, wires[c].endpoint, *self.others(wires[c]))}
        flat = () if "flat" in self._flows else FLAT
        asked = {self.paths.namespace(p): {"do": "tell", "flow": ""} for p in (*places, *flat)}
        self._couriers.ask(asked)  # all of them start at once
        for client in missing:
            wire = wires[client]
            ends = wire.client_addresses[0], wire.endpoint_addresses[0]
            self._begin(client, client, wire.endpoint, ends, self.others(wire))
        if flat:
            a, b = (wires[member].client_addresses[0] for member in FLAT)
            self._begin("flat", *FLAT, (a, b), ())

    def _begin(
        self, name: str, a: str, b: str, addresses: tuple[str, str], stand_by: Sequence[str]
    ) -> None:
        flow = Traffic(
            self.paths, a, b, addresses, stand_by=stand_by, couriers=self._couriers
        )  # fmt: skip
        self._flows[name] = flow.__enter__()
        self._since[name] = Mark()
        self._between[name] = a, b

    def _end(self, name: str) -> None:
        self._between.pop(name, None)
        if flow := self._flows.pop(name, None):
            flow.__exit__(None, None, None)

    def _hush(self) -> None:
        for name in [*self._flows]:
            self._end(name)
        self._dismiss()

    def _dismiss(self) -> None:
        if caller := self._caller:
            self._caller = None
            caller.kill()
            assert caller.stdin is not None
            assert caller.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                caller.stdin.close()
            caller.stdout.close()
            caller.wait()

    # -- who is called ----------------------------------------------------------------------

    def _call(self, wires: Sequence[tuple[str, str]]) -> list[str]:
        """Have wires made at endpoints, and closed; who is registered then.

        Raises AssertionError with what was refused.
        """
        for _ in range(2):  # a caller whose node died is not there any more
            if self._caller is None or self._caller.poll() is not None:
                self._dismiss()
                with open(self.paths.log("caller"), "a") as log:
                    self._caller = subprocess.Popen(
                    [sys.executable, "-P", "-m", "tests.e2e.kills.caller", self.lab.name,
                     self.paths.root, "caller"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}, cwd="/",
                )  # fmt: skip
            assert self._caller.stdin is not None
            assert self._caller.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                self._caller.stdin.write(json.dumps({"wires": wires, "patience": 10}) + "\n")
                self._caller.stdin.flush()
            ready, _, _ = select.select([self._caller.stdout], [], [], ANSWER)
            assert ready, f"the caller says nothing for {ANSWER:g} s: {self.paths.log('caller')}"
            if line := self._caller.stdout.readline():
                told = json.loads(line)
                assert not (refused := [*filter(None, told["refused"])]), refused
                return sorted(whose(self.lab, name) for name in told["registered"])
            self._dismiss()
        raise AssertionError("the caller ends when it is asked")

    # -- one row ----------------------------------------------------------------------------

    def judge(
        self, row: Row, kinds: dict[str, str], meanwhile: Callable[[], None] = lambda: None
    ) -> dict[str, Cell]:
        """Strike, mend, and count; by wire. kinds: what is expected to become of each.

        meanwhile: what else is done while whoever was struck is dead.
        """
        cells = {client: Cell(kinds[client]) for client in kinds}
        for client in kinds:
            self._flows[client].arrive(ENOUGH, self._since[client], patience=30)
        before = {client: self.facts(wire) for client, wire in self.wires().items()}
        marks = {client: self._flows[client].mark() for client in kinds}
        victims = [VICTIMS[name](self) for name in row]
        began = time.time()
        old = [life for victim in victims for life in victim.strike(self)]
        assert not (alive := [life for life in old if life.alive]), f"still there: {alive}"
        meanwhile()
        self._mend_processes(victims)
        mended = time.time()
        clock = began if len(row) == 1 else mended
        restarted = [c for v in victims for who in v.killed for c in kinds if who == f"client:{c}"]
        for client, cell in cells.items():
            if cell.kind == MOVED:
                self._heal(client, cell, marks[client], began, clock, restarted)
        if faults.standing(self.paths).ended:
            self._gone([c for c in cells.values() if c.kind != KEPT], began)
        self._mend_namespaces()
        after = {c: self._flows[c].mark() for c in kinds if cells[c].kind == KEPT}
        self._prove(victims, old)
        for client, cell in cells.items():
            if cell.kind != KEPT:
                self._end(client)
        self._flow()
        self._left(cells, began)  # while what is to arrive arrives
        self._compare(cells, before)
        for client, cell in cells.items():
            flow = self._flows[client]
            # what arrives after this row has arrived before the next
            self._since[client] = after.get(client, Mark())
            flow.arrive(ENOUGH, self._since[client], patience=30)
            if cell.kind == KEPT:
                report = flow.report(marks[client])
                cell.count("lost", report.lost, str(report))
                cell.count("twice", report.there.duplicates + report.back.duplicates, str(report))
                cell.times["silence"] = max(report.there.silence, report.back.silence)
        return cells

    def _mend_processes(self, victims: Sequence["Victim"]) -> None:
        """Start again who was killed alone; who is in what has ended comes back with that."""
        ended = faults.standing(self.paths).ended
        killed = {self.faults.process(who) for victim in victims for who in victim.killed}
        stages: dict[Stage, list[str]] = {}
        for process in processes.plan(self.lab, self.paths).processes:
            if process.name in killed and not {*process.name.split("/")} & {*ended}:
                stages.setdefault(process.stage, []).append(process.name)
        for stage in sorted(stages):
            self.faults.start_together(stages[stage])

    def _mend_namespaces(self) -> None:
        ended = {*faults.standing(self.paths).ended}
        for name in [name for name, places in self._between.items() if ended & {*places}]:
            self._end(name)  # its couriers died with that
        nodes = [n for n in faults.standing(self.paths).ended if n in self.lab.nodes]
        for node in sorted(nodes, key=lambda name: name == "near"):  # clients wait for the others
            self.faults.start_node(node)
        self.faults.renew(*faults.standing(self.paths).ended)

    def _heal(
        self,
        client: str,
        cell: Cell,
        mark: Mark,
        began: float,
        clock: float,
        restarted: Collection[str],
    ) -> None:
        flow = self._flows[client]
        after = flow.mark()
        flow.until(
            lambda now: now.there.arrived >= HEALED,
            f"{client} to be healed",
            after,
            patience=PATIENCE * 2.0,
        )
        report = flow.report(mark, patience=0.0)
        late = clock - began
        cell.times["healed"] = max(0.0, max(report.there.silence, report.there.outage) - late)
        if client in restarted:  # it was dead itself, and had nothing to notice
            cell.count("unnoticed", 0)
        else:
            downs = [
                told["time"] / 1e9
                for told in self._told(client)
                if told["event"] == "down" and told["time"] / 1e9 >= began
            ]
            cell.count("unnoticed", 0 if downs else 1, "the client never said that it was down")
            if downs:
                cell.times["noticed"] = max(0.0, downs[0] - clock)
        cell.count("twice", report.there.duplicates, str(report))

    def _told(self, client: str) -> list[dict[str, Any]]:
        lines = Path(self.paths.status(client)).read_text().splitlines()
        return [json.loads(line) for line in lines]

    def _gone(self, cells: Sequence[Cell], began: float) -> None:
        """Nothing of the dead is there before somebody comes in their stead."""
        ended = faults.standing(self.paths).ended
        # of a node that died with all that runs there, its last word is what the registry knows
        dead = [e for e in ended if self.lab.node_of(e).name not in ended]

        def found() -> list[str]:
            left = self.audit.left(self._known(), self._waiting())
            if "caller" not in ended:
                left += [f"registered: {name}" for name in self._call([]) if name in dead]
            return left

        left = self._until_nothing(found, bar=GONE)
        for cell in cells:
            cell.times["gone"] = time.time() - began
            cell.count("left behind", left)

    def _prove(self, victims: Sequence["Victim"], old: Sequence[Life]) -> None:
        for victim in victims:
            for who in victim.killed:
                pid = self.faults.pids(who)
                assert pid not in [life.pid for life in old], f"{who} is the old one"
        missing: set[str] = set()

        def up() -> bool:
            nonlocal missing
            missing = {*WIRES, *FLAT} - {*self.wires()}
            return not missing

        with contextlib.suppress(AssertionError):
            _wait(up, "every wire is up", bar=2.0)
        assert not missing, f"no wire of {missing} is up"
        called = {wire.service: wire.endpoint for wire in self.wires().values()}
        for victim in victims:
            called |= victim.serves
        self._call([*called.items()])

    def _compare(self, cells: dict[str, Cell], before: dict[str, Facts]) -> None:
        wires = self.wires()
        for name, cell in cells.items():
            clients = FLAT if name == "flat" else (name,)
            changes = [
                change
                for client in clients
                for change in before[client].changes(self.facts(wires[client]))
            ]
            if cell.kind == KEPT:
                cell.count("changed", changes)
            if cell.kind == MOVED:
                named = [c for c in changes if c.startswith(("the interface", "addresses"))]
                cell.count("readdressed", named)

    def _left(self, cells: dict[str, Cell], began: float) -> None:
        """Nothing is there but what wires need, and everybody is registered once."""

        def found() -> list[str]:
            now = self._call([])
            differ = [] if now == self._registered else [f"registered: {now}"]
            return [*self.audit.left(self._known()), *differ]

        left = self._until_nothing(found, bar=CLEAN)
        for cell in cells.values():
            cell.times["clean"] = time.time() - began
            cell.count("left", left)

    def _until_nothing(self, found: Callable[[], list[str]], *, bar: float) -> list[str]:
        left: list[str] = []

        def nothing() -> bool:
            nonlocal left
            left = found()
            return not left

        with contextlib.suppress(AssertionError):
            _wait(nothing, "nothing is left", bar=bar)
        return left

    # -- facts ------------------------------------------------------------------------------

    def facts(self, wire: Wire) -> Facts:
        """What a wire is, at both its ends."""
        ends = {p: self.paths.namespace(p) for p in (wire.client, wire.endpoint)}
        looks = look(ends.values())
        known = {id_ for id_, one in self._known().items() if one.id == wire.id}
        devices = []
        for place, name in ends.items():
            for device in looks[name].foreign(self.audit.own(place)).values():
                mark = owner.Mark.parse(device.get("ifalias", ""))
                if mark and mark.connection in known:
                    devices.append(_identity(device, mark))
        assert len(devices) == 2, f"wire {wire.id} has devices {devices}"
        addresses = (*wire.client_addresses, "-", *wire.endpoint_addresses)
        return Facts(wire.interface, addresses, *devices)


def _wait(condition: Callable[[], bool], what: str, *, bar: float) -> None:
    asyncio.run(until(condition, what, bar=bar, record=False))


def _identity(device: dict[str, Any], mark: owner.Mark) -> tuple[Any, ...]:
    """Number, name, MAC, MTU; a VXLAN's VNI, port and ends; a WireGuard's public key and port."""
    kind = device["linkinfo"]["info_kind"]
    data = device["linkinfo"].get("info_data", {})
    more: tuple[Any, ...] = tuple(data.get(key) for key in ("id", "port", "local", "remote"))
    if kind == "tun":
        name = owner.tunnel_name(mark.wire, mark.side)
        more = tuple(_wg(name, what) for what in ("public-key", "listen-port"))
    return device["ifindex"], device["ifname"], device.get("address"), device["mtu"], kind, *more


def _wg(name: str, what: str) -> str:
    done = subprocess.run(["wg", "show", name, what], capture_output=True, text=True, check=False)
    return done.stdout.strip() or done.stderr.strip()


# --- who is struck ---------------------------------------------------------------------------


@dataclass
class Victim:
    """Somebody who is struck: strike returns who is dead of it."""

    strike: Callable[[Stand], list[Life]]
    killed: tuple[str, ...] = ()  # processes, whom somebody is to start again
    serves: dict[str, str] = field(default_factory=dict)  # service: who is called to prove it


def _processes(*who: str, **serves: str) -> Victim:
    def strike(stand: Stand) -> list[Life]:
        dead = []
        for one in who:
            if {*stand.faults.process(one).split("/")} & {*faults.standing(stand.paths).ended}:
                continue  # another victim took it along
            pid = stand.faults.pids(one)
            dead.append(Life(pid, started(pid)))
            stand.faults.kill(one)
        return dead

    return Victim(strike, who, serves)


def _namespaces(*places: str, **serves: str) -> Victim:
    def strike(stand: Stand) -> list[Life]:
        born = state.born(stand.paths)
        dead = []
        for place in places:
            if place not in faults.standing(stand.paths).ended:
                who = stand.faults.process(place)
                dead.append(born[who].mark)
                stand.faults.end_namespace(place)
        return dead

    return Victim(strike, (), serves)


def _node(stand: Stand, *nodes: str) -> Victim:
    def strike(stand: Stand) -> list[Life]:
        born = state.born(stand.paths)
        dead = [one.mark for name, one in born.items() if name.partition("/")[0] in nodes]
        for node in nodes:
            stand.faults.end_node(node)
        return dead

    return Victim(strike)


def _endpoints(stand: Stand) -> dict[str, str]:
    wires = stand.wires()
    return {wires[c].service: wires[c].endpoint for c in WIRES}


def _far(stand: Stand) -> list[str]:
    """The nodes where the tunnels end."""
    wires = stand.wires()
    return [*dict.fromkeys(wires[client].nodes[1] for client in ("vxlan", "wireguard"))]


def _one(nodes: list[str]) -> str:
    """Where both tunnels end: were there two, nobody would be left to take their wires over."""
    assert len(nodes) == 1, f"tunnels end on {' and '.join(nodes)}"
    return nodes[0]


def _routers(stand: Stand) -> list[str]:
    wires = stand.wires()
    return [*dict.fromkeys(wires[member].endpoint for member in FLAT)]


VICTIMS: Final[dict[str, Callable[[Stand], Victim]]] = {
    "client process": lambda s: _processes(*(f"client:{c}" for c in WIRES)),
    "client namespace": lambda s: _namespaces(*WIRES),
    "endpoint process": lambda s: _processes(
        *(f"endpoint:{e}" for e in _endpoints(s).values()), **_endpoints(s)
    ),
    "endpoint namespace": lambda s: _namespaces(*_endpoints(s).values(), **_endpoints(s)),
    "nsmgr near": lambda s: _processes("nsmgr@near"),
    "nsmgr far": lambda s: _processes(*(f"nsmgr@{node}" for node in _far(s))),
    "forwarder near": lambda s: _processes("forwarder@near"),
    "forwarder far": lambda s: _processes(*(f"forwarder@{node}" for node in _far(s))),
    "registry": lambda s: _processes("registry@east"),
    "router": lambda s: _processes(*(f"router:{r}" for r in _routers(s)), flat=_routers(s)[0]),
    "node near": lambda s: _node(s, "near"),
    "node far": lambda s: _node(s, _one(_far(s))),
}

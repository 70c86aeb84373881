"""Breaking a lab that is up, one thing after another, and looking whether it holds.

Numbered packets are on every wire and between the members of flat networks, and somebody
asks for wires all the time, while a schedule (labs/schedule.py) is gone through. After each
fault, and until the next:

    carries    every wire carries again, within CARRIES seconds of the fault's end
    packets    none is lost, or comes twice, on a wire that the fault did not cut
    answers    every request was answered in time, and new ones get their wires
    processes  nobody has ended but who was told to
    addresses  no address is in two places
    leftovers  links, routes, rules, neighbours, processes, registrations are those from before
    flat       memory, open files, tasks, threads of every process do not grow: over all of it,
               and in each of its lives, because who is killed again and again never grows old

The first that does not hold ends it, with what was seen.
"""

import contextlib
import itertools
import json
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

from labs import inventory, processes, state, wear
from labs.alive import Mark as Life
from labs.faults import Faults
from labs.hands import EndedError, FailedError, Hands
from labs.lab import Client, Lab
from labs.paths import Paths
from labs.schedule import OF_NODES, Fault, called
from labs.traffic import Couriers, Mark, Traffic
from labs.wires import Wire, wires
from nsm.errors import DeadlineError, NsmError, PreconditionError

# Ten times what it takes where nothing else runs: a busy machine makes slow figures, and no harm.
CARRIES: Final = 20.0  # seconds after a fault within which every wire carries again
STEADY: Final = 1.0  # seconds, up and without a loss, after which a wire counts as healed
RATE: Final = 100.0  # packets a second on every wire, each way
WITHIN: Final = 6.0  # seconds a request of the prober may take
LEASE: Final = 15.0  # seconds a wire of the prober's lives that nobody could close
LEFT: Final = 10.0  # seconds within which nothing is left of what is over
ANSWER: Final = 20.0  # seconds after a fault within which somebody who asks gets a wire
_LOOK: Final = 0.05

Report = Callable[[str], None]


class Probers(Hands):
    """Who asks for wires, one in the namespace of each client that the lab's file leaves alone."""

    def __init__(self) -> None:
        super().__init__("labs.prober")


class BrokenError(Exception):
    """An invariant that does not hold."""

    def __init__(self, invariant: str, evidence: Sequence[str]) -> None:
        super().__init__(f"{invariant}: {'; '.join(evidence)}")
        self.invariant = invariant
        self.evidence = tuple(evidence)


@dataclass(frozen=True, slots=True)
class Broke:
    """Which invariant did not hold, after which fault (from 1), and what was seen of it."""

    invariant: str
    after: int
    seconds: float  # since the first fault
    evidence: tuple[str, ...]


@dataclass(slots=True)
class Outcome:
    """What a run came to."""

    done: list[Fault] = field(default_factory=list)
    seconds: float = 0.0
    healed: list[float] = field(default_factory=list)  # seconds, of each wire that was cut
    moved: int = 0  # of those, how many came back with other addresses
    lost: int = 0  # packets on wires that were cut
    arrived: int = 0
    asked: dict[str, Any] = field(default_factory=dict)
    held: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)  # first, last
    broke: Broke | None = None

    @property
    def made(self) -> int:
        """Wires that somebody got who asked all the time."""
        return sum(one["made"] for one in self.asked.values())

    @property
    def refused(self) -> int:
        """Requests that were answered with a refusal."""
        return sum(sum(one["refused"].values()) for one in self.asked.values())

    def healing(self) -> dict[str, float]:
        """Of the wires that were cut: how many, and how long until they carried again."""
        if not self.healed:
            return {"n": 0}
        median = statistics.median(self.healed)
        return {"n": len(self.healed), "median_s": round(median, 3),
                "max_s": round(max(self.healed), 3), "moved": self.moved}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Between:
    """What packets are on: a wire, or the two of a flat network's members."""

    wires: tuple[Wire, ...]

    @property
    def clients(self) -> tuple[str, ...]:
        return tuple(wire.client for wire in self.wires)

    @property
    def nodes(self) -> set[str]:
        return {node for wire in self.wires for node in wire.nodes}

    @property
    def places(self) -> tuple[str, str]:
        """Where they start and end."""
        first, last = self.wires[0], self.wires[-1]
        return first.client, last.endpoint if first is last else last.client

    @property
    def addresses(self) -> tuple[str, str]:
        first, last = self.wires[0], self.wires[-1]
        far = last.endpoint_addresses if first is last else last.client_addresses
        return first.client_addresses[0], far[0]

    def __str__(self) -> str:
        what = self.wires[0].mechanism if len(self.wires) == 1 else self.wires[0].network
        return f"{' - '.join(self.places)} ({what})"

    def cut_by(self, fault: Fault) -> bool:
        """Whether packets may be lost: its nodes do not reach each other, or not at full rate,
        one of them died, or its client was asked to end, and closed it."""
        nodes, whom = self.nodes, set(fault.who)
        match fault.do:
            case "restart":
                return any(f"client:{client}" in whom for client in self.clients)
            case "partition":
                return bool(nodes & whom) and not nodes <= whom
            case "unplug" | "rate":
                return len(nodes) > 1 and bool(nodes & whom)
            case _:
                return fault.do == "reboot" and bool(nodes & whom)


@dataclass(slots=True)
class _Flow:
    """The packets on it."""

    between: _Between
    traffic: Traffic
    open: contextlib.ExitStack
    mark: Mark = field(default_factory=Mark)
    ended: bool = False  # its couriers died with their node
    up: bool = True  # as its clients say

    def __str__(self) -> str:
        return str(self.between)


class Chaos:
    """A lab that is up, with packets on its wires and somebody who asks for more: a block."""

    def __init__(self, lab: Lab, paths: Paths, report: Report = lambda _: None) -> None:
        self._lab = lab
        self._paths = paths
        self._report = report
        self._faults = Faults(lab, paths)
        self._plan = processes.plan(lab, paths)
        self._order = [called(p) for p in self._plan.processes]
        self._couriers, self._probers = Couriers(), Probers()
        self._asking: dict[str, str] = {}  # namespaces of who asks, by client
        self._told_before: list[dict[str, Any]] = []  # by those that died with their node
        self._flows: list[_Flow] = []
        self._open = contextlib.ExitStack()
        self._before: Counter[str] = Counter()
        self._pids: dict[str, int] = {}
        self._logs = {called(p): p.log for p in self._plan.processes if p.module}
        self._looks: list[dict[str, wear.Held]] = []
        self._in_lives: list[dict[str, wear.Held]] = []  # the same, by process and pid

    def __enter__(self) -> Self:
        with self._open:
            there = self._between(wires(self._lab, self._paths))
            if not there:
                raise PreconditionError(f"lab {self._lab.name} has no wire to break")
            self._open.enter_context(self._couriers)
            for one in there:
                self._flows.append(self._flow(one))
            self._open.enter_context(self._probers)
            for client in self._lab.clients.values():
                if client.netns_only:
                    self._seat(client)
            self._open = self._open.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, faults: Sequence[Fault], until: float) -> Outcome:
        """Go through faults until they are over, one does harm, or it is so late (monotonic)."""
        outcome = Outcome()
        start = time.monotonic()
        try:
            self._settle()
            for number, fault in enumerate(faults, 1):
                if time.monotonic() >= until:
                    break
                outcome.done.append(fault)
                self._report(f"{number} of {len(faults)}: {fault}")
                self._step(fault, outcome)
            outcome.held = wear.trend(self._looks)
            _flat(outcome.held)
            _flat(wear.trend(self._in_lives))
        except BrokenError as broken:
            outcome.broke = Broke(
                broken.invariant, len(outcome.done), round(time.monotonic() - start, 1),
                broken.evidence,
            )  # fmt: skip
        outcome.seconds = time.monotonic() - start
        with contextlib.suppress(EndedError, FailedError):
            outcome.asked = self._told()
        return outcome

    # -- one fault ----------------------------------------------------------------------------

    def _settle(self) -> None:
        """The state that everything is to come back to."""
        for flow in self._flows:
            self._carries(flow, time.monotonic() + CARRIES)
        self._pause()
        self._before = self._standing()
        self._pids = self._alive()
        self._go()
        self._served({})
        for flow in self._flows:
            flow.mark = flow.traffic.mark()

    def _step(self, fault: Fault, outcome: Outcome) -> None:
        cut = [flow for flow in self._flows if flow.between.cut_by(fault)]
        asked = self._made()
        with _named("a fault that cannot be taken back"):
            self._break(fault)
        if fault.do == "reboot":
            asked = {}
        ended = time.monotonic()
        for flow in cut:
            outcome.moved += self._carries(flow, ended + CARRIES)
            outcome.healed.append(time.monotonic() - ended)
            outcome.lost += flow.traffic.report(flow.mark).lost
            flow.mark = flow.traffic.mark()
        self._look_at_processes(fault)
        self._answered()
        self._served(asked)
        self._look_at_what_is_left(cut_off=bool(cut))
        time.sleep(fault.rest)  # the schedule's own
        for flow in self._flows:
            report = flow.traffic.report(flow.mark)
            outcome.arrived += report.arrived
            if not report.whole:
                raise BrokenError("packets", [f"{flow}: {report}"])
            flow.mark = flow.traffic.mark()

    def _break(self, fault: Fault) -> None:
        """Break it, let its time go by, mend it."""
        if fault.do in OF_NODES:
            self._break_network(fault)
            return
        faults = self._faults
        if fault.do == "freeze":
            for who in fault.who:
                faults.freeze(who)
            time.sleep(fault.seconds)
            for who in fault.who:
                faults.thaw(who)
            return
        for who in fault.who:
            faults.kill(who, signal.SIGKILL if fault.do == "kill" else signal.SIGTERM)
        time.sleep(fault.seconds)
        for who in sorted(fault.who, key=self._order.index):
            self._pids[who] = faults.start(who)

    def _break_network(self, fault: Fault) -> None:
        faults, node = self._faults, fault.who[0]
        match fault.do:
            case "unplug":
                faults.link(node, False)
                time.sleep(fault.seconds)
                faults.link(node, True)
            case "partition":
                others = [n for n, one in self._lab.nodes.items() if one.kind == "node"]
                faults.partition(fault.who, [n for n in others if n not in fault.who])
                time.sleep(fault.seconds)
                faults.mend()
            case "rate":
                faults.rate(node, fault.bits)
                time.sleep(fault.seconds)
                faults.rate(node, None)
            case "reboot":
                self._reboot(node, fault.seconds)

    def _reboot(self, node: str, seconds: float) -> None:
        """A node dies with all that runs there, ours too, and comes back with other processes."""
        there = {place for place in self._lab.places if self._lab.node_of(place).name == node}
        for flow in self._flows:
            if there & {*flow.between.places}:
                flow.open.close()
                flow.ended = True
        asked = [self._lab.clients[name] for name in self._asking if name in there]
        for client in asked:
            self._told_before.append(self._order_one(client.name, "tell"))
            self._probers.drop(self._asking.pop(client.name))
        for place in there:
            self._couriers.drop(self._paths.namespace(place))
        self._faults.end_node(node)
        time.sleep(seconds)
        self._faults.start_node(node)
        here = {called(p) for p in self._plan.processes if p.name.startswith(f"{node}/")}
        self._pids |= {who: pid for who, pid in self._alive().items() if who in here}
        for client in asked:
            self._seat(client)
            self._order_one(client.name, "ask")

    # -- packets ------------------------------------------------------------------------------

    def _between(self, there: Sequence[Wire]) -> list[_Between]:
        """Each wire; of those that lead into one network, each with the next."""
        found = [_Between((wire,)) for wire in there if not wire.network]
        for network in dict.fromkeys(wire.network for wire in there if wire.network):
            members = [wire for wire in there if wire.network == network]
            found += map(_Between, itertools.pairwise(members) if members[1:] else [(*members,)])
        return found

    def _flow(self, between: _Between) -> _Flow:
        """Packets on it, between the addresses it has now."""
        open_ = contextlib.ExitStack()
        self._open.callback(open_.close)
        traffic = Traffic(
            self._paths, *between.places, between.addresses, rate=RATE, couriers=self._couriers
        )
        return _Flow(between, open_.enter_context(traffic), open_)

    def _carries(self, flow: _Flow, until: float) -> bool:
        """Wait until it is up, as its clients say, and nothing was lost on it for a while; whether
        that is at other addresses.

        Packets may come through before: what was asked for meanwhile still takes its place.
        """
        enough = int(STEADY * RATE)
        moved = False
        while True:
            moved = self._follow(flow) or moved
            seen = "its client says that it is down"
            if flow.up:
                traffic, mark = flow.traffic, flow.traffic.mark()
                with contextlib.suppress(DeadlineError):
                    traffic.until(
                        lambda one: one.arrived >= enough or one.lost > enough,
                        f"{enough} packets each way", mark, patience=4 * STEADY,
                    )  # fmt: skip
                report = traffic.report(mark)
                moved = self._follow(flow) or moved
                whole = report.whole and report.arrived >= enough
                if whole and flow.up and flow.traffic is traffic:
                    return moved
                seen = str(report)
            if time.monotonic() > until:
                raise BrokenError("carries", [f"{flow}, {CARRIES:g} s later: {seen}"])
            time.sleep(_LOOK)

    def _follow(self, flow: _Flow) -> bool:
        """Whether it has other addresses by now. Packets are sent to those it has."""
        old = flow.between
        up = {(w.client, w.interface): w for w in wires(self._lab, self._paths)}
        found = [up.get((wire.client, wire.interface)) for wire in old.wires]
        there = tuple(w for w in found if w and w.client_addresses and w.endpoint_addresses)
        flow.up = len(there) == len(found)
        if not flow.up:
            return False
        now = _Between(there)
        moved = now.addresses != old.addresses
        if moved or now.places != old.places or flow.ended:
            flow.open.close()
            new = self._flow(now)
            flow.traffic, flow.open, flow.mark, flow.ended = new.traffic, new.open, Mark(), False
        flow.between = now
        return moved

    # -- who asks -----------------------------------------------------------------------------

    def _seat(self, client: Client) -> None:
        node = self._lab.nodes[client.on]
        namespace = self._paths.namespace(client.name)
        entry = next(e for e in self._plan.entries if e.namespace == namespace)
        services = [u for c in self._lab.clients.values() for u in c.connect]
        own = [u for c in self._lab.clients.values()
               if self._lab.nodes[c.on].cluster == node.cluster for u in c.connect]  # fmt: skip
        self._probers.ask(
            {
                namespace: {
                    "name": client.name,
                    "gid": entry.gid,
                    "agent": f"unix://{self._paths.cluster(node.cluster, 'spiffe.sock')}",
                    "manager": f"unix://{self._paths.node(client.on, 'nsm.io.sock')}",
                    "urls": sorted({u.rpartition("/")[0] for u in own or services}),
                    "log": self._paths.log(f"{client.on}/{client.name}"),
                    "within": WITHIN,
                    "lifetime": LEASE,
                }
            }
        )
        self._asking[client.name] = namespace

    def _orders(self, do: str) -> dict[str, Any]:
        try:
            return self._probers.ask({name: {"do": do} for name in self._asking.values()})
        except EndedError as ended:
            raise BrokenError("processes", [str(ended)]) from ended

    def _order_one(self, client: str, do: str) -> Any:
        namespace = self._asking[client]
        return self._probers.ask({namespace: {"do": do}})[namespace]

    def _pause(self) -> None:
        self._orders("pause")

    def _go(self) -> None:
        self._orders("ask")

    def _told(self) -> dict[str, Any]:
        """What was asked for, by URL: of all who ask, and those who did."""
        found: dict[str, Any] = {}
        for told in (*self._told_before, *self._orders("tell").values()):
            for url, one in told.items():
                found[url] = _joined(found[url], one) if url in found else one
        return found

    def _made(self) -> dict[str, int]:
        return {url: one["made"] for url, one in self._told().items()}

    def _answered(self) -> None:
        """All requests so far were answered in time, and as the mesh answers."""
        wrong = [
            f"{url}: {what}"
            for url, one in self._told().items()
            for what in (*(f"answered after {late}" for late in one["late"]), *one["defects"])
        ]
        if wrong:
            raise BrokenError("answers", wrong)

    def _served(self, before: Mapping[str, int]) -> None:
        """Whoever asks gets a wire again."""
        before = before or self._made()
        end = time.monotonic() + ANSWER
        while late := [url for url, count in self._made().items() if count <= before.get(url, 0)]:
            if time.monotonic() > end:
                told = self._told()
                raise BrokenError(
                    "answers",
                    [f"no wire of {url} for {ANSWER:g} s: {json.dumps(told[url])}" for url in late],
                )
            time.sleep(_LOOK)

    # -- what is there ------------------------------------------------------------------------

    def _alive(self) -> dict[str, int]:
        """The pid of every process that lives, by how people call it."""
        return {who: mark.pid for who, mark in self._lives().items()}

    def _lives(self) -> dict[str, Life]:
        """Every process that lives, by how people call it."""
        born = state.born(self._paths)
        names = {p.name: called(p) for p in self._plan.processes if not p.is_errand}
        return {
            names[name]: child.mark
            for name, child in born.items()
            if name in names and child.mark.alive
        }

    def _look_at_processes(self, fault: Fault) -> None:
        now = self._alive()
        wrong = [
            f"{who} (pid {pid}) {'is pid ' + str(now[who]) if who in now else 'has ended'}"
            for who, pid in self._pids.items()
            if now.get(who) != pid
        ]
        if wrong:
            raise BrokenError("processes", [*wrong, f"after: {fault}"])

    def _look_at_what_is_left(self, *, cut_off: bool) -> None:
        """Once nobody asks for a while, everything is as it was."""
        self._pause()
        patience = LEFT + (LEASE if cut_off or self._unclosed() else 0.0)
        end = time.monotonic() + patience
        while (now := self._standing()) != self._before:
            if time.monotonic() > end:
                more = [f"left: {count} {what}" for what, count in (now - self._before).items()]
                less = [f"gone: {count} {what}" for what, count in (self._before - now).items()]
                raise BrokenError("leftovers", [*more, *less, f"for {patience:g} s"])
            time.sleep(_LOOK)
        lives = {who: mark for who, mark in self._lives().items() if who in self._logs}
        held = wear.held({who: (mark, self._logs[who]) for who, mark in lives.items()})
        self._looks.append(held)
        self._in_lives.append({f"{who} (pid {lives[who].pid})": one for who, one in held.items()})
        self._go()

    def _unclosed(self) -> bool:
        """Whether somebody could not close a wire, or take a request back: leases end those."""
        return any(one["unclosed"] or one["refused"] for one in self._told().values())

    def _standing(self) -> Counter[str]:
        """What of ours is in the kernel, runs, and is registered, a line each with its count."""
        found, places = inventory.taken(self._lab, self._paths)
        twice = [f"{a} is in {', '.join(sorted(p))}" for a, p in places.items() if len(p) > 1]
        if twice:
            raise BrokenError("addresses", twice)
        for namespace in [*self._asking.values()][:1]:
            with contextlib.suppress(FailedError):  # a registry that is coming back
                registered = self._probers.ask({namespace: {"do": "registered"}})[namespace]
                found.update(f"registration of {name}" for name in registered)
        return found


def _joined(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """What two came to who asked for the same."""
    found = {**a, "slowest": max(a["slowest"], b["slowest"]), "why": {**a["why"], **b["why"]}}
    found |= {what: a[what] + b[what] for what in ("made", "unclosed", "late", "defects")}
    return found | {"refused": dict(Counter(a["refused"]) + Counter(b["refused"]))}


def _flat(trends: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    if more := wear.growing(trends):
        raise BrokenError("flat", more)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Whatever the lab refuses or a process says at its start is a broken invariant."""
    try:
        yield
    except NsmError as refused:
        raise BrokenError("processes", [f"{what}: {refused}"]) from refused

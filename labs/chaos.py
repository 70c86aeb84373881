"""Breaking a lab that is up, one thing after another, and looking whether it holds.

Numbered packets are on every wire and somebody asks for wires all the time, while a
schedule (labs/schedule.py) is gone through. After each fault, and until the next:

    carries    every wire carries again, within CARRIES seconds of the fault's end
    packets    none is lost, or comes twice, on a wire that the fault did not cut
    answers    every request was answered in time, and new ones get their wires
    processes  nobody has ended but who was told to
    addresses  no address is in two places
    leftovers  links, routes, rules, neighbours, processes, registrations are those from before
    flat       memory, open files, tasks, threads of every process do not grow, over all of it

The first that does not hold ends it, with what was seen.
"""

import contextlib
import json
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
from labs.lab import Lab
from labs.paths import Paths
from labs.schedule import Fault, called
from labs.traffic import Couriers, Mark, Traffic
from labs.wires import Wire, wires
from nsm.errors import DeadlineError, NsmError, PreconditionError

CARRIES: Final = 10.0  # seconds after a fault within which every wire carries again
STEADY: Final = 0.5  # seconds without a loss after which a wire counts as healed
RATE: Final = 100.0  # packets a second on every wire, each way
WITHIN: Final = 3.0  # seconds a request of the prober may take
LEASE: Final = 15.0  # seconds a wire of the prober's lives that nobody could close
LEFT: Final = 5.0  # seconds within which nothing is left of what is over
ANSWER: Final = 10.0  # seconds after a fault within which somebody who asks gets a wire
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


@dataclass(slots=True)
class _Flow:
    """A wire, and the packets on it."""

    wire: Wire
    traffic: Traffic
    open: contextlib.ExitStack
    mark: Mark = field(default_factory=Mark)

    def __str__(self) -> str:
        return f"{self.wire.client} - {self.wire.endpoint} ({self.wire.mechanism})"

    def cut_by(self, fault: Fault) -> bool:
        """Whether packets may be lost: its nodes do not reach each other, or not at full rate,
        or its client was asked to end, and closed it."""
        a, b = self.wire.nodes
        if fault.do == "restart":
            return f"client:{self.wire.client}" in fault.who
        if fault.do == "partition":
            return (a in fault.who) != (b in fault.who)
        return fault.do in ("unplug", "rate") and a != b and bool({a, b} & set(fault.who))


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
        self._asking: list[str] = []  # namespaces
        self._flows: list[_Flow] = []
        self._open = contextlib.ExitStack()
        self._before: Counter[str] = Counter()
        self._pids: dict[str, int] = {}
        self._logs = {called(p): p.log for p in self._plan.processes if p.module}
        self._looks: list[dict[str, wear.Held]] = []

    def __enter__(self) -> Self:
        with self._open:
            there = wires(self._lab, self._paths)
            if not there:
                raise PreconditionError(f"lab {self._lab.name} has no wire to break")
            self._open.enter_context(self._couriers)
            for wire in there:
                self._flows.append(self._flow(wire))
            self._open.enter_context(self._probers)
            self._seat()
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
        cut = [flow for flow in self._flows if flow.cut_by(fault)]
        asked = self._made()
        with _named("a fault that cannot be taken back"):
            self._break(fault)
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
        faults = self._faults
        match fault.do:
            case "kill" | "restart":
                number = 9 if fault.do == "kill" else 15
                for who in fault.who:
                    faults.kill(who, number)
                time.sleep(fault.seconds)
                for who in sorted(fault.who, key=self._order.index):
                    self._pids[who] = faults.start(who)
            case "freeze":
                for who in fault.who:
                    faults.freeze(who)
                time.sleep(fault.seconds)
                for who in fault.who:
                    faults.thaw(who)
            case "unplug":
                faults.link(fault.who[0], False)
                time.sleep(fault.seconds)
                faults.link(fault.who[0], True)
            case "partition":
                others = [n for n, one in self._lab.nodes.items() if one.kind == "node"]
                faults.partition(fault.who, [n for n in others if n not in fault.who])
                time.sleep(fault.seconds)
                faults.mend()
            case "rate":
                faults.rate(fault.who[0], fault.bits)
                time.sleep(fault.seconds)
                faults.rate(fault.who[0], None)

    # -- packets ------------------------------------------------------------------------------

    def _flow(self, wire: Wire) -> _Flow:
        """Packets on a wire, between the addresses it has now."""
        open_ = contextlib.ExitStack()
        self._open.callback(open_.close)
        ends = (wire.client_addresses[0], wire.endpoint_addresses[0])
        traffic = Traffic(
            self._paths, wire.client, wire.endpoint, ends, rate=RATE, couriers=self._couriers
        )
        return _Flow(wire, open_.enter_context(traffic), open_)

    def _carries(self, flow: _Flow, until: float) -> bool:
        """Wait until nothing was lost on it for a while; whether that is at other addresses."""
        enough = int(STEADY * RATE)
        moved = False
        while True:
            moved = self._follow(flow) or moved
            mark = flow.traffic.mark()
            with contextlib.suppress(DeadlineError):
                flow.traffic.until(
                    lambda one: one.arrived >= enough or one.lost > enough,
                    f"{enough} packets each way", mark, patience=4 * STEADY,
                )  # fmt: skip
            report = flow.traffic.report(mark)
            if report.whole and report.arrived >= enough:
                return moved
            if time.monotonic() > until:
                raise BrokenError("carries", [f"{flow}, {CARRIES:g} s later: {report}"])

    def _follow(self, flow: _Flow) -> bool:
        """Whether the wire has other addresses by now; then packets are sent to those."""
        of = (flow.wire.client, flow.wire.interface)
        now = next(
            (w for w in wires(self._lab, self._paths) if (w.client, w.interface) == of), None
        )
        if now is None or not now.client_addresses or (now.endpoint_addresses == (
            flow.wire.endpoint_addresses
        ) and now.client_addresses == flow.wire.client_addresses):  # fmt: skip
            return False
        flow.open.close()
        new = self._flow(now)
        flow.wire, flow.traffic, flow.open, flow.mark = now, new.traffic, new.open, Mark()
        return True

    # -- who asks -----------------------------------------------------------------------------

    def _seat(self) -> None:
        services = [u for c in self._lab.clients.values() for u in c.connect]
        for client in self._lab.clients.values():
            if not client.netns_only:
                continue
            node = self._lab.nodes[client.on]
            namespace = self._paths.namespace(client.name)
            entry = next(e for e in self._plan.entries if e.namespace == namespace)
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
            self._asking.append(namespace)

    def _orders(self, do: str) -> dict[str, Any]:
        return self._probers.ask({namespace: {"do": do} for namespace in self._asking})

    def _pause(self) -> None:
        self._orders("pause")

    def _go(self) -> None:
        self._orders("ask")

    def _told(self) -> dict[str, Any]:
        return {url: one for told in self._orders("tell").values() for url, one in told.items()}

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
        ours = {who: (mark, self._logs[who]) for who, mark in lives.items()}
        self._looks.append(wear.held(ours))
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
        for namespace in self._asking[:1]:
            with contextlib.suppress(FailedError):  # a registry that is coming back
                registered = self._probers.ask({namespace: {"do": "registered"}})[namespace]
                found.update(f"registration of {name}" for name in registered)
        return found


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

"""The checks of a lab, asked of the network itself; each ends as one row of a table."""

import random
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final

from labs import alive, seats, state, units
from labs import lab as labfile
from labs.breaking import carry_out, touched
from labs.faults import Faults, standing
from labs.flows import MOST, Flows, Pair, pairs
from labs.hands import FailedError, Hands
from labs.lab import Capture, Check, Lab, Port, matching
from labs.paths import Paths
from labs.processes import Stage
from labs.wires import Way, Wire, of_family, outside, ways, wires
from nsm.errors import NsmError

PATIENCE: Final = 1.0  # seconds for the last echo
TRANSFER_PATIENCE: Final = 10.0  # seconds without progress
HEALING: Final = 20.0  # seconds until packets flow again, whatever is expected
LOOK_EVERY: Final = 0.1  # seconds between looks at a wire that may take its time
MARK: Final = "vwire lab payload "
_TOLD: Final = 5  # faults named in one row
_Asked = labfile.Ping | labfile.Datagrams | labfile.Transfer


@dataclass(frozen=True, slots=True)
class Result:
    """Whether a check holds, in one sentence, and what it measured."""

    name: str
    holds: bool
    says: str
    seconds: float
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a kind of check found: all faults (none: it holds), and a line for when it holds."""

    faults: Sequence[str]
    fine: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Target:
    """An address that source asks, and whose it is; mtu is that of source's end."""

    source: str
    target: str
    address: str
    mtu: int

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} {self.address}"


class Checks:
    """Runs the checks of a lab that is up."""

    def __init__(self, lab: Lab, paths: Paths, hands: Hands) -> None:
        self._lab = lab
        self._paths = paths
        self._hands = hands
        self._while_up: dict[Port, Mapping[str, Any]] = {}
        self._faulty = False  # a fault was carried out

    @contextmanager
    def watching(self) -> Iterator[Callable[[Stage], None]]:
        """For the block in which the lab comes up: captures that are to run meanwhile.

        Whoever brings it up calls what this yields before each stage.
        """
        asked = [check.what for check in self._lab.checks if isinstance(check.what, Capture)]
        ports = {one.port for one in asked if one.during == labfile.UP}

        def before(stage: Stage) -> None:
            if stage is Stage.CLIENT:  # what comes before is the mesh's own talk
                for port in ports:
                    self._watch(port)
                    self._while_up[port] = {}

        yield before
        self._while_up = {port: self._watched(port) for port in self._while_up}

    def run(self, check: Check) -> Result:
        """One check. What the network refuses is a check that does not hold, not an error."""
        start = time.monotonic()
        try:
            found = self._found(check)
        except FailedError as refusal:
            found = Verdict([str(refusal)], "")
        told = [*found.faults[:_TOLD]]
        if len(found.faults) > _TOLD:
            told.append(f"and {len(found.faults) - _TOLD} more")
        says = "; ".join(told) or found.fine
        seconds = time.monotonic() - start
        return Result(check.name, not found.faults, says, seconds, found.figures)

    def _found(self, check: Check) -> Verdict:
        match check.what:
            case labfile.Ping():
                return self._ping(check.what)
            case labfile.Datagrams():
                return self._datagrams(check.what)
            case labfile.Transfer():
                return self._transfer(check.what)
            case labfile.Exec():
                return self._exec(check.what)
            case labfile.Capture():
                return self._capture(check.what)
            case labfile.WireFacts():
                return self._wire_in_time(check.what)
            case labfile.Stop():
                return self._stop(check.what)
            case labfile.Faulty():
                return self._fault(check.what)

    # -- who with whom ----------------------------------------------------------------------

    def _healed(self) -> list[Wire]:
        """The wires that are up; after a fault those that clients heal are waited for."""
        end = time.monotonic() + HEALING
        while True:
            there = wires(self._lab, self._paths)
            if not self._faulty or time.monotonic() > end:
                return there
            ended = standing(self._paths).ended
            wanted = sum(len(c.connect) for c in self._lab.clients.values() if c.name not in ended)
            if len(there) >= wanted:
                return there
            time.sleep(LOOK_EVERY)

    def _targets(self, asked: _Asked, faults: list[str], *, lost_all: bool = False) -> list[Target]:
        """Each address that is asked, by whom; what is missing becomes a fault.

        Where all is to be lost, outsiders are meant too, and whoever else has no way there.
        """
        found: list[Target] = []
        ends = (*self._lab.clients, *self._lab.endpoints)
        there = self._healed()
        whom = "*" if labfile.is_name(asked.target) else asked.target
        pairs = [(a, b) for a in matching(asked.source, ends) for b in matching(whom, ends)]
        on = {(a, b): ways(there, a, b, asked.service) for a, b in pairs}
        alone = [a for a in self._lab.clients if self._lab.clients[a].netns_only]
        if lost_all:
            strangers = [pair for pair in pairs if pair[0] in alone or not any(on.values())]
            on |= {(a, b): outside(there, b, asked.service) for a, b in strangers if a != b}
        if labfile.is_name(asked.target):
            return self._named(asked, on, faults, lost_all=lost_all)
        for (a, b), of in on.items():
            for way in of:
                faults += _missing(f"{a} -> {b}: {way.wire}", way.addresses, asked)
                addresses = of_family(way.addresses, asked.families)
                found += [Target(a, b, address, way.mtu) for address in addresses]
        if not any(on.values()):
            faults += self._nobody(asked)
        return found

    def _nobody(self, asked: _Asked) -> list[str]:
        what = "" if asked.service == "*" else f" of {asked.service}"
        return [f"no wire{what} joins {asked.source} and {asked.target}"]

    def _named(
        self,
        asked: _Asked,
        on: Mapping[tuple[str, str], Sequence[Way]],
        faults: list[str],
        *,
        lost_all: bool,
    ) -> list[Target]:
        """The same by what members are called: as programs at the source find it in DNS.

        A name must lead to its member and nobody else; where all is to be lost, it may be unknown.
        """
        members = {pair: of for pair, of in on.items() if of and pair[1] in self._lab.clients}
        names: dict[str, dict[str, str]] = {}
        for a, b in members:
            names.setdefault(a, {})[b] = asked.target.replace(labfile.CLIENT, b)
        if not members:
            faults += self._nobody(asked)
        orders = {
            self._paths.namespace(a): {
                "do": "resolve", "names": [*of.values()], "families": asked.families
            }
            for a, of in names.items()
        }  # fmt: skip
        told = self._hands.ask(orders)
        found = []
        for (a, b), of in members.items():
            name = names[a][b]
            answer = told[self._paths.namespace(a)][name]
            known = {address for way in of for address in of_family(way.addresses, asked.families)}
            for way in of:
                faults += _missing(f"{a} -> {name}: {way.wire}", way.addresses, asked)
            if set(answer["addresses"]) != known and not (lost_all and not answer["addresses"]):
                got = ", ".join(answer["addresses"]) or answer["failure"]
                faults.append(f"{a}: {name} is {got}, expected {', '.join(sorted(known))}")
            found += [Target(a, b, address, of[0].mtu) for address in answer["addresses"]]
        return found

    # -- ping -------------------------------------------------------------------------------

    def _ping(self, asked: labfile.Ping) -> Verdict:
        faults: list[str] = []
        todo: dict[str, list[tuple[str, str, int]]] = {}
        for one in self._targets(asked, faults, lost_all=asked.lost == "all"):
            size = asked.size if asked.size > 0 else one.mtu - asked.size
            todo.setdefault(one.source, []).append((one.target, one.address, size))
        idents = {a: ident for ident, a in enumerate(todo, random.randrange(1, 1 << 15))}  # noqa: S311
        with self._listening({b for rows in todo.values() for b, *_ in rows}) as arrivals:
            told = self._hands.ask(
                {
                    self._paths.namespace(a): {
                        "do": "ping",
                        "targets": [{"address": x, "size": size} for _, x, size in rows],
                        "count": asked.count,
                        "patience": PATIENCE,
                        "ident": idents[a],
                    }
                    for a, rows in todo.items()
                }
            )
        sent = lost = arrived = 0
        best: list[float] = []
        for a, rows in todo.items():
            answered: dict[str, int] = {}
            for (b, address, _), row in zip(rows, told[self._paths.namespace(a)], strict=True):
                sent, lost = sent + row["sent"], lost + row["lost"]
                best += [row["ms"]] if row["ms"] is not None else []
                answered[b] = answered.get(b, 0) + row["sent"] - row["lost"]
                faults += _lost(f"{a} -> {b} {address}", row, asked.lost)
            for b, replies in answered.items():
                came = arrivals[b].get(str(idents[a]), 0)
                arrived += came
                if came < replies or (came and asked.lost == "all"):
                    expected = "none" if asked.lost == "all" else f"{replies}, as were answered"
                    faults.append(f"{a} -> {b}: {came} arrived, expected {expected}")
        if isinstance(asked.lost, int) and lost > asked.lost > 0:
            faults.append(f"{lost} of {sent} lost, expected at most {asked.lost}")
        fine = f"{sent} sent, {arrived} arrived, {sent - lost} answered"
        fine += f", {min(best):.2f} to {max(best):.2f} ms" if best else ""
        figures = {
            "sent": sent, "arrived": arrived, "lost": lost, "best_ms": min(best, default=None)
        }  # fmt: skip
        return Verdict(faults, fine, figures)

    @contextmanager
    def _listening(self, places: Iterable[str]) -> Iterator[dict[str, Mapping[str, int]]]:
        """For the block in which echoes are sent: filled at its end with those that arrived,

        by place and ident. A sender's word is not enough: somebody else might answer.
        """
        names = {place: self._paths.namespace(place) for place in sorted(places)}
        self._hands.ask({name: {"do": "listen-echoes"} for name in names.values()})
        arrivals: dict[str, Mapping[str, int]] = {}
        yield arrivals
        told = self._hands.ask({name: {"do": "heard-echoes"} for name in names.values()})
        for place, name in names.items():
            if told[name]["missed"]:
                raise FailedError(f"{place}: {told[name]['missed']} echoes came and were not heard")
            arrivals[place] = told[name]["idents"]

    # -- udp --------------------------------------------------------------------------------

    def _datagrams(self, asked: labfile.Datagrams) -> Verdict:
        faults: list[str] = []
        sent = lost = arrived = 0
        for one in self._targets(asked, faults, lost_all=asked.lost == "all"):
            size = asked.size if asked.size > 0 else one.mtu - asked.size
            row = self._thrown(one, asked.count, size)
            sent, lost = sent + row["sent"], lost + row["lost"]
            arrived += row["arrived"]
            faults += _lost(str(one), row, asked.lost)
            if asked.lost == "all" and row["arrived"]:
                faults.append(f"{one}: {row['arrived']} arrived, expected none")
        if isinstance(asked.lost, int) and lost > asked.lost > 0:
            faults.append(f"{lost} of {sent} lost, expected at most {asked.lost}")
        fine = f"{sent} sent, {arrived} arrived, {sent - lost} came back"
        return Verdict(faults, fine, {"sent": sent, "arrived": arrived, "lost": lost})

    def _thrown(self, one: Target, count: int, size: int) -> Mapping[str, Any]:
        """How many datagrams were sent, arrived, and did not come back."""
        source, target = self._paths.namespace(one.source), self._paths.namespace(one.target)
        opened = self._hands.ask({target: {"do": "open-udp", "address": one.address}})
        port = opened[target]["port"]
        patience = {"count": count, "patience": PATIENCE}
        self._hands.tell(target, {"do": "echo-udp", "port": port, **patience})
        throw = {"do": "throw-udp", "address": one.address, "port": port, "size": size,
                 "mark": MARK, **patience}  # fmt: skip
        thrown = self._hands.ask({source: throw})[source]
        return {**thrown, **self._hands.hear(target)}

    # -- tcp --------------------------------------------------------------------------------

    def _transfer(self, asked: labfile.Transfer) -> Verdict:
        faults: list[str] = []
        rates: list[float] = []
        for one in self._targets(asked, faults):
            try:
                rates.append(self._one_transfer(one, asked.octets, asked.port))
            except FailedError as failure:
                faults.append(f"{one}: {failure}")
        size = units.people(asked.octets)
        fine = f"{len(rates)} x {size}, same SHA-256"
        fine += f", {min(rates):.0f} Mbit/s at least" if rates else ""
        return Verdict(faults, fine, {"mbit_s": [round(rate) for rate in rates]})

    def _one_transfer(self, one: Target, octets: int, port: int) -> float:
        """Send; Mbit/s. Raises FailedError."""
        source, target = self._paths.namespace(one.source), self._paths.namespace(one.target)
        address = one.address
        listen = {"do": "listen", "address": address, "port": port}
        port = self._hands.ask({target: listen})[target]["port"]
        self._hands.tell(target, {"do": "receive", "port": port, "patience": TRANSFER_PATIENCE})
        order = {"do": "send", "address": address, "port": port, "octets": octets,
                 "patience": TRANSFER_PATIENCE, "mark": MARK}  # fmt: skip
        self._hands.tell(source, order)
        try:
            sent: dict[str, Any] = self._hands.hear(source)
        except FailedError:
            self._hands.drop(target)  # because nobody will come to what it listens for
            raise
        got: dict[str, Any] = self._hands.hear(target)
        if not sent["sha256"] == got["sha256"] == sent["echo"] or got["octets"] != octets:
            raise FailedError(f"{got['octets']} of {octets} bytes arrived, with another SHA-256")
        return float(octets * 8 / sent["seconds"] / 1e6)

    # -- exec -------------------------------------------------------------------------------

    def _exec(self, asked: labfile.Exec) -> Verdict:
        namespace = self._paths.namespace(asked.place)
        argv = shlex.split(asked.command)
        order = {"do": "exec", "argv": argv, "patience": asked.timeout, **self._somebody(asked)}
        done = self._hands.ask({namespace: order})[namespace]
        faults = []
        if done["status"] != asked.exit:
            words = _last_words(done["err"]) or _last_words(done["out"])
            faults.append(
                f"{argv[0]} ended with status {done['status']}, expected {asked.exit}"
                + (f": {words}" if words else "")
            )
        if asked.output and asked.output not in done["out"]:
            faults.append(f"{asked.output!r} is not in its output: {_last_words(done['out'])!r}")
        return Verdict(faults, f"ended with status {done['status']}")

    def _somebody(self, asked: labfile.Exec) -> Mapping[str, Any]:
        """Who the command is: the place's own, as in `nsmctl lab exec`; on a switch nobody is."""
        if self._lab.node_of(asked.place).kind == "switch":
            return {}
        seat = seats.of(self._lab, self._paths, asked.place)
        return {"gid": seat.gid, "variables": seat.variables}

    # -- capture ----------------------------------------------------------------------------

    def _capture(self, asked: labfile.Capture) -> Verdict:
        faults = []
        if asked.during == labfile.UP:
            got = self._while_up[asked.port]
        else:
            during = next(c for c in self._lab.checks if c.name == asked.during)
            self._watch(asked.port)
            try:
                meanwhile = self.run(during)
            finally:
                got = self._watched(asked.port)
            if not meanwhile.holds:
                faults.append(f"{during.name!r} does not hold: {meanwhile.says}")
        seen: Mapping[str, int] = got["kinds"]
        if got["dropped"]:
            faults.append(f"{got['dropped']} frames were not seen: the capture was too slow")
        passing = [kind for kind in asked.never if seen.get(kind)]
        faults += [f"{seen[k]} packets of {k} pass {asked.port}, expected none" for k in passing]
        absent = [kind for kind in asked.sees if not seen.get(kind)]
        faults += [f"no packet of {kind} passes {asked.port}" for kind in absent]
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(seen.items()))
        return Verdict(faults, f"{got['packets']} frames: {counted}", {"seen": dict(seen)})

    def _watch(self, port: Port) -> None:
        start = {"do": "capture", "interface": port.interface, "marks": [MARK]}
        self._hands.ask({self._paths.namespace(port.node): start})

    def _watched(self, port: Port) -> Mapping[str, Any]:
        """What passed the port since `_watch`."""
        where = self._paths.namespace(port.node)
        stop = {"do": "captured", "interface": port.interface}
        got: Mapping[str, Any] = self._hands.ask({where: stop})[where]
        return got

    # -- wire -------------------------------------------------------------------------------

    def _wire_in_time(self, asked: labfile.WireFacts) -> Verdict:
        """What is so in the end, or at once if it may take no time."""
        end = time.monotonic() + asked.within
        while (found := self._wire(asked)).faults and time.monotonic() < end:
            time.sleep(LOOK_EVERY)
        return found

    def _wire(self, asked: labfile.WireFacts) -> Verdict:
        faults = []
        of = [
            wire
            for wire in wires(self._lab, self._paths)
            if fnmatchcase(wire.client, asked.client) and wire.serves(asked.service)
        ]
        if not of:
            faults = [f"{asked.client} has no wire"]
        for wire in of:
            if not wire.mechanism:
                faults.append(f"{wire.client} has no interface {wire.interface}")
                continue
            if asked.mechanism and wire.mechanism != asked.mechanism:
                faults.append(
                    f"{wire.client}'s {wire.interface} is a {wire.mechanism},"
                    f" expected {asked.mechanism}"
                )
            if asked.mtu and wire.mtu != asked.mtu:
                faults.append(
                    f"{wire.client}'s {wire.interface} has MTU {wire.mtu}, expected {asked.mtu}"
                )
            if asked.endpoint and wire.endpoint != asked.endpoint:
                faults.append(
                    f"{wire.client}'s {wire.interface} leads to {wire.endpoint},"
                    f" expected {asked.endpoint}"
                )
        kinds = sorted({f"{wire.mechanism} mtu {wire.mtu}" for wire in of})
        return Verdict(faults, f"{len(of)} wires: {', '.join(kinds)}")

    # -- stop -------------------------------------------------------------------------------

    def _stop(self, asked: labfile.Stop) -> Verdict:
        name = f"{self._lab.node_of(asked.process).name}/{asked.process}"
        born = state.born(self._paths).get(name)
        if born is None or not born.mark.alive:
            return Verdict([f"{name} does not run"], "")
        killed = alive.stop([born.mark], TRANSFER_PATIENCE)
        return Verdict([f"{name} had to be killed"] if killed else [], f"{name} has ended")

    # -- fault ------------------------------------------------------------------------------

    def _fault(self, asked: labfile.Faulty) -> Verdict:
        """Break, while packets flow along wires, and see that they do in the end."""
        over, breaking = asked.over, Faults(self._lab, self._paths)
        gone = touched(breaking, asked.broken)
        between = self._between(over, gone) if over else []
        if over and not between:
            return Verdict([f"no wire joins {over.source} and {over.target}"], "")
        try:
            with Flows(self._paths, between[:MOST]) as flows:
                self._faulty = True
                done = carry_out(breaking, asked.broken)
                flows.flow(max(HEALING, 2 * (asked.healed or 0.0)), "after it")
                toll = flows.toll()
        except NsmError as refusal:
            return Verdict([refusal.message], "")
        finally:
            for place in gone:  # the probes there ended with it
                self._hands.drop(self._paths.namespace(place))
        says = "; ".join(map(str, done))
        if not over:
            return Verdict([], says)
        faults = []
        if asked.lost is not None and toll.lost > asked.lost:
            faults.append(f"{says}; {toll}, expected at most {asked.lost} lost")
        if asked.lost == 0 and toll.twice:
            faults.append(f"{toll.twice} datagrams came twice")
        if asked.healed is not None and toll.seconds > asked.healed:
            faults.append(f"{says}; {toll}, expected {asked.healed:g} s at most")
        faults += toll.says if faults else ()
        return Verdict(faults, f"{says}; {toll}", toll.figures)

    def _between(self, over: labfile.Over, gone: set[str]) -> list[Pair]:
        self._healed()
        found = pairs(self._lab, self._paths, over.source, over.target, over.service)
        return [pair for pair in found if not {pair.a, pair.b} & gone]


def _lost(who: str, row: Mapping[str, Any], allowed: int | str) -> list[str]:
    sent, lost = row["sent"], row["lost"]
    if allowed == "all":
        answered = sent - lost
        return [f"{who}: {answered} of {sent} answered, expected none"] if answered else []
    if allowed != 0 or not lost:
        return []
    why = f" ({row['refused']})" if row["refused"] else ""
    return [f"{who}: {lost} of {sent} lost{why}"]


def _missing(what: str, addresses: Sequence[str], asked: _Asked) -> list[str]:
    """The families a wire must have and has not."""
    wanted = asked.families if asked.strict else ()
    absent = [family for family in wanted if not of_family(addresses, (family,))]
    return [f"{what} has no {family} address" for family in absent]


def _last_words(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:200] if lines else ""

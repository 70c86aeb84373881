"""Breaking a lab that is up, one thing at a time, and mending it again.

What is broken is broken as in life: a process ends by a signal, a machine with its
kernel's state, a cable without telling whoever sends into it. Everything is found in
the lab's folder, so anybody may do it, not only whoever brought the lab up. What is
killed stays dead until it is started again, by the lab's nursery and the same order.

All of it blocks and is bounded; who does not do as told is named in the error.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from labs import alive, engine, processes, schema, state
from labs.alive import Mark
from labs.births import READY, ProcessFailedError, listens
from labs.lab import BRIDGE, Lab, Link, Port
from labs.paths import Paths
from labs.processes import Process, Stage
from nsm.errors import (
    DeadlineError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TakenError,
    UnavailableError,
)
from nsm.kernel import topology, wireguard_go
from nsm.kernel.namespaces import NAMED, create_named, delete_named
from nsm.kernel.topology import Plug
from nsm.names import resolvconf
from nsm.process.words import last_words

GONE: Final = 5.0  # seconds a signal may take to end somebody
LOOK: Final = 0.01  # seconds between looks at what a lab's journal says


@dataclass(frozen=True, slots=True)
class Standing:
    """What is broken on purpose and not mended, besides processes: those are in the journal."""

    unplugged: tuple[str, ...] = ()  # nodes
    groups: tuple[tuple[str, ...], ...] = ()  # of nodes that reach one another only
    rates: Mapping[str, int] = field(default_factory=dict)  # of nodes, in bits a second
    ended: tuple[str, ...] = ()  # nodes and workloads' places without their namespace
    full: tuple[str, ...] = ()  # clusters' disks

    def lines(self) -> list[str]:
        """Each in words, as `lab status` has them."""
        told = [f"{node} is unplugged" for node in self.unplugged]
        told += [f"{node} sends {rate} bit/s at most" for node, rate in self.rates.items()]
        told += [f"{place} has ended" for place in self.ended]
        told += [f"the disk of {cluster} is full" for cluster in self.full]
        if self.groups:
            told.append(" | ".join(", ".join(group) for group in self.groups) + " are apart")
        return told


def stands_still(mark: Mark) -> bool:
    """Whether a process is stopped (SIGSTOP)."""
    return mark.alive and _letter(mark.pid) in "Tt"


def standing(paths: Paths) -> Standing:
    """What is broken in a lab now."""
    try:
        with open(paths.faults) as file:
            told = json.load(file)
    except FileNotFoundError:
        return Standing()
    return Standing(
        tuple(told["unplugged"]),
        tuple(tuple(group) for group in told["groups"]),
        told["rates"],
        tuple(told["ended"]),
        tuple(told["full"]),
    )


class Faults:
    """Of one lab that is up (`labs.engine.running`).

    Who is meant by `who`: a process as `nsmctl lab logs` has it (`east-1/nsmgr`), or as
    people say it: `forwarder@NODE`, `registry@CLUSTER`, `client:NAME`, `endpoint:NAME`,
    `router:NAME`, `NAME` of one of those three.
    """

    def __init__(self, lab: Lab, paths: Paths) -> None:
        self._lab = lab
        self._paths = paths
        plan = processes.plan(lab, paths)
        self._processes = {p.name: p for p in plan.processes if not p.is_errand}
        self._on_demand = {p.name: p for p in plan.on_demand}
        self._called = processes.called(lab, plan)

    # -- who --------------------------------------------------------------------------------

    @property
    def lab(self) -> Lab:
        """Whose they are."""
        return self._lab

    @property
    def paths(self) -> Paths:
        """Where that lab has its files."""
        return self._paths

    @property
    def names(self) -> tuple[str, ...]:
        """How people call each process."""
        first = {process: name for name, process in reversed(self._called.items())}
        return tuple(first.values())[::-1]

    def process(self, who: str) -> str:
        """NODE/PROC of somebody. Raises NotFoundError with the nearest name."""
        name = self._called.get(who)
        if name is None:
            near = schema.nearest(who, list(self._called)) or f"; there is {', '.join(self.names)}"
            raise NotFoundError(f"lab {self._lab.name} has no process {who!r}{near}")
        return name

    def pids(self, who: str) -> int:
        """The pid of the process now. Raises PreconditionError if it does not run."""
        return self._mark(self.process(who)).pid

    def _mark(self, name: str) -> Mark:
        mark = self._newest(name)
        if mark is None or not mark.alive:
            raise PreconditionError(
                f"{name} of lab {self._lab.name} does not run",
                hint=f"nsmctl lab fault start {self._lab.name} {name}",
            )
        return mark

    def _newest(self, name: str) -> Mark | None:
        if name in self._on_demand:
            return engine.on_demand(self._lab, self._paths)[name]
        born = state.born(self._paths).get(name)
        return born.mark if born else None

    def node(self, node: str) -> str:
        """A node's name, as it is. Raises NotFoundError with the nearest."""
        nodes = [name for name, one in self._lab.nodes.items() if one.kind == "node"]
        if node not in nodes:
            near = schema.nearest(node, nodes) or f"; there is {', '.join(nodes)}"
            raise NotFoundError(f"lab {self._lab.name} has no node {node!r}{near}")
        return node

    def place(self, place: str) -> str:
        """The name of an endpoint, router or client, as it is. Raises NotFoundError."""
        lab = self._lab
        places = [*lab.clients, *lab.endpoints, *lab.routers]
        if place not in places:
            near = schema.nearest(place, places) or f"; there is {', '.join(places)}"
            raise NotFoundError(f"lab {lab.name} has no client, endpoint or router {place!r}{near}")
        return place

    # -- processes --------------------------------------------------------------------------

    def kill(self, who: str, number: int = signal.SIGKILL) -> int:
        """End a process by a signal; its pid, once it is gone and reaped."""
        name = self.process(who)
        mark = self._mark(name)
        with alive.held([mark]) as held:
            for fd in held.values():
                with contextlib.suppress(ProcessLookupError):  # it ends by itself this moment
                    signal.pidfd_send_signal(fd, number)
                    signal.pidfd_send_signal(fd, signal.SIGCONT)  # the stopped hear nothing else
        self._await(lambda: self._has_ended(name, mark), GONE, f"{name} (pid {mark.pid}) has ended")
        return mark.pid

    def _has_ended(self, name: str, mark: Mark) -> bool:
        """Gone, and its end written down: then it may be started again."""
        if mark.alive:
            return False
        if name in self._on_demand:
            return True
        born = state.born(self._paths)[name]
        return born.mark != mark or born.ended is not None

    def stop(self, who: str) -> int:
        """Ask a process to end, and see that it does; its pid."""
        return self.kill(who, signal.SIGTERM)

    def start(self, who: str) -> int:
        """Start a process again by its order; its pid, once it is ready."""
        return self.start_together([who])[0]

    def start_together(self, whom: Sequence[str]) -> list[int]:
        """Start several at once; their pids, once all of them are ready."""
        names = [self.process(who) for who in whom]
        self._start(names)
        return [self._mark(name).pid for name in names]

    def _start(self, names: Sequence[str]) -> None:
        """Start processes together, and wait until all of them are ready."""
        born = state.born(self._paths)
        for name in names:
            if name in self._on_demand:
                supplier = f"supplier@{name.partition('/')[0]}"
                raise PreconditionError(f"{name} is started by {supplier}, when it is asked for")
            if (before := born.get(name)) and before.mark.alive:
                raise TakenError(f"{name} runs already, as pid {before.mark.pid}")
        seen = os.path.getsize(self._paths.processes)
        self._order([{"again": name} for name in names])
        waiting, events = set(names), _Told(self._paths.processes, seen)
        end = time.monotonic() + READY
        while waiting:
            for event in events.more():
                if event["name"] in waiting:
                    self._heard(event, waiting)
            waiting -= {name for name in waiting if self._serves(self._processes[name], born)}
            if waiting and time.monotonic() > end:
                late = min(waiting)
                log = self._processes[late].log
                raise DeadlineError(
                    f"{late} is not ready {READY:g} s after it was started again; its log ends:"
                    f" {last_words(log)}"
                )
            time.sleep(LOOK if waiting else 0)

    def _heard(self, event: Mapping[str, Any], waiting: set[str]) -> None:
        name = event["name"]
        match event["event"]:
            case "ready":
                waiting.discard(name)
            case "refused":
                raise PreconditionError(f"{name} cannot be started: {event['because']}")
            case "ended":
                log = self._processes[name].log
                raise ProcessFailedError(
                    f"{name} ended with status {event['status']} before it was ready:"
                    f" {last_words(log)}"
                )

    def _serves(self, process: Process, before: Mapping[str, state.Born]) -> bool:
        """Whether a program that says nothing is there: on its port, if it has one."""
        if not process.is_foreign:
            return False
        now = state.born(self._paths).get(process.name)
        old = before.get(process.name)
        fresh = now is not None and now.mark.alive and (old is None or now.mark != old.mark)
        return fresh and (not process.tcp or listens(process.namespace, process.tcp))

    def _order(self, orders: Sequence[Mapping[str, str]]) -> None:
        nursery = state.born(self._paths).get("nursery")
        if nursery is None or not nursery.mark.alive:
            raise UnavailableError(
                f"nothing can be started in lab {self._lab.name}: its nursery is dead",
                hint=f"nsmctl lab down {self._lab.name}",
            )
        fd = os.open(self._paths.orders, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for order in orders:  # each at once, because somebody else may give orders, too
                os.write(fd, json.dumps(order).encode() + b"\n")
        finally:
            os.close(fd)

    def freeze(self, who: str, seconds: float | None = None) -> int:
        """Stop a process (SIGSTOP), and let it go on after some seconds if they are said."""
        mark = self._signalled(who, signal.SIGSTOP)
        self._await(lambda: _letter(mark.pid) in "TtXZ", GONE, f"{who} stands still")
        if seconds is not None:
            time.sleep(seconds)
            self.thaw(who)
        return mark.pid

    def thaw(self, who: str) -> int:
        """Let a stopped process go on."""
        return self._signalled(who, signal.SIGCONT).pid

    def _signalled(self, who: str, number: signal.Signals) -> Mark:
        mark = self._mark(self.process(who))
        with alive.held([mark]) as held:
            for fd in held.values():
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, number)
        return mark

    # -- namespaces -------------------------------------------------------------------------

    def end_namespace(self, place: str) -> None:
        """A workload's namespace dies with all that is in it."""
        self.place(place)
        with self._noting() as now:
            self._refuse_ended(now, place)
            self._end([place])
            self._note(replace(now, ended=(*now.ended, place)))

    def renew(self, *places: str) -> None:
        """Workloads' namespaces are made again, and their processes start in them, together."""
        with self._noting() as now:
            for place in places:
                self._need_ended(now, place)
            self._make(places)
            self._note(replace(now, ended=tuple(p for p in now.ended if p not in places)))
        self._start_all(p for p in self._processes.values() if _place(p) in places)

    def _end(self, places: Sequence[str]) -> None:
        """All processes of places and all in their namespaces at once, then the namespaces."""
        names = [self._paths.namespace(place) for place in places]
        born = state.born(self._paths)
        here = [p.name for p in self._processes.values() if _place(p) in places]
        of = {name: born[name].mark for name in here if name in born}
        marks = [*of.values()]
        for name in self._on_demand:
            mark = self._newest(name)
            marks += [mark] if mark and _place(self._on_demand[name]) in places else []
        inodes = [topology.inode_named(name) for name in names]
        cookies = {topology.cookie_named(name) for name in names}
        alive.kill(marks)
        alive.kill(alive.inside(inodes))
        wireguard_go.tidy(cookies)  # its sockets are in the machine's own /run
        for name, mark in of.items():
            self._await(
                lambda name=name, mark=mark: self._has_ended(name, mark),  # type: ignore[misc]
                GONE,
                f"{name} (pid {mark.pid}) has ended",
            )
        for name in names:
            resolvconf.forget(name)
            delete_named(name)
        for place in places:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._paths.status(place))  # what it told is no more

    def _make(self, places: Sequence[str]) -> None:
        """Namespaces, each noted before it is there, so that `down` knows it as the lab's."""
        names = {place: self._paths.namespace(place) for place in places}
        self._cookies(dict.fromkeys(names.values(), 0))
        for name in names.values():
            create_named(name)
        self._cookies({name: topology.cookie_named(name) for name in names.values()})
        for place in places:
            if place in self._lab.clients:
                engine.at_home(names[place])

    def _cookies(self, cookies: Mapping[str, int]) -> None:
        now = state.read(self._paths)
        if now is None:
            raise engine.NotUpError(f"lab {self._lab.name} is not up any more")
        state.write(self._paths, replace(now, namespaces={**now.namespaces, **cookies}))

    def _start_all(self, todo: Iterator[Process]) -> None:
        """Stage by stage, as they first started."""
        for process in (stages := _by_stage(todo)):
            self._start([one.name for one in stages[process]])

    # -- nodes ------------------------------------------------------------------------------

    def end_node(self, node: str) -> None:
        """A whole machine goes: its processes, its workloads, its namespace and cables.

        And what a machine keeps in memory only: sockets, temporary files.
        """
        self.node(node)
        with self._noting() as now:
            self._refuse_ended(now, node)
            places = [p for p in self._lab.places if self._lab.node_of(p).name == node]
            self._end([p for p in places if p not in now.ended])
            for link in self._links(node):
                far = next(end for end in link.ends if end.node != node)
                topology.unplug(Plug(self._paths.namespace(far.node), far.interface))
            for entry in os.scandir(self._paths.node(node)):
                if stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode):
                    os.unlink(entry.path)
            _empty(self._paths.node(node, "tmp"))
            ended = tuple(dict.fromkeys((*now.ended, *places)))
            rates = {name: rate for name, rate in now.rates.items() if name != node}
            unplugged = tuple(name for name in now.unplugged if name != node)
            self._note(replace(now, ended=ended, rates=rates, unplugged=unplugged))

    def start_node(self, node: str) -> None:
        """The machine comes back: its namespaces, cables and addresses, then its processes."""
        self.node(node)
        with self._noting() as now:
            self._need_ended(now, node)
            places = [p for p in self._lab.places if self._lab.node_of(p).name == node]
            self._make(places)
            for link in self._links(node):
                engine.cable(self._paths, link)
                for end in link.ends:
                    if self._lab.nodes[end.node].kind == "switch":
                        topology.plug_in(self._paths.namespace(end.node), BRIDGE, end.interface)
                    else:
                        self._readdress(end)
            self._note(replace(now, ended=tuple(p for p in now.ended if p not in places)))
            self._separate(now.groups)
        self._await_carrier(node)
        self._start_all(p for p in self._processes.values() if p.name.startswith(f"{node}/"))

    def _readdress(self, end: Port) -> None:
        engine.address(self._lab, self._paths, self._lab.nodes[end.node])

    # -- the network ------------------------------------------------------------------------

    def link(self, node: str, up: bool) -> None:
        """Pull a node's cable out at its far end, or plug it in again: it loses its carrier."""
        self.node(node)
        with self._noting() as now:
            for link in self._links(node):
                far = next(end for end in link.ends if end.node != node)
                topology.switch(self._paths.namespace(far.node), far.interface, up=up)
                if up and self._lab.nodes[far.node].kind == "node":
                    self._readdress(far)  # its IPv6 addresses went with it
            others = tuple(name for name in now.unplugged if name != node)
            self._note(replace(now, unplugged=others if up else (*others, node)))
        if up:
            self._await_carrier(node)

    def interface(self, place: str, name: str, *, up: bool) -> None:
        """Set a workload's own interface down, or up: as somebody in there may do; * is all."""
        where = self._paths.namespace(self.place(place))
        for one in topology.interfaces(where) if name == "*" else (name,):
            topology.switch(where, one, up=up)

    def partition(self, *groups: Collection[str]) -> None:
        """Nodes of different groups lose what the others send; those of none reach all."""
        named = tuple(tuple(self.node(node) for node in group) for group in groups)
        twice = [n for i, g in enumerate(named) for n in g if any(n in h for h in named[:i])]
        if len(named) < 2 or twice:
            why = f"{twice[0]} is in two" if twice else "say two at least"
            raise InvalidError(f"groups of nodes that lose one another: {why}")
        with self._noting() as now:
            self._separate(named)
            self._note(replace(now, groups=named))

    def mend(self) -> None:
        """Cables are in, at full rate, disks have room, nodes that run reach one another."""
        with self._noting() as now:
            self._separate(())
            self._note(replace(now, groups=()))
        for node in now.unplugged:
            self.link(node, True)
        for node in now.rates:
            self.rate(node, None)
        for cluster in now.full:
            self.empty(cluster)

    def _separate(self, groups: Sequence[Sequence[str]]) -> None:
        of = {node: i for i, group in enumerate(groups) for node in group}
        for name, node in self._lab.nodes.items():
            if node.kind != "node" or not os.path.exists(f"{NAMED}/{self._paths.namespace(name)}"):
                continue
            apart = [n for n in of if name in of and of[n] != of[name]]
            addresses = [a.partition("/")[0] for n in apart for a in self._lab.nodes[n].addresses]
            topology.cut_off(self._paths.namespace(name), addresses)

    def rate(self, node: str, bits_per_second: int | None) -> None:
        """Let a node send no more than that; None: as the lab's file has it."""
        self.node(node)
        with self._noting() as now:
            for link in self._links(node):
                own = next(end for end in link.ends if end.node == node)
                limit = bits_per_second or link.rate
                if limit:
                    topology.slow_down(self._paths.namespace(node), own.interface, limit)
                else:
                    topology.speed_up(self._paths.namespace(node), own.interface)
            rates = {name: rate for name, rate in now.rates.items() if name != node}
            rates |= {node: bits_per_second} if bits_per_second else {}
            self._note(replace(now, rates=rates))

    # -- disks ------------------------------------------------------------------------------

    def disk(self, cluster: str) -> str:
        """A cluster that has a disk of its own. Raises NotFoundError."""
        disks = [name for name, one in self._lab.clusters.items() if one.disk]
        if cluster not in disks:
            near = schema.nearest(cluster, disks) or f"; there is {', '.join(disks) or 'none'}"
            raise NotFoundError(
                f"lab {self._lab.name} has no cluster {cluster!r} with a disk of its own{near}"
            )
        return cluster

    def fill(self, cluster: str) -> None:
        """Leave no room on a cluster's disk: nothing can be written there any more."""
        if not os.path.ismount(self._paths.disk(self.disk(cluster))):  # or the machine's is filled
            raise PreconditionError(
                f"the disk of {cluster} of lab {self._lab.name} is not mounted where this runs",
                hint="do it in the mount namespace in which the lab was brought up",
            )
        with self._noting() as now, open(self._fill(cluster), "wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):  # to the last page
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass
            self._note(replace(now, full=tuple(dict.fromkeys((*now.full, cluster)))))

    def empty(self, cluster: str) -> None:
        """There is room again."""
        with self._noting() as now, contextlib.suppress(FileNotFoundError):
            self._note(replace(now, full=tuple(name for name in now.full if name != cluster)))
            os.unlink(self._fill(cluster))

    def _fill(self, cluster: str) -> str:
        return os.path.join(self._paths.disk(self.disk(cluster)), "filled")

    def _links(self, node: str) -> list[Link]:
        return [link for link in self._lab.links if any(end.node == node for end in link.ends)]

    def _await_carrier(self, node: str) -> None:
        for link in self._links(node):
            for end in link.ends:
                self._await(
                    lambda end=end: topology.carries(  # type: ignore[misc]
                        self._paths.namespace(end.node), end.interface
                    ),
                    engine.CARRIER,
                    f"{end} passes packets",
                )

    # -- what is noted ----------------------------------------------------------------------

    @contextlib.contextmanager
    def _noting(self) -> Iterator[Standing]:
        """What is broken now, for somebody who changes it, one at a time."""
        fd = os.open(self._paths.orders, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield standing(self._paths)
        finally:
            os.close(fd)

    def _note(self, now: Standing) -> None:
        state.put(self._paths.faults, json.dumps(asdict(now), indent=1))

    def _refuse_ended(self, now: Standing, place: str) -> None:
        if place in now.ended:
            raise PreconditionError(f"{place} of lab {self._lab.name} has ended already")

    def _need_ended(self, now: Standing, place: str) -> None:
        self._lab.node_of(place)
        if place not in now.ended:
            raise PreconditionError(f"{place} of lab {self._lab.name} is there: it has not ended")

    def _await(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise DeadlineError(f"lab {self._lab.name}: not so after {seconds:g} s: {what}")
            time.sleep(LOOK)


class _Told:
    """What a lab's journal tells from a place in it on."""

    def __init__(self, path: str, offset: int) -> None:
        self._path = path
        self._offset = offset

    def more(self) -> list[dict[str, Any]]:
        """The whole lines since the last look."""
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _place(process: Process) -> str:
    """Where a process is: the node, or the workload whose namespace it is in."""
    node, _, own = process.name.partition("/")
    if process.stage in (*processes.WORKLOADS, Stage.PROGRAM):
        return own.partition(".")[0]
    return node


def _by_stage(todo: Iterator[Process]) -> dict[Stage, list[Process]]:
    stages: dict[Stage, list[Process]] = {}
    for process in todo:
        stages.setdefault(process.stage, []).append(process)
    return dict(sorted(stages.items()))


def _letter(pid: int) -> str:
    """What the kernel calls the state of a process; Z where there is none."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def _empty(folder: str) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)

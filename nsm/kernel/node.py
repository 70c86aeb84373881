"""The kernel of this node, as asyncio code uses it.

    async with Kernel("forwarder-1") as kernel:
        client = await kernel.namespace(fd=fd, name="alpine")
        async with Undo() as undo:
            wire = LocalWire(id, Interface(client, "nsm-1"), Interface(…))
            made = await kernel.ensure(wire, undo, fds={client: fd})

Nothing here blocks the loop: creating runs in two threads (more would wait for the
same lock in the kernel), deleting in many (each waits some 18 ms for the kernel's
grace periods, and those overlap), and what waits for others' answers in some of its
own, so that who does not answer holds up neither. Nothing here remembers what must be known: the
index of wires is a hint, believed only after the kernel confirmed it.
"""

import asyncio
import errno
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, ParamSpec, Self, TypeVar

from nsm.errors import InternalError, InvalidError, PreconditionError
from nsm.kernel import ensure as ensuring
from nsm.kernel import (
    isolation,
    messages,
    namespaces,
    owner,
    ports,
    swap,
    sweep,
    tunnels,
    wireguard_go,
)
from nsm.kernel.ensure import Journal, Place
from nsm.kernel.messages import Counters, Device
from nsm.kernel.namespaces import Home
from nsm.kernel.netlink import NamespaceGoneError, Refusal, Socket, explain
from nsm.kernel.plan import Step
from nsm.kernel.reach import Reach
from nsm.kernel.state import (
    OWN,
    VXLAN_PORT,
    End,
    EngineName,
    IPAddress,
    Namespace,
    RemoteWire,
    Wire,
)
from nsm.kernel.sweep import Found
from nsm.kernel.tunnels import Engine, StandingWireguard
from nsm.kernel.wireguard_go import Processes, Running
from nsm.undo import Undo

log = logging.getLogger(__name__)
Role = tuple[str, str, str]  # a side of a wire, which of its devices (`owner.Mark.role`), its leg
P = ParamSpec("P")
T = TypeVar("T")
WITHIN = 16  # functions that run in other namespaces at once
_LOOPBACK = 1  # the number of every namespace's
_CHUNK = 24  # answers that surely fit into a socket's buffer
_ANEW, _SLOWER = 0.25, 1.4  # seconds until a handshake is begun anew; each next time longer
_DRAIN, _DRAINS = 0.05, 10  # seconds between looks whether answers still come, and how many
_QUIET = 4  # looks in a row that find none: a busy endpoint's or wireguard-go's may take as long
_GLANCE, _LONGEST_GLANCE = 0.0005, 0.02  # seconds between looks whether it was answered


@dataclass(frozen=True, slots=True)
class Ensured:
    """What an ensure took, and where the wire's devices are."""

    steps: tuple[Step, ...]
    places: Mapping[owner.SideName, Place]


@dataclass(frozen=True, slots=True)
class Way:
    """How an underlay reaches an address: from which address, over which device of which MTU.

    carrier is false where that device is down, or its cable is out.
    """

    source: IPAddress
    device: str
    mtu: int
    carrier: bool = True


class Kernel:
    """Wires in the kernel of this node; see the module."""

    def __init__(self, instance: str = "vwire", *, creating: int = 2, deleting: int = 32) -> None:
        """instance names who owns what is made: two forwarders of one machine differ in it.

        creating and deleting are the numbers of threads; they start when first needed, as do
        WITHIN for `within`.
        """
        self.group = owner.group(instance)
        self._home = Home()
        self._processes = Processes(self.group)
        self._watched: dict[int, Running] = {}
        self._dying: dict[Running, asyncio.TimerHandle] = {}
        self.on_engine_end: Callable[[owner.Mark], None] = lambda _: None
        """Told, on the loop, of every wireguard-go process that ended and not by us."""
        self._open = False
        self._creating = ThreadPoolExecutor(creating, "kernel-create")
        self._deleting = ThreadPoolExecutor(deleting, "kernel-delete")
        self._within = ThreadPoolExecutor(WITHIN, "kernel-within")
        self._hints: dict[str, dict[Role, tuple[Namespace, Place]]] = {}

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self._home.__enter__)
        self._processes.at(self._home.namespace.cookie)
        self._loop = asyncio.get_running_loop()
        self._processes.on_start = self._follow
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for what is under way; the kernel's state stays as it is."""
        self._open = False
        for watched in list(self._watched):
            self._unwatch(watched)
        for timer in self._dying.values():
            timer.cancel()
        for pool in (self._creating, self._deleting, self._within):
            await asyncio.to_thread(pool.shutdown)
        await asyncio.to_thread(self._processes.close)
        await asyncio.to_thread(self._home.__exit__)

    @property
    def own(self) -> Namespace:
        """The namespace this process runs in: the underlay."""
        return self._home.namespace

    # --- namespaces --------------------------------------------------------------------------

    async def namespace(
        self,
        *,
        fd: int | None = None,
        pid: int | None = None,
        path: str = "",
        nsid: int | None = None,
        name: str = "",
    ) -> Namespace:
        """Get to know a namespace by exactly one of fd (borrowed, maybe O_PATH), pid, path, nsid.

        It gets a number (nsid) if it has none, which keeps nothing alive. Raises
        InvalidError for what is not a network namespace, NamespaceGoneError, DeniedError.
        """
        whose = name or path or (f"process {pid}" if pid is not None else f"nsid {nsid}")
        with _Borrowed({} if fd is None else {self.own: fd}) as kept:

            def work() -> Namespace:
                if fd is not None:
                    opened = self._home.opened(kept.fds[self.own], whose)
                elif pid is not None:
                    opened = self._home.opened_pid(pid, whose)
                elif path:
                    opened = self._home.opened_path(path, whose)
                elif nsid is not None and nsid != OWN:
                    opened = self._home.find_number(nsid, whose)
                else:
                    return self.own
                try:
                    return self._home.known(opened, name)
                finally:
                    os.close(opened)

            return await self._run(self._creating, kept, work)

    async def misusable(self, namespace: Namespace, *, fd: int | None = None) -> bool:
        """Whether whoever is in that namespace could misuse a tunnel there; see `isolation`."""
        with _Borrowed({} if fd is None else {namespace: fd}) as kept:

            def work() -> bool:
                with Reach(self._home, kept.fds, self._processes) as reach:
                    return isolation.misusable(reach.fd(namespace))

            return await self._run(self._creating, kept, work)

    async def within(
        self, namespace: Namespace, function: Callable[[], T], *, fd: int | None = None
    ) -> T:
        """Run a short blocking function in a worker thread that is in that namespace.

        For probes and labs, of which WITHIN run at once and others wait. What it opens there it
        must close: it would keep the workload's namespace alive. Sockets it returns stay in that
        namespace.
        """
        with _Borrowed({} if fd is None else {namespace: fd}) as kept:

            def work() -> T:
                with Reach(self._home, kept.fds, self._processes) as reach:
                    if namespace.own:
                        return function()
                    with self._home.inside(reach.fd(namespace)):
                        return function()

            return await self._run(self._within, kept, work)

    # --- wires -------------------------------------------------------------------------------

    async def ensure(
        self, wire: Wire, undo: Undo, *, fds: Mapping[Namespace, int] | None = None
    ) -> Ensured:
        """Make the kernel hold exactly this wire; called again it changes only what differs.

        fds are borrowed ways into the namespaces, copied before this returns to the loop; a
        namespace without one is looked up again (`Home.find`). If the block of undo fails
        later, the kernel is put back to what it was. On failure here it already is.

        Raises NameTakenError, VniTakenError, PortTakenError, RouteTakenError (all TakenError),
        InvalidError, NamespaceGoneError, UnsupportedError, DeniedError, PreconditionError,
        UnavailableError, InternalError.
        """
        journal = Journal()
        last = dict(self._hints.get(wire.connection, {}))
        with _Borrowed(fds or {}) as kept:

            def work() -> tuple[tuple[Step, ...], dict[Role, tuple[Namespace, Place]]]:
                with Reach(self._home, kept.fds, self._processes) as reach:
                    return self._ensured(reach, wire, last, journal)

            running = self._submit(self._creating, kept, work)
            undo.add(f"take back wire {wire.connection}", self._take_back, wire, running, journal)
            steps, found = await asyncio.wrap_future(running)
        self._hints.setdefault(wire.connection, {}).update(found)
        return Ensured(steps, {side: found[side, "", wire.leg][1] for side, _ in wire.sides})

    def _ensured(
        self,
        reach: Reach,
        wire: Wire,
        last: Mapping[Role, tuple[Namespace, Place]],
        journal: Journal,
    ) -> tuple[tuple[Step, ...], dict[Role, tuple[Namespace, Place]]]:
        """What it took, and where the wire's devices are."""
        leg = wire.leg
        seats: dict[Role, tuple[Namespace, str]] = {
            (side, "", leg): (end.namespace, end.name) for side, end in wire.sides
        }
        if isinstance(wire, RemoteWire) and wire.apart:
            seats |= {(wire.side, "hop", leg): wire.below, (wire.side, "lead", leg): wire.lead}
        for key, seat in seats.items():
            if key in last and last[key][1].nsid == seat[0].nsid:
                reach.last[seat] = last[key][1].index
        steps = ensuring.ensure(reach, wire, self.group, journal)
        return steps, {
            key: (seat[0], Place(seat[0].nsid, reach.index[seat]))
            for key, seat in seats.items()
            if seat in reach.index
        }

    async def replace(
        self, old: str, new: Wire, undo: Undo, *, fds: Mapping[Namespace, int] | None = None
    ) -> Ensured:
        """Have new, which stands beside (`swap.beside`), take the place of the connection's
        wire whose leg is old, and no packet lost.

        Here is the client's end. The old one stays where it is, out of use, until it is
        removed: what was sent over it may yet be answered (`drained`).
        fds and undo as in `ensure`. Raises as `ensure` does, with all as before.
        """
        done, journal = swap.Swap(), Journal()
        last = dict(self._hints.get(new.connection, {}))
        with _Borrowed(fds or {}) as kept:

            def work() -> tuple[tuple[Step, ...], dict[Role, tuple[Namespace, Place]]]:
                with Reach(self._home, kept.fds, self._processes) as reach:
                    swap.swap(reach, old, new, done)
                    try:
                        return self._ensured(reach, new, last, journal)
                    except BaseException:
                        swap.undo(reach, done)
                        raise

            running = self._submit(self._creating, kept, work)
            undo.add(
                f"put the wire before {new.id} back", self._swap_back, running, new, done, journal
            )
            steps, found = await asyncio.wrap_future(running)
        self._hints.setdefault(new.connection, {}).update(found)
        return Ensured(steps, {side: found[side, "", new.leg][1] for side, _ in new.sides})

    async def drained(self, connection: str, leg: str) -> None:
        """Return when nothing arrives any more over that wire of a client's, or soon enough."""
        _, place = self._hints.get(connection, {}).get(("src", "", leg), (None, None))
        before, quiet = -1, 0
        for _ in range(_DRAINS):
            (seen,) = await self.counters([place]) if place else (None,)
            quiet = quiet + 1 if seen and seen.rx_packets == before else 0
            if seen is None or quiet == _QUIET:
                return
            before = seen.rx_packets
            await asyncio.sleep(_DRAIN)

    async def _swap_back(
        self, running: "Future[T]", new: Wire, done: swap.Swap, journal: Journal
    ) -> None:
        await self._take_back(new, running, journal)
        if done.where is None:
            return

        def work() -> None:
            with Reach(self._home, {}, self._processes) as reach:
                swap.undo(reach, done)

        await self._run(self._deleting, None, work)
        # deleted next: what was sent over it meanwhile may yet be answered
        await self.drained(new.connection, new.leg)

    async def _take_back(self, wire: Wire, running: "Future[T]", journal: Journal) -> None:
        # cancelling a coroutine does not stop its thread: let it come to its end first
        ended = asyncio.wrap_future(running)
        await asyncio.wait([ended])
        if not ended.cancelled():
            ended.exception()  # the caller has it already
        if not journal.steps:
            return

        def work() -> list[str]:
            with Reach(self._home, {}, self._processes) as reach:
                return ensuring.revert(reach, wire, self.group, journal)

        if notes := await self._run(self._deleting, None, work):
            raise InternalError("; ".join(notes))

    async def find(self) -> tuple[Found, ...]:
        """Every device of ours in every namespace ever numbered, from the kernel alone.

        After a restart this is what there is. `Found.mark` is None for a device whose maker
        died before naming it: remove it.
        """
        before = {connection: dict(hints) for connection, hints in self._hints.items()}
        found = await self._run(self._creating, None, self._found)
        there = {(_whose(item.mark), item.place) for item in found if item.mark}
        for item in found:
            if item.mark is None:
                continue
            connection, role = whose = _whose(item.mark)
            known = self._hints.get(connection, {}).get(role)
            if known != before.get(connection, {}).get(role):
                continue  # made or taken away since we looked
            if known and (whose, known[1]) in there:
                continue  # another that says the same was marked by somebody in a workload
            same = known and known[1].nsid == item.place.nsid
            space = known[0] if known and same else Namespace(0, item.place.nsid)
            self._hints.setdefault(connection, {})[role] = (space, item.place)
        return found

    def _found(self) -> tuple[Found, ...]:
        found = sweep.find(self.group)
        self._processes.sweep(_names(found))
        return found

    async def own_number(self) -> int:
        """The nsid under which this namespace knows itself, OWN if it has none as yet.

        A tunnel device elsewhere that stands on this node says so by it (`Device.far`), and
        nobody who may do nothing here can have it say so.
        """

        def work() -> int:
            with Socket.here() as own:
                return namespaces.own_number(own)

        return await self._run(self._creating, None, work)

    async def remove(self, connection: str, *, leg: str | None = None) -> int:
        """Take a wire away, all of it that is on this node; how many devices that were.

        With leg only that one of the connection's wires.

        Answers when the devices are gone; closing what is not there is no error. Works
        without any fd: devices are deleted by number, from here. A wireguard-go, and with it
        its UDP port, may be there for some 30 ms more; `ensure` of the same wire waits for that.
        """
        known = self._hints.get(connection, {})
        hints = {key: known.pop(key) for key in list(known) if leg in (None, key[2])}
        if not known:
            self._hints.pop(connection, None)
        if leg and not hints:
            return 0
        legs = {key[2] for key in hints} | ({""} if leg is None else {leg})
        found = await self._run(
            self._deleting, None, self._located, connection, list(hints.values()), legs
        )
        found = tuple(
            one for one in found if leg is None or one.mark is None or one.mark.leg == leg
        )
        await self.remove_found(found, spaces=[space for space, _ in hints.values()])
        places = {one.place for one in found}
        for (side, role, _), (space, place) in hints.items():
            if side == "src" and not role and place not in places:
                # somebody else deleted the device: rules, which only clients have, outlive it
                await self._run(self._deleting, None, self._sweep_left, place.nsid, space)
        return len(found)

    async def remove_found(
        self, found: Iterable[Found], *, spaces: Iterable[Namespace] = ()
    ) -> None:
        """Delete devices `find` named, those still ours; answers when they are gone."""
        wanted = list(found)
        if names := _names(wanted):
            await self._run(self._deleting, None, self._kill, names)
        known = {space.nsid: space for space in spaces if space.cookie}
        if wanted:
            deleting = [self._deleting.submit(sweep.delete, item, self.group) for item in wanted]
            gone = self._deleting.submit(sweep.wait_gone, wanted, deleting)
            await asyncio.wrap_future(gone)
        for nsid in {item.place.nsid for item in wanted if item.mark and item.mark.rules}:
            await self._run(self._deleting, None, self._sweep_rules, nsid, known.get(nsid))

    def _located(
        self, connection: str, hints: list[tuple[Namespace, Place]], legs: Iterable[str]
    ) -> tuple[Found, ...]:
        found = sweep.located(self.group, connection, hints)
        names = [
            owner.tunnel_name(owner.wire_id(connection, leg), side)
            for leg in legs
            for side in owner.SIDES
        ]
        self._kill(name for name in names if self._processes.present(name))
        return found

    def _kill(self, names: Iterable[str]) -> None:
        for name in names:
            if dying := self._processes.kill(name):
                self._loop.call_soon_threadsafe(self._expect_end, dying)

    def _stop(self, names: Iterable[str]) -> None:
        for name in names:
            self._processes.stop(name)

    def _sweep_left(self, nsid: int, space: Namespace) -> None:
        with Socket.here() as own:
            (answer,) = own.ask_all([messages.get_link(index=_LOOPBACK, nsid=nsid)])
        if not isinstance(answer, Refusal):  # else the namespace is gone, and all that was in it
            self._sweep_rules(nsid, space if space.cookie else None)

    def _sweep_rules(self, nsid: int, known: Namespace | None) -> None:
        try:
            fd = self._home.find(known) if known else self._home.find_number(nsid)
        except NamespaceGoneError:
            return
        try:
            with self._home.socket(fd) as sock:
                sweep.rules(sock)
        finally:
            os.close(fd)

    async def remove_all(self) -> int:
        """Remove everything this instance ever made, by link group, namespace by namespace."""
        found = await self.find()
        rules = {item.place.nsid for item in found if item.mark and item.mark.rules}
        spaces = {item.place.nsid for item in found}
        async with asyncio.TaskGroup() as group:
            for running in self._processes.known():
                group.create_task(self._run(self._deleting, None, self._stop, [running.name]))
            for nsid in spaces:
                group.create_task(
                    self._run(self._deleting, None, sweep.delete_group, nsid, self.group)
                )
        for nsid in rules:
            await self._run(self._deleting, None, self._sweep_rules, nsid, None)
        self._hints.clear()
        return len(found)

    async def counters(self, places: Sequence[Place]) -> list[Counters | None]:
        """What went through each device so far; None for one that is gone. About 10 us each."""

        def work() -> list[Counters | None]:
            with Socket.here() as own:
                result: list[Counters | None] = []
                for start in range(0, len(places), _CHUNK):
                    asked = [
                        messages.get_link(index=place.index, nsid=place.nsid, stats=True)
                        for place in places[start : start + _CHUNK]
                    ]
                    result += [
                        None if isinstance(answer, Refusal) else messages.counters(answer)
                        for answer in own.ask_all(asked)
                    ]
                return result

        return await self._run(self._creating, None, work)

    # --- WireGuard ---------------------------------------------------------------------------

    async def find_wireguard(
        self, prefer: Literal["auto", "kernel", "userspace"] = "auto"
    ) -> Engine:
        """Which engine makes WireGuard devices here, by having it make one; "" if none does.

        `why` says what was tried, and what would help.
        """
        return await self._run(
            self._creating, None, tunnels.find_engine, prefer, self.group, self._processes
        )

    async def port_free(self, port: int, *, underlay: Namespace | None = None) -> bool:
        """Whether a tunnel could have that UDP port now, over IPv4 and over IPv6."""

        def work() -> bool:
            with Reach(self._home, {}) as reach, reach.inside(underlay or self.own):
                return ports.free(port)

        return await self._run(self._creating, None, work)

    def knows(self, connection: str) -> bool:
        """Whether anything of the connection may stand here: made in this life, or found."""
        return bool(self._hints.get(connection))

    def places(
        self, connection: str, side: owner.SideName, *, leg: str | None = None
    ) -> list[Place]:
        """Where that side's devices of the workload were seen last; with leg only of that wire."""
        hints = self._hints.get(connection, {})
        return [
            place
            for key, (_, place) in hints.items()
            if key[:2] == (side, "") and leg in (None, key[2])
        ]

    async def standing_wireguard(
        self,
        connection: str,
        side: owner.SideName,
        seat: tuple[Namespace, str],
        *,
        leg: str = "",
        hop: bool = False,
        underlay: Namespace | None = None,
        fds: Mapping[Namespace, int] | None = None,
    ) -> StandingWireguard | None:
        """What that side's tunnel has, from itself alone; None if there is none to be kept.

        seat is where the workload's device is to be, hop whether the tunnel is to stand apart
        from it, in the underlay. If so, no kernel device of the workload's is believed: who
        has rights in there could have made it, mark and all, with a key and port of choice.

        What an earlier life made is known after `find`. fds as in `ensure`.
        """
        hints = dict(self._hints.get(connection, {}))
        if not hints:
            return None
        wire = owner.wire_id(connection, leg)
        below = underlay or self.own, owner.tunnel_name(wire, side)
        with _Borrowed(fds or {}) as kept:

            def work() -> StandingWireguard | None:
                def ours(device: Device | None, role: str) -> bool:
                    mark = owner.Mark.parse(device.alias) if device else None
                    return (
                        device is not None
                        and device.group == self.group
                        and mark is not None
                        and (mark.wire, mark.side, mark.role) == (wire, side, role)
                    )

                with Reach(self._home, kept.fds, self._processes) as reach:
                    if hop:
                        device = reach.device(below[0], name=below[1])
                        if device and ours(device, "hop") and device.kind == "wireguard":
                            return _standing(reach, device.end(below[0]), "kernel")
                    _, place = hints.get((side, "", leg), (None, None))
                    if place is None or place.nsid != seat[0].nsid:
                        return None
                    question = messages.get_link(index=place.index, nsid=place.nsid)
                    (answer,) = reach.socket(self.own).ask_all([question])
                    device = None if isinstance(answer, Refusal) else messages.device(answer)
                    engine = tunnels.KINDS.get(device.kind) if device else None
                    if device is None or not ours(device, "") or device.name != seat[1]:
                        return None
                    if engine is None or (hop and engine == "kernel"):
                        return None
                    return _standing(reach, device.end(seat[0]), engine)

            return await self._run(self._creating, kept, work)

    async def handshake(
        self, wire: RemoteWire, patience: float, *, fds: Mapping[Namespace, int] | None = None
    ) -> float:
        """Have the far end of a WireGuard wire answer; how many seconds that took, 0 if it has.

        For the end that speaks first, once both are configured: if both spoke, each would
        drop the other's answer. What seems lost is said again, within fractions of a second.
        fds as in `ensure`. Raises UnavailableError when patience (seconds) is over.
        """
        began = anew = time.monotonic()
        said, wait, glance = 0, _ANEW, _GLANCE
        while True:
            now = time.monotonic()
            how: tunnels.Greeting = "" if now < anew else "anew" if said else "once"
            if await self._greeted(wire, fds, how):
                break
            if now > began + patience:
                await self._quiet(wire, fds)
                raise tunnels.unanswered(wire, said, patience)
            if how:
                said, anew, wait, glance = said + 1, now + wait, wait * _SLOWER, _GLANCE
            await asyncio.sleep(glance)
            glance = min(glance * 1.5, _LONGEST_GLANCE)
        if not said:
            return 0.0
        await self._quiet(wire, fds)
        return time.monotonic() - began

    async def _greeted(
        self, wire: RemoteWire, fds: Mapping[Namespace, int] | None, how: tunnels.Greeting
    ) -> bool:
        with _Borrowed(fds or {}) as kept:

            def work() -> bool:
                with Reach(self._home, kept.fds, self._processes) as reach:
                    return tunnels.greet(reach, wire, how)

            return await self._run(self._creating, kept, work)

    async def _quiet(self, wire: RemoteWire, fds: Mapping[Namespace, int] | None) -> None:
        with _Borrowed(fds or {}) as kept:

            def work() -> None:
                with Reach(self._home, kept.fds, self._processes) as reach:
                    tunnels.quiet(reach, wire)

            await self._run(self._creating, kept, work)

    def _follow(self, running: Running) -> None:
        """From a worker thread: the loop is to notice when that process ends."""
        self._loop.call_soon_threadsafe(self._watch, self._processes.watch(running), running)

    def _watch(self, descriptor: int, running: Running) -> None:
        if not self._open:
            os.close(descriptor)
            return
        self._watched[descriptor] = running
        self._loop.add_reader(descriptor, self._ended, descriptor)

    def _unwatch(self, descriptor: int) -> Running:
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        return self._watched.pop(descriptor)

    def _expect_end(self, running: Running) -> None:
        if self._open and running not in self._dying:
            late = self._loop.call_later(wireguard_go.DIES, self._outlives, running)
            self._dying[running] = late

    def _outlives(self, running: Running) -> None:
        self._dying.pop(running, None)
        if running.pidfd >= 0:
            log.error(
                "wireguard-go (pid %d) of %s does not die, and keeps its UDP port",
                running.pid,
                running.mark.connection,
            )

    def _ended(self, descriptor: int) -> None:
        running = self._unwatch(descriptor)
        if late := self._dying.pop(running, None):
            late.cancel()

        def tidied(done: "asyncio.Future[None]") -> None:
            if not done.cancelled():
                done.exception()  # what it leaves is swept another time
            if self._open and not running.stopped:
                self.on_engine_end(running.mark)

        tidying = self._submit(self._deleting, None, partial(self._processes.ended, running))
        asyncio.wrap_future(tidying).add_done_callback(tidied)

    def has_engine(self, mark: owner.Mark) -> bool:
        """Whether a wireguard-go process runs for that side of that connection."""
        return self._processes.present(owner.tunnel_name(mark.wire, mark.side))

    # --- the underlay ------------------------------------------------------------------------

    async def vni_free(
        self,
        vni: int,
        local: IPAddress,
        remote: IPAddress,
        *,
        port: int = VXLAN_PORT,
        underlay: Namespace | None = None,
    ) -> bool:
        """Whether a tunnel with that VNI could be made now, says the kernel: it holds for the
        underlay and port, whoever made the tunnels and wherever their devices are."""

        def question(sock: Socket) -> bool:
            (refusal,) = sock.do([messages.probe_vni(vni, port, local, remote)])
            return sweep.free(refusal, vni, underlay or self.own)

        return await self._asked(underlay, question)

    async def way_to(self, remote: IPAddress, *, underlay: Namespace | None = None) -> Way:
        """Source address, device and MTU towards a far node; PreconditionError without a route."""
        where = underlay or self.own

        def question(sock: Socket) -> Way:
            try:
                index, source = messages.way(sock.ask(messages.get_route(remote)))
                if index == _LOOPBACK:
                    # who passes requests on to other nodes may be on this one, and no packet to
                    # them leaves by the loopback
                    own = messages.index_of(sock.dump(messages.dump_addresses()), remote)
                    index = own or index
                device = messages.device(sock.ask(messages.get_link(index=index)))
            except Refusal as refusal:
                raise explain(refusal, f"ip route get {remote}", where) from refusal
            if source is None:
                raise PreconditionError(
                    f"the route to {remote} in {where} has no source address",
                    hint=f"give {device.name} an address, or set the tunnel IP",
                )
            return Way(source, device.name, device.mtu, device.up and device.carrier)

        return await self._asked(underlay, question)

    async def gateway(
        self, remote: IPAddress, *, underlay: Namespace | None = None
    ) -> IPAddress | None:
        """The router on the way to an address, or the default one on the same device.

        None where there is none; PreconditionError without a route.
        """

        def question(sock: Socket) -> IPAddress | None:
            try:
                answer = sock.ask(messages.get_route(remote))
                routes = sock.dump(messages.dump_routes())
            except Refusal as refusal:
                raise explain(refusal, f"ip route get {remote}", underlay or self.own) from refusal
            index, _ = messages.way(answer)
            default = [
                via
                for _, over, via in messages.default_routes(routes)
                if over == index and via and via.version == remote.version
            ]
            return messages.gateway(answer) or next(iter(default), None)

        return await self._asked(underlay, question)

    async def default_address(
        self, family: int = 4, *, underlay: Namespace | None = None
    ) -> IPAddress:
        """The address from which the default route leaves; PreconditionError if there is none."""
        where = underlay or self.own

        def question(sock: Socket) -> IPAddress:
            return sweep.default_address(sock, family, where)

        return await self._asked(underlay, question)

    async def _asked(self, underlay: Namespace | None, question: Callable[[Socket], T]) -> T:
        def work() -> T:
            with Reach(self._home, {}, self._processes) as reach:
                return question(reach.socket(underlay or self.own))

        return await self._run(self._creating, None, work)

    # --- threads -----------------------------------------------------------------------------

    def _submit(
        self, pool: ThreadPoolExecutor, kept: "_Borrowed | None", work: Callable[[], T]
    ) -> "Future[T]":
        def whole() -> T:
            try:
                return work()
            except Refusal as refusal:  # one nobody had words for
                raise explain(refusal, "netlink", "the kernel") from refusal
            except OSError as failure:
                if failure.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                raise explain(failure, "open", "this process") from failure
            finally:
                if kept:
                    kept.close()

        running = pool.submit(whole)
        if kept:
            kept.given_to(running)
        return running

    async def _run(
        self,
        pool: ThreadPoolExecutor,
        kept: "_Borrowed | None",
        work: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        return await asyncio.wrap_future(self._submit(pool, kept, lambda: work(*args, **kwargs)))


def _standing(reach: Reach, end: End, engine: EngineName) -> StandingWireguard | None:
    held = tunnels.settings(reach, end, engine)
    if held is None or held.key is None or not held.port:
        return None
    return StandingWireguard(held.key, held.port, engine)


def _whose(mark: owner.Mark) -> tuple[str, Role]:
    return mark.connection, (mark.side, mark.role, mark.leg)


def _names(found: Iterable[Found]) -> set[str]:
    """What wireguard-go calls those of them that are its."""
    return {
        owner.tunnel_name(item.mark.wire, item.mark.side)
        for item in found
        if item.mark and tunnels.KINDS.get(item.device.kind) == "userspace"
    }


class _Borrowed:
    """Copies of a caller's fds, closed by the thread that uses them.

    Copies, because a cancelled caller closes its own while the thread still runs, and
    the number may be another file's by then.
    """

    def __init__(self, fds: Mapping[Namespace, int]) -> None:
        self.fds: dict[Namespace, int] = {}
        try:
            for namespace, fd in fds.items():
                self.fds[namespace] = os.dup(fd)
        except OSError as failure:
            self.close()
            if failure.errno != errno.EBADF:
                raise explain(failure, "dup", "this process") from failure
            raise InvalidError(f"a namespace's file descriptor is closed: {failure}") from None
        self._given = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._given:
            self.close()

    def given_to(self, running: "Future[T]") -> None:
        """The thread closes them; or nobody does if it never starts, so that we do."""
        self._given = True
        running.add_done_callback(lambda done: self.close() if done.cancelled() else None)

    def close(self) -> None:
        fds, self.fds = self.fds, {}
        for fd in fds.values():
            os.close(fd)

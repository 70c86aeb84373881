"""Bringing a wire to its desired state: look, plan, do, look again.

The second look is for what was there before: what is new is there as the kernel
acknowledged it.

All of this blocks and runs in a worker thread, in one go: one thread hop, and what
it opens in a workload's namespace is closed before it answers. `nsm.kernel.node`
is the door from asyncio.

Every step is written down before it is taken (`Journal`), so that a failure here,
or of anything the caller does later, takes back exactly what was done.
"""

import errno
import struct
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

from nsm.errors import InternalError, NsmError, UnsupportedError
from nsm.kernel import messages, netlink, owner, splice, tunnels, wireguard
from nsm.kernel.messages import Device
from nsm.kernel.netlink import (
    NamespaceGoneError,
    NameTakenError,
    Refusal,
    RouteTakenError,
    Socket,
    VniTakenError,
    explain,
)
from nsm.kernel.plan import Step, plan
from nsm.kernel.reach import ABSENT, Reach, Seat
from nsm.kernel.state import (
    Address,
    End,
    Interface,
    Item,
    Link,
    LocalWire,
    Macvlan,
    Made,
    Namespace,
    Neighbour,
    RemoteWire,
    Route,
    Rule,
    Splice,
    State,
    Stub,
    Sysctl,
    Veth,
    Vxlan,
    Wire,
    Wireguard,
    WireguardTunnel,
    items,
    member_of,
    policies,
)
from nsm.kernel.tunnels import IndexTakenError

_ROUNDS = 3  # taking an address away can take others with it: then the second look finds them
choosing_tables = threading.Lock()  # a free table number is free only until somebody takes it


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device is: enough to ask for it and to delete it without entering anything."""

    nsid: int
    index: int


@dataclass(slots=True)
class Journal:
    """What an attempt has done so far, oldest first, and what it found when it began."""

    before: State | None = None
    steps: list[Step] = field(default_factory=list)
    places: dict[Seat, Place] = field(default_factory=dict)


# --- the whole of it -------------------------------------------------------------------------


def ensure(reach: Reach, wire: Wire, group: int, journal: Journal) -> tuple[Step, ...]:
    """Make the kernel hold the wire, and nothing else of ours for it; return what that took.

    Raises NsmError with everything taken back, so that the kernel is as it was.
    """
    fixed = items(wire, group)
    with_policies = any(interface.policies for _, interface in wire.sides)
    with ExitStack() as stack:
        if with_policies:
            stack.enter_context(choosing_tables)
        try:
            for _ in range(_ROUNDS):
                desired, observed = _look(reach, wire, fixed, journal)
                if journal.before is None:
                    journal.before = observed
                steps = plan(desired, observed)
                if not steps:
                    return tuple(journal.steps)
                try:
                    do(reach, steps, journal)
                except IndexTakenError:
                    _reversed(reach, journal)  # one in a million: all of it again
                    continue
                if any(_is_led_elsewhere(step) for step in steps):
                    _unlearn(reach, wire)
                if _is_new(journal):
                    return tuple(journal.steps)
            _agree(wire, *_look(reach, wire, fixed, journal))
        except BaseException as failure:
            for note in revert(reach, wire, group, journal):
                failure.add_note(note)
            raise
    return tuple(journal.steps)


def _is_new(journal: Journal) -> bool:
    """Whether all of it was made here and now, and acknowledged step by step.

    Then that is the kernel's word, and there is nothing to look at again: a look finds what
    was there before, and what the kernel takes away with something taken away or changed.
    """
    links = [step for step in journal.steps if isinstance(step.item, Made)]
    before = any(isinstance(item, Link) for item in journal.before or ())
    return (
        bool(links)
        and not before
        and all(step.verb == "add" or isinstance(step.item, Sysctl) for step in journal.steps)
    )


def _agree(wire: Wire, desired: State, observed: State) -> None:
    if left := plan(desired, observed):
        raise InternalError(
            f"wire {wire.connection}: the kernel took every step and still lacks"
            f" `{'`, `'.join(map(str, left[:3]))}` in {left[0].namespaces[0]}"
        )


def revert(reach: Reach, wire: Wire, group: int, journal: Journal) -> list[str]:
    """Take back what was done, newest first; harmless where it is gone. Says what did not work.

    Where a device was there before, what stood on it is compared once more: the kernel
    takes more away than it was told (with the last IPv4 address go the neighbours).
    """
    notes = _reversed(reach, journal)
    before = journal.before or frozenset()
    if any(isinstance(item, Made) for item in before):
        try:
            _, now = _look(reach, wire, items(wire, group), Journal())
            lost = [step for step in plan(before, now) if not isinstance(step.item, Stub)]
            do(reach, lost, Journal(places=journal.places))
        except NamespaceGoneError:
            pass  # and what was in it went with it
        except NsmError as failure:
            notes.append(f"and could not take back: {failure}")
    return notes


def _reversed(reach: Reach, journal: Journal) -> list[str]:
    created = {
        end.seat
        for step in journal.steps
        if step.verb == "add" and isinstance(step.item, Made)
        for end in step.item.ends
    }
    notes = []
    while journal.steps:
        step = journal.steps.pop().reversed()
        if step.verb == "del" and member_of(step.item) in created:
            continue  # it goes with its device
        try:
            _do_one(reach, step, journal)
        except NamespaceGoneError:
            continue  # and what was in it went with it
        except NsmError as failure:
            notes.append(f"and could not take back: {failure}")
    return notes


def _do_one(reach: Reach, step: Step, journal: Journal) -> None:
    if step.verb == "del" and isinstance(step.item, Link):
        _delete(reach, step.item, journal)
        return
    do(reach, (step,), Journal(places=journal.places))


# --- looking ---------------------------------------------------------------------------------


def _look(reach: Reach, wire: Wire, fixed: State, journal: Journal) -> tuple[State, State]:
    """What the wire needs now that tables are chosen, and what of it is there."""
    desired: set[Item] = set(fixed)
    observed: set[Item] = set()
    seen: list[tuple[Interface, Device | None]] = []
    for side, interface in wire.sides:
        seen.append((interface, _standing(reach, wire, side, interface.namespace, interface.name)))
    observed.update(_devices(reach, wire, seen))
    for interface, found in seen:
        if found:
            observed.update(_members(reach, interface, found))
        if interface.policies or (found and (mark := owner.Mark.parse(found.alias)) and mark.rules):
            wanted, there = _policies(reach, interface, found)
            desired |= wanted
            observed |= there
    settings = [item for item in fixed if isinstance(item, Sysctl)]
    present = set(reach.read(settings))
    observed |= present
    if missing := {(s.namespace, s.key) for s in settings} - {
        (s.namespace, s.key) for s in present
    }:
        raise _no_setting(wire, *min(missing, key=str))
    return frozenset(desired), frozenset(observed)


def _no_setting(wire: Wire, namespace: Namespace, key: str) -> NsmError:
    if "ipv6" in key:
        return UnsupportedError(
            f"wire {wire.connection} asks for IPv6 in {namespace}, and this kernel has no IPv6",
            hint="boot without ipv6.disable=1, or give the service IPv4 prefixes only",
        )
    return UnsupportedError(
        f"the running kernel has no setting {key.replace('/', '.')} in {namespace}"
    )


def _standing(reach: Reach, wire: Wire, side: str, where: Namespace, name: str) -> Device | None:
    """The wire's device under that name; what somebody renamed is called so again.

    Raises NameTakenError if the name is another's.
    """
    last = reach.last.get((where, name), 0)
    found = reach.device(where, name=name)
    if found is None and last:
        found = _renamed(reach, wire, side, where, name)
    if found is None:
        return None
    _ours(found, wire.connection, side, where, last)
    reach.index[where, name] = found.index
    return found


def _renamed(reach: Reach, wire: Wire, side: str, where: Namespace, name: str) -> Device | None:
    """A device keeps its number whatever it is called: ours gets its name back."""
    last = reach.last[where, name]
    found = reach.device(where, index=last)
    if found is None or not _is_ours(found, wire.connection, side, last):
        return None
    command = f"ip link set {found.name} name {name}"
    (refusal,) = reach.socket(where).do([messages.rename_link(last, name)])
    if refusal and refusal.errno == errno.EBUSY:  # what goes with that is put back as it is seen
        *_, refusal = reach.socket(where).do(
            [messages.set_down(last), messages.rename_link(last, name)]
        )
    if refusal:
        raise explain(refusal, command, where)
    return reach.device(where, index=last)


def _is_ours(found: Device, connection: str, side: str, last: int) -> bool:
    """Whether a device is the wire's, by what is written on it and by the number it had."""
    if not owner.is_ours(found.group):
        return False
    mark = owner.Mark.parse(found.alias)
    if mark is None:  # somebody wrote over it; or an attempt of ours died before it wrote
        return found.index == last or not found.alias
    return (mark.connection, mark.side) == (connection, side)  # whichever leg: it is replaced


def _ours(found: Device, connection: str, side: str, where: Namespace, last: int) -> None:
    """Raise NameTakenError unless the device under the wire's name is the wire's."""
    if _is_ours(found, connection, side, last):
        return
    mark = owner.Mark.parse(found.alias) if owner.is_ours(found.group) else None
    whose = f"is wire {mark.connection}" if mark else "is not a wire's"
    raise NameTakenError(
        f"wire {connection}: there is an interface {found.name} in {where} already, which {whose}",
        hint="choose another name in the NSURL, or remove that interface",
    )


def _devices(
    reach: Reach, wire: Wire, seen: list[tuple[Interface, Device | None]]
) -> Iterator[Link]:
    if isinstance(wire, LocalWire):
        (a, first), (b, second) = seen
        if first and second and _pair(first, second):
            yield Veth(first.end(a.namespace), second.end(b.namespace))
            return
    below = _below(reach, wire) if isinstance(wire, RemoteWire) else None
    if below:
        yield below
    lead = _lead(reach, wire, below) if isinstance(wire, RemoteWire) else None
    for interface, found in seen:
        if not found:
            continue
        if lead and (spliced := _spliced(reach, interface, found, below, lead)):
            lead = None
            yield spliced
        else:
            yield _on(reach, interface, found, below) or _single(reach, wire, interface, found)
    if lead:
        yield Stub(lead, "veth")


def _below(reach: Reach, wire: RemoteWire) -> Vxlan | Wireguard | Stub | None:
    """The wire's tunnel in the underlay, if there is one."""
    where, name = wire.below
    found = _standing(reach, wire, wire.side, where, name)
    if found is None:
        return None
    return _single(reach, wire, replace(wire.end, namespace=where), found)


def _lead(reach: Reach, wire: RemoteWire, below: Link | None) -> End | None:
    """The end of what leads to the wire's encrypted tunnel in the underlay, if there is one."""
    if not (isinstance(below, Wireguard) or isinstance(wire.tunnel, WireguardTunnel)):
        return None
    where, name = wire.lead
    found = _standing(reach, wire, wire.side, where, name)
    return found.end(where) if found else None


def _spliced(
    reach: Reach, interface: Interface, found: Device, below: Link | None, lead: End
) -> Splice | None:
    """The workload's device as one that leads to the tunnel below, both ways."""
    if not isinstance(below, Wireguard) or (found.kind, found.peer) != (
        "veth",
        reach.index[lead.seat],
    ):
        return None
    sock = reach.socket(lead.namespace)
    near, tunnel = reach.index[lead.seat], reach.index[below.end.seat]
    for at, name in ((near, splice.name(tunnel)), (tunnel, splice.name(near, found.mac))):
        if splice.seen(sock.dump(splice.dump(at))) != [name]:
            return None
    return Splice(found.end(interface.namespace), lead, below.end.seat, below.core)


def _on(
    reach: Reach, interface: Interface, found: Device, below: Vxlan | Wireguard | Stub | None
) -> Macvlan | None:
    """The workload's device as one on top of the tunnel below, if that is what it is."""
    if not isinstance(below, Vxlan) or (found.kind, found.peer) != (
        "macvlan",
        reach.index[below.end.seat],
    ):
        return None
    if not _stands_on(reach, interface.namespace, below.underlay, found):
        return None
    return Macvlan(found.end(interface.namespace), below.end.seat, below.core)


def _pair(a: Device, b: Device) -> bool:
    return a.kind == b.kind == "veth" and (a.peer, b.peer) == (b.index, a.index)


def _single(
    reach: Reach, wire: Wire, interface: Interface, found: Device
) -> Vxlan | Wireguard | Stub:
    end = found.end(interface.namespace)
    if found.kind in tunnels.KINDS:
        return _encrypted(reach, wire, end, found.kind) or Stub(end, found.kind)
    if found.kind == "vxlan" and found.local and found.remote:
        for underlay in _underlays(reach, wire):
            if _stands_on(reach, interface.namespace, underlay, found):
                return Vxlan(end, found.vni, found.local, found.remote, found.port, underlay)
    return Stub(end, found.kind)


def _encrypted(reach: Reach, wire: Wire, end: End, kind: str) -> Wireguard | None:
    """A WireGuard device of ours, if its underlay lives and somebody is behind it."""
    mark = owner.Mark.parse(end.alias)
    if mark is None:
        return None
    for underlay in _underlays(reach, wire):
        if underlay.cookie == mark.underlay:
            engine = tunnels.KINDS[kind]
            settings = tunnels.settings(reach, end, engine)
            if settings is None:
                return None
            tunnel = wire.tunnel if isinstance(wire, RemoteWire) else None
            wanted = tunnel.peer if isinstance(tunnel, WireguardTunnel) else ""
            return wireguard.found(end, engine, underlay, settings, wanted, mark.far)
    return None


def _underlays(reach: Reach, wire: Wire) -> Iterator[Namespace]:
    if isinstance(wire, RemoteWire):
        yield wire.tunnel.underlay
    if not isinstance(wire, RemoteWire) or not wire.tunnel.underlay.own:
        yield reach.own


def _stands_on(reach: Reach, where: Namespace, underlay: Namespace, found: Device) -> bool:
    """Whether the device's socket is in that underlay, by the workload's own numbering."""
    if found.far is None:
        return where == underlay
    return reach.number(where, underlay) == found.far


def _members(reach: Reach, interface: Interface, found: Device) -> Iterator[Item]:
    where, link, index = interface.namespace, interface.name, found.index
    sock = reach.socket(where)
    yield from messages.seen_addresses(
        sock.dump(messages.dump_addresses(index)), where, link, index
    )
    yield from messages.seen_routes(sock.dump(messages.dump_routes(index)), where, link, index)
    neighbours = sock.dump(messages.dump_neighbours(index))
    yield from messages.seen_neighbours(neighbours, where, link, index)


def _policies(
    reach: Reach, interface: Interface, found: Device | None
) -> tuple[set[Item], set[Item]]:
    where, link = interface.namespace, interface.name
    sock = reach.socket(where)
    rules = list(messages.seen_rules(sock.dump(messages.dump_rules()), where))
    routes = sock.dump(messages.dump_routes())
    full = messages.tables(routes)
    here = {
        route.table
        for route in (messages.seen_routes(routes, where, link, found.index) if found else ())
    }
    mine = {
        Rule(where, link, rule.family, rule.selector, rule.table, rule.priority)
        for rule, ours in rules
        # a rule of ours that leads nowhere is what a wire left that died with its device
        if ours and (rule.table in here or rule.table not in full)
    }
    busy = full | {rule.table for rule, _ in rules}
    taken = {rule.priority for rule, _ in rules}
    return set(policies(interface, mine, busy, taken)), set(mine)


# --- doing -----------------------------------------------------------------------------------


def do(reach: Reach, steps: Iterable[Step], journal: Journal) -> None:
    """Take the steps in order, one batch a namespace where the order allows.

    Raises the first refusal; the journal then holds what was done, and nothing that was not.
    """
    steps = tuple(steps)
    waiting = _Waiting(reach, journal)
    # Beside these a route of the same place may stand: they are our own, and go later, if at all.
    ours = Counter(_place(one.item) for one in steps if one.verb == "del")
    for step in steps:
        item = step.item
        if isinstance(item, Link):
            if step.verb != "set":
                waiting.send()
            _link(reach, step, journal, waiting)
        elif isinstance(item, Sysctl):
            waiting.send()
            journal.steps.append(step)
            try:
                reach.write(item)
            except OSError as failure:
                journal.steps.pop()
                raise explain(failure, str(step), item.namespace) from failure
        else:
            place = _place(item)
            waiting.add(item.namespace, step, _member(reach, step, item, beside=ours[place] > 0))
            ours[place] += -1 if step.verb == "del" else 1
    waiting.send()


def _place(item: Item) -> tuple[object, ...]:
    """What the kernel tells a device's routes apart by at first sight; empty for no route."""
    if not isinstance(item, Route):
        return ()
    return item.namespace, item.link, item.table, item.metric, item.to


class _Waiting:
    """Messages that wait to be sent together, by namespace."""

    def __init__(self, reach: Reach, journal: Journal) -> None:
        self._reach = reach
        self._journal = journal
        self._batches: dict[Namespace, list[tuple[Step, bytearray]]] = {}

    def add(self, where: Namespace, step: Step, message: bytearray | None) -> None:
        """Queue one message of a step; what no message says is so already."""
        if message is not None:
            self._batches.setdefault(where, []).append((step, message))

    def send(self) -> None:
        """Send all, a batch a namespace, and write down what was done."""
        batches, self._batches = self._batches, {}
        done = self._journal.steps
        for where, batch in batches.items():
            # before it is sent: whatever ends us from here on, the way back is known
            known = {id(step) for step in done}  # a step on two ends is in two batches
            for step, _ in batch:
                if id(step) not in known:
                    known.add(id(step))
                    done.append(step)
            results = self._reach.socket(where).do([message for _, message in batch])
            refused: list[tuple[Step, Refusal]] = []
            for (step, message), refusal in zip(batch, results, strict=True):
                if refusal is None or self._forgiven(where, step, message, refusal):
                    continue
                refused.append((step, refusal))
                if step.verb == "add" and (_creates(message) or not _is_link(step)):
                    _drop(done, step)
            if refused:
                raise self._refused(where, *refused[0])

    def _refused(self, where: Namespace, step: Step, refusal: Refusal) -> Exception:
        item = step.item
        if not (isinstance(item, Made) and step not in self._journal.steps):
            return _explained(self._reach, step, refusal, where)
        for end in item.ends:  # the device was not made
            self._reach.index.pop(end.seat, None)
            self._journal.places.pop(end.seat, None)
        if refusal.errno == errno.EBUSY:
            return IndexTakenError()
        return _not_created(self._reach, item, step, refusal)

    def _forgiven(self, where: Namespace, step: Step, message: bytearray, refusal: Refusal) -> bool:
        """Whether the refusal means that it is so already, or that the step works another way."""
        item = step.item
        if step.verb == "del" and refusal.errno in ABSENT:
            return True
        if refusal.errno == errno.EAFNOSUPPORT and isinstance(item, Vxlan | Wireguard | Splice):
            return True  # nothing to silence: this kernel has no IPv6, or this device none
        if refusal.errno == errno.EINVAL and step.verb == "add" and isinstance(item, Route):
            # its gateway is reached over another wire's device until what is before it in this
            # batch, and had to stand beside that, is there
            (again,) = self._reach.socket(where).do([message])
            if again is None or again.errno == errno.EINVAL:
                return again is None
            refusal = again
        if refusal.errno != errno.EEXIST or step.verb != "add":
            return False
        if splice.is_place(message):
            return True  # of one that led to this tunnel before
        if isinstance(item, Address):
            _drop(self._journal.steps, step)  # somebody was quicker; it is not ours to take back
            return True
        if isinstance(item, Route) and not _taken(self._reach, item):
            index = self._reach.index_of(where, item.link)
            (again,) = self._reach.socket(where).do(
                [messages.route("add", item, index, append=True)]
            )
            return again is None or again.errno == errno.EEXIST  # the very same, and ours
        return False


def _is_link(step: Step) -> bool:
    return isinstance(step.item, Link)


def _creates(message: bytearray) -> bool:
    kind, flags = struct.unpack_from("=HH", message, 4)
    return kind == netlink.NEWLINK and bool(flags & netlink.CREATE)


def _drop(steps: list[Step], step: Step) -> None:
    """Forget that step, the newest if there are several."""
    for n in range(len(steps) - 1, -1, -1):
        if steps[n] is step:
            del steps[n]
            return


def _taken(reach: Reach, item: Route) -> bool:
    """Whether a route to that prefix is somebody else's: by those of wires ours may stand. There
    may be none any more: another wire's was there, and has gone."""
    routes = reach.socket(item.namespace).dump(messages.dump_routes())
    return not messages.holders(routes, item) <= {owner.PROTOCOL}


def _explained(reach: Reach, step: Step, refusal: Refusal, where: Namespace) -> NsmError:
    if refusal.errno == errno.EADDRINUSE and isinstance(step.item, Vxlan | Wireguard):
        return tunnels.port_taken(reach, step.item)  # a tunnel takes its port as it comes up
    if isinstance(step.item, Splice) and refusal.errno in (errno.ENOENT, errno.EOPNOTSUPP):
        return splice.cannot(refusal)
    if refusal.errno == errno.EEXIST and isinstance(step.item, Route):
        return RouteTakenError(
            f"`{step}` in {where}: there is a route to {step.item.to} already that is not a wire's",
            hint=f"see ip route show {step.item.to}; remove it, or let the endpoint give another",
        )
    return explain(refusal, str(step), where)


def _member(
    reach: Reach, step: Step, item: Address | Route | Neighbour | Rule, *, beside: bool
) -> bytearray | None:
    verb: messages.Verb = "del" if step.verb == "del" else "add"
    if isinstance(item, Rule):
        return messages.rule(verb, item)
    index = reach.index_of(item.namespace, item.link)
    if not index:
        if verb == "del":
            return None  # it went with its device
        raise explain(Refusal(errno.ENODEV), str(step), item.namespace)
    if isinstance(item, Address):
        return messages.address(verb, item, index)
    if isinstance(item, Route):
        return messages.route(verb, item, index, append=beside)
    return messages.neighbour(verb, item, index)


def _link(reach: Reach, step: Step, journal: Journal, waiting: _Waiting) -> None:
    item = step.item
    assert isinstance(item, Link)
    if step.verb == "del":
        journal.steps.append(step)
        _delete(reach, item, journal)
    elif step.verb == "set":
        assert isinstance(step.before, Link)
        if isinstance(item, Wireguard) and isinstance(step.before, Wireguard):
            # before its alias, which says that it has been told
            waiting.send()
            journal.steps.append(step)
            tunnels.change(reach, item, wireguard.difference(item, step.before))
        tunnel = _retargeted(item, step.before)
        for after, before in zip(item.ends, step.before.ends, strict=True):
            index = reach.index_of(after.namespace, after.name)
            waiting.add(after.namespace, step, messages.set_link(index, before, after, tunnel))
    else:
        if isinstance(item, Stub):  # taking back its deletion: its far end is nowhere to be found
            raise InternalError(f"`{step}` in {item.end.namespace}: its far end is gone")
        _create(reach, item, step, journal, waiting)


def _is_led_elsewhere(step: Step) -> bool:
    """Whether a tunnel that stood ends at another node from now on."""
    item, before = step.item, step.before
    return isinstance(item, Vxlan) and isinstance(before, Vxlan) and item.remote != before.remote


def _unlearn(reach: Reach, wire: Wire) -> None:
    """Forget what the workload found out of its neighbours: behind the same addresses there
    may be other devices now, and for a minute the kernel would go on sending to the old."""
    for _, interface in wire.sides:
        if index := reach.index_of(interface.namespace, interface.name):
            sock = reach.socket(interface.namespace)
            learned = messages.learned_neighbours(sock.dump(messages.dump_neighbours(index)), index)
            sock.do(list(learned))  # one that is gone by itself is what we want


def _retargeted(item: Link, before: Link) -> Vxlan | None:
    if not (isinstance(item, Vxlan) and isinstance(before, Vxlan)):
        return None
    return item if (item.local, item.remote) != (before.local, before.remote) else None


def _create(reach: Reach, item: Made, step: Step, journal: Journal, waiting: _Waiting) -> None:
    """Queue what makes the device, under the index it had before if it had one."""
    for end in item.ends:
        index = reach.index.setdefault(end.seat, messages.fresh_index())
        journal.places[end.seat] = Place(end.namespace.nsid, index)
        reach.forget(end.namespace, f"/{end.name}/")  # its settings will be the default's
    indexes = [reach.index[end.seat] for end in item.ends]
    if isinstance(item, Veth):
        far = reach.fd(item.dst.namespace)
        made = messages.create_veth(item.src, indexes[0], item.dst, indexes[1], far)
        waiting.add(item.src.namespace, step, made)
    elif isinstance(item, Macvlan):
        where, name = item.lower
        made = messages.create_macvlan(
            item, indexes[0], reach.index_of(where, name), reach.fd(item.end.namespace)
        )
        waiting.add(where, step, made)
    elif isinstance(item, Wireguard):
        _create_encrypted(reach, item, step, journal, waiting)
    elif isinstance(item, Splice):
        _create_splice(reach, item, step, waiting)
    else:
        made = messages.create_vxlan(item, indexes[0], reach.fd(item.end.namespace))
        waiting.add(item.underlay, step, made)
        if (mark := owner.Mark.parse(item.end.alias)) and mark.hop:
            waiting.add(item.underlay, step, messages.silence(indexes[0]))
    for end, index in zip(item.ends, indexes, strict=True):
        quiet = isinstance(item, Wireguard)  # as it is by nature
        born = replace(end, alias="", up=False, quiet=quiet)
        waiting.add(end.namespace, step, messages.set_link(index, born, end))


def _create_encrypted(
    reach: Reach, item: Wireguard, step: Step, journal: Journal, waiting: _Waiting
) -> None:
    """Make the device and tell it everything, while it is down and without its mark."""
    seat, index = item.end.seat, reach.index[item.end.seat]
    if item.engine == "kernel":
        made = messages.create_wireguard(item.end, index, reach.fd(item.end.namespace))
        waiting.add(item.underlay, step, made)
        waiting.send()
        tunnels.change(reach, item, wireguard.difference(item))
        return
    journal.steps.append(step)  # before anything is started: the way back is known
    try:
        tunnels.run(reach, item, index)
    except IndexTakenError:
        del reach.index[seat], journal.places[seat]
        raise
    # as the kernel's own has none: what a node says by itself is no reason for a handshake
    waiting.add(item.end.namespace, step, messages.silence(index))


def _create_splice(reach: Reach, item: Splice, step: Step, waiting: _Waiting) -> None:
    """Queue a veth pair into the workload, and what joins its end here with the tunnel."""
    where, mac = item.near.namespace, item.end.mac
    inside, near = (reach.index[end.seat] for end in item.ends)
    tunnel = reach.index_of(*item.lower)
    out, back = (
        reach.keep(splice.load(program))
        for program in (splice.outward(tunnel), splice.inward(near, mac))
    )
    for message in (
        messages.create_veth(item.near, near, item.end, inside, reach.fd(item.end.namespace)),
        messages.silence(near),
        splice.place(near),
        splice.attach(near, out, splice.name(tunnel)),
        splice.place(tunnel),
        splice.attach(tunnel, back, splice.name(near, mac)),
    ):
        waiting.add(where, step, message)
    waiting.add(item.end.namespace, step, messages.silence(inside))


def _not_created(reach: Reach, item: Made, step: Step, refusal: Refusal) -> NsmError:
    where = item.ends[0].namespace
    if isinstance(item, Vxlan | Wireguard):
        where = item.underlay
    elif isinstance(item, Macvlan | Splice):
        where = item.lower[0]
    if refusal.errno == errno.EEXIST:
        for end in item.ends:
            if reach.device(end.namespace, name=end.name):
                return NameTakenError(
                    f"`{step}`: there is an interface {end.name} in {end.namespace} already",
                    hint="choose another name in the NSURL, or remove that interface",
                )
        if isinstance(item, Vxlan):
            return VniTakenError(
                f"VNI {item.vni} is in use on UDP port {item.port} in {item.underlay}",
                hint="agree on another VNI",
            )
    return explain(refusal, str(step), where)


def _process(item: Link) -> str:
    """The name of the wireguard-go process behind a device; empty if there is none."""
    if isinstance(item, Wireguard) and item.engine == "userspace":
        return item.called
    if isinstance(item, Stub) and tunnels.KINDS.get(item.kind) == "userspace":
        mark = owner.Mark.parse(item.end.alias)
        return owner.tunnel_name(mark.wire, mark.side) if mark else ""
    return ""


def _delete(reach: Reach, item: Link, journal: Journal) -> None:
    """Delete the device; from outside by its number where the way in is gone."""
    if name := _process(item):  # and with it the device
        reach.processes.stop(name)
    for end in item.ends:
        refusal: Refusal | None = None
        place = journal.places.get(end.seat)
        if place is not None:
            with Socket.here() as own:
                (refusal,) = own.do([messages.delete_link(place.index, place.nsid)])
        else:
            with suppress(NamespaceGoneError):
                index = reach.index_of(end.namespace, end.name)
                if not index:
                    continue
                (refusal,) = reach.socket(end.namespace).do([messages.delete_link(index)])
        # EINVAL: the number belongs to no namespace any more
        if refusal and refusal.errno not in ABSENT | {errno.EINVAL}:
            raise explain(refusal, f"ip link del {end.name}", end.namespace)

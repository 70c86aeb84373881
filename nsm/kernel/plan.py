"""From what is to what should be, in an order the kernel accepts. Nothing here does I/O.

Add before delete, so that a refresh never leaves a wire without an address; delete
in reverse order of dependence. Only what stands in the way of something new goes
first: a device under the same name, or with the same VNI, or on the same port.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from nsm.kernel.state import (
    Address,
    End,
    Item,
    Link,
    Macvlan,
    Made,
    Namespace,
    Neighbour,
    OnTop,
    Route,
    Rule,
    Splice,
    State,
    Stub,
    Sysctl,
    Veth,
    Vxlan,
    Wireguard,
    member_of,
)
from nsm.kernel.wireguard import difference

_ORDER = (
    Veth,
    Vxlan,
    Wireguard,
    Macvlan,
    Splice,
    Stub,
    Sysctl,
    Address,
    Route,
    Neighbour,
    Rule,
)  # later stands on earlier


@dataclass(frozen=True, slots=True)
class Step:
    """One change; reads as the `ip` and `wg` commands that would do it.

    `before` is what a "set" replaces, so that every step can be taken back.
    """

    verb: Literal["add", "del", "set"]
    item: Item
    before: Item | None = None

    def __str__(self) -> str:
        if isinstance(self.item, Sysctl):
            return f"sysctl -w {self.item}"
        if self.verb == "set" and isinstance(self.item, Made):
            return "; ".join(_set(self.item, self.before)) or f"ip {self.item}"
        if self.verb == "del" and isinstance(self.item, Link):
            return f"ip link del {self.item.ends[0].name}"
        kind, rest = str(self.item).split(" ", 1)
        family = "-6 " if getattr(self.item, "family", 4) == 6 else ""
        command = f"ip {family}{kind} {self.verb} {rest}"
        if isinstance(self.item, Wireguard):
            return "; ".join(_encrypted(self.item, command))
        if isinstance(self.item, Splice):
            return "; ".join(_joined(self.item, command))
        return command

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """Where it happens; where the device is seen first, then where its far end is."""
        if isinstance(self.item, Link):
            return tuple(end.namespace for end in self.item.ends)
        return (self.item.namespace,)

    def reversed(self) -> "Step":
        """The step that takes this one back."""
        if self.verb == "set":
            assert self.before is not None
            return Step("set", self.before, self.item)
        return Step("del" if self.verb == "add" else "add", self.item)


def plan(desired: State, observed: State) -> tuple[Step, ...]:
    """What to do, in this order, to get from observed to desired."""
    if desired == observed:
        return ()
    want, have = _links(desired), _links(observed)
    cores = {link.core: link for link in want}
    kept = sorted((link for link in have if link.core in cores), key=_rank)  # the tunnel first
    changed = [(link, cores[link.core]) for link in kept]
    gone = [link for link in have if link.core not in cores]
    fresh = [link for link in want if link.core not in {old.core for old in have}]
    blocking = [link for link in gone if any(_collide(link, new) for new in fresh)]
    falling = {link.core for link in blocking}
    blocking += [  # it would go with the tunnel it stands on, and all on it too
        link
        for link in gone
        if isinstance(link, OnTop) and link.on in falling and link not in blocking
    ]
    leaving = [link for link in gone if link not in blocking]

    first = _with_members(blocking, observed)
    last = _with_members(leaving, observed)
    steps = [Step("del", item) for item in sorted(first, key=_rank, reverse=True)]
    left = observed - first - last

    adding = [Step("add", link) for link in sorted(fresh, key=_rank)]
    steps += [step for step in adding if not isinstance(step.item, OnTop)]
    steps += [Step("set", new, old) for old, new in changed if old != new]
    steps += [step for step in adding if isinstance(step.item, OnTop)]  # no larger than below it
    settings = {(item.namespace, item.key): item for item in left if isinstance(item, Sysctl)}
    rest = [item for item in desired - left if not isinstance(item, Link)]
    for item in sorted(rest, key=_rank):
        old = settings.get((item.namespace, item.key)) if isinstance(item, Sysctl) else None
        steps.append(Step("set", item, old) if old else Step("add", item))
    surplus = [item for item in left - desired if not isinstance(item, Link | Sysctl)]
    steps += [Step("del", item) for item in sorted(surplus, key=_rank, reverse=True)]
    steps += [Step("del", item) for item in sorted(last, key=_rank, reverse=True)]
    return tuple(steps)


def _links(state: State) -> list[Link]:
    return [item for item in state if isinstance(item, Link)]


def _collide(old: Link, new: Link) -> bool:
    if {end.seat for end in old.ends} & {end.seat for end in new.ends}:
        return True
    if isinstance(old, Vxlan) and isinstance(new, Vxlan):
        return old.claim == new.claim
    return isinstance(old, Wireguard) and isinstance(new, Wireguard) and old.claim == new.claim


def _with_members(links: Iterable[Link], state: State) -> frozenset[Item]:
    """The links and all that goes with them, so that taking it back can bring all of it."""
    seats = {end.seat for link in links for end in link.ends}
    return frozenset(links) | {
        item
        for item in state
        if member_of(item) in seats
        # a rule outlives the device, but must not outlive the table it leads to
        or (isinstance(item, Rule) and (item.namespace, item.link) in seats)
    }


def _rank(item: Item) -> tuple[int, int, int, bytes]:
    """Sorts by dependence, then by place, so that one situation has one plan."""
    kind = _ORDER.index(type(item))
    if isinstance(item, Address):
        return (kind, item.namespace.cookie, item.cidr.version, item.cidr.packed)
    if isinstance(item, Route):
        key = item.to.network_address.packed + bytes([item.to.prefixlen])
        return (kind, item.namespace.cookie, item.table << 32 | item.metric, key)
    if isinstance(item, Neighbour):
        return (kind, item.namespace.cookie, item.ip.version, item.ip.packed)
    if isinstance(item, Rule):
        return (kind, item.namespace.cookie, item.priority, b"")
    if isinstance(item, Sysctl):
        return (kind, item.namespace.cookie, 0, item.key.encode())
    return (kind, item.ends[0].namespace.cookie, 0, item.ends[0].name.encode())


def _set(new: Link, old: Item | None) -> Iterable[str]:
    assert isinstance(old, Link)
    if isinstance(new, Wireguard) and isinstance(old, Wireguard):
        yield from difference(new, old).commands(new.called)
    for after, before in zip(new.ends, old.ends, strict=True):
        words = [f"{word} {value}" for word, value in _differences(after, before)]
        if words:
            yield f"ip link set {after.name} {' '.join(words)}"
    if not (isinstance(new, Vxlan) and isinstance(old, Vxlan)):
        return
    if (new.local, new.remote) != (old.local, old.remote):
        yield f"ip link set {new.end.name} type vxlan local {new.local} remote {new.remote}"


def _encrypted(new: Wireguard, command: str) -> Iterable[str]:
    yield command if new.engine == "kernel" else f"wireguard-go {new.called}"
    yield from difference(new).commands(new.called)
    if new.engine == "userspace":
        end = new.end
        yield (
            f"ip link set {new.called} mtu {end.mtu} group {end.group}"
            f" netns {end.namespace} name {end.name}"
        )


def _joined(new: Splice, command: str) -> Iterable[str]:
    yield command
    for one, other in ((new.near.name, new.lower[1]), (new.lower[1], new.near.name)):
        yield f"tc qdisc add dev {one} ingress"
        yield f"tc filter add dev {one} ingress bpf direct-action, redirecting to {other}"


def _differences(after: End, before: End) -> Iterable[tuple[str, object]]:
    for word, attribute in (
        ("address", "mac"),
        ("mtu", "mtu"),
        ("group", "group"),
        ("alias", "alias"),
    ):
        if getattr(after, attribute) != getattr(before, attribute):
            yield word, getattr(after, attribute)
    if after.quiet != before.quiet:
        yield "arp", "off" if after.quiet else "on"
    if after.up != before.up:
        yield ("up" if after.up else "down"), ""

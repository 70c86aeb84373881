"""What carries a forwarder's mark on a node, against what its leases say. Blocks.

Both are read twice: what a forwarder is making, or taking away, at this very moment is no leak.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Final

from forwarder.store import KEPT, load
from nsm.errors import NsmError
from nsm.kernel import namespaces, owner, sweep
from nsm.kernel.namespaces import NAMED, Home
from nsm.kernel.netlink import Refusal, Socket
from nsm.kernel.state import OWN
from nsm.kernel.sweep import Found
from nsm.kernel.wireguard_go import Processes
from nsm.store import looked_into

AGAIN: Final = 1.0  # seconds between the two looks
HERE: Final = "the node"


@dataclass(frozen=True, slots=True)
class Forwarder:
    """One whose node is looked at: what it is called, where its leases are, and its namespace."""

    node: str
    name: str
    store: str
    namespace: str = ""
    """A name below /run/netns; empty is where this process is."""


@dataclass(frozen=True, slots=True)
class Leak:
    """One thing that differs; what it is, where, and why it should not be so."""

    node: str
    what: str
    where: str
    why: str
    connection: str = ""
    remove: Callable[[], None] | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """By which it is known in the second look."""
        return (self.what, self.where, self.connection)


def of(forwarder: Forwarder) -> list[Leak]:
    """What differs on that forwarder's node, both times."""
    first = {leak.key for leak in _look(forwarder)}
    if not first:
        return []
    time.sleep(AGAIN)
    return [leak for leak in _look(forwarder) if leak.key in first]


def _look(forwarder: Forwarder) -> list[Leak]:
    with _node(forwarder) as home:
        return list(_leaks(forwarder, home))


@contextmanager
def _node(forwarder: Forwarder) -> Iterator[Home]:
    """This thread is on that forwarder's node, which is its home for the block."""
    with Home() as home:
        if not forwarder.namespace:
            yield home
            return
        entry = home.opened_path(f"{NAMED}/{forwarder.namespace}", forwarder.node)
        try:
            with home.inside(entry), Home() as there:
                yield there
        finally:
            os.close(entry)


def _leaks(forwarder: Forwarder, home: Home) -> Iterator[Leak]:
    with looked_into(forwarder.store, KEPT) as kept:
        leases = {lease.id: lease for lease in load(kept)}
        begun = {id_ for (id_,) in kept.execute("SELECT id FROM begun")}
    group = owner.group(forwarder.name)
    found = sweep.find(group)
    names = _names(home)
    owned = {*leases, *begun}
    untold = unwritten(forwarder.store)
    for one in found:
        if one.mark and one.mark.connection in owned:
            continue
        yield Leak(
            forwarder.node,
            f"device {one.device.name}",
            names.get(one.place.nsid, f"namespace {one.place.nsid}"),
            f"no lease{untold}" if one.mark else "nobody has said whose it is",
            one.mark.connection if one.mark else "",
            None if untold else _removal(forwarder, one, group),
        )
    standing = {one.mark.connection for one in found if one.mark and not one.mark.hop}
    for id_, lease in leases.items():
        if id_ not in standing:
            where = ", ".join(names.get(one.nsid, one.interface) for one in lease.spaces)
            yield Leak(forwarder.node, f"lease of {lease.connection.service}", where or HERE,
                       "no device", id_)  # fmt: skip
    processes = Processes(group)
    processes.at(home.namespace.cookie)
    with closing(processes):
        processes.adopt()
        for running in processes.known():
            if running.mark.connection not in owned:
                yield Leak(forwarder.node, f"wireguard-go {running.pid}", HERE, "no lease",
                           running.mark.connection)  # fmt: skip


def unwritten(store: str) -> str:
    """Why a forwarder may hold more than its store says, which it cannot write now; empty if it
    can. Then what has no lease may be somebody's, and is not to be taken away."""
    facts = os.statvfs(store)
    if facts.f_flag & os.ST_RDONLY:
        return ", and its store is on a disk that is read-only"
    return ", and its store is on a disk that is full" if not facts.f_bavail else ""


def _removal(forwarder: Forwarder, one: Found, group: int) -> Callable[[], None]:
    def remove() -> None:
        with _node(forwarder):
            sweep.delete(one, group)

    return remove


def _names(home: Home) -> Mapping[int, str]:
    """What people call namespaces, by the number each has here."""
    found = {OWN: HERE}
    with Socket.here() as own:
        for name in namespaces.list_named():
            try:
                entry = home.opened_path(f"{NAMED}/{name}", name)
            except NsmError:  # it went meanwhile
                continue
            try:
                nsid = namespaces.number(own, entry, assign=False)
            except Refusal:
                continue
            finally:
                os.close(entry)
            if nsid >= 0:
                found.setdefault(nsid, name)
    return found

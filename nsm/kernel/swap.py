"""A wire takes the place of another of the same connection, and no packet is lost.

The new wire stands beside the old one, whole and proven, its device in the client's namespace
under a name of its own (`beside`). Then one message to the kernel does all of this: routes lead
over the new device, the old one gets another name and the new one its. The kernel works it off
without a break, so whoever is killed meanwhile leaves either the one or the other in use, and
the other's alias says `beside`: the next life takes that one away.

Routes are added behind the old ones before those are deleted, and not replaced: a route to the
same prefix may be another wire's. What the workload itself led over the old device is led over
the new one. Sockets that are bound to the old device end with it: its number is another.

Before Linux 6.2 a device that is up cannot be renamed (EBUSY). There the new one goes down for
the moment it is renamed, after the routes have left the old one.
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from nsm.errors import NotFoundError
from nsm.kernel import messages, owner
from nsm.kernel.messages import Device
from nsm.kernel.netlink import NameTakenError, Refusal, explain
from nsm.kernel.reach import ABSENT, Reach
from nsm.kernel.state import Interface, LocalWire, Namespace, Wire

_MAIN = 254  # the routing table that is looked into where no rule says otherwise


def client(wire: Wire) -> Interface:
    """The wire's end in the client's namespace."""
    return wire.src if isinstance(wire, LocalWire) else wire.end


def beside(wire: Wire) -> Wire:
    """The wire as it stands before it takes another's place: under another name, and without
    policies, whose rules look at no device."""
    end = replace(client(wire), name=owner.beside_name(wire.id, "src"), policies=())
    if isinstance(wire, LocalWire):
        return replace(wire, src=end, beside=True)
    return replace(wire, end=end, beside=True)


@dataclass(slots=True)
class Swap:
    """What was done so far, and how it is taken back."""

    where: Namespace | None = None
    back: list[bytearray] = field(default_factory=list)


def swap(reach: Reach, old: str, new: Wire, done: Swap) -> None:
    """Put the device of `beside(new)` in the place of that of the connection's wire whose leg is
    old; what is left is to ensure new.

    Raises NameTakenError where another's device is in that place, NotFoundError where new's is
    gone; on any failure all is as before.
    """
    end = client(new)
    where, sock = end.namespace, reach.socket(end.namespace)
    waiting = owner.beside_name(new.id, "src")
    fresh = reach.device(where, name=waiting)
    if fresh is None or not _of(fresh, new.connection, new.leg):
        raise NotFoundError(f"wire {new.id}: {waiting} is gone from {where}")
    former = reach.device(where, name=end.name)
    if former is not None and not _of(former, new.connection, old):
        raise NameTakenError(
            f"wire {new.connection}: {end.name} in {where} is another's by now",
            hint="choose another name in the NSURL, or remove that interface",
        )
    there, back = _led_over(reach, where, former, fresh.index) if former else ([], [])
    aside = owner.beside_name(owner.wire_id(new.connection, old), "src")
    names = [messages.renamed(former.index, aside, _marked(former, beside=True))] if former else []
    names.append(messages.renamed(fresh.index, end.name, _marked(fresh, beside=False)))
    done.where = where
    done.back = [*back, messages.renamed(fresh.index, waiting, fresh.alias)]
    if former:
        done.back.append(messages.renamed(former.index, end.name, former.alias))
    results = sock.do([*there, *names])
    named = results[len(there) :]
    if any(one and one.errno == errno.EBUSY for one in named):
        named = _renamed_down(reach, where, former, fresh, names)
    for refusal in (*_serious(results[: len(there)]), *named):
        if refusal:
            undo(reach, done)
            raise explain(refusal, f"ip link set {waiting} name {end.name}", where)
    reach.index[where, end.name] = fresh.index
    reach.index.pop((where, waiting), None)
    for name in (end.name, waiting, aside):
        reach.forget(where, f"/{name}/")


def undo(reach: Reach, done: Swap) -> None:
    """Put the old device back in its place; harmless where nothing was done."""
    if done.where is None:
        return
    where, back = done.where, done.back
    done.where, done.back = None, []
    sock = reach.socket(where)
    results = sock.do(list(back))
    if any(one and one.errno == errno.EBUSY for one in results):
        for message in back[-2:]:
            (index,) = struct.unpack_from("=i", message, 20)
            sock.do([messages.set_down(index), message, messages.set_up(index)])
        sock.do(list(back[:-2]))


def _renamed_down(
    reach: Reach,
    where: Namespace,
    former: Device | None,
    fresh: Device,
    names: Sequence[bytearray],
) -> list[Refusal | None]:
    """Rename both while they are down, which is all that an older kernel lets one do."""
    batch = [messages.set_down(former.index)] if former else []
    batch += [*names[:-1], messages.set_down(fresh.index), names[-1]]
    return reach.socket(where).do([*batch, messages.set_up(fresh.index)])


def _led_over(
    reach: Reach, where: Namespace, former: Device, fresh: int
) -> tuple[list[bytearray], list[bytearray]]:
    """What leads all that goes over the former device over the fresh one; and what leads it back.

    Of our own routes the fresh device has those of the main table already, and of the kernel's
    those to its networks: they have their place behind the former one's again.
    """
    sock = reach.socket(where)
    dumped = sock.dump(messages.dump_routes(former.index))
    ours = sorted(  # first those by which the others' gateways are reached
        messages.seen_routes(dumped, where, former.name, former.index),
        key=lambda route: route.via is not None,
    )
    foreign = sorted(
        messages.others_routes(sock.dump(messages.dump_routes()), former.index),
        key=lambda route: not route.connected,
    )
    adding = [messages.route("add", one, fresh, append=True) for one in ours if one.table != _MAIN]
    adding += [one.over(fresh) for one in foreign if not one.connected]
    leaving = [messages.route("del", one, former.index) for one in ours]
    leaving += [one.deleted_over(former.index) for one in foreign]
    back = [one.over(former.index) for one in foreign]
    back += [messages.route("add", one, former.index, append=True) for one in ours]
    back += [messages.route("del", one, fresh) for one in ours]
    back += [one.deleted_over(fresh) for one in foreign]
    back += [messages.route("add", one, fresh, append=True) for one in ours if one.table == _MAIN]
    back += [one.over(fresh) for one in foreign if one.connected]
    return [*adding, *leaving], back


def _serious(results: Sequence[Refusal | None]) -> list[Refusal]:
    """Refusals to add or delete routes; one that is there already, or gone, is as it should be."""
    return [one for one in results if one and one.errno not in ABSENT | {errno.EEXIST}]


def _of(device: Device, connection: str, leg: str) -> bool:
    mark = owner.Mark.parse(device.alias) if owner.is_ours(device.group) else None
    return mark is not None and (mark.connection, mark.side, mark.leg) == (connection, "src", leg)


def _marked(device: Device, *, beside: bool) -> str:
    mark = owner.Mark.parse(device.alias)
    assert mark is not None
    return str(replace(mark, beside=beside))

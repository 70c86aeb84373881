"""Finding what is ours in the kernel, and taking it away. Blocks: call it in threads.

By owner marks and namespace numbers only: this works after a restart, without a
file descriptor, and for namespaces nobody can enter any more.
"""

import errno
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from nsm.errors import InternalError, PreconditionError
from nsm.kernel import ensure, messages, namespaces, netlink, owner
from nsm.kernel.ensure import Place
from nsm.kernel.messages import Device
from nsm.kernel.netlink import Refusal, Socket, explain
from nsm.kernel.state import OWN, IPAddress, Namespace

_GONE = {errno.ENODEV, errno.EINVAL, errno.ENOENT}  # no device; no namespace of that number


@dataclass(frozen=True, slots=True)
class Found:
    """A device of ours: where it is, whose (None: its maker died before it said so), and what."""

    place: Place
    mark: owner.Mark | None
    device: Device


def find(group: int) -> tuple[Found, ...]:
    """All devices of that group in all namespaces that have a number, and in our own."""
    found: list[Found] = []
    with Socket.here() as own:
        itself = namespaces.own_number(own)  # what is here is found once
        for nsid in (OWN, *(one for one in namespaces.numbers(own) if one != itself)):
            try:
                dumped = own.dump(messages.dump_links(nsid))
            except Refusal as refusal:
                if refusal.errno in _GONE:
                    continue  # died since its number was listed
                raise explain(refusal, "ip link show", f"namespace {nsid}") from refusal
            found += _ours(dumped, nsid, group)
    return tuple(found)


def _ours(dumped: Iterable[tuple[int, memoryview]], nsid: int, group: int) -> Iterator[Found]:
    for kind, body in dumped:
        if kind == netlink.NEWLINK:
            device = messages.device(body)
            if device.group == group:
                yield Found(Place(nsid, device.index), owner.Mark.parse(device.alias), device)


def located(
    group: int, connection: str, hints: Sequence[tuple[Namespace, Place]]
) -> tuple[Found, ...]:
    """The devices of one wire: where they were last seen, else everywhere."""
    found: list[Found] = []
    with Socket.here() as own:
        asked = [messages.get_link(index=place.index, nsid=place.nsid) for _, place in hints]
        for (_, place), answer in zip(hints, own.ask_all(asked), strict=True):
            if isinstance(answer, Refusal):
                continue
            device = messages.device(answer)
            mark = owner.Mark.parse(device.alias)
            # without a mark somebody wrote over it: no other device of ours has had that number
            if device.group == group and (mark is None or mark.connection == connection):
                found.append(Found(place, mark, device))
    if hints:  # a device keeps its index whatever it is renamed to: not there means gone
        return tuple(found)
    return tuple(item for item in find(group) if item.mark and item.mark.connection == connection)


def delete(item: Found, group: int) -> None:
    """Delete one device if it still is what was found. Takes some 18 ms; gone after one."""
    with Socket.here() as own:
        (answer,) = own.ask_all([messages.get_link(index=item.place.index, nsid=item.place.nsid)])
        if isinstance(answer, Refusal):
            return
        device = messages.device(answer)
        if device.group != group or device.alias != item.device.alias:
            return  # the number is another namespace's by now
        (refusal,) = own.do([messages.delete_link(item.place.index, item.place.nsid)])
        if refusal and refusal.errno not in _GONE:
            raise explain(
                refusal, f"ip link del {item.device.name}", f"namespace {item.place.nsid}"
            )


def wait_gone(items: Sequence[Found], deleting: "Sequence[Future[None]]") -> None:
    """Return when none of the devices is there any more, or when all deletions have ended.

    The kernel takes a device away long before it answers the one who asked for it.
    """
    with Socket.here() as own:
        while True:
            done = all(running.done() for running in deleting)
            asked = [
                messages.get_link(index=item.place.index, nsid=item.place.nsid) for item in items
            ]
            if all(
                isinstance(answer, Refusal) or messages.device(answer).alias != item.device.alias
                for item, answer in zip(items, own.ask_all(asked), strict=True)
            ):
                return
            if done:
                for running in deleting:
                    running.result()
                names = ", ".join(item.device.name for item in items)
                raise InternalError(
                    f"the kernel took the deletion of {names}, and it is still there"
                )
            time.sleep(0.0005)


def delete_group(nsid: int, group: int) -> None:
    """Delete all devices of the group in one namespace; none is no error."""
    with Socket.here() as own:
        (refusal,) = own.do([messages.delete_group(group, nsid)])
        if refusal and refusal.errno not in _GONE:
            raise explain(refusal, f"ip link del group {group}", f"namespace {nsid}")


def rules(sock: Socket) -> None:
    """Delete rules of ours that lead to an empty table: their wires are gone."""
    with ensure.choosing_tables:
        _rules(sock)


def _rules(sock: Socket) -> None:
    full = messages.tables(sock.dump(messages.dump_routes()))
    somewhere = Namespace(0, OWN)
    sock.do(
        [
            messages.rule("del", rule)
            for rule, ours in messages.seen_rules(sock.dump(messages.dump_rules()), somewhere)
            if ours and rule.table not in full
        ]
    )


def free(refusal: Refusal | None, vni: int, where: object) -> bool:
    """What the answer to `messages.probe_vni` means."""
    if refusal and refusal.errno == errno.EINVAL:
        return True
    if refusal and refusal.errno == errno.EEXIST:
        return False
    if refusal:
        raise explain(refusal, f"ip link add type vxlan id {vni}", where)
    raise InternalError(f"the kernel made a device of an impossible name in {where}")


def default_address(sock: Socket, family: int, where: Namespace) -> IPAddress:
    """The first global address of the default route's device."""
    version = {4: 2, 6: 10}[family]
    routes = [entry for entry in sock.dump(messages.dump_routes()) if entry[1][0] == version]
    for _, index in messages.default_devices(routes):
        dumped = sock.dump(messages.dump_addresses(index))
        for address in messages.seen_addresses(dumped, where, "", index):
            if address.cidr.version == family:
                return address.cidr.ip
    raise PreconditionError(
        f"no default route of IPv{family} with an address in {where}",
        hint="set the tunnel IP by hand",
    )

"""A lab's wires: what its clients say of them, what the kernel says, and how they answer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labs import state
from labs.hands import Hands
from labs.lab import Family, Lab, serves
from labs.paths import Paths
from nsm import domains
from nsm.kernel import owner, topology
from nsm.kernel.messages import Device

_ECHOES = 5


@dataclass(frozen=True, slots=True)
class Wire:
    """One wire. mechanism and mtu are the kernel's words, the rest is the client's."""

    id: str
    client: str
    service: str  # as the client asks for it
    domain: str  # whose service that is
    endpoint: str
    nodes: tuple[str, str]
    interface: str
    mechanism: str  # veth, vxlan, wireguard; "" where there is no such device
    mtu: int
    client_addresses: tuple[str, ...]
    endpoint_addresses: tuple[str, ...]
    ms: float  # from the client's request to its answer
    stages: Mapping[str, float] = field(default_factory=dict)  # in ms
    hops: tuple[str, ...] = ()  # the names on its path, client and endpoint too
    network: str = ""  # the flat network it leads into, if it does

    def far(self, place: str) -> tuple[str, ...]:
        """The addresses at the other end, seen from a client or endpoint."""
        return self.endpoint_addresses if place == self.client else self.client_addresses

    def joins(self, a: str, b: str) -> bool:
        """Whether it is between those two."""
        return {a, b} == {self.client, self.endpoint}

    def serves(self, service: str) -> bool:
        """Whether it is of a service (a glob)."""
        return serves(domains.split(self.service)[0], self.domain, service)


@dataclass(frozen=True, slots=True)
class Way:
    """By which wire of the far one it is reached, at which addresses, and the own end's MTU."""

    wire: str
    addresses: tuple[str, ...]
    mtu: int


@dataclass(frozen=True, slots=True)
class Answers:
    """How a wire answered, from both ends: round trips in ms (the best), echoes sent and lost."""

    there_ms: float | None
    back_ms: float | None
    sent: int
    lost: int


def wires(lab: Lab, paths: Paths) -> list[Wire]:
    """All wires that are up, in the order of clients."""
    return [wire for client in lab.clients for wire in _of(lab, paths, client)]


def _of(lab: Lab, paths: Paths, client: str) -> Iterator[Wire]:
    for told in state.statuses(paths, client):
        if told.get("event") != "up":
            continue
        interface = str(told.get("interface", ""))
        device = topology.device(paths.namespace(client), interface) if interface else None
        endpoint = whose(lab, str(told.get("endpoint", "")))
        far = lab.endpoints.get(endpoint) or lab.routers.get(endpoint)
        service = str(told.get("service", ""))
        own, cluster = domains.split(service)
        cluster = cluster or lab.node_of(client).cluster
        network = domains.join(own, cluster)
        yield Wire(
            str(told["id"]),
            client,
            service,
            cluster,
            endpoint,
            (lab.clients[client].on, far.on if far else "?"),
            interface,
            _mechanism(device) if device else "",
            device.mtu if device else 0,
            _bare(told.get("src", [])),
            _bare(told.get("dst", [])),
            float(told.get("ms", 0.0)),
            {str(k): float(v) for k, v in told.get("stages", {}).items()},
            tuple(str(hop["name"]) for hop in told.get("path", ())),
            network if network in lab.networks else "",
        )


def _mechanism(device: Device) -> str:
    """The kind of a wire's device, or of what it leads to.

    To the kernel a wireguard-go process's is a TUN like any other. A workload with somebody in it
    who may change devices has none of a tunnel's, but a way to one that stands on the node: a
    macvlan of a VXLAN, a veth pair spliced to a WireGuard. Which one an owner's mark tells.
    """
    mark = owner.Mark.parse(device.alias) if owner.is_ours(device.group) else None
    if mark and device.kind == "macvlan":
        return "vxlan"
    if mark and mark.far and device.kind in ("tun", "veth"):
        return "wireguard"
    return device.kind


def whose(lab: Lab, registered: str) -> str:
    """The lab's name of an endpoint or router, behind which may be a domain, or a registry's

    suffix.
    """
    registered, _ = domains.split(registered)
    there = (*lab.endpoints, *lab.routers)
    if registered in there:
        return registered
    near = [name for name in there if registered.startswith(f"{name}-")]
    return max(near, key=len, default=registered)


def of_family(addresses: Sequence[str], families: Sequence[Family]) -> list[str]:
    """Those of the wanted families."""
    return [a for a in addresses if ("ipv6" if ":" in a else "ipv4") in families]


def ways(all_: Sequence[Wire], a: str, b: str, service: str) -> list[Way]:
    """How a reaches b by a service (a glob): along each wire that joins them, and through each

    flat network that both are in.
    """
    of = [wire for wire in all_ if wire.serves(service)]
    found = [Way(wire.id, wire.far(a), wire.mtu) for wire in of if wire.joins(a, b)]
    own = {wire.network: wire for wire in of if wire.network and wire.client == a != b}
    theirs = [wire for wire in of if wire.client == b and wire.network in own]
    return found + [Way(w.id, w.client_addresses, own[w.network].mtu) for w in theirs]


def outside(all_: Sequence[Wire], b: str, service: str) -> list[Way]:
    """What somebody who has no part in b's wires of a service (a glob) must not reach."""
    of = [wire for wire in all_ if b in (wire.client, wire.endpoint) and wire.serves(service)]
    return [Way(w.id, w.far(w.endpoint if b == w.client else w.client), w.mtu) for w in of]


def answers(all_: Sequence[Wire], paths: Paths, hands: Hands) -> dict[str, Answers]:
    """Ping every wire from both ends, all at once; by wire id."""
    todo: dict[str, list[tuple[Wire, str, str]]] = {}
    for wire in all_:
        for place, direction in ((wire.client, "there"), (wire.endpoint, "back")):
            for address in wire.far(place):
                todo.setdefault(place, []).append((wire, direction, address))
    orders = {
        paths.namespace(place): {
            "do": "ping",
            "targets": [{"address": address, "size": 64} for _, _, address in rows],
            "count": _ECHOES,
            "patience": 1.0,
        }
        for place, rows in todo.items()
    }
    told = hands.ask(orders)
    results: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for place, rows in todo.items():
        for (wire, direction, _), result in zip(rows, told[paths.namespace(place)], strict=True):
            results.setdefault((wire.id, direction), []).append(result)
    return {wire.id: _answers(wire, results) for wire in all_}


def _answers(wire: Wire, results: Mapping[tuple[str, str], list[dict[str, Any]]]) -> Answers:
    there, back = results.get((wire.id, "there"), []), results.get((wire.id, "back"), [])
    both = (*there, *back)
    return Answers(
        min((r["ms"] for r in there if r["ms"] is not None), default=None),
        min((r["ms"] for r in back if r["ms"] is not None), default=None),
        sum(r["sent"] for r in both),
        sum(r["lost"] for r in both),
    )


def _bare(addresses: Sequence[str]) -> tuple[str, ...]:
    return tuple(str(address).partition("/")[0] for address in addresses)

"""What there is in a lab's namespaces that no wire explains: asked of `ip`, `ss` and /proc."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from labs.lab import Lab
from labs.paths import Paths
from labs.wires import Wire
from nsm.kernel import owner, topology
from tests.support.spaces import Space

VIEWS: Final = ("link", "address", "route show table all", "neighbour", "rule")
VXLAN: Final = 4789
GO: Final = "wireguard-go"
SOCKETS: Final = "/var/run/wireguard"
Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Look:
    """One namespace, as `ip -j` shows it."""

    links: Sequence[Object]
    addresses: Mapping[str, Sequence[str]]  # by device, link-local ones aside
    routes: Sequence[Object]
    neighbours: Sequence[Object]
    rules: Sequence[Object]

    def foreign(self, own: Collection[str]) -> dict[str, Object]:
        """The devices that are not the topology's own."""
        return {one["ifname"]: one for one in self.links if one["ifname"] not in own}


def look(namespaces: Iterable[str]) -> dict[str, Look]:
    """Namespaces, all at once; those that are not there are left out."""
    asked = {
        (name, family): subprocess.Popen(
            ["ip", "-n", name, "-j", "-d", f"-{family}", "-batch", "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for name in namespaces for family in (4, 6)
    }  # fmt: skip
    told: dict[str, list[list[list[Object]]]] = {}
    for (name, _), process in asked.items():
        said, _ = process.communicate("".join(f"{view}\n" for view in VIEWS))
        if process.returncode == 0:
            told.setdefault(name, []).append(_documents(said))
    return {name: _look(*both) for name, both in told.items() if len(both) == 2}


def _documents(said: str) -> list[list[Object]]:
    """What `ip -batch` prints: a JSON array for each line of its input."""
    found, at = [], 0
    decoder = json.JSONDecoder()
    while rest := said[at:].lstrip():
        at = len(said) - len(rest)
        value, length = decoder.raw_decode(rest)
        found.append([one for one in value if one])
        at += length
    assert len(found) == len(VIEWS), f"ip answered {len(found)} of {len(VIEWS)} questions: {said}"
    return found


def _look(four: list[list[Object]], six: list[list[Object]]) -> Look:
    addresses: dict[str, list[str]] = {}
    for one in (*four[1], *six[1]):
        infos = [f"{i['local']}/{i['prefixlen']}" for i in one["addr_info"] if i]
        addresses.setdefault(one["ifname"], []).extend(i for i in infos if not _by_itself(i))
    routes = [one for one in (*four[2], *six[2]) if not _by_itself(str(one))]
    return Look(four[0], addresses, routes, [*four[3], *six[3]], [*four[4], *six[4]])


def _by_itself(text: str) -> bool:
    """Whether the kernel makes it with every device that is up."""
    return "fe80" in text or "ff00::" in text or "'multicast'" in text


@dataclass(frozen=True, slots=True)
class Seen:
    """A lab at one moment."""

    looks: Mapping[str, Look]  # by place
    ports: Mapping[str, Collection[int]]  # UDP, by node
    processes: Mapping[str, Collection[int]]  # of wireguard-go, by node
    sockets: Collection[str]  # of wireguard-go's, whoever listens or not


@dataclass
class Audit:
    """Holds what a lab has against what its wires need."""

    lab: Lab
    paths: Paths
    base: Mapping[str, Sequence[str]] = field(default_factory=dict)
    _homes: set[str] = field(default_factory=set)

    def see(self) -> Seen:
        """All of the lab's namespaces, now."""
        nodes = [name for name, one in self.lab.nodes.items() if one.kind == "node"]
        found = look(self.paths.namespace(place) for place in self.lab.places)
        looks = {p: found[n] for p in self.lab.places if (n := self.paths.namespace(p)) in found}
        there = [node for node in nodes if node in looks]
        for node in there:  # also of those that are gone later
            self._homes.add(f"{topology.cookie_named(self.paths.namespace(node)):x}")
        inodes = {os.stat(Space(self.paths.namespace(n)).path).st_ino: n for n in there}
        return Seen(
            looks,
            {node: self._ports(node) for node in there},
            _processes(inodes),
            [name for name in _listed(SOCKETS) if _home(f"{SOCKETS}/{name}") in self._homes],
        )

    def _ports(self, node: str) -> set[int]:
        said = Space(self.paths.namespace(node)).run("ss", "-Hlun").stdout
        return {int(line.split()[3].rpartition(":")[2]) for line in said.splitlines()}

    def own(self, place: str) -> set[str]:
        """The devices a place has by the topology."""
        ends = {end.interface for link in self.lab.links for end in link.ends if end.node == place}
        return {"lo", "bridge", *ends}

    def remember(self) -> None:
        """What there is besides wires now is what there may be."""
        self.base = self._besides(self.see())

    def left(
        self, wires: Mapping[str, Wire], waiting: Mapping[str, str] | None = None
    ) -> list[str]:
        """What no wire explains, and what a wire lacks: a line each.

        wires: by the id of each of their paths' segments. waiting: of wires that are down the
        places of clients, which keep the interface.
        """
        seen = self.see()
        besides = self._besides(seen)
        found = [
            f"{place}: {'left over' if sign > 0 else 'taken away'}: {what}"
            for place in besides
            for sign, more in (
                (1, Counter(besides[place]) - Counter(self.base[place])),
                (-1, Counter(self.base[place]) - Counter(besides[place])),
            )
            for what in more
        ]
        return [*found, *self._devices(seen, wires, waiting or {}), *self._tunnels(seen)]

    def _besides(self, seen: Seen) -> dict[str, list[str]]:
        """All that is on no wire's device, by place."""
        return {place: [*self._other(place, one)] for place, one in seen.looks.items()}

    def _other(self, place: str, one: Look) -> Iterable[str]:
        foreign = one.foreign(self.own(place))
        for device, addresses in one.addresses.items():
            if device not in foreign:
                yield from (f"address {address} on {device}" for address in addresses)
        for route in one.routes:
            if route.get("dev") not in foreign:
                yield f"route {_said(route)}"
        for rule in one.rules:
            yield f"rule {_said(rule)}"
        for neighbour in one.neighbours:  # the others come and go by themselves
            if "PERMANENT" in neighbour["state"] and neighbour["dev"] not in foreign:
                yield f"neighbour {neighbour['dst']} on {neighbour['dev']}"

    def _devices(
        self, seen: Seen, wires: Mapping[str, Wire], waiting: Mapping[str, str]
    ) -> Iterable[str]:
        """One device at each end of each wire, and no other."""
        between: list[str] = []
        ends: Counter[tuple[str, str, str]] = Counter()  # wire, place, role
        for place, name, device in self._foreign(seen):
            alias = device.get("ifalias", "")
            mark = owner.Mark.parse(alias)
            wire = wires.get(mark.connection) if mark else None
            if mark and wire and place in (wire.client, wire.endpoint):
                ends[wire.id, place, ""] += 1
            elif mark and wire and mark.role and place in wire.nodes:
                ends[wire.id, place, f"{mark.side} {mark.role}"] += 1
            elif mark and waiting.get(mark.connection) == place:
                ends["that waits", place, ""] += 1
            elif mark and place in self.lab.routers:
                between.append(f"{place}: {name} ({alias})")
            else:
                yield f"{place}: left over: device {name} ({alias})"
        for wire in {wire.id: wire for wire in wires.values()}.values():
            for place in (wire.client, wire.endpoint):
                ends[wire.id, place, ""] += 0
        yield from (
            f"{place}: {count} {role} devices of wire {id_}"
            for (id_, place, role), count in ends.items()
            if count != 1
        )
        if len(between) > len(self.lab.routers):  # each two are joined once
            yield f"{len(between)} devices between {len(self.lab.routers)} routers: {between}"

    def _foreign(self, seen: Seen) -> Iterator[tuple[str, str, Object]]:
        for place, one in seen.looks.items():
            for name, device in one.foreign(self.own(place)).items():
                yield place, name, device

    def _tunnels(self, seen: Seen) -> Iterable[str]:
        """Sockets and processes in the nodes: as many as there are tunnels, and no more."""
        for node, ports in seen.ports.items():
            devices = [d for p, _, d in self._foreign(seen) if self.lab.node_of(p).name == node]
            kinds = Counter(d.get("linkinfo", {}).get("info_kind", "?") for d in devices)
            sealed = kinds["tun"] + kinds["wireguard"]
            others = len(set(ports) - {VXLAN})
            if (VXLAN in ports) != (kinds["vxlan"] > 0):
                yield f"{node}: {kinds['vxlan']} VXLANs, and port {VXLAN} in {sorted(ports)}"
            if kinds["tun"] and others != sealed:
                yield f"{node}: {sealed} encrypted tunnels, and UDP ports {sorted(ports)}"
            if not sealed and others:
                yield f"{node}: no encrypted tunnel, and UDP ports {sorted(ports)}"
            if len(seen.processes.get(node, ())) != kinds["tun"]:
                pids = [*seen.processes.get(node, ())]
                yield f"{node}: {kinds['tun']} tunnels of {GO}, and processes {pids}"
        running = sum(len(pids) for pids in seen.processes.values())
        if len(seen.sockets) != running:
            yield f"{running} processes of {GO}, and sockets {sorted(seen.sockets)}"


def _said(one: Object) -> str:
    """A route or rule, without what changes by itself."""
    return " ".join(f"{key} {value}" for key, value in one.items() if key != "flags")


def _processes(inodes: Mapping[int, str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if Path(f"/proc/{entry}/comm").read_text().strip() == GO:
                node = inodes.get(os.stat(f"/proc/{entry}/ns/net").st_ino)
                if node:
                    found.setdefault(node, []).append(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except FileNotFoundError:
        return []


def _home(path: str) -> str:
    """The namespace of whose owner a socket of wireguard-go's is, by its mark."""
    try:
        return os.getxattr(path, "trusted.vwire").decode(errors="replace").split("/")[1]
    except (OSError, IndexError):
        return ""

"""What a router knows of names, and what several routers know together. Pure.

An `Answer` is better or worse, and of two the better holds; of two equally good ones, both.
So it does not matter in which order routers answer, nor who asks whom first.
"""

import ipaddress
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

from nsm import domains

TTL = 3600  # seconds, as upstream says of all its records
NEGATIVE = 5  # seconds that there is none is believed: a member may join at any time

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Key = TypeVar("Key", bound=Hashable)
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_V4, _V6 = "in-addr.arpa", "ip6.arpa"


class Standing(IntEnum):
    """How good an answer is."""

    NXDOMAIN = 0  # whoever was asked knows no such name
    FAILED = 1  # somebody was asked and did not say: nobody can say that there is none
    NODATA = 2  # the name is somebody's; there is no such record of it
    RECORDS = 3


@dataclass(frozen=True, slots=True, order=True)
class Record:
    """A record, its data as text in DNS's own form."""

    name: str
    kind: str
    data: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What is known of a question; zone is the one that the name is in."""

    standing: Standing
    records: tuple[Record, ...] = ()
    zone: str = ""
    ttl: int = NEGATIVE


def merged(one: Answer, other: Answer) -> Answer:
    """What both know."""
    zone = max(one.zone, other.zone, key=lambda zone: (len(zone), zone))
    if one.standing != other.standing:
        return replace(max(one, other, key=lambda answer: answer.standing), zone=zone)
    return replace(
        one,
        records=tuple(sorted({*one.records, *other.records})),
        zone=zone,
        ttl=min(one.ttl, other.ttl),
    )


class Zone:
    """Members and routers, by whom they are known; their names and addresses.

    apexes are the domains that are ours whoever is in them, prefixes those of whose addresses
    nobody else knows the names. Each name's own domain is ours while it is somebody's.
    """

    def __init__(self, apexes: Iterable[str] = (), prefixes: Iterable[str] = ()) -> None:
        fixed = tuple(one for one in map(domains.canonical, apexes) if _own(one))
        self._prefixes: tuple[Network, ...] = ()
        self._held: dict[str, tuple[tuple[str, ...], tuple[Address, ...]]] = {}
        self._users: Counter[str] = Counter()
        self._names: dict[str, Counter[Address]] = {}
        self._addresses: dict[Address, Counter[str]] = {}
        self._apexes = Counter(fixed)
        self._above: Counter[str] = Counter()
        self.cover(prefixes)

    def cover(self, prefixes: Iterable[str]) -> None:
        """These are the domain's prefixes from now on."""
        self._prefixes = tuple(ipaddress.ip_network(one) for one in prefixes)

    def put(self, id_: str, names: Iterable[str], addresses: Iterable[str]) -> None:
        """Who id_ is called so and has these addresses, and no others any more."""
        called = tuple(dict.fromkeys(name for name in map(domains.canonical, names) if _own(name)))
        has = tuple(dict.fromkeys(ipaddress.ip_interface(one).ip for one in addresses))
        if self._held.get(id_) == (called, has):
            return
        self.drop(id_)
        self._held[id_] = called, has
        self._count(called, has, 1)

    def drop(self, id_: str) -> None:
        """Who id_ is gone; nothing for an unknown one."""
        if held := self._held.pop(id_, None):
            self._count(*held, -1)

    def _count(self, names: Sequence[str], addresses: Sequence[Address], by: int) -> None:
        for name in names:
            _add(self._apexes, _apex(name), by)
            for above in _above(name):
                _add(self._above, above, by)
            known = self._names.setdefault(name, Counter())
            for address in addresses:
                _add(known, address, by)
                back = self._addresses.setdefault(address, Counter())
                _add(back, name, by)
                if not back:
                    del self._addresses[address]
            _add(self._users, name, by)
            if name not in self._users:
                del self._names[name]

    def answer(self, name: str, kind: str) -> Answer | None:
        """What we know; None where the name is in no zone of ours."""
        name = domains.canonical(name)
        if name.endswith((_V4, _V6)):
            return self._reverse(name, kind)
        zone = self._zone(name)
        if zone is None:
            return None
        if name in self._names:
            wanted = {"A": (4,), "AAAA": (6,), "ANY": (4, 6)}.get(kind, ())
            found = [one for one in self._names[name] if one.version in wanted]
            records = [Record(name, "A" if one.version == 4 else "AAAA", str(one)) for one in found]
            return _found(records, zone)
        if name in self._above or name in self._apexes:
            return Answer(Standing.NODATA, zone=zone)
        return Answer(Standing.NXDOMAIN, zone=zone)

    def _zone(self, name: str) -> str | None:
        return next((one for one in (name, *_above(name)) if one in self._apexes), None)

    def _reverse(self, name: str, kind: str) -> Answer | None:
        network = pointed(name)
        if network is None:
            return None
        around = next((one for one in self._prefixes if _overlap(one, network)), None)
        if around is None:
            return None
        zone = pointer(around, network)
        if network.prefixlen < network.max_prefixlen:
            return Answer(Standing.NODATA, zone=zone)
        names = self._addresses.get(network.network_address)
        if names is None:
            return Answer(Standing.NXDOMAIN, zone=zone)
        wanted = names if kind in ("PTR", "ANY") else ()
        return _found([Record(name, "PTR", f"{one}.") for one in wanted], zone)


def pointed(name: str) -> Network | None:
    """What addresses a name below in-addr.arpa or ip6.arpa stands for; None for other names."""
    name = domains.canonical(name)
    for suffix, most in ((_V4, 4), (_V6, 32)):
        if name != suffix and not name.endswith(f".{suffix}"):
            continue
        parts = name.removesuffix(suffix).rstrip(".").split(".")[::-1] if name != suffix else []
        try:
            if len(parts) > most or any(len(one) > (3 if most == 4 else 1) for one in parts):
                return None
            if most == 4:
                text = ".".join((*parts, *["0"] * (4 - len(parts))))
                return ipaddress.ip_network(f"{text}/{8 * len(parts)}")
            digits = "".join(parts).ljust(32, "0")
            groups = ":".join(digits[at : at + 4] for at in range(0, 32, 4))
            return ipaddress.ip_network(f"{groups}/{4 * len(parts)}")
        except ValueError:
            return None
    return None


def pointer(prefix: Network, within: Network) -> str:
    """The name of prefix, or of the part of it around within, at the next boundary of names."""
    bits = 8 if prefix.version == 4 else 4
    parts = min(-(-prefix.prefixlen // bits), within.prefixlen // bits)
    full = within.network_address.reverse_pointer.split(".")
    count = prefix.max_prefixlen // bits
    return ".".join(full[count - parts :])


def _found(records: Iterable[Record], zone: str) -> Answer:
    in_order = tuple(sorted(records))
    if not in_order:
        return Answer(Standing.NODATA, zone=zone)
    return Answer(Standing.RECORDS, in_order, zone, TTL)


def _overlap(one: Network, other: Network) -> bool:
    return one.version == other.version and one.overlaps(other)


def _own(name: str) -> bool:
    """Whether somebody can be called so: what a template could not fill in begins with a dot."""
    return bool(name) and not name.startswith(".")


def _apex(name: str) -> str:
    return name.partition(".")[2] or name


def _above(name: str) -> Iterable[str]:
    rest = name.partition(".")[2]
    while rest:
        yield rest
        rest = rest.partition(".")[2]


def _add(counter: "Counter[Key]", key: Key, by: int) -> None:
    counter[key] += by
    if counter[key] <= 0:
        del counter[key]

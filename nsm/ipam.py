"""Address pools: two addresses for each connection, and never one address twice.

The point-to-point scheme of `wire.md` §10.1. For each group of prefixes a
connection gets a pair: the lowest free address for the endpoint's side (dst),
the next for the client's (src), each with a route on the other side. Dual
stack is two groups; several prefixes within a group are used up in turn.
"""

import ipaddress
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from netaddr import AddrFormatError, IPAddress, IPNetwork, cidr_merge

from nsm.errors import ExhaustedError, InvalidError
from nsm.model import IPContext, Route

MOST = 1024  # prefixes, addresses or routes that one request may list; more would hold the loop
Span = tuple[int, int]  # first and last address as numbers, both included


@dataclass(frozen=True, slots=True)
class Pair:
    """The two addresses of one connection from one pool, as `a/32` or `a/128`."""

    dst: str  # the endpoint's
    src: str  # the client's


@dataclass(frozen=True, slots=True)
class _Held:
    """A pair, and where it came from."""

    pair: Pair
    pool: "_Pool"
    dst: int
    src: int


class Free:
    """The free addresses of one prefix, as spans in order."""

    def __init__(self, first: int, last: int) -> None:
        self._firsts = [first]
        self._lasts = [last]

    def __contains__(self, address: int) -> bool:
        place = bisect_right(self._firsts, address) - 1
        return place >= 0 and address <= self._lasts[place]

    def lowest(self, excluded: Sequence[Span], count: int) -> list[int]:
        """The lowest free addresses outside excluded (spans in order), up to count of them."""
        found: list[int] = []
        for first, last in zip(self._firsts, self._lasts, strict=True):
            address = first
            while address <= last:
                beyond = _end_of(excluded, address)
                if beyond is not None:
                    address = beyond + 1
                    continue
                found.append(address)
                if len(found) == count:
                    return found
                address += 1
        return found

    def take(self, address: int) -> None:
        """Make a free address taken."""
        place = bisect_right(self._firsts, address) - 1
        first, last = self._firsts[place], self._lasts[place]
        pieces = [(a, b) for a, b in ((first, address - 1), (address + 1, last)) if a <= b]
        self._firsts[place : place + 1] = [a for a, _ in pieces]
        self._lasts[place : place + 1] = [b for _, b in pieces]

    def give(self, address: int) -> None:
        """Make a taken address free again."""
        place = bisect_right(self._firsts, address)
        joins_left = place > 0 and self._lasts[place - 1] == address - 1
        joins_right = place < len(self._firsts) and self._firsts[place] == address + 1
        if joins_left and joins_right:
            self._lasts[place - 1] = self._lasts[place]
            del self._firsts[place], self._lasts[place]
        elif joins_left:
            self._lasts[place - 1] = address
        elif joins_right:
            self._firsts[place] = address
        else:
            self._firsts.insert(place, address)
            self._lasts.insert(place, address)


class _Pool:
    """One prefix and what is free in it."""

    def __init__(self, network: IPNetwork) -> None:
        self.text = str(network)
        self.family = network.version
        self.first: int = network.first
        self.last: int = network.last
        self.free = Free(self.first, self.last)
        self.held = 0

    def __contains__(self, address: tuple[int, int]) -> bool:
        family, number = address
        return family == self.family and self.first <= number <= self.last

    def take(self, dst: int, src: int) -> _Held:
        self.free.take(dst)
        self.free.take(src)
        self.held += 2
        return _Held(Pair(self._host(dst), self._host(src)), self, dst, src)

    def give(self, held: _Held) -> None:
        self.free.give(held.dst)
        self.free.give(held.src)
        self.held -= 2

    def _host(self, number: int) -> str:
        return f"{IPAddress(number, self.family)}/{32 if self.family == 4 else 128}"


class Pools:
    """The addresses an endpoint hands out, by connection id.

    groups are prefixes: one pair from each group, from its first prefix with
    room. strict takes out of a request every address that these pools could not
    give to it; polite (the default) leaves foreign ones where they are, for
    clients that hold addresses of several endpoints. Raises InvalidError for
    prefixes that are none, overlap, or hold no two addresses.
    """

    def __init__(self, groups: Iterable[Iterable[str]], *, strict: bool = False) -> None:
        self._groups = tuple(tuple(_Pool(_network(text)) for text in group) for group in groups)
        self._strict = strict
        self._held: dict[str, tuple[_Held, ...]] = {}
        self._owners: dict[tuple[int, int], str] = {}
        self._reserved: dict[tuple[int, int], _Pool] = {}
        self._all = tuple(pool for group in self._groups for pool in group)
        for place, one in enumerate(self._all):
            for other in self._all[:place]:
                if one.family == other.family and max(one.first, other.first) <= min(
                    one.last, other.last
                ):
                    raise InvalidError(
                        f"prefixes {other.text} and {one.text} of NSM_CIDR_PREFIX overlap",
                        hint="give each address to one prefix only",
                    )

    def __len__(self) -> int:
        return len(self._held)

    def pairs(self, id_: str) -> tuple[Pair, ...]:
        """What the connection holds, one pair a group; nothing if it is unknown."""
        return tuple(one.pair for one in self._held.get(id_, ()))

    def reserve(self, addresses: Iterable[str]) -> int:
        """Give these addresses only to connections that carry them; how many are ours and free.

        For those that wires of an earlier life of the endpoint still have.
        """
        for address in map(_address, addresses):
            for pool in self._all:
                if address and address in pool and address[1] in pool.free:
                    pool.free.take(address[1])
                    self._reserved[address] = pool
        return len(self._reserved)

    def unreserve(self) -> None:
        """Give what is still reserved to anybody: whoever had it did not come back in time."""
        for (_, number), pool in self._reserved.items():
            pool.free.give(number)
        self._reserved.clear()

    def assign(self, id_: str, asked: IPContext) -> IPContext:
        """Give the connection its addresses and both routes, appended to what asked holds.

        A known connection keeps its addresses unless the request now excludes
        them. An unknown one that carries addresses, as after a restart, gets
        them back if both are free. All groups or none: raises ExhaustedError
        with what was held before still held, InvalidError for an excluded prefix
        that is none.
        """
        check_sizes(id_, asked)
        excluded = excluded_spans(asked.excluded_prefixes)
        before = self._held.get(id_, ())
        kept = [one for one in before if not _hit(one, excluded)]
        new: list[_Held] = []
        try:
            for group in self._groups:
                if any(one.pool in group for one in kept):
                    continue
                found = self._reclaim(group, asked, excluded)
                new.append(found or _draw(group, asked, excluded, id_))
        except ExhaustedError:
            for one in new:
                one.pool.give(one)
            raise
        for one in before:
            if one not in kept:
                self._give(one)
        for one in new:
            self._owners[one.pool.family, one.dst] = id_
            self._owners[one.pool.family, one.src] = id_
        held = tuple(
            next(one for one in (*kept, *new) if one.pool in group) for group in self._groups
        )
        self._held[id_] = held
        return self._fill(id_, asked, before, held)

    def release(self, id_: str) -> None:
        """Take back what the connection holds; nothing for an unknown one."""
        for one in self._held.pop(id_, ()):
            self._give(one)

    def _give(self, held: _Held) -> None:
        held.pool.give(held)
        del self._owners[held.pool.family, held.dst], self._owners[held.pool.family, held.src]

    def _reclaim(
        self, group: Sequence[_Pool], asked: IPContext, excluded: "Excluded"
    ) -> _Held | None:
        """The addresses a request carries, if one pool can give it both."""
        carried = [list(map(_address, some)) for some in (asked.dst_ip_addrs, asked.src_ip_addrs)]
        for pool in group:
            dst, src = (
                next((one[1] for one in some if one and self._can_have(one, pool, excluded)), None)
                for some in carried
            )
            if dst is not None and src is not None and dst != src:
                for number in (dst, src):
                    if self._reserved.pop((pool.family, number), None):
                        pool.free.give(number)
                return pool.take(dst, src)
        return None

    def _can_have(self, address: tuple[int, int], pool: _Pool, excluded: "Excluded") -> bool:
        family, number = address
        return (
            address in pool
            and (number in pool.free or address in self._reserved)
            and _end_of(excluded[family], number) is None
        )

    def _fill(
        self, id_: str, asked: IPContext, before: Sequence[_Held], held: Sequence[_Held]
    ) -> IPContext:
        """The context with what the connection holds, and without what it may not have.

        Whatever lies in our pools and is not this connection's goes: the next
        client would get it too.
        """
        gone = {text for one in before if one not in held for text in (one.pair.dst, one.pair.src)}
        dropped = set(gone)

        def stays(text: str) -> bool:
            address = _address(text)
            if text in gone:
                fine = False
            elif address is None or not any(address in pool for pool in self._all):
                fine = not self._strict
            else:
                fine = self._owners.get(address) == id_
            if not fine:
                dropped.add(text)
            return fine

        src = tuple(text for text in asked.src_ip_addrs if stays(text))
        dst = tuple(text for text in asked.dst_ip_addrs if stays(text))
        lost = {bare for text in dropped if (bare := _address(text)) is not None}
        ours = [one.pair for one in held]
        return replace(
            asked,
            src_ip_addrs=_with(src, [pair.src for pair in ours]),
            dst_ip_addrs=_with(dst, [pair.dst for pair in ours]),
            src_routes=_routes(asked.src_routes, lost, [pair.dst for pair in ours]),
            dst_routes=_routes(asked.dst_routes, lost, [pair.src for pair in ours]),
        )


def _draw(group: Sequence[_Pool], asked: IPContext, excluded: "Excluded", id_: str) -> _Held:
    for pool in group:
        found = pool.free.lowest(excluded[pool.family], 2)
        if len(found) == 2:
            return pool.take(*found)
    names = " and ".join(
        f"{pool.text} ({pool.last - pool.first + 1} addresses, {pool.held} held)" for pool in group
    )
    beside = (
        f" beside the {len(asked.excluded_prefixes)} prefixes its request excludes"
        if asked.excluded_prefixes
        else ""
    )
    raise ExhaustedError(
        f"no two free addresses for connection {id_} in {names}{beside}",
        hint="close wires to this endpoint, or give it a larger prefix (NSM_CIDR_PREFIX)",
    )


def _with(texts: Sequence[str], ours: Sequence[str]) -> tuple[str, ...]:
    """Texts with ours, each address once, a known one in its place and written as ours."""
    written = {_address(text): text for text in ours}
    placed = dict.fromkeys(written.get(_address(text), text) for text in texts)
    return tuple(dict.fromkeys((*placed, *ours)))


def _routes(
    routes: Sequence[Route], lost: set[tuple[int, int]], ours: Sequence[str]
) -> tuple[Route, ...]:
    kept = [one for one in routes if not (_is_host(one.prefix) and _address(one.prefix) in lost)]
    present = {one.prefix for one in kept}
    return (*kept, *(Route(prefix) for prefix in ours if prefix not in present))


Excluded = dict[int, tuple[Span, ...]]


def check_sizes(id_: str, asked: IPContext) -> None:
    for what, listed in (
        ("excluded prefixes", asked.excluded_prefixes),
        ("source addresses", asked.src_ip_addrs),
        ("destination addresses", asked.dst_ip_addrs),
        ("source routes", asked.src_routes),
        ("destination routes", asked.dst_routes),
    ):
        if len(listed) > MOST:
            raise InvalidError(
                f"the request of connection {id_} lists {len(listed)} {what}; at most {MOST}"
                " are read",
                hint="merge them into wider prefixes",
            )


@lru_cache(maxsize=32)  # one node's manager sends the same list with every request
def excluded_spans(prefixes: tuple[str, ...]) -> Excluded:
    """Spans in order, by family."""
    networks = []
    for text in prefixes:
        try:
            networks.append(_parsed(text))
        except ValueError:
            raise InvalidError(
                f"excluded prefix {text[:64]!r} of the request is no prefix",
                hint="write it as ADDRESS/LENGTH",
            ) from None
    merged = sorted(cidr_merge(networks))
    return {
        family: tuple((one.first, one.last) for one in merged if one.version == family)
        for family in (4, 6)
    }


def _end_of(spans: Sequence[Span], address: int) -> int | None:
    """The last address of the span that holds address; None if none does."""
    place = bisect_right(spans, address, key=lambda span: span[0]) - 1
    return spans[place][1] if place >= 0 and address <= spans[place][1] else None


def _hit(held: _Held, excluded: Excluded) -> bool:
    spans = excluded[held.pool.family]
    return _end_of(spans, held.dst) is not None or _end_of(spans, held.src) is not None


def _network(text: str) -> IPNetwork:
    try:
        if "/" not in text:
            raise ValueError  # noqa: TRY301 - one sentence for all ways to be no prefix
        network = _parsed(text)
    except ValueError:
        raise InvalidError(
            f"prefix {text[:64]!r} of NSM_CIDR_PREFIX is no prefix",
            hint="write it as ADDRESS/LENGTH, as in 169.254.0.0/16; groups as [a,b],c",
        ) from None
    if network.size < 2:
        raise InvalidError(
            f"prefix {network} of NSM_CIDR_PREFIX holds one address, and a wire needs two",
            hint="give it a shorter length",
        )
    return network


def _parsed(text: str) -> IPNetwork:
    """A prefix without host bits; an address alone is one of full length. Raises ValueError."""
    try:
        strict = ipaddress.ip_network(text, strict=False)  # netaddr would take 10/8 and more
        return IPNetwork(str(strict))
    except AddrFormatError as error:
        raise ValueError(text) from error


def _address(text: str) -> tuple[int, int] | None:
    """Family and number of the address in `a` or `a/len`; None if there is none in it."""
    try:
        address = ipaddress.ip_interface(text).ip
    except ValueError:
        return None
    return address.version, int(address)


def _is_host(prefix: str) -> bool:
    try:
        return ipaddress.ip_network(prefix, strict=False).num_addresses == 1
    except ValueError:
        return False

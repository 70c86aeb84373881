"""Who holds which prefix of which pool (`wire.md` §10.2). Pure: no clock, no file, no wire.

A router is lent a prefix while its stream lasts and for some time after, so that one that was
restarted, or could not reach us for a while, finds its clients' addresses still its own. What
nobody came back for goes to others last of all: its router may live, and we not see it.
"""

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from nsm.errors import (
    ExhaustedError,
    InvalidError,
    NotFoundError,
    PreconditionError,
    TakenError,
)

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Family = Literal[4, 6]
MOST_EXCLUDED = 1024  # prefixes one request may exclude; more would hold the loop
MOST_LEASES = 256  # prefixes of a family one identity may hold of a pool
SHARE, LEAST_SHARE = 4, 8  # but no more than a quarter of it, if that is no less than 8
MOST_POOLS = 10_000
MOST_FORMER = 1024  # prefixes of a pool that others get last
MOST_PREFIXES = 64  # of one pool
LONGEST_NAME = 253
UNUSABLE = {  # no member could be reached at one of these; IPv4's link-local ones are but a prefix
    ipaddress.ip_network(text): what
    for text, what in (
        ("0.0.0.0/8", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("224.0.0.0/3", "multicast or reserved"),
        ("::/127", "unspecified or loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
}
DEFAULT = ""  # the pool of those who name none, as upstream's routers do


@dataclass(frozen=True, slots=True)
class Lease:
    """A prefix lent; ends in ns since 1970, None while its holder, a stream, lasts."""

    pool: str
    prefix: Network
    owner: str
    ends: int | None = None
    holder: int = 0


@dataclass(frozen=True, slots=True)
class Pool:
    """Prefixes to lend parts of; lengths of such a part, by family."""

    name: str
    prefixes: tuple[Network, ...]
    lengths: dict[int, int]

    def __str__(self) -> str:
        return f"pool {self.name!r}" if self.name else "the pool of the address plan"


def pool(name: str, prefixes: Sequence[str], *, ipv4: int = 0, ipv6: int = 0) -> Pool:
    """A pool as an operator describes it; lengths of 0 are chosen.

    Raises InvalidError for what are no prefixes, overlap, are nobody's to have, or are smaller
    than what is lent.
    """
    whose = f"pool {name[:LONGEST_NAME]!r}"
    if len(name) > LONGEST_NAME:
        raise InvalidError(f"{whose}: its name has over {LONGEST_NAME} characters")
    if not 0 < len(prefixes) <= MOST_PREFIXES:
        raise InvalidError(f"{whose} has {len(prefixes)} prefixes; it needs 1 to {MOST_PREFIXES}")
    networks: list[Network] = []
    for text in prefixes:
        network = parse(text, f"a prefix of {whose}")
        _usable(network, whose)
        for other in networks:
            if network.version == other.version and network.overlaps(other):
                raise InvalidError(
                    f"{network} and {other} of {whose} overlap",
                    hint="give each address to one prefix only",
                )
        networks.append(network)
    lengths = {}
    for version, wanted in ((4, ipv4), (6, ipv6)):
        own = [one for one in networks if one.version == version]
        if not own:
            continue
        longest = max(one.prefixlen for one in own)
        most = own[0].max_prefixlen
        length = wanted or _usual(version, longest)
        if not longest <= length <= most:
            raise InvalidError(
                f"{whose} is to lend /{length}, and has {min(own, key=lambda n: n.num_addresses)}",
                hint=f"a length from {longest} to {most} fits",
            )
        lengths[version] = length
    return Pool(name, tuple(networks), lengths)


def _usable(network: Network, whose: str) -> None:
    for no, what in UNUSABLE.items():
        if network.version == no.version and network.overlaps(no):
            raise InvalidError(
                f"{network} of {whose} has {what} addresses, at which no member is reached",
                hint="give it others, such as 172.16.0.0/16 or 2001:db8:10::/64",
            )


def _usual(version: int, longest: int) -> int:
    """Upstream's /24 and /112 where there is room for some of them, else sixteen parts."""
    usual, most = (24, 32) if version == 4 else (112, 128)
    return usual if longest + 4 <= usual else min(longest + 4, most)


def parse(text: str, what: str) -> Network:
    """A prefix without host bits. Raises InvalidError that says what it was to be."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as wrong:
        raise InvalidError(
            f"{what}: {text[:64]!r} is none: {str(wrong)[:200]}", hint="as 172.16.0.0/16"
        ) from None


@dataclass(slots=True)
class _Stock:
    """A pool and what of it is lent."""

    pool: Pool
    leases: dict[Network, Lease] = field(default_factory=dict)
    former: dict[Network, None] = field(default_factory=dict)  # nobody came back for, oldest first


class Plan:
    """All pools and leases. Methods return what changed; keeping it is the caller's."""

    def __init__(self, pools: Iterable[Pool] = ()) -> None:
        self._stocks = {one.name: _Stock(one) for one in pools}

    def load(self, leases: Iterable[Lease]) -> list[Lease]:
        """Have what an earlier life lent; of those what its pool, made otherwise since, is not.

        What is of no pool we have is passed over.
        """
        strange = []
        for lease in leases:
            stock = self._stocks.get(lease.pool)
            if stock and _inside(stock, lease.prefix):
                stock.leases[lease.prefix] = lease
            elif stock:
                strange.append(lease)
        return strange

    # -- pools ------------------------------------------------------------------------------

    def pools(self) -> list[Pool]:
        """All of them, by name."""
        return [self._stocks[name].pool for name in sorted(self._stocks)]

    def leases(self, name: str) -> list[Lease]:
        """What is lent of a pool, in the order of addresses. Raises NotFoundError."""
        held = self._stock(name).leases.values()
        return sorted(held, key=lambda one: (one.prefix.version, one.prefix))

    def lease_of(
        self, name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address
    ) -> Lease | None:
        """What is lent that an address is of."""
        held = self._stock(name).leases.values()
        return next((one for one in held if address in one.prefix), None)

    def covers(self, name: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        """Whether an address is of a pool's prefixes."""
        return any(address in one for one in self._stock(name).pool.prefixes)

    def lends(self, name: str, owner: str, prefix: Network) -> bool:
        """Whether all of a prefix is lent to it."""
        held = self._stock(name).leases.values()
        return any(
            one.owner == owner
            and one.prefix.version == prefix.version
            and prefix.subnet_of(one.prefix)  # type: ignore[arg-type]
            for one in held
        )

    def has(self, name: str, owner: str) -> bool:
        """Whether anything of a pool is lent to it."""
        stock = self._stocks.get(name)
        return stock is not None and any(one.owner == owner for one in stock.leases.values())

    def add(self, new: Pool) -> bool:
        """Have a pool; whether it is new: the same again changes nothing.

        Raises TakenError where another has its name or some of its addresses.
        """
        known = self._stocks.get(new.name)
        if known:
            if known.pool == new:
                return False
            raise TakenError(
                f"{new} is there with {_listed(known.pool.prefixes)}, lending"
                f" {_listed(f'/{length}' for length in known.pool.lengths.values())}",
                hint="delete it first, or take another name",
            )
        if len(self._stocks) >= MOST_POOLS:
            raise ExhaustedError(f"there are {MOST_POOLS} pools, which is the most")
        for stock in self._stocks.values():
            for one in stock.pool.prefixes:
                for other in new.prefixes:
                    if one.version == other.version and one.overlaps(other):
                        raise TakenError(
                            f"{other} of {new} overlaps {one} of {stock.pool}",
                            hint="two networks that share addresses could never meet",
                        )
        self._stocks[new.name] = _Stock(new)
        return True

    def drop(self, name: str, *, force: bool = False) -> bool:
        """Forget a pool; whether it was there. Raises PreconditionError while routers hold
        parts of it, unless forced.
        """
        stock = self._stocks.get(name)
        if stock is None:
            return False
        held = [one for one in stock.leases.values() if one.ends is None]
        if held and not force:
            raise PreconditionError(
                f"{stock.pool} is in use: {held[0].owner} holds {held[0].prefix}"
                + (f", and {len(held) - 1} more are held" if held[1:] else ""),
                hint="end its routers first, or say --force",
            )
        del self._stocks[name]
        return True

    # -- leases -----------------------------------------------------------------------------

    def allocate(
        self,
        name: str,
        owner: str,
        *,
        holder: int,
        wanted: str = "",
        excluded: Sequence[str] = (),
        family: Family | None = None,
        now: int,
    ) -> tuple[Lease, Lease | None]:
        """Lend owner a prefix: the wanted one if it is its own, or free and no larger than what
        the pool lends, else one that it had and nobody holds, else the lowest free one. The
        other is how it was lent to owner before, for `put_back`.

        What it wants and has already, it has from now on over this stream: the other may be one
        that broke and nobody noticed yet. Raises InvalidError, NotFoundError (no such pool, or
        none of that family), ExhaustedError.
        """
        stock = self._stock(name)
        self.expire(now)
        if len(excluded) > MOST_EXCLUDED:
            raise InvalidError(
                f"{owner} excludes {len(excluded)} prefixes; at most {MOST_EXCLUDED} are read"
            )
        closed = [parse(one, "an excluded prefix") for one in excluded]
        own = [one for one in stock.leases.values() if one.owner == owner]
        found = None
        if wanted:
            asked = parse(wanted, f"the prefix that {owner} wants")
            if _may_have(stock, asked, owner, closed):
                found = asked
            if asked.version in stock.pool.lengths:  # else of what there is, as to who wants none
                family = family or (4 if asked.version == 4 else 6)
        if found is None:
            back = (one.prefix for one in own if one.ends is not None)
            found = next(
                (
                    one
                    for one in sorted(back, key=lambda n: (n.version, n))
                    if one.version == (family or one.version)
                    and one.prefixlen == stock.pool.lengths[one.version]
                    and not _hit(one, closed)
                ),
                None,
            )
        prefix = found or _lowest(stock, closed, family, owner)
        before = stock.leases.get(prefix)
        held = sum(one.prefix.version == prefix.version for one in own)
        if before is None and held >= _share(stock.pool, prefix.version):
            raise ExhaustedError(
                f"{owner} holds {held} IPv{prefix.version} prefixes of {stock.pool}, which is the"
                " most one may",
                hint="give some back",
            )
        lease = Lease(name, prefix, owner, holder=holder)
        stock.leases[prefix] = lease
        stock.former = {one: None for one in stock.former if not _hit(one, [prefix])}
        return lease, before

    def put_back(self, lease: Lease, before: Lease | None) -> None:
        """A lease could not be kept: have what `allocate` found instead."""
        if self.release(lease) and before:
            self._stocks[lease.pool].leases[lease.prefix] = before

    def release(self, lease: Lease) -> bool:
        """Take a prefix back now; whether it was lent so."""
        stock = self._stocks.get(lease.pool)
        if stock is None or not _same(stock.leases.get(lease.prefix), lease):
            return False
        del stock.leases[lease.prefix]
        return True

    def leave(self, lease: Lease, until: int) -> Lease | None:
        """Its holder's stream ended: it stays lent until then. None if it is not lent so."""
        stock = self._stocks.get(lease.pool)
        if stock is None or not _same(stock.leases.get(lease.prefix), lease):
            return None
        stock.leases[lease.prefix] = left = replace(lease, ends=until)
        return left

    def expire(self, now: int) -> list[Lease]:
        """Forget what nobody came back for; what that was."""
        over = [
            lease
            for stock in self._stocks.values()
            for lease in stock.leases.values()
            if lease.ends is not None and lease.ends <= now
        ]
        for lease in over:
            stock = self._stocks[lease.pool]
            del stock.leases[lease.prefix]
            stock.former[lease.prefix] = None
            if len(stock.former) > MOST_FORMER:
                del stock.former[next(iter(stock.former))]
        return over

    def _stock(self, name: str) -> _Stock:
        try:
            return self._stocks[name]
        except KeyError:
            known = _listed(filter(None, self._stocks)) or "none with a name"
            raise NotFoundError(
                f"the address plan has no pool {name[:LONGEST_NAME]!r}; it has {known}",
                hint="`nsmctl vl3 create` makes one",
            ) from None


def _share(pool: Pool, version: int) -> int:
    """How many prefixes of a family one identity may hold: others are to find some, too."""
    length = pool.lengths[version]
    own = (one for one in pool.prefixes if one.version == version)
    parts = sum(1 << (length - one.prefixlen) for one in own)
    return min(MOST_LEASES, max(LEAST_SHARE, parts // SHARE))


def _may_have(stock: _Stock, asked: Network, owner: str, closed: Sequence[Network]) -> bool:
    """Whether it is of the pool, and the owner's or nobody's, and no more than a router's part."""
    if not _inside(stock, asked) or _hit(asked, closed):
        return False
    if held := stock.leases.get(asked):
        return held.owner == owner
    # one that wants all of a pool would leave nothing to the others
    return asked.prefixlen >= stock.pool.lengths[asked.version] and not _hit(asked, stock.leases)


def _inside(stock: _Stock, prefix: Network) -> bool:
    """Whether it is of the pool."""
    return any(
        one.version == prefix.version and prefix.subnet_of(one)  # type: ignore[arg-type]
        for one in stock.pool.prefixes
    )


def _lowest(stock: _Stock, closed: Sequence[Network], family: Family | None, owner: str) -> Network:
    """The lowest part that is free, from the first prefix that has one; what somebody did not
    come back for only where there is no other, the oldest first.
    """
    ours = [one for one in stock.pool.prefixes if one.version == (family or one.version)]
    if not ours:
        raise NotFoundError(
            f"{stock.pool} has no IPv{family} prefix", hint="it was made without one"
        )
    former = [one for one in stock.former if one.version in {prefix.version for prefix in ours}]
    spared = [former[place:] for place in (0, *(1 << n for n in range(len(former).bit_length())))]
    for kept in (*spared, []):
        for prefix in ours:
            taken = (*stock.leases, *closed, *kept)
            shut = [one for one in taken if one.version == prefix.version]
            if found := _gap(prefix, stock.pool.lengths[prefix.version], shut):
                return found
    holders = sorted({one.owner for one in stock.leases.values()})
    excluded = f"; {owner} excludes {len(closed)}" if closed else ""
    raise ExhaustedError(
        f"{stock.pool} is exhausted: of {_listed(ours)} {len(stock.leases)} parts are lent, to"
        f" {_listed(holders[:3]) or 'nobody'}{' and others' if holders[3:] else ''}{excluded}",
        hint="give it another prefix, or end routers that nobody needs",
    )


def _gap(prefix: Network, length: int, shut: Sequence[Network]) -> Network | None:
    """The lowest part of that length that meets none of shut."""
    size = 1 << (prefix.max_prefixlen - length)
    start = int(prefix.network_address)
    last = int(prefix.broadcast_address)
    for one in sorted(shut, key=lambda n: int(n.network_address)):
        if int(one.broadcast_address) < start:
            continue
        if int(one.network_address) >= start + size:
            break
        start = -(-(int(one.broadcast_address) + 1) // size) * size  # the next that is aligned
    if start + size - 1 > last:
        return None
    return type(prefix)((start, length))


def _same(held: Lease | None, lease: Lease) -> bool:
    """Whether it is held as lease says, and by no later stream."""
    return held is not None and (held.owner, held.holder) == (lease.owner, lease.holder)


def _hit(one: Network, others: Iterable[Network]) -> bool:
    return any(one.version == other.version and one.overlaps(other) for other in others)


def _listed(things: Iterable[object]) -> str:
    return ", ".join(map(str, things))

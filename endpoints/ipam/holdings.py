"""Which member has which address, as its router says. Pure.

A router's addresses live on at another when it dies (`docs/vl3.md`). Whose an address is, only
the router that gave it knew, so it says so here while it lives. Another router may have the
address for the same holder and nobody else; the first, when it is back, is told what is
elsewhere. An address that its member left stays known as that member's until it is given to
another, because who moves leaves before it comes.
"""

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
MOST_LEFT = 4096  # addresses of a pool that are known as somebody's who left
MOST_HELD = 16_384  # addresses of a pool that members of one router have
MOST_UNKNOWN = 1024  # of those, of others' prefixes, and nobody knew whose: a router has 512


@dataclass(frozen=True, slots=True)
class Holding:
    """A member's address; router is the one it is at, or was: see `named`."""

    pool: str
    address: Address
    holder: str
    router: str
    left: bool = False


def named(identity: str, name: str) -> str:
    """A router here: by its name too, because those of one Deployment may have one identity."""
    return f"{identity} {name}" if name else identity


def identity_of(router: str) -> str:
    """Its SPIFFE id, to which prefixes are lent."""
    return router.partition(" ")[0]


class Holdings:
    """All of all pools. Methods return what changed; keeping it is the caller's."""

    def __init__(self) -> None:
        self._pools: dict[str, dict[Address, Holding]] = {}
        self._left: dict[str, dict[Address, None]] = {}  # the longest ago first
        self._at: dict[tuple[str, str], set[Address]] = {}  # by pool and router, what is not left
        self._unknown: dict[tuple[str, str], set[Address]] = {}  # of those, had on its word alone
        self._from: dict[tuple[str, Address], str] = {}  # the router before, of what has moved

    def put(self, holding: Holding) -> None:
        """Have it so, as an earlier life kept it, or as it was before."""
        before = self.get(holding.pool, holding.address)
        if before and (holding.left or before.router != holding.router):
            self._nowhere(before)
        self._pools.setdefault(holding.pool, {})[holding.address] = holding
        left = self._left.setdefault(holding.pool, {})
        left.pop(holding.address, None)
        if holding.left:
            left[holding.address] = None
        else:
            self._at.setdefault((holding.pool, holding.router), set()).add(holding.address)

    def drop(self, pool: str, address: Address) -> None:
        """Forget it."""
        if before := self._pools.get(pool, {}).pop(address, None):
            self._nowhere(before)
        self._left.get(pool, {}).pop(address, None)
        self._from.pop((pool, address), None)

    def _nowhere(self, before: Holding) -> None:
        at = (before.pool, before.router)
        for where in (self._at, self._unknown):
            if at in where:
                where[at].discard(before.address)
                if not where[at]:
                    del where[at]

    def forget(self, pool: str) -> None:
        """Forget all of a pool."""
        self._pools.pop(pool, None)
        self._left.pop(pool, None)
        self._at = {at: of for at, of in self._at.items() if at[0] != pool}
        self._from = {which: of for which, of in self._from.items() if which[0] != pool}
        self._unknown = {at: of for at, of in self._unknown.items() if at[0] != pool}

    def get(self, pool: str, address: Address) -> Holding | None:
        """What is known of an address."""
        return self._pools.get(pool, {}).get(address)

    def told(self, pool: str, router: str, prefix: Network) -> list[Holding]:
        """What a router that is lent a prefix is to know: all of the prefix, and all of its own."""
        return [
            one
            for one in self._pools.get(pool, {}).values()
            if one.address in prefix
            or (one.router == router and not one.left and one.address.version == prefix.version)
        ]

    def claim(self, wanted: Holding, lent_to: str, *, moves: bool) -> bool:
        """Have an address for a member of a router; whether it may be. lent_to is the router
        whose prefix it is of, empty if nobody's; moves is whether the member comes from another
        router, and not that this one says what it has had.
        """
        now, own = self.get(wanted.pool, wanted.address), lent_to == wanted.router
        at, unknown = (wanted.pool, wanted.router), now is None and not own
        if wanted.address not in (has := self._at.get(at, set())) and len(has) >= MOST_HELD:
            return False
        if unknown and len(self._unknown.get(at, ())) >= MOST_UNKNOWN:
            return False  # all that is free could be taken from the others so
        same = now is not None and now.holder == wanted.holder
        if moves:  # and so proves by what is known here that the address is its own
            fine = same or (own and (now is None or now.left))
        elif now is None:
            fine = True
        else:
            fine = (own or same) and (now.left or now.router == wanted.router)
        if fine:
            if now and not now.left and now.router != wanted.router:
                self._from[wanted.pool, wanted.address] = now.router
            self.put(wanted)
            if unknown:
                self._unknown.setdefault(at, set()).add(wanted.address)
        return fine

    def before(self, pool: str, address: Address) -> str:
        """The router that an address came from to the one it is at; empty: from none. Its member
        may have a wire there still, as where one could not be made at the other.
        """
        return self._from.get((pool, address), "")

    def leave(self, pool: str, address: Address, holder: str, router: str) -> Holding | None:
        """Its member has it no longer; None if it is not held so: it may be elsewhere by now."""
        now = self.get(pool, address)
        if now is None or now.left or (now.holder, now.router) != (holder, router):
            return None
        self.put(left := replace(now, left=True))
        return left

    def inherited(
        self, pool: str, router: str, prefix: Network, *, former: str, gone: Callable[[str], bool]
    ) -> list[Holding]:
        """What a router comes to with a prefix that others of its identity had, who are gone: all
        of former's, who had it last, and of its addresses whoever's.
        """

        def before(one: str) -> bool:
            return one != router and identity_of(one) == identity_of(router) and gone(one)

        return [
            one
            for one in self._pools.get(pool, {}).values()
            if one.address.version == prefix.version and not one.left and before(one.router)
            if one.address in prefix or one.router == former
        ]

    def without(self, pool: str, who: str) -> list[Holding]:
        """A router, or all of an identity, has nothing lent any more: its members are nobody's;
        what changed."""
        ended = [
            replace(self._pools[pool][one], left=True)
            for (of, router), at in self._at.items()
            if of == pool and who in (router, identity_of(router))
            for one in at
        ]
        for one in ended:
            self.put(one)
        return ended

    def surplus(self, pool: str) -> list[Address]:
        """What was left so long ago that it need not be known: forgotten with this."""
        left = self._left.get(pool, {})
        over = list(left)[: max(0, len(left) - MOST_LEFT)]
        for address in over:
            self.drop(pool, address)
        return over

    def load(self, holdings: Iterable[Holding]) -> None:
        """Have what an earlier life kept."""
        for one in holdings:
            self.put(one)

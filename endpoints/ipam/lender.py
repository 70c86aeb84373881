"""The address plan at work: what is decided is kept before it is told."""

import asyncio
import ipaddress
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NoReturn

import structlog

from endpoints.ipam import store as kept
from endpoints.ipam.holdings import Address, Holding, Holdings, identity_of, named
from endpoints.ipam.plan import Lease, Network, Plan, Pool, parse, pool
from endpoints.ipam.store import Store
from nsm.errors import DeniedError, ExhaustedError, InvalidError, NsmError
from nsm.identity.spiffe import SpiffeId
from nsm.rpc.holdings import MOST_UNREAD, Listener, MemberAddress
from nsm.rpc.prefixes import AddressPool, LentPrefix

SWEEP = 60.0  # seconds between looks for what nobody came back for
log = structlog.get_logger(__name__)


class Lender:
    """Lends from a plan, kept in a store where there is one. hold in ns: how long after its
    stream's end a prefix stays lent. operators are the SPIFFE ids that may manage pools.
    """

    def __init__(
        self,
        plan: Plan,
        store: Store | None,
        *,
        hold: int,
        operators: Collection[str],
        clock: Callable[[], int] | None = None,
    ) -> None:
        self.plan = plan
        self._store = store
        self._hold = hold
        self._operators = operators
        self._clock = clock or steady()
        self._turn = asyncio.Lock()  # decisions are kept in the order they are made
        self.holdings = Holdings()
        self._listening: dict[tuple[str, str], list[Listener]] = {}
        self._asked: dict[tuple[str, Network], str] = {}  # the router that asked last about it

    async def restarted(self, leases: Iterable[Lease], holdings: Iterable[Holding] = ()) -> None:
        """Have what an earlier life lent. None of its streams lasts: all is held for a while."""
        self.holdings.load(holdings)
        if strange := self.plan.load(leases):
            log.warning(
                "what was lent is no longer of its pool, and is forgotten",
                prefixes=[f"{one.prefix} of {one.owner}" for one in strange[:10]],
                count=len(strange),
            )
            await self._keep(map(kept.lease_gone, strange))
        until = self._clock() + self._hold
        held = [lease for one in self.plan.pools() for lease in self.plan.leases(one.name)]
        # One that ends later than it can was kept before the clock was set back.
        open_ = [lease for lease in held if lease.ends is None or lease.ends > until]
        left = [self.plan.leave(lease, until) for lease in open_]
        await self._keep(kept.lease_kept(lease) for lease in left if lease)

    async def sweep(self) -> NoReturn:
        """Forget what nobody came back for, for a task of the process."""
        while True:
            await asyncio.sleep(SWEEP)
            try:
                async with self._turn:
                    await self._expire()
            except NsmError as trouble:  # it expires again after the next start
                log.warning("expired prefixes stay in the store", error=str(trouble))

    async def allocate(
        self, pool: str, owner: str, holder: int, wanted: str, excluded: Sequence[str], family: int
    ) -> str:
        """A prefix for owner, kept. Raises what `Plan.allocate` raises, and UnavailableError."""
        async with self._turn:
            await self._expire()
            lease, before = self.plan.allocate(
                pool,
                owner,
                holder=holder,
                wanted=wanted,
                excluded=excluded,
                family={4: 4, 6: 6}.get(family),  # type: ignore[arg-type]
                now=self._clock(),
            )
            try:
                await self._keep([kept.lease_kept(lease)])
            except BaseException:
                # Its addresses are in use if owner had it before: nobody else may get it now.
                self.plan.put_back(lease, before)
                raise
        log.info("prefix lent", prefix=str(lease.prefix), pool=pool, owner=owner)
        return str(lease.prefix)

    async def release(self, pool: str, owner: str, holder: int, prefix: str) -> None:
        """Take it back now, if it is lent so."""
        lease = Lease(pool, parse(prefix, "a prefix"), owner, holder=holder)
        async with self._turn:
            if self.plan.release(lease):
                await self._keep([kept.lease_gone(lease)])

    async def leave(self, pool: str, owner: str, holder: int, prefixes: Sequence[str]) -> None:
        """The stream ended: they stay lent for a while."""
        until = self._clock() + self._hold
        async with self._turn:
            left = [
                self.plan.leave(Lease(pool, parse(one, "a prefix"), owner, holder=holder), until)
                for one in prefixes
            ]
            await self._keep(kept.lease_kept(lease) for lease in left if lease)

    async def domain(self, pool: str) -> Sequence[str]:
        """Every prefix of a pool; none where there is no such pool."""
        found = (one.prefixes for one in self.plan.pools() if one.name == pool)
        return [str(one) for one in next(found, ())]

    async def create(self, pool: AddressPool, by: SpiffeId) -> AddressPool:
        """Have a pool, and what it is then."""
        self._admit(by)
        made = _made(pool)
        async with self._turn:
            if self.plan.add(made):
                try:
                    await self._keep([kept.pool_kept(made)])
                except BaseException:
                    self.plan.drop(made.name)
                    raise
        log.info("pool made", pool=made.name, prefixes=list(map(str, made.prefixes)), by=str(by))
        return self._told(made)

    async def delete(self, name: str, force: bool, by: SpiffeId) -> None:
        """Forget it; OK if it is not there."""
        self._admit(by)
        async with self._turn:
            gone = self.plan.drop(name, force=force)
            self.holdings.forget(name)
            # Kept though it is not there: an earlier try may have failed here.
            await self._keep(kept.pool_gone(name))
        if gone:
            log.info("pool forgotten", pool=name, by=str(by))

    async def pools(self, by: SpiffeId) -> list[AddressPool]:
        """All of them, with what is lent."""
        self._admit(by)
        async with self._turn:
            await self._expire()
            return [self._told(one) for one in self.plan.pools()]

    # -- members' addresses ---------------------------------------------------------------

    @contextmanager
    def listening(
        self, pool: str, identity: str, listener: Listener, name: str = ""
    ) -> Iterator[None]:
        """Tell a router's stream what becomes of addresses of its prefixes."""
        which = pool, named(identity, name)
        listeners = self._listening.setdefault(which, [])
        listeners.append(listener)
        try:
            yield
        finally:
            listeners.remove(listener)
            if not listeners:
                self._listening.pop(which, None)

    async def hold(
        self,
        pool: str,
        identity: str,
        said: Sequence[MemberAddress],
        answer: Listener | None = None,
        name: str = "",
    ) -> None:
        """What a router says of its members. answer is told what that is to the router itself,
        and not its other streams, one of an earlier life; news go to all listeners. One of those
        that share an identity is known by its name.

        All of it is kept in one go, before anybody is told. Raises UnavailableError where it
        cannot be, and then it is not so; DeniedError for who is no router of the pool.
        """
        async with self._turn:
            if not self.plan.has(pool, identity):
                raise DeniedError(
                    f"{identity} says what members of pool {pool!r} have, and is lent nothing of"
                    " it",
                    hint="a router says so once the address plan has lent it a prefix",
                )
            own = named(identity, name)
            decisions = _Decisions(self, pool)
            try:
                for one in said:
                    decisions.hear(own, one)
                decisions.over(self.holdings.surplus(pool))
                await self._keep(decisions.changes)
            except BaseException:
                decisions.undo()
                raise
            for to, news in decisions.told:
                if to == own and answer:
                    answer(news)
                else:
                    self._tell(pool, [(to, news)])

    def _tell(self, pool: str, told: Iterable[tuple[str, MemberAddress]]) -> None:
        for to, news in told:
            for listener in self._listening.get((pool, to), ()):
                listener(news)

    def lent_to(self, pool: str, address: Address) -> str:
        """The router whose prefix an address is of; empty: nobody's."""
        lease = self.plan.lease_of(pool, address)
        if lease is None:
            return ""
        asked = self._asked.get((pool, lease.prefix), "")
        return asked if identity_of(asked) == lease.owner else lease.owner

    def ask(self, pool: str, own: str, prefix: Network) -> str:
        """A router asks about a prefix that is lent to its identity; who did before."""
        lease = self.plan.lease_of(pool, prefix.network_address)
        if lease is None:
            return ""
        before = self._asked.get((pool, lease.prefix), "")
        self._asked[pool, lease.prefix] = own
        return before

    def gone(self, pool: str, one: str) -> bool:
        """Whether a router has no stream."""
        return (pool, one) not in self._listening

    def _admit(self, by: SpiffeId) -> None:
        if str(by) not in self._operators:
            raise DeniedError(
                f"{by} may not manage the address plan's pools",
                hint="add it to NSM_OPERATORS of the address plan",
            )

    def _told(self, one: Pool) -> AddressPool:
        return AddressPool(
            one.name,
            tuple(map(str, one.prefixes)),
            one.lengths.get(4, 0),
            one.lengths.get(6, 0),
            tuple(
                LentPrefix(str(lease.prefix), lease.owner, lease.ends)
                for lease in self.plan.leases(one.name)
            ),
        )

    async def _expire(self) -> None:
        if over := self.plan.expire(self._clock()):
            log.info("prefixes nobody came back for", prefixes=[str(one.prefix) for one in over])
            ended = {
                (one.pool, one.owner) for one in over if not self.plan.has(one.pool, one.owner)
            }
            had = {(one.pool, self._asked.pop((one.pool, one.prefix), "")) for one in over}
            have = {(pool, who) for (pool, _), who in self._asked.items()}
            left = [
                holding
                for pool, who in sorted(ended | (had - have))
                if who
                for holding in self.holdings.without(pool, who)
            ]
            await self._keep([*map(kept.lease_gone, over), *map(kept.holding_kept, left)])
            for one in left:
                if owner := self.lent_to(one.pool, one.address):
                    self._tell(one.pool, [(owner, _news(one, owner))])

    async def _keep(self, changes: Iterable[kept.Change]) -> None:
        if self._store and (listed := list(changes)):
            await self._store.keep(listed)


class _Decisions:
    """What one router said, decided: the changes to keep, whom to tell what, and the way back."""

    def __init__(self, lender: Lender, pool: str) -> None:
        self._lender = lender
        self._plan = lender.plan
        self._holdings = lender.holdings
        self._pool = pool
        self._before: list[tuple[Address, Holding | None]] = []
        self.changes: list[kept.Change] = []
        self.told: list[tuple[str, MemberAddress]] = []

    def hear(self, router: str, said: MemberAddress) -> None:
        """One thing it said."""
        if len(self.told) > MOST_UNREAD:
            raise ExhaustedError(
                f"{router} asks for more at once than it would read",
                hint="ask about a prefix once, and for the next when that is answered",
            )
        if "/" in said.address:
            self._about(router, said)
            return
        address = _address(said.address, router)
        lent_to = self._lender.lent_to(self._pool, address)
        before = self._holdings.get(self._pool, address)
        if said.left:
            left = self._holdings.leave(self._pool, address, said.holder, router)
            if left:
                self._changed(left, before)
                others = {lent_to, self._holdings.before(self._pool, address)} - {"", router}
                self.told += [(one, _news(left, one)) for one in sorted(others)]
            return
        wanted = Holding(self._pool, address, said.holder, router)
        fine = self._plan.covers(self._pool, address) and self._holdings.claim(
            wanted, lent_to, moves=said.number > 0
        )
        if said.number:
            self.told.append((router, replace(said, refused=not fine)))
        elif not fine:
            self.told.append((router, replace(said, elsewhere=True)))
        if not fine or wanted == before:
            return
        self._changed(wanted, before)
        others = {lent_to, before.router if before and not before.left else ""} - {"", router}
        self.told += [(one, _news(wanted, one)) for one in sorted(others)]

    def over(self, addresses: Iterable[Address]) -> None:
        """What need not be known any more."""
        self.changes += [kept.holding_gone(self._pool, one) for one in addresses]

    def undo(self) -> None:
        """Have it as it was before."""
        for address, before in reversed(self._before):
            if before:
                self._holdings.put(before)
            else:
                self._holdings.drop(self._pool, address)

    def _about(self, router: str, said: MemberAddress) -> None:
        prefix = parse(said.address, f"the prefix that {router} asks about")
        if not self._plan.lends(self._pool, identity_of(router), prefix):
            self.told.append((router, replace(said, refused=True)))
            return
        for one in self._holdings.inherited(
            self._pool,
            router,
            prefix,
            former=self._lender.ask(self._pool, router, prefix),
            gone=partial(self._lender.gone, self._pool),
        ):
            self._holdings.put(mine := replace(one, router=router))
            self._changed(mine, one)
        found = self._holdings.told(self._pool, router, prefix)
        self.told += [(router, _news(one, router)) for one in found]
        self.told.append((router, said))

    def _changed(self, holding: Holding, before: Holding | None) -> None:
        self._before.append((holding.address, before))
        self.changes.append(kept.holding_kept(holding))


def _news(one: Holding, router: str) -> MemberAddress:
    elsewhere = not one.left and one.router != router
    return MemberAddress(str(one.address), one.holder, left=one.left, elsewhere=elsewhere)


def _address(text: str, router: str) -> Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        raise InvalidError(f"{router} names a member's address {text[:64]!r}") from None


def steady() -> Callable[[], int]:
    """A clock in ns since 1970 that nobody sets: a step forward, as at a start without a battery,
    would end all leases before their routers are back; one backward would have them for ever.
    """
    began = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return lambda: began + time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _made(asked: AddressPool) -> Pool:
    return pool(asked.name, asked.prefixes, ipv4=asked.ipv4_length, ipv6=asked.ipv6_length)

"""The address plan at work: what is decided is kept before it is told."""

import asyncio
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NoReturn

import structlog

from endpoints.ipam import store as kept
from endpoints.ipam.plan import Lease, Plan, Pool, parse, pool
from endpoints.ipam.store import Store
from nsm.errors import DeniedError, NsmError
from nsm.identity.spiffe import SpiffeId
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
        self._plan = plan
        self._store = store
        self._hold = hold
        self._operators = operators
        self._clock = clock or steady()
        self._turn = asyncio.Lock()  # decisions are kept in the order they are made

    async def restarted(self, leases: Iterable[Lease]) -> None:
        """Have what an earlier life lent. None of its streams lasts: all is held for a while."""
        if strange := self._plan.load(leases):
            log.warning(
                "what was lent is no longer of its pool, and is forgotten",
                prefixes=[f"{one.prefix} of {one.owner}" for one in strange[:10]],
                count=len(strange),
            )
            await self._keep(map(kept.lease_gone, strange))
        until = self._clock() + self._hold
        held = [lease for one in self._plan.pools() for lease in self._plan.leases(one.name)]
        # One that ends later than it can was kept before the clock was set back.
        open_ = [lease for lease in held if lease.ends is None or lease.ends > until]
        left = [self._plan.leave(lease, until) for lease in open_]
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
            lease, before = self._plan.allocate(
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
                self._plan.put_back(lease, before)
                raise
        log.info("prefix lent", prefix=str(lease.prefix), pool=pool, owner=owner)
        return str(lease.prefix)

    async def release(self, pool: str, owner: str, holder: int, prefix: str) -> None:
        """Take it back now, if it is lent so."""
        lease = Lease(pool, parse(prefix, "a prefix"), owner, holder=holder)
        async with self._turn:
            if self._plan.release(lease):
                await self._keep([kept.lease_gone(lease)])

    async def leave(self, pool: str, owner: str, holder: int, prefixes: Sequence[str]) -> None:
        """The stream ended: they stay lent for a while."""
        until = self._clock() + self._hold
        async with self._turn:
            left = [
                self._plan.leave(Lease(pool, parse(one, "a prefix"), owner, holder=holder), until)
                for one in prefixes
            ]
            await self._keep(kept.lease_kept(lease) for lease in left if lease)

    async def domain(self, pool: str) -> Sequence[str]:
        """Every prefix of a pool; none where there is no such pool."""
        found = (one.prefixes for one in self._plan.pools() if one.name == pool)
        return [str(one) for one in next(found, ())]

    async def create(self, pool: AddressPool, by: SpiffeId) -> AddressPool:
        """Have a pool, and what it is then."""
        self._admit(by)
        made = _made(pool)
        async with self._turn:
            if self._plan.add(made):
                try:
                    await self._keep([kept.pool_kept(made)])
                except BaseException:
                    self._plan.drop(made.name)
                    raise
        log.info("pool made", pool=made.name, prefixes=list(map(str, made.prefixes)), by=str(by))
        return self._told(made)

    async def delete(self, name: str, force: bool, by: SpiffeId) -> None:
        """Forget it; OK if it is not there."""
        self._admit(by)
        async with self._turn:
            gone = self._plan.drop(name, force=force)
            # Kept though it is not there: an earlier try may have failed here.
            await self._keep(kept.pool_gone(name))
        if gone:
            log.info("pool forgotten", pool=name, by=str(by))

    async def pools(self, by: SpiffeId) -> list[AddressPool]:
        """All of them, with what is lent."""
        self._admit(by)
        async with self._turn:
            await self._expire()
            return [self._told(one) for one in self._plan.pools()]

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
                for lease in self._plan.leases(one.name)
            ),
        )

    async def _expire(self) -> None:
        if over := self._plan.expire(self._clock()):
            log.info("prefixes nobody came back for", prefixes=[str(one.prefix) for one in over])
            await self._keep(map(kept.lease_gone, over))

    async def _keep(self, changes: Iterable[kept.Change]) -> None:
        if self._store and (listed := list(changes)):
            await self._store.keep(listed)


def steady() -> Callable[[], int]:
    """A clock in ns since 1970 that nobody sets: a step forward, as at a start without a battery,
    would end all leases before their routers are back; one backward would have them for ever.
    """
    began = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return lambda: began + time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _made(asked: AddressPool) -> Pool:
    return pool(asked.name, asked.prefixes, ipv4=asked.ipv4_length, ipv6=asked.ipv6_length)

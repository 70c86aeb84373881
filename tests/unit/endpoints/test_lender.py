"""The address plan where its disk fails and its clock is set: nobody gets what is another's."""

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from endpoints.ipam import lender as module
from endpoints.ipam.lender import Lender
from endpoints.ipam.plan import Lease, Plan, parse, pool
from endpoints.ipam.store import Store, open_store
from nsm.errors import ExhaustedError, NotFoundError, UnavailableError
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND
from nsm.rpc.prefixes import AddressPool

pytestmark = pytest.mark.unit
A, B = "spiffe://east.test/router/a", "spiffe://west.test/router/b"
OPERATOR = SpiffeId("east.test", "/operator")
HOLD = 600 * SECOND


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with open_store(str(tmp_path / "plan.db")) as (opened, _):
        yield opened


def lender(store: Store | None, *prefixes: str, **more: object) -> Lender:
    plan = Plan([pool("", list(prefixes) or ["10.0.0.0/16"])])
    return Lender(plan, store, hold=HOLD, operators=(str(OPERATOR),), **more)  # type: ignore[arg-type]


def writable(store: Store, may: bool) -> None:
    """As a file system that turns read-only, and back."""
    store._connection.execute(f"PRAGMA query_only = {'OFF' if may else 'ON'}")


async def test_what_cannot_be_kept_is_not_lent_and_what_was_lent_before_stays(
    store: Store,
) -> None:
    plan = lender(store)
    assert await plan.allocate("", A, 1, "", (), 0) == "10.0.0.0/24"
    writable(store, False)
    for owner, wanted in ((A, "10.0.0.0/24"), (B, "")):  # A's stream broke, and it comes again
        with pytest.raises(UnavailableError, match=r"cannot write .*plan\.db: attempt to"):
            await plan.allocate("", owner, 2, wanted, (), 0)
    writable(store, True)
    assert await plan.allocate("", B, 3, "10.0.0.0/24", (), 0) == "10.0.1.0/24"
    await plan.leave("", A, 1, ["10.0.0.0/24"])  # its first stream was never replaced
    ends = {one.prefix: one.ends for one in plan.plan.leases("")}
    assert [ends[parse(one, "")] is None for one in ("10.0.0.0/24", "10.0.1.0/24")] == [False, True]


async def test_a_full_disk_is_called_by_its_name(store: Store) -> None:
    store._connection.execute("PRAGMA max_page_count = 12")
    long = ("INSERT INTO pools VALUES (?, ?, 0, 0)", ("a", "x" * 100_000))
    with pytest.raises(UnavailableError, match="database or disk is full"):
        await store.keep([long])
    await store.keep([("INSERT INTO pools VALUES (?, ?, 0, 0)", ("a", "x"))])


async def test_a_pool_that_could_not_be_forgotten_is_forgotten_the_next_time(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "plan.db")
    async with open_store(path) as (store, _):
        plan = lender(store)
        await plan.create(AddressPool("orders", ("172.16.0.0/16",)), OPERATOR)
        writable(store, False)
        with pytest.raises(UnavailableError):
            await plan.delete("orders", False, OPERATOR)
        writable(store, True)
        await plan.delete("orders", False, OPERATOR)
    async with open_store(path) as (_, loaded):
        assert not loaded.pools


async def test_a_clock_that_is_set_ends_no_lease_and_keeps_none_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wall = time.time_ns()
    monkeypatch.setattr(module.time, "time_ns", lambda: wall)
    plan = lender(None)
    await plan.restarted([Lease("", parse("10.0.0.0/24", ""), A)])
    wall += 10**9 * SECOND  # a machine without a battery learns what year it is
    assert await plan.allocate("", B, 1, "10.0.0.0/24", (), 0) == "10.0.1.0/24"
    late = Lease("", parse("10.0.7.0/24", ""), A, ends=wall)  # from before it was set back
    await (again := lender(None)).restarted([late])
    (held,) = again.plan.leases("")
    assert held.ends is not None
    assert held.ends <= again._clock() + HOLD


@pytest.mark.parametrize(
    ("prefix", "family", "most"),
    [("10.0.0.0/16", 4, 64), ("10.0.0.0/27", 4, 8), ("10.0.0.0/8", 4, 256), ("fd00::/64", 6, 256)],
)
async def test_one_alone_cannot_take_a_pool_and_still_gets_again_what_it_has(
    prefix: str, family: int, most: int
) -> None:
    plan = lender(None, prefix)
    got = [await plan.allocate("", A, n, "", (), family) for n in range(most)]
    with pytest.raises(ExhaustedError, match=f"{A} holds {most} IPv{family} prefixes of the pool"):
        await plan.allocate("", A, most, "", (), family)
    assert await plan.allocate("", A, 999, got[-1], (), family) == got[-1]
    assert await plan.allocate("", B, 1, "", (), family) not in got


async def test_nobody_gives_back_what_is_anothers(store: Store) -> None:
    plan = lender(store)
    mine = await plan.allocate("", A, 1, "", (), 0)
    for owner, holder in ((B, 1), (A, 2)):  # another's, and another stream's
        await plan.release("", owner, holder, mine)
        await plan.leave("", owner, holder, [mine])
    (held,) = plan.plan.leases("")
    assert (held.owner, held.ends) == (A, None)
    with pytest.raises(NotFoundError):
        await plan.allocate("another", A, 1, "", (), 0)

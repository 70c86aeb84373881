"""A router's decisions that need neither kernel nor mesh."""

import asyncio

import pytest

from endpoints.vl3.fellows import Fellows
from endpoints.vl3.router import Router
from nsm.errors import UnavailableError
from nsm.kernel.routing import Routing
from nsm.model import Connection, Context, IPContext, Route
from tests.support.wait import until


@pytest.fixture
async def router(monkeypatch: pytest.MonkeyPatch):
    """One whose namespace takes what it is told."""
    for what in ("admit", "own"):
        monkeypatch.setattr(Routing, what, lambda *_: None)
    made = Router(Fellows("r", "vL3"), Routing("/nowhere"), [4])
    settling = asyncio.create_task(made.settle())
    yield made
    settling.cancel()
    await asyncio.gather(settling, return_exceptions=True)


def asks(id_: str, **ip) -> Connection:
    return Connection(id_, context=Context(ip=IPContext(**ip)))


async def lent(router: Router) -> None:
    router.lend("172.16.1.0/24", ["172.16.0.0/16"])
    await until(lambda: router.ready, "the kernel to be told", record=False)


async def test_nobody_is_served_before_packets_are_passed_on(router) -> None:
    with pytest.raises(UnavailableError, match=r"^prefix pool is initializing"):
        router.assign(asks("a"))
    router.lend("172.16.1.0/24", [])
    with pytest.raises(UnavailableError, match=r"^prefix pool is initializing"):
        router.assign(asks("a"))
    await until(lambda: router.ready, "the kernel to be told", record=False)
    assert router.assign(asks("a")).src_ip_addrs == ("172.16.1.1/32",)


async def test_who_is_no_router_leads_nobody_on(router) -> None:
    """Else a member could draw the packets of all others to itself."""
    await lent(router)
    with pytest.raises(UnavailableError, match="has registered no router"):
        router.assign(asks("a", dst_routes=(Route("172.16.2.0/24", "172.16.1.1"),)))
    made = router.assign(asks("a", dst_routes=(Route("172.16.2.9/32"),)))
    assert made.dst_routes == (Route("172.16.1.1/32"),)


async def test_all_are_told_of_a_new_prefix_and_of_a_lower_mtu(router) -> None:
    told = []
    router.on_change = lambda larger: told.append([one for one in (0, 1400, 1500) if larger(one)])
    await lent(router)
    assert told == [[0, 1400, 1500]]
    router.lend("172.16.1.0/24", ["172.16.0.0/16"])  # the same again
    small = Connection("a", context=Context(mtu=1400))
    assert (await router.answer(small)).context.mtu == 1400
    large = Connection("b", context=Context(mtu=9000))
    assert (await router.answer(large)).context.mtu == 1400
    assert told[1:] == [[0, 1500]]
    assert router.shape(Context(mtu=9000)).mtu == 1400


async def test_it_is_idle_when_it_has_had_no_member_for_so_long(router) -> None:
    await lent(router)
    router.assign(asks("a"))
    waiting = asyncio.create_task(router.idle(0.01))
    await asyncio.sleep(0)
    assert not waiting.done()
    router.release("a")
    await until(waiting.done, "the idle time to be over", record=False)

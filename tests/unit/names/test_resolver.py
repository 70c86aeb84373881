"""For how long a workload's resolver believes what a connection's servers said."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from nsm.model import Context, DNSConfig, DNSContext
from nsm.names import resolver, server
from nsm.names.asking import question
from nsm.names.resolvconf import Before
from nsm.names.resolver import FRESH, STALE, Resolver
from nsm.names.server import Sockets
from tests.support.nameserver import free_port

HOST = "127.0.0.1"


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    """A resolver of one connection, whose server is at HOST."""
    monkeypatch.setattr(resolver, "_is_elsewhere", lambda _: True)
    made = Resolver(Before(), Sockets(), free_port(HOST))
    made.tell("w-1", Context(dns=DNSContext((DNSConfig((HOST,), ("net",)),))))
    return made


@asynccontextmanager
async def serving(asking: Resolver, *addresses: str, code: int = 0) -> AsyncIterator[None]:
    async def answer(query: dns.message.QueryMessage, _: str) -> dns.message.Message:
        made = server.reply(query)
        made.set_rcode(dns.rcode.Rcode(code))
        if addresses:
            name = query.question[0].name
            made.answer = [dns.rrset.from_text(name, 3600, "IN", "A", *addresses)]
        return made

    async with server.serving(answer, [(HOST, asking._port)], Sockets()):
        yield


async def heard(asking: Resolver, name: str = "m1.net") -> tuple[str, list[str], int]:
    """How it answers, with what, and for how long that is to be believed."""
    said = await asking.answer(question(name, "A"), HOST)
    records = [one for found in said.answer for one in found]
    ttl = min((one.ttl for one in said.answer), default=0)
    return dns.rcode.to_text(said.rcode()), [str(one) for one in records], ttl


def later(asking: Resolver, seconds: float) -> None:
    """Make what it holds so much older."""
    for held in asking._cache.values():
        held.came -= seconds
        held.ends -= seconds


async def test_who_moved_is_found_after_some_seconds_whatever_the_ttl(asking: Resolver) -> None:
    async with serving(asking, "172.16.0.1"):
        assert await heard(asking) == ("NOERROR", ["172.16.0.1"], FRESH)
    async with serving(asking, "172.16.1.1"):
        assert (await heard(asking))[1] == ["172.16.0.1"]
        later(asking, FRESH)
        assert await heard(asking) == ("NOERROR", ["172.16.1.1"], FRESH)


async def test_the_last_answer_holds_while_nobody_answers(asking: Resolver) -> None:
    async with serving(asking, "172.16.0.1"):
        await heard(asking)
    later(asking, FRESH)
    assert await heard(asking) == ("NOERROR", ["172.16.0.1"], 0)
    async with serving(asking, code=dns.rcode.SERVFAIL):
        later(asking, FRESH)
        assert await heard(asking) == ("NOERROR", ["172.16.0.1"], 0)
    later(asking, STALE)
    assert (await heard(asking))[0] == "SERVFAIL"
    async with serving(asking, "172.16.0.2"):
        assert (await heard(asking))[1] == ["172.16.0.2"]


async def test_a_short_name_that_a_search_domain_may_have_is_not_denied(
    asking: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = question("m1", "A")
    denied.flags |= dns.flags.QR
    denied.set_rcode(dns.rcode.NXDOMAIN)

    async def none(*_: object) -> resolver.Found:
        return resolver.Found(denied)

    monkeypatch.setattr(Resolver, "_by_before", none)
    assert await heard(asking, "m1") == ("SERVFAIL", [], 0)
    async with serving(asking, code=dns.rcode.NXDOMAIN):
        assert await heard(asking, "m1") == ("NXDOMAIN", [], 0)
    async with serving(asking, "172.16.0.1"):
        assert await heard(asking, "m1") == ("NOERROR", ["m1.net.", "172.16.0.1"], FRESH)
    later(asking, FRESH)
    assert await heard(asking, "m1") == ("NOERROR", ["m1.net.", "172.16.0.1"], 0)
    assert (await heard(asking, "none.example"))[0] == "NXDOMAIN"  # of the names of before


async def test_who_says_that_there_is_none_is_believed_at_once(asking: Resolver) -> None:
    async with serving(asking, "172.16.0.1"):
        await heard(asking)
    later(asking, FRESH)
    async with serving(asking, code=dns.rcode.NXDOMAIN):
        assert (await heard(asking))[0] == "NXDOMAIN"
    assert (await heard(asking))[0] == "SERVFAIL"  # and what was before is forgotten


async def test_an_answer_without_end_is_not_kept(asking: Resolver) -> None:
    most = [f"172.16.{n // 250}.{n % 250 + 1}" for n in range(2000)]
    async with serving(asking, *most):
        assert len((await heard(asking))[1]) == len(most)
        assert not asking._cache
    async with serving(asking, *most[:20]):
        assert len((await heard(asking))[1]) == 20
        assert len(asking._cache) == 1


@pytest.mark.parametrize(
    ("server_", "asked"),
    [
        ("172.16.0.1", True),
        ("fe80::1%eth0", True),
        ("127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:0.0.0.0", False),
        ("0.0.0.0", False),
        ("::", False),
        ("ff02::fb", False),
        ("not one", False),
    ],
)
def test_nobody_has_us_ask_ourselves(server_: str, asked: bool) -> None:
    told = Context(dns=DNSContext((DNSConfig((server_,), ("net",)),)))
    assert bool(resolver.ways_of(told, 53)) == asked

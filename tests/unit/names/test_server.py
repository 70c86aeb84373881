"""Whatever comes in: an answer to a question, a short one to a wrong question, or none."""

import asyncio

import dns.flags
import dns.message
import dns.rcode
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsm.errors import UnavailableError
from nsm.model import Connection, Path, Segment
from nsm.names import server, templates
from nsm.names.router import RouterNames
from nsm.names.server import _Desk

QUERY = dns.message.make_query("m1.db.", "A", use_edns=0).to_wire()


def names() -> RouterNames:
    made = RouterNames(templates.parse_all(["{client}.{service}"]), apexes=["db"])
    made.cover(["172.16.0.0/16"])
    made.own(["router.db"], ["172.16.0.0"])
    return made


def answered(data: bytes, *, datagram: bool = True) -> bytes | None:
    async def one() -> bytes | None:
        async with asyncio.TaskGroup() as tasks:
            return await _Desk(names().answer, tasks)._answered(
                data, "192.0.2.9", datagram=datagram
            )

    return asyncio.run(one())


@settings(max_examples=150)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.binary(min_size=10, max_size=60).map(lambda tail: QUERY[:2] + tail),
        st.lists(
            st.tuples(st.integers(0, len(QUERY) - 1), st.integers(0, 255)), min_size=1, max_size=6
        ).map(lambda some: bytes(dict(some).get(at, byte) for at, byte in enumerate(QUERY))),
        st.integers(0, len(QUERY)).map(lambda end: QUERY[:end]),
    ),
    st.booleans(),
)
def test_nothing_comes_of_garbage_but_short_answers_to_what_looks_like_a_question(
    data: bytes, datagram: bool
) -> None:
    wire = answered(data, datagram=datagram)
    question = len(data) >= 12 and not data[2] & 0x80
    assert (wire is not None) == question
    if wire is not None:
        assert wire[:2] == data[:2]
        assert wire[2] & 0x80
        assert len(wire) <= 1232
        dns.message.from_wire(wire)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (QUERY[:2] + b"\x28" + QUERY[3:], dns.rcode.NOTIMP),  # an update
        (QUERY[:5] + b"\2" + QUERY[6:], dns.rcode.FORMERR),
        (QUERY[:5] + b"\0" + QUERY[6:], dns.rcode.FORMERR),
        (QUERY[:20], dns.rcode.FORMERR),
        (QUERY, dns.rcode.NXDOMAIN),
    ],
    ids=["update", "two questions", "no question", "cut off", "nobody"],
)
def test_a_wrong_question_is_told_what_it_is(data: bytes, code: dns.rcode.Rcode) -> None:
    wire = answered(data)
    assert wire
    assert dns.message.from_wire(wire).rcode() == code


def test_an_answer_that_cannot_be_made_is_a_failure_and_not_the_end() -> None:
    async def broken(*_: object) -> dns.message.Message:
        raise KeyError

    async def one() -> bytes | None:
        async with asyncio.TaskGroup() as tasks:
            return await _Desk(broken, tasks)._answered(QUERY, "192.0.2.9", datagram=True)

    wire = asyncio.run(one())
    assert wire
    assert dns.message.from_wire(wire).rcode() == dns.rcode.SERVFAIL


def test_before_there_is_an_address_a_member_is_told_to_ask_again() -> None:
    conn = Connection(id="c", service="db", path=Path((Segment("m", "c"),)))
    with pytest.raises(UnavailableError, match="DNS address is initializing"):
        names().join(conn, ["172.16.0.5"])
    with pytest.raises(UnavailableError, match="DNS address is initializing"):
        names().ask()


def test_there_is_room_for_so_many_questions_and_no_more() -> None:
    async def some() -> int:
        async with asyncio.TaskGroup() as tasks:
            stop = asyncio.Event()

            async def slow(query: dns.message.QueryMessage, _: str) -> dns.message.Message:
                await stop.wait()
                return server.refused(query)

            desk = _Desk(slow, tasks)
            transport = _Out()
            for _ in range(server.AT_ONCE + 50):
                desk.datagram(QUERY, ("192.0.2.9", 5353), transport)  # type: ignore[arg-type]
            desk.datagram(QUERY, ("192.0.2.9", 0), transport)  # type: ignore[arg-type]
            await asyncio.sleep(0)
            stop.set()
        return len(transport.sent)

    assert asyncio.run(some()) == server.AT_ONCE


class _Out:
    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def sendto(self, data: bytes, _: object) -> None:
        self.sent.append(data)

"""A router's DNS server, asked by stock dig and by hostile strangers; beside it, unbound."""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from nsm.errors import TakenError
from nsm.kernel.routing import Routing
from nsm.model import Connection, DNSConfig, Segment
from nsm.model import Path as Way
from nsm.names import templates
from nsm.names.router import PATIENCE, RouterNames
from nsm.names.server import Sockets
from tests.e2e.names.dig import dig
from tests.e2e.names.places import address, segment
from tests.support.nameserver import nameserver
from tests.support.spaces import Space
from tests.support.wait import until

PATTERNS = templates.parse_all(["{client}.{service}"])


def member(name: str) -> Connection:
    return Connection(id=f"c-{name}", service="db", path=Way((Segment(name, f"c-{name}"),)))


@asynccontextmanager
async def routers(spaces: Sequence[Space], first: int = 1) -> AsyncIterator[list[RouterNames]]:
    """A router in each namespace from first on, with one member, r1.db … of router r1; each
    knows the others, and none knows a member of another."""
    async with AsyncExitStack() as stack:
        made = []
        for n, space in enumerate(spaces[first:], first):
            names = RouterNames(PATTERNS, apexes=["db"])
            names.cover(["172.16.0.0/16", "fd16::/48"])
            names.own([f"router-{n}.db"], [f"172.16.{n}.0/32"])
            hosts = [(address(n), 53), (f"fd77::{n + 1}", 53)]
            await stack.enter_async_context(
                names.serving(hosts, Sockets(Routing(space.path).inside))
            )
            names.join(member(f"m{n}"), [f"172.16.{n}.5/32", f"fd16::{n}:5/128"])
            made.append(names)
        for one, names in enumerate(made, first):
            for other in range(first, first + len(made)):
                if one != other:
                    names.meet(f"to-{other}", [address(other), f"fd77::{other + 1}"])
        yield made


async def test_names_and_addresses_of_members_and_routers_are_answered() -> None:
    with segment(2) as spaces:
        async with routers(spaces):
            for server in (address(1), "fd77::2"):
                for how in ("+notcp", "+tcp", "+noedns"):
                    heard = await dig(spaces[0], server, "M1.db", "A", how)
                    assert heard.status == "NOERROR", heard.text
                    assert heard.answer == ["M1.db. A 172.16.1.5"]
                    assert heard.ttls == {3600}
                    assert "aa" in heard.flags
                    assert ("; EDNS: version: 0" in heard.text) == (how != "+noedns")
            for name, kind, data in (
                ("m1.db", "AAAA", ["fd16::1:5"]),
                ("router-1.db", "A", ["172.16.1.0"]),
                ("-x172.16.1.5", "", ["m1.db."]),
                ("-xfd16::1:5", "", ["m1.db."]),
                ("-x172.16.1.0", "", ["router-1.db."]),
            ):
                heard = await dig(spaces[0], address(1), *filter(None, (name, kind)))
                assert heard.data == data, heard.text


async def test_what_is_not_there_is_answered_as_what_it_is() -> None:
    with segment(2) as spaces:
        async with routers(spaces) as (names,):
            for name, status, zone in (
                ("none.db A", "NXDOMAIN", "db."),
                ("m1.db TXT", "NOERROR", "db."),
                ("db A", "NOERROR", "db."),
                ("-x 172.16.9.9", "NXDOMAIN", "16.172.in-addr.arpa."),
            ):
                heard = await dig(spaces[0], address(1), *name.split())
                assert (heard.status, heard.answer) == (status, []), heard.text
                (soa,) = heard.authority
                assert soa.startswith(f"{zone} SOA ")
                assert heard.ttls == {5}
            for words in ("example.org A", "-x 192.0.2.1", "db AXFR +tcp", "m1.db CH TXT"):
                heard = await dig(spaces[0], address(1), *words.split())
                assert not heard.answer
                assert heard.status == "REFUSED" or "Transfer failed" in heard.text, heard.text
            heard = await dig(spaces[0], address(1), "m1.db", "+edns=7", "+noednsneg")
            assert heard.status == "BADVERS"
            names.leave("c-m1")
            assert (await dig(spaces[0], address(1), "m1.db")).status == "NXDOMAIN"


async def test_an_answer_that_is_too_long_is_cut_and_whole_by_tcp() -> None:
    with segment(2) as spaces:
        async with routers(spaces) as (names,):
            many = [f"172.16.7.{n}" for n in range(100)]
            names.join(member("many"), many)
            for edns in ("+noedns", "+bufsize=4096"):
                cut = await dig(spaces[0], address(1), "many.db", "+ignore", edns)
                assert "tc" in cut.flags
                assert not cut.answer  # a part of them would be taken for all
                whole = await dig(spaces[0], address(1), "many.db", edns)
                assert sorted(whole.data) == sorted(many)
                assert "tc" not in whole.flags
            names.join(member("many"), many[:60])  # 60 fit 1232 bytes and not 512
            assert "tc" not in (await dig(spaces[0], address(1), "many.db", "+ignore")).flags
            short = await dig(spaces[0], address(1), "many.db", "+ignore", "+noedns")
            assert "tc" in short.flags


async def test_routers_know_each_others_members_and_ask_in_no_circle() -> None:
    with segment(4) as spaces:
        async with routers(spaces) as made:
            for n in (1, 2, 3):
                for other in (1, 2, 3):
                    heard = await dig(spaces[0], address(n), f"m{other}.db")
                    assert heard.data == [f"172.16.{other}.5"], heard.text
                heard = await dig(spaces[0], address(n), "-x", "172.16.3.5")
                assert heard.data == ["m3.db."]
            asked: list[str] = []
            for names in made:
                count(names, asked)
            assert (await dig(spaces[0], address(1), "none.db")).status == "NXDOMAIN"
            assert sorted(asked) == [address(0), address(1), address(1)]
            made[2].part("to-1")  # who is no peer (yet) is known by its mark
            asked.clear()
            assert (await dig(spaces[0], address(1), "none.db")).status == "NXDOMAIN"
            assert sorted(asked) == [address(0), address(1), address(1)]


def count(names: RouterNames, asked: list[str]) -> None:
    """From now on, note who asks these names something that they do not know themselves."""
    before = names._by_router

    def noted(query: object, whose: str) -> bool:
        asked.append(whose)
        return before(query, whose)  # type: ignore[arg-type]

    names._by_router = noted  # type: ignore[method-assign]


async def test_a_router_that_is_away_makes_no_name_untrue() -> None:
    with segment(4) as spaces:
        async with routers(spaces) as made:
            spaces[3].do("link", "set", "eth0", "down")
            heard = await dig(spaces[0], address(1), "m2.db")
            assert heard.data == ["172.16.2.5"]
            took = asyncio.get_running_loop().time()
            heard = await dig(spaces[0], address(1), "m3.db")
            took = asyncio.get_running_loop().time() - took
            assert heard.status == "SERVFAIL"  # not: there is none
            assert "another router of this network" in heard.text
            assert took < 2 * PATIENCE + 1
            spaces[0].do("addr", "add", "10.77.0.99/24", "dev", "eth0")
            made[0].meet("to-3", ["10.77.0.99"])  # where nobody answers, and the kernel says so
            assert (await dig(spaces[0], address(1), "m3.db")).status == "SERVFAIL"
            made[0].part("to-3")
            assert (await dig(spaces[0], address(1), "m3.db")).status == "NXDOMAIN"


async def test_a_router_of_another_make_is_asked_and_may_ask_back(tmp_path: Path) -> None:
    with segment(3) as spaces:
        async with (
            routers(spaces[:2]) as (names,),
            nameserver(tmp_path / "u", address(2), 53, space=spaces[2].name) as other,
        ):
            await other.serve({"db": "theirs A 172.16.2.7"})
            names.meet("theirs", [address(2)])
            assert (await dig(spaces[0], address(1), "theirs.db")).data == ["172.16.2.7"]
            # what it does not know it asks us, and takes our mark off
            back = f'forward-zone:\n  name: "db"\n  forward-addr: {address(1)}\n'
            await other.serve({}, forward=back)
            asked: list[str] = []
            count(names, asked)
            assert (await dig(spaces[0], address(1), "none.db")).status == "NXDOMAIN"
            assert asked[0] == address(0)
            assert set(asked[1:]) == {address(2)}
            assert len(asked) < 8  # unbound asks once more in other letters, not for ever
            assert (await dig(spaces[0], address(2), "m1.db")).data == ["172.16.1.5"]


async def test_strangers_cannot_end_it_and_hear_nothing_where_they_asked_nothing() -> None:
    with segment(2) as spaces:
        async with routers(spaces):
            maker = Routing(spaces[0].path).inside
            sent = await asyncio.to_thread(_garbage, maker, (address(1), 53))
            assert sent
            heard = await dig(spaces[0], address(1), "m1.db")
            assert heard.data == ["172.16.1.5"]
            open_ones = await asyncio.to_thread(_silent, maker, (address(1), 53), 80)
            try:  # whoever holds all connections holds up nobody's datagrams
                assert (await dig(spaces[0], address(1), "m1.db")).data == ["172.16.1.5"]
            finally:
                for one in open_ones:
                    one.close()

            async def served() -> bool:
                return (await dig(spaces[0], address(1), "m1.db", "+tcp")).status == "NOERROR"

            await until(served, "TCP to be served again", bar=2.0)


def _garbage(inside, server) -> int:  # type: ignore[no-untyped-def]
    """Send a thousand datagrams that are no questions: nothing may come back. How many it sent."""
    dice = random.Random(7)
    with inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as own:
        own.connect(server)
        for _ in range(500):
            own.send(dice.randbytes(dice.randrange(0, 12)))
            answer = struct.pack("!6H", dice.randrange(65536), 0x8000, 1, 0, 0, 0)
            own.send(answer + dice.randbytes(dice.randrange(0, 300)))
        # whatever it answered, it would have by the time it answers this
        own.settimeout(1)
        for _ in range(20):
            own.send(struct.pack("!6H", 77, 0x0100, 1, 0, 0, 0) + b"\2m1\2db\0\0\1\0\1")
            try:  # of that many datagrams at once some are lost, and maybe this
                heard = own.recv(4096)
                break
            except TimeoutError:
                continue
        assert heard[:2] == struct.pack("!H", 77), heard
        for _ in range(500):  # headers of questions, and garbage behind
            own.send(struct.pack("!6H", 1, 0x0100, 1, 0, 0, 1) + dice.randbytes(40))
        return 1500


def _silent(inside, server, count):  # type: ignore[no-untyped-def]
    made = []
    for _ in range(count):
        one = inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        one.connect(server)
        one.send(b"\xff\xff\0")
        made.append(one)
    return made


async def test_a_member_is_told_whom_to_ask_before_anything_else_is() -> None:
    with segment(2) as spaces:
        async with routers(spaces) as (names,):
            context = names.join(member("new"), ["172.16.1.9/32"])
            assert context.configs == (DNSConfig((address(1), "fd77::2"), ("db",)),)
            assert (await dig(spaces[0], address(1), "new.db")).data == ["172.16.1.9"]


async def test_an_address_that_another_program_answers_at_is_said_to_be_so(tmp_path: Path) -> None:
    with segment(2) as spaces:
        async with nameserver(tmp_path / "u", address(1), 53, space=spaces[1].name) as other:
            await other.serve({"db": "x A 192.0.2.1"})
            with pytest.raises(TakenError, match=r"another program answers DNS at 10\.77\.0\.2:53"):
                async with routers(spaces):
                    raise AssertionError("it does not begin")

"""Whose address is whose, between routers of a flat network and their address plan.

Of vwire's own, beside `ipam.IPAM`: upstream's address plans answer UNIMPLEMENTED, and then a
member that moves to another router gets another address. As for prefixes, who asks is who the
TLS handshake proves. A router says what its members have, without waiting; it asks before it
gives an address of somebody else's prefix; and it is told what is given elsewhere of its own.
"""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn, Protocol

from grpclib.client import Stream as ClientStream
from grpclib.server import Stream

from nsm.errors import InvalidError, NsmError, UnavailableError, UnsupportedError
from nsm.identity.spiffe import MAX_ID
from nsm.path import MAX_NAME
from nsm.proto import pools_pb2 as pb
from nsm.proto.pools_grpc import AddressHoldingsBase, AddressHoldingsStub
from nsm.race import both, unless
from nsm.rpc.peers import Peers
from nsm.rpc.prefixes import FIRST_PAUSE, GROWTH, LONGEST_PAUSE, POOL
from nsm.rpc.server import current_caller

ROUTER = "vwire-router"  # metadata: what the router is called: its identity may be another's too
LONGEST = MAX_ID + 1 + MAX_NAME  # characters of a holder: a member must not end its router's stream
MOST_WAITING = 1024  # things said that are not decided yet: more are not read
MOST_UNREAD = 8192  # things told that a router did not read: its stream is ended
ANSWER = 1.0  # seconds a member waits for the address plan's word on its address


@dataclass(frozen=True, slots=True)
class MemberAddress:
    """A member's address, or a prefix that a router asks about; see `protos/pools.proto`."""

    address: str
    holder: str = ""
    number: int = 0
    left: bool = False
    refused: bool = False
    elsewhere: bool = False


Listener = Callable[[MemberAddress], None]


class Keeper(Protocol):
    """Who knows whose addresses are."""

    def listening(
        self, pool: str, router: str, listener: Listener, name: str
    ) -> AbstractContextManager[None]:
        """Tell a router's stream of its addresses for a block."""

    async def hold(
        self, pool: str, router: str, said: Sequence[MemberAddress], answer: Listener, name: str
    ) -> None:
        """What a router says; the answers go to answer, news to listeners. Raises NsmError."""


class AddressHoldings(AddressHoldingsBase):
    """The address plan's side."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    async def Follow(self, stream: "Stream[pb.Holding, pb.Holding]") -> None:  # noqa: N802
        """For as long as a router runs: what it says is decided, and it is told."""
        caller = current_caller(stream)
        pool, router = caller.metadata.get(POOL, ""), str(caller.id)
        name = caller.metadata.get(ROUTER, "")[:MAX_NAME]
        await stream.send_initial_metadata()
        following = _Following(self._keeper, pool, router, name, stream)
        with self._keeper.listening(pool, router, following.hear, name):
            await unless(following.read(), following.work())
        if following.failure:
            raise following.failure


class _Following:
    """One router's stream."""

    def __init__(
        self,
        keeper: Keeper,
        pool: str,
        router: str,
        name: str,
        stream: "Stream[pb.Holding, pb.Holding]",
    ) -> None:
        self.failure: NsmError | None = None
        self._keeper = keeper
        self._pool = pool
        self._router = router
        self._name = name
        self._stream = stream
        self._said: asyncio.Queue[MemberAddress] = asyncio.Queue(MOST_WAITING)
        self._told: asyncio.Queue[MemberAddress] = asyncio.Queue(MOST_UNREAD)
        self._slow = asyncio.Event()

    def hear(self, news: MemberAddress) -> None:
        """What the router is to be told."""
        try:
            self._told.put_nowait(news)
        except asyncio.QueueFull:
            self._slow.set()

    async def read(self) -> None:
        """What the router says, until it ends."""
        try:
            async for one in self._stream:
                if max(len(one.holder), len(one.address)) > LONGEST:
                    raise InvalidError(
                        f"{self._router}: an address or a holder of over {LONGEST} characters"
                    )
                await self._said.put(_of(one))
        except NsmError as failure:
            self.failure = failure

    async def work(self) -> None:
        """Decide and tell, until that fails."""
        try:
            await unless(both(self._decide(), self._tell()), self._slow.wait())
            raise UnavailableError(f"{self._router} does not read what it is told of its addresses")
        except NsmError as failure:
            self.failure = failure

    async def _decide(self) -> None:
        while True:
            batch = [await self._said.get()]
            while not self._said.empty():
                batch.append(self._said.get_nowait())
            await self._keeper.hold(self._pool, self._router, batch, self.hear, self._name)

    async def _tell(self) -> None:
        while True:
            await self._stream.send_message(_pb(await self._told.get()))


class HoldingsClient:
    """A router's side, at url; `run` keeps the stream.

    on_news is told what becomes of addresses; on_known a prefix of which all was told, with
    whether this address plan knows of members at all. holdings is what the router's members
    have now: said again with each new stream.
    """

    def __init__(
        self,
        peers: Peers,
        url: str,
        pool: str,
        *,
        name: str = "",
        holdings: Callable[[], Iterable[MemberAddress]],
        on_news: Listener,
        on_known: Callable[[str, bool], None],
        on_failure: Callable[[NsmError], None] = lambda _: None,
    ) -> None:
        self._peers = peers
        self._url = url
        self._said = {key: text for key, text in ((POOL, pool), (ROUTER, name)) if text}
        self._holdings = holdings
        self._on_news = on_news
        self._on_known = on_known
        self._on_failure = on_failure
        self._prefixes: dict[str, None] = {}
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[str, asyncio.Future[bool] | None]] = {}
        self._out: asyncio.Queue[MemberAddress] | None = None  # there is a stream
        self._lent = asyncio.Event()
        self._unsupported = False
        self._pause = FIRST_PAUSE

    def ask_about(self, prefix: str) -> None:
        """A prefix is ours: be told of its addresses, now and with each new stream."""
        self._prefixes[prefix] = None
        self._lent.set()
        if self._out is not None:
            self._ask(prefix)
        elif self._unsupported:
            self._on_known(prefix, False)

    def no_more(self, prefix: str) -> None:
        """It is ours no longer."""
        self._prefixes.pop(prefix, None)

    def say(self, one: MemberAddress) -> None:
        """What became of a member's address; with the next stream if there is none now."""
        if self._out is not None:
            self._out.put_nowait(one)

    async def claim(self, address: str, holder: str) -> bool:
        """Whether an address that another router gave is holder's, and ours to give from now on.

        False also where the address plan does not say so in time.
        """
        if self._out is None:
            return False
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        number = next(self._numbers)
        self._asked[number] = (address, answer)
        self._out.put_nowait(MemberAddress(address, holder, number))
        try:
            async with asyncio.timeout(ANSWER):
                return await answer
        except TimeoutError:
            self.say(MemberAddress(address, holder, left=True))  # if it says yes later
            return False
        except asyncio.CancelledError:
            self.say(MemberAddress(address, holder, left=True))  # the same, and nobody wants it
            raise
        finally:
            self._asked.pop(number, None)

    async def run(self) -> NoReturn:
        """Keep the stream for as long as this runs, for a task."""
        await self._lent.wait()
        while True:
            try:
                async with self._peers.link(self._url, whose="the address plan") as link:
                    with link.errors():
                        opened = AddressHoldingsStub(link.channel).Follow.open(metadata=self._said)
                        async with opened as stream:
                            await self._follow(stream)
                raise UnavailableError(f"the address plan at {self._url} ended the stream")
            except UnsupportedError:
                self._unsupported = True
                for prefix in self._prefixes:
                    self._on_known(prefix, False)
                self._pause = LONGEST_PAUSE
            except NsmError as failure:
                self._on_failure(failure)
            finally:
                self._out = None
                for _, answer in self._asked.values():
                    if answer and not answer.done():
                        answer.set_result(False)
                self._asked.clear()
            await asyncio.sleep(self._pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            self._pause = min(self._pause * GROWTH, LONGEST_PAUSE)

    async def _follow(self, stream: "ClientStream[pb.Holding, pb.Holding]") -> None:
        out: asyncio.Queue[MemberAddress] = asyncio.Queue()

        async def write() -> None:
            while True:
                await stream.send_message(_pb(await out.get()))

        await stream.send_request()
        await stream.recv_initial_metadata()
        self._out, self._unsupported = out, False
        for prefix in self._prefixes:
            self._ask(prefix)
        for one in self._holdings():
            out.put_nowait(one)
        await unless(self._read(stream), write())

    async def _read(self, stream: "ClientStream[pb.Holding, pb.Holding]") -> None:
        async for told in stream:
            self._heard(_of(told))

    def _ask(self, prefix: str) -> None:
        assert self._out is not None
        number = next(self._numbers)
        self._asked[number] = (prefix, None)
        self._out.put_nowait(MemberAddress(prefix, number=number))

    def _heard(self, told: MemberAddress) -> None:
        self._pause = FIRST_PAUSE  # not at a stream's begin: who is refused is told after that
        if not told.number:
            self._on_news(told)
            return
        about, answer = self._asked.pop(told.number, ("", None))
        if answer and not answer.done():
            answer.set_result(not told.refused)
        elif about in self._prefixes and not told.refused:
            self._on_known(about, True)


def _of(message: pb.Holding) -> MemberAddress:
    return MemberAddress(
        message.address,
        message.holder,
        message.number,
        message.left,
        message.refused,
        message.elsewhere,
    )


def _pb(one: MemberAddress) -> pb.Holding:
    return pb.Holding(
        number=one.number,
        address=one.address,
        holder=one.holder,
        left=one.left,
        refused=one.refused,
        elsewhere=one.elsewhere,
    )

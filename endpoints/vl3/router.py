"""A router at work: who gets which address, what all are told, and what the kernel passes on."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_interface, ip_network
from typing import NoReturn, Protocol

import structlog

from endpoints.vl3.addresses import Network, RouterAddresses, Taken
from endpoints.vl3.fellows import Fellows
from endpoints.vl3.holdings import holder
from endpoints.vl3.lending import BOTH
from endpoints.vl3.mtu import Smallest
from nsm import policy
from nsm.client import Wire
from nsm.endpoint import LIFETIME, present
from nsm.errors import NsmError, UnavailableError
from nsm.kernel.routing import Routing
from nsm.mechanisms import NAME
from nsm.model import SECOND, Connection, Context, DNSContext, IPContext
from nsm.names.router import RouterNames
from nsm.names.server import Sockets

DNS_PORT = 53
RETURN = 10.0  # seconds after a start in which members of before, and other routers, are expected
AGAIN = 1.0  # seconds until the kernel is told again what it refused
log = structlog.get_logger(__name__)


class Router:
    """Addresses for `nsm.endpoint`, contexts for `nsm.client`, and the namespace below both.

    on_change is called with a test of MTUs whenever those on wires of a larger one, or, without
    one, all, would be told something else than they were; on_ways whenever other routers would;
    on_lost with a connection that has lost an address, or has it again. plan is who knows of all
    members' addresses. lifetime, in seconds, is how long members have to come back after a
    restart. names, if there are any, are answered at the router's own addresses; called is what
    it is called itself.
    """

    def __init__(
        self,
        fellows: Fellows,
        routing: Routing,
        families: Sequence[int],
        names: RouterNames | None = None,
        called: Sequence[str] = (),
        lifetime: float = LIFETIME / SECOND,
    ) -> None:
        self._lifetime = lifetime
        self.addresses = RouterAddresses(families or BOTH)
        self.mtu = Smallest()
        self.on_change: Callable[[Callable[[int], bool]], None] = lambda _: None
        self.on_ways: Callable[[], None] = lambda: None
        self.on_lost: Callable[[str], None] = lambda _: None
        self.plan: Plan = Unasked()
        self._fellows = fellows
        self._routing = routing
        self._names = names
        self._called = tuple(called)
        self._began = 0.0  # when names were last begun to be answered
        if names:
            names.expected = self._expected
        self._links: dict[str, tuple[str, str]] = {}  # of other routers: whose, and the device
        self._devices: dict[str, str] = {}  # of members
        self._ways = asyncio.Event()
        self._gone: asyncio.Queue[tuple[Network, str]] = asyncio.Queue()
        self._settled = False  # the kernel passes on what is ours now
        self._lent = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._members = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether members can be served."""
        named = self._names is None or self._names.answering
        return self._settled and named and self.addresses.ready

    # -- prefixes, as `Lending` tells them ------------------------------------------------------

    def lend(self, prefix: str, domain: Sequence[str]) -> None:
        """A prefix is ours; the kernel is told next, and then everybody."""
        before = self.addresses.domain
        with self._telling():
            new = self.addresses.lend(prefix, domain)
        if self.addresses.keeps:  # for whoever may come back of an earlier life
            asyncio.get_running_loop().call_later(self._lifetime, self.unreserve)
        if new or self.addresses.domain != before:
            self._settled = False
            self._lent.set()

    def without(self, family: int) -> None:
        """There is no such family."""
        self.addresses.without(family)
        self._lent.set()

    async def settle(self) -> NoReturn:
        """Tell the kernel what is ours, whenever that changes; for a task of the process."""
        while True:
            await self._lent.wait()
            self._lent.clear()
            if not self.addresses.ready:
                continue
            own, domain = self.addresses.own, self.addresses.domain
            try:
                await asyncio.to_thread(self._routing.admit, domain)
                await asyncio.to_thread(self._routing.own, own, self.addresses.known)
            except (NsmError, OSError) as error:  # or a kernel that is silent: TimeoutError
                log.warning("the domain's packets are not passed on", why=str(error))
                await asyncio.sleep(AGAIN)
                self._lent.set()
                continue
            self._settled = True
            try:
                async with self._answering(own):
                    log.info("router of", own=", ".join(own), domain=", ".join(map(str, domain)))
                    self.on_change(lambda _: True)
                    await self._lent.wait()
            except NsmError as error:
                log.warning("the domain's names are not answered", why=str(error))
                await asyncio.sleep(AGAIN)
                self._lent.set()

    @asynccontextmanager
    async def _answering(self, own: Sequence[str]) -> AsyncIterator[None]:
        """Answer for names at our own addresses, whatever those are now."""
        if self._names is None:
            yield
            return
        self._names.cover(map(str, self.addresses.known))
        self._names.own(self._called, own)
        self._began = asyncio.get_running_loop().time()
        where = [(str(ip_interface(one).ip), DNS_PORT) for one in own]
        async with self._names.serving(where, Sockets(self._routing.inside)):
            yield

    def _expected(self, routers: bool) -> bool:
        """Whether a member may come back, or, if routers, another router may be met."""
        if self._names is None or asyncio.get_running_loop().time() > self._began + RETURN:
            return False
        others = self._fellows.others
        unmet = others is None or self._names.met < others
        return self.addresses.expected or (routers and unmet)

    # -- the endpoint's side --------------------------------------------------------------------

    def assign(self, conn: Connection) -> IPContext:
        """A member's addresses and routes, or another router's. See `nsm.endpoint.Addresses`."""
        if not self._settled and self.addresses.ready:
            raise UnavailableError(
                "prefix pool is initializing: this router is about to pass packets on"
            )
        if self._names and self.addresses.ready:
            self._names.check()  # before there is something to take back from who comes again
        router = self._fellows.are(policy.origin(conn))
        if not router and self.addresses.leads_on(conn.ip):
            raise UnavailableError(
                f"connection {conn.id} begins at {policy.origin(conn) or 'nobody'}, who says that"
                " more of the domain is behind it, and has registered no router of it",
                hint="if it has, ask again: the registry tells in a moment",
            )
        with self._telling():
            made = self.addresses.assign(
                conn.id, conn.ip, router=router, holder="" if router else _holder(conn)
            )
        self._count()
        return made

    def release(self, id_: str) -> None:
        """Take back what a member has."""
        with self._telling():
            self.addresses.release(id_)
        self._links.pop(id_, None)
        self._devices.pop(id_, None)
        if self._names:
            self._names.leave(id_)
            self._names.part(id_)
        self._count()

    def reserve(self, addresses: Iterable[str]) -> int:
        """Keep what members of an earlier life have."""
        return self.addresses.reserve(addresses)

    def unreserve(self) -> None:
        """Keep it no longer."""
        with self._telling():
            self.addresses.unreserve()

    async def prepare(self, conn: Connection) -> None:
        """Ask the address plan for what a member brings along from another router."""
        if not self.addresses.ready or self._fellows.are(policy.origin(conn)):
            return
        whose = _holder(conn)
        for address in self.addresses.claimable(conn.id, conn.ip, whose):
            if await self.plan.claim(address, whose):
                self.addresses.grant(conn.id, address)
                log.info("a member keeps another router's address", address=address, whose=whose)
            else:
                log.info("a member gets another address", instead_of=address, whose=whose)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Tell the address plan, and other routers, what the block changes."""
        before = self.addresses.foreign
        try:
            yield
        finally:
            self.plan.say(self.addresses.drain())
            if self.addresses.foreign != before:
                self.ways_changed()

    def ways_changed(self) -> None:
        """Other routers are to be told of other addresses: of all that change now, at once."""
        self._ways.set()

    async def tell_ways(self) -> NoReturn:
        """Tell them, for a task of the process."""
        while True:
            await self._ways.wait()
            self._ways.clear()
            self.on_ways()

    def moved(self, address: str, lost: Iterable[str], same: bool) -> None:
        """An address is at another router, which these connections had here."""
        for id_ in lost:
            if device := self._devices.get(id_):
                self._gone.put_nowait((ip_network(address), device))
            if not same:
                self.on_lost(id_)

    def returned(self, connections: Iterable[str]) -> None:
        """They could not move after all: they ask, so that they have, and the kernel leads to,
        what they had."""
        for id_ in connections:
            self.on_lost(id_)

    async def forget(self) -> NoReturn:
        """Send nothing more to members that have left an address, for a task of the process."""
        while True:
            way, device = await self._gone.get()
            try:
                await asyncio.to_thread(self._routing.forget, [way], [device])
            except (NsmError, OSError) as error:
                log.warning("a way to a member that left stays", way=str(way), why=str(error))

    def shown(self) -> list[str]:
        """The addresses that our namespace has or leads to. Blocks."""
        return self._routing.inside(present)

    async def answer(self, conn: Connection) -> Connection:
        """The last word on a connection: no MTU larger than the smallest of all, and its name."""
        context = conn.context or Context()
        self._note(context.mtu)
        if self._fellows.are(whose := policy.origin(conn)):
            await self._met(conn, whose)
        elif conn.mechanism:
            self._devices[conn.id] = conn.mechanism.get(NAME)
        dns = self._named(conn, self._names) if self._names else context.dns
        return replace(conn, context=replace(context, mtu=self.mtu.of(context.mtu), dns=dns))

    async def _met(self, conn: Connection, whose: str) -> None:
        """Another router's prefix is behind this wire, and not behind one it had before.

        After its node died it asks anew, and what it had asked for stands until its lease ends.
        """
        name = conn.mechanism.get(NAME) if conn.mechanism else ""
        before = [
            link
            for id_, (router, link) in self._links.items()
            if router == whose and id_ != conn.id
        ]
        self._links[conn.id] = (whose, name)
        if before:
            ways = [ip_network(one.prefix, strict=False) for one in conn.ip.dst_routes]
            log.info("router has come anew", router=whose, interface=name, before=before)
            await asyncio.to_thread(self._routing.forget, ways, before)

    def _named(self, conn: Connection, names: RouterNames) -> DNSContext:
        """What to tell a member, or another router, of names; its own are known from now on."""
        if self._fellows.are(policy.origin(conn)):
            return names.greet(conn)
        return names.join(conn, self.addresses.members().get(conn.id, ()))

    # -- the client's side ----------------------------------------------------------------------

    def shape(self, context: Context) -> Context:
        """What another router is told of us."""
        ip = self.addresses.ask(context.ip or IPContext())
        dns = self._names.ask() if self._names else context.dns
        return replace(context, ip=ip, dns=dns, mtu=self.mtu.of(context.mtu))

    def answered(self, wire: Wire) -> None:
        """What another router says."""
        self._note(wire.mtu)
        if self._names:
            self._names.hear(wire.id, wire.dns)

    def left(self, id_: str) -> None:
        """The wire to another router is no more."""
        if self._names:
            self._names.part(id_)

    # -- ends -----------------------------------------------------------------------------------

    async def idle(self, seconds: float) -> None:
        """Wait until there was no member for so long; wires of other routers do not count."""
        while True:
            await self._empty.wait()
            self._members.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._members.wait()
            except TimeoutError:
                return

    def _note(self, mtu: int) -> None:
        families = tuple(dict.fromkeys(6 if ":" in one else 4 for one in self.addresses.own))
        if self.mtu.note(mtu, families or (4,)):
            log.info("the domain's MTU is lower", mtu=self.mtu.now)
            self.on_change(partial(_over, self.mtu.now))

    def _count(self) -> None:
        if self.addresses.members():
            self._empty.clear()
            self._members.set()
        else:
            self._empty.set()


class Plan(Protocol):
    """Who knows whose addresses are: `endpoints.vl3.holdings`."""

    async def claim(self, address: str, holder: str) -> bool:
        """Whether another router's address is holder's, and may be given here."""

    def say(self, changes: Iterable[Taken]) -> None:
        """What became of members' addresses."""


class Unasked:
    """Nobody knows, so nobody brings an address along."""

    async def claim(self, address: str, holder: str) -> bool:
        """Not known."""
        return False

    def say(self, changes: Iterable[Taken]) -> None:
        """Nobody to tell."""


def _holder(conn: Connection) -> str:
    return holder(policy.origin(conn), conn.segments[0].id if conn.segments else "")


def _over(least: int, mtu: int) -> bool:
    return mtu > least or mtu == 0

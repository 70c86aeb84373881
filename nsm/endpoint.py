"""Serving a network service: where a path ends.

    async with Endpoint("echo-1", ["echo"], source=identity, manager=MANAGER):
        await asyncio.Event().wait()

Each client that asks for the service gets a wire: an interface here, named
below, and one on its side, joined by the node's forwarder. This process makes
no interface itself; it says which namespace is its own (a descriptor beside
every reply), how the interface is to be called, and which addresses both ends
have.
"""

import asyncio
import contextlib
import ipaddress
import os
import shutil
import tempfile
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Protocol, Self

import structlog

from nsm import mechanisms, model, path
from nsm.caller import Caller
from nsm.connections import Held
from nsm.descriptors import opened
from nsm.errors import (
    ExhaustedError,
    NsmError,
    PreconditionError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)
from nsm.hop import Established, Hop
from nsm.identity.background import background
from nsm.identity.source import Source
from nsm.ipam import Pools
from nsm.limits import Bounds, Places
from nsm.mechanisms import ETHERNET, INODE_URL, KERNEL, NAME, NOOP
from nsm.model import SECOND, Connection, Context, DNSConfig, IPContext, Mechanism, PolicyRoute
from nsm.rpc import services as hop_services
from nsm.rpc.health import Health
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient, keep_registered
from nsm.rpc.server import Call, serve
from nsm.undo import Undo

log = structlog.get_logger(__name__)

DEFAULT_PREFIXES = (("169.254.0.0/16",),)  # upstream's responder has it too
OWN_NAMESPACE = "/proc/self/ns/net"
LIFETIME = 600 * SECOND  # of tokens
REGISTERED_WITHIN = 15.0  # seconds the first registration may take

Answer = Callable[[Connection], Awaitable[Connection]]
Prepare = Callable[[Connection], Awaitable[None]]
Policies = Callable[[], Awaitable[Sequence[PolicyRoute]]]
Shown = Callable[[], Iterable[str]]


class Addresses(Protocol):
    """Who hands out addresses: `Handed` for pairs of a pool, a vL3 router for members'."""

    def assign(self, conn: Connection) -> IPContext:
        """The context with what both ends have and route; again the same for a refresh."""

    def release(self, id_: str) -> None:
        """Take back what the connection has; nothing for an unknown one."""

    def reserve(self, addresses: Iterable[str]) -> int:
        """Give those that are ours only to connections that carry them; how many there are."""

    def unreserve(self) -> None:
        """Give what is still reserved to anybody."""


class FromPools:
    """A pair of addresses for each connection, from pools (`wire.md` §10.1)."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self.release = pools.release
        self.reserve = pools.reserve
        self.unreserve = pools.unreserve

    def __len__(self) -> int:
        return len(self._pools)

    def assign(self, conn: Connection) -> IPContext:
        """The connection's pairs, and both routes."""
        return self._pools.assign(conn.id, conn.ip)


class EndpointRoute:
    """The route of a path's last hop: it goes no further, and says what both ends shall have.

    Memory of a connection is the name of its interface here; empty if it has none.
    """

    def __init__(
        self,
        name: str,
        addresses: Addresses,
        *,
        payload: str = ETHERNET,
        interface: str = "",
        dns: Sequence[DNSConfig] = (),
        policies: Policies | None = None,
        prepare: Prepare | None = None,
        answer: Answer | None = None,
        on_asked: Callable[[], None] = lambda: None,
        namespace: str = OWN_NAMESPACE,
    ) -> None:
        self.addresses = addresses
        self.expired = False  # no more wires: the process is about to end
        self._name = name
        self._payload = payload
        self._interface = interface
        self._dns = tuple(dns)
        self._policies = policies
        self._prepare = prepare
        self._answer = answer
        self._on_asked = on_asked
        self._namespace = namespace
        self._names: dict[str, str] = {}  # connection id -> interface name
        self._owners: dict[str, str] = {}  # and back

    async def establish(
        self, asked: model.Request, held: Held[str], caller: Caller, undo: Undo
    ) -> Established:
        """Choose the mechanism, give addresses, name the interface; a refresh changes nothing."""
        conn = asked.connection
        if self.expired:
            raise UnavailableError(
                f"endpoint expired: {self._name!r} had no wires for its idle time and is ending",
                hint="ask again, for any endpoint of the service",
            )
        self._on_asked()
        offered = mechanisms.acceptable(conn, asked.preferences, (KERNEL, NOOP))
        if held.memory is None:
            undo.add(f"forget connection {conn.id}", self.withdraw, conn, None, None)
        if self._prepare:
            await self._prepare(conn)
        try:
            ip = self.addresses.assign(conn)
        except ExhaustedError as full:
            raise ExhaustedError(
                f"endpoint {self._name!r}: {full.message}", hint=full.hint
            ) from full
        context = conn.context or Context()
        context = replace(
            context,
            ip=_with_policies(ip, await self._policies() if self._policies else ()),
            dns=_with_dns(context.dns, self._dns),
        )
        made = replace(
            conn,
            context=context,
            payload=conn.payload or self._payload,
            endpoint=conn.endpoint or self._name,
        )
        mechanism, name = offered[0], ""
        if mechanism.type == KERNEL:
            name = self._named(made, mechanism)
            mechanism = mechanism.with_(**{NAME: name})
        made = path.measured(made, server_interface=f"{mechanism.type}/{name or 'unknown'}")
        made = replace(made, mechanism=mechanism)
        if self._answer:
            made = await self._answer(made)
        if made.mechanism and made.mechanism.type == KERNEL:
            # Last: it would ride on a refusal as well, and pin us with whoever gets it.
            here = await self._send_namespace(caller, conn)
            made = replace(made, mechanism=made.mechanism.with_(**{INODE_URL: here}))
        held.memory = name
        return Established(made)

    async def withdraw(self, conn: Connection, memory: str | None, caller: Caller | None) -> None:
        """Take back addresses and name; nothing for what is not held."""
        self.addresses.release(conn.id)
        if name := self._names.pop(conn.id, ""):
            del self._owners[name]

    def _named(self, conn: Connection, mechanism: Mechanism) -> str:
        """The interface's name here: what it has, what was asked for, ours, or a new one."""
        if held := self._names.get(conn.id):
            return held
        name = mechanism.get(NAME) or self._interface
        if name:
            mechanisms.check_name(name, whose=f"connection {conn.id} at {self._name}")
        else:
            name = mechanisms.generate_name(conn.service or self._name)
            while name in self._owners:  # rare: there are millions of them for each service
                name = mechanisms.generate_name(conn.service or self._name)
        if name in self._owners:
            raise TakenError(
                f"interface name {name!r} for connection {conn.id} is that of connection"
                f" {self._owners[name]} at endpoint {self._name!r}",
                hint="leave the name out to get one",
            )
        self._owners[name], self._names[conn.id] = conn.id, name
        return name

    async def _send_namespace(self, caller: Caller, conn: Connection) -> str:
        """Send a descriptor of our namespace beside the reply; return the URL it is known by.

        Opened anew each time and closed at once, so that nothing keeps a
        namespace alive that its processes have left.
        """
        if caller.fds is None:
            raise UnsupportedError(
                f"mechanism {KERNEL} of connection {conn.id} needs a unix socket between"
                f" {caller.id} and endpoint {self._name!r}",
                hint="listen on a unix:// URL, and register that",
            )
        fd = await opened(_open, self._namespace, self._name)
        try:
            return caller.fds.send(fd)
        finally:
            os.close(fd)


def _open(namespace: str, whose: str) -> int:
    try:
        return os.open(namespace, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise PreconditionError(
            f"the network namespace {namespace} of endpoint {whose!r} cannot be opened:"
            f" {error.strerror}",
            hint="if its workload has ended, end the endpoint as well",
        ) from error


def _with_policies(ip: IPContext, policies: Sequence[PolicyRoute]) -> IPContext:
    """The context with policies, and each one's `from` among the client's addresses (§10.5)."""
    new = tuple(one for one in policies if one not in ip.policies)
    sources = [one.from_ for one in policies if one.from_]
    return replace(
        ip,
        policies=ip.policies + new,
        src_ip_addrs=tuple(dict.fromkeys((*ip.src_ip_addrs, *sources))),
    )


def _with_dns(
    dns: model.DNSContext | None, configs: Sequence[DNSConfig]
) -> model.DNSContext | None:
    if not configs:
        return dns
    dns = dns or model.DNSContext()
    return replace(dns, configs=tuple(dict.fromkeys((*dns.configs, *configs))))


class Endpoint:
    """An endpoint as a block: it serves inside it, registered if manager is given.

    name            its name in the registry and on paths; unique in the domain
    services        the network services it offers, each registered too unless
                    register_service is False
    source          its identity (`nsm.identity`), or a block that yields one
    manager         the URL of the node's manager; empty: it registers nowhere
    prefixes        groups of prefixes: a wire gets a pair of addresses from each
                    group (dual stack is two groups); none: it gives no addresses
    strict          take foreign addresses out of requests (`nsm.ipam.Pools`)
    addresses       who hands them out instead, where pairs of prefixes will not do
    labels          of the endpoint, for every service: services choose by them
    payload         ETHERNET or IP: what its wires carry
    interface       the name of the interface here; empty: a new one for each wire
    dns, policies   what clients are told beside addresses; policies is asked at
                    every request
    prepare         an async function that is told of each request before addresses are
                    assigned to it
    answer          an async function that has the last word: it gets each
                    connection before it is answered, and returns it, changed or
                    not; an NsmError it raises refuses the client
    listen          `unix:///path`; empty: a socket in a new directory
    namespace       a path: where its wires end. shown, which may block, tells which
                    addresses wires of an earlier life have there (`present`, looked at
                    inside); for our own namespace that is known
    unregister      whether leaving the block takes the registration back. Wires
                    stay: they end with their clients or their namespace.
    bounds          how many requests may be here, and of one client

    Entering the block raises NsmError where it cannot listen or register.
    """

    def __init__(
        self,
        name: str,
        services: Sequence[str],
        *,
        source: Source | AbstractAsyncContextManager[Source],
        manager: str = "",
        prefixes: Iterable[Iterable[str]] = DEFAULT_PREFIXES,
        strict: bool = False,
        addresses: Addresses | None = None,
        labels: Mapping[str, str] | None = None,
        payload: str = ETHERNET,
        interface: str = "",
        dns: Sequence[DNSConfig] = (),
        policies: Policies | None = None,
        prepare: Prepare | None = None,
        answer: Answer | None = None,
        listen: str = "",
        namespace: str = OWN_NAMESPACE,
        shown: Shown | None = None,
        register_service: bool = True,
        unregister: bool = True,
        lifetime: int = LIFETIME,
        patience: float = REGISTERED_WITHIN,
        on_call: Callable[[Call], None] | None = None,
        bounds: Bounds = Bounds(),  # noqa: B008 - frozen
    ) -> None:
        if interface:
            mechanisms.check_name(interface, whose=f"endpoint {name!r}")
        self.name = name
        self.services = tuple(services)
        self.urls: tuple[str, ...] = ()
        self._source = source
        self._manager = manager
        self._labels = dict(labels or {})
        self._payload = payload
        self._listen = listen
        self._register_service = register_service
        self._unregister = unregister
        self._lifetime = lifetime
        self._patience = patience
        self._on_call = on_call
        self._bounds = bounds
        self._busy = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._shown = shown or (present if namespace == OWN_NAMESPACE else tuple)
        self.route = EndpointRoute(
            name,
            addresses or FromPools(Pools(prefixes, strict=strict)),
            payload=payload,
            interface=interface,
            dns=dns,
            policies=policies,
            prepare=prepare,
            answer=answer,
            on_asked=self._busy.set,
            namespace=namespace,
        )
        self._hop: Hop[str] | None = None
        self._spawn: Callable[[Coroutine[Any, Any, None], str], object] | None = None
        self._block: AbstractAsyncContextManager[None] | None = None

    @property
    def connections(self) -> tuple[Connection, ...]:
        """What it serves now."""
        held = self._hop.connections.established() if self._hop else []
        return tuple(one.made for one in held if one.made)

    def ask_again(self, which: Callable[[Connection], bool] = lambda _: True) -> None:
        """Have clients refresh those of its wires: they would get another answer now."""
        if self._hop and self._spawn:
            for id_ in self._hop.connections.ids():
                self._spawn(self._hop.want_again(id_, which), f"another answer for {id_}")

    async def idle(self, seconds: float) -> None:
        """Wait until there was no wire for so long; from then on requests are refused."""
        while True:
            await self._empty.wait()
            self._busy.clear()
            try:
                async with asyncio.timeout(seconds):
                    await self._busy.wait()
            except TimeoutError:
                self.route.expired = True
                return

    async def __aenter__(self) -> Self:
        self._block = self._running()
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._block is not None
        await self._block.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            source = self._source
            if isinstance(source, AbstractAsyncContextManager):
                source = await stack.enter_async_context(source)
            listen = self._listen or await stack.enter_async_context(_own_socket())
            tasks = await stack.enter_async_context(background())

            await self._remember(stack)

            def spawn(work: Coroutine[Any, Any, None], name: str) -> "asyncio.Task[None]":
                return tasks.create_task(work, name=name)

            self._spawn = spawn
            hop = self._hop = Hop(
                self.name,
                self.route,
                lifetime=self._lifetime,
                spawn=spawn,
                on_established=self._counted,
                places=Places(self.name, self._bounds),
            )
            health = Health(*hop_services.HEALTHY)
            server = await stack.enter_async_context(
                serve([listen], [*hop_services.of(hop), health], source, on_call=self._on_call)
            )
            stack.callback(hop.stop)
            self.urls = server.urls
            if self._manager:
                peers = await stack.enter_async_context(Peers(source))
                registering = await stack.enter_async_context(background())
                first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                registering.create_task(
                    self._keep_registered(peers, first), name=f"registration of {self.name}"
                )
                await first
            yield

    async def _remember(self, stack: contextlib.AsyncExitStack) -> None:
        """Keep the addresses that wires of an earlier life have until those are refreshed.

        Their clients come back within a token's life; a new one might come before.
        """
        if kept := self.route.addresses.reserve(await asyncio.to_thread(self._shown)):
            log.info("addresses of an earlier life are kept", endpoint=self.name, count=kept)
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._lifetime / SECOND, self.route.addresses.unreserve)
            stack.callback(timer.cancel)

    async def _keep_registered(self, peers: Peers, first: "asyncio.Future[None]") -> None:
        """Register for as long as this runs; first has the outcome of the beginning."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience

        def registered(_: model.Endpoint) -> None:
            if not first.done():
                first.set_result(None)
                log.info("endpoint is registered", endpoint=self.name, services=self.services)

        def refused(error: NsmError) -> None:
            if first.done():
                log.warning("endpoint is not registered now", endpoint=self.name, why=str(error))
            elif not error.retry or loop.time() >= until:
                first.set_exception(error)

        await keep_registered(
            RegistryClient(peers, self._manager, lifetime=self._lifetime),
            model.Endpoint(
                name=self.name,
                services=self.services,
                labels=dict.fromkeys(self.services, self._labels),
                url=self.urls[0],
            ),
            [model.Service(one, self._payload) for one in self.services]
            if self._register_service
            else (),
            on_registered=registered,
            on_failure=refused,
            unregister=self._unregister,
        )

    def _counted(self, connections: int) -> None:
        if connections:
            self._busy.set()
            self._empty.clear()
        else:
            self._empty.set()


def present() -> list[str]:
    """Every single address the calling thread's namespace has or has a route to (/proc)."""
    found = []
    with contextlib.suppress(FileNotFoundError), open("/proc/thread-self/net/fib_trie") as file:
        address = ""
        for line in file:
            head, _, rest = line.strip().partition(" ")
            if head == "|--":
                address = rest
            elif head == "/32":
                found.append(address)
    with contextlib.suppress(FileNotFoundError), open("/proc/thread-self/net/ipv6_route") as file:
        for line in file:
            prefix, length, *_ = line.split()
            if length == "80":  # 128
                found.append(str(ipaddress.IPv6Address(int(prefix, 16))))
    return found


@asynccontextmanager
async def _own_socket() -> AsyncIterator[str]:
    """The URL of a socket to be, in a directory that nobody else may list."""
    directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="nse-")
    try:
        yield f"unix://{directory}/listen.on"
    finally:
        await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

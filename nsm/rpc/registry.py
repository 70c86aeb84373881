"""Calling a registry, or a manager that stands before one (`wire.md` §6).

Register and Unregister carry their path of tokens in metadata both ways; an
endpoint's listening socket travels as a file descriptor where the registry is
met over a unix socket (§5.5). `keep_registered` is what an endpoint's process
does all its life (§6.7).
"""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NoReturn, TypeVar

from nsm import registration
from nsm.descriptors import Descriptors, opened
from nsm.errors import (
    DeadlineError,
    ExhaustedError,
    InvalidError,
    NsmError,
    UnavailableError,
)
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.proto import registry_pb2 as pb
from nsm.proto.registry_grpc import NetworkServiceEndpointRegistryStub, NetworkServiceRegistryStub
from nsm.race import unless
from nsm.registration import RegistrationPath
from nsm.rpc import wire
from nsm.rpc.peers import Link, Peers

T = TypeVar("T", Endpoint, Service)
LIFETIME = 600 * SECOND  # of tokens: upstream's default
DIAL_TIMEOUT = 0.3  # seconds, as upstream's registry clients have it
CALL_TIMEOUT = 15.0  # seconds of one try
FD_PATIENCE = 2.0  # seconds a socket's descriptor may come after the answer that names it
MOST_FOUND = 1_000_000  # answers one Find may have
MOST_BYTES = 1 << 30  # of them
GOODBYE = 2.0  # seconds an Unregister may take at the end
FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 0.2, 5.0, 1.6  # seconds between tries
AWAY_PAUSE = 0.35  # seconds at most, where nobody answers: it is registered again soon after
_STEADY = 5.0  # seconds a watch must have lived for the pauses to begin anew
_LEAST = 0.05  # seconds between two refreshes, whatever the registry answers


@dataclass(frozen=True, slots=True)
class Registered(Generic[T]):
    """What a registry answered: the resource as held, and the path; both go with the next try."""

    item: T
    path: RegistrationPath


class RegistryClient:
    """Registers, finds and watches at url. lifetime of tokens in ns, timeouts in seconds.

    most_bytes is how long all answers to one Find may be, together.
    """

    def __init__(
        self,
        peers: Peers,
        url: str,
        *,
        lifetime: int = LIFETIME,
        dial_timeout: float = DIAL_TIMEOUT,
        call_timeout: float = CALL_TIMEOUT,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.url = url
        self._peers = peers
        self._lifetime = lifetime
        self._dial_timeout = dial_timeout
        self._call_timeout = call_timeout
        self._most_bytes = most_bytes

    # -- endpoints

    async def register_endpoint(
        self,
        asked: Endpoint,
        path: RegistrationPath = RegistrationPath(),  # noqa: B008 - frozen
        *,
        deadline: float | None = None,
        socket: int | None = None,
    ) -> Registered[Endpoint]:
        """Register, or refresh; path is what the last answer had, or a manager's own.

        An `unix://` URL is sent as its socket's descriptor where that can
        travel, and is the URL again in what returns; socket is a descriptor to
        send instead of opening the path. deadline is in the loop's time.
        """
        private = _private(asked)
        async with self._link(private) as link:
            with link.errors():
                asked_url, sent = asked.url, await _send_socket(link, asked, socket)
                stub = NetworkServiceEndpointRegistryStub(link.channel)
                message, back = await self._unary(
                    stub.Register, link, wire.to_pb(sent), path, deadline
                )
            self._admit(back, path, link, f"endpoint {asked.name!r}")
            held = wire.endpoint(message)
            if sent.url != asked_url and held.url == sent.url:
                held = replace(held, url=asked_url)
            return Registered(held, back)

    async def unregister_endpoint(
        self,
        asked: Endpoint,
        path: RegistrationPath = RegistrationPath(),  # noqa: B008 - frozen
        *,
        deadline: float | None = None,
        socket: int | None = None,
    ) -> None:
        """Forget the endpoint; OK if it is not there."""
        private = _private(asked)
        try:
            async with self._link(private) as link:
                with link.errors():
                    sent = await _send_socket(link, asked, socket)
                    stub = NetworkServiceEndpointRegistryStub(link.channel)
                    await self._unary(stub.Unregister, link, wire.to_pb(sent), path, deadline)
        finally:
            if private:
                await self._peers.release(private)

    async def find_endpoints(
        self,
        query: Endpoint = Endpoint(),  # noqa: B008 - frozen
        *,
        fds: Descriptors | None = None,
        deadline: float | None = None,
    ) -> list[Endpoint]:
        """All that answer query. With fds, every socket an answer names is in there afterwards.

        Such an answer's URL stays `inode://…`; `fds.get(url)` is its descriptor,
        and a peer dials `unix:///proc/self/fd/N`.
        """
        asked = pb.NetworkServiceEndpointQuery(network_service_endpoint=wire.to_pb(query))
        async with self._link() as link:
            stub = NetworkServiceEndpointRegistryStub(link.channel)
            found = await self._found(stub.Find, link, asked, wire.found_endpoint, deadline)
            if fds is not None:
                for one in found:
                    await fds.claim(link.fds, one.url, FD_PATIENCE)
            return found

    def watch_endpoints(
        self,
        query: Endpoint = Endpoint(),  # noqa: B008 - frozen
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What answers query, and every change of it.

        Ends when the registry ends it or our certificate is renewed: watch
        again, it begins with what is there. Raises NsmError. Close it:
        `async with contextlib.aclosing(…) as seen`.
        """
        asked = pb.NetworkServiceEndpointQuery(
            network_service_endpoint=wire.to_pb(query), watch=True
        )
        return self._watched(NetworkServiceEndpointRegistryStub, asked, wire.found_endpoint)

    # -- services

    async def register_service(
        self,
        asked: Service,
        path: RegistrationPath = RegistrationPath(),  # noqa: B008 - frozen
        *,
        deadline: float | None = None,
    ) -> Registered[Service]:
        """Register; the same content from several identities is fine."""
        async with self._link() as link:
            with link.errors():
                stub = NetworkServiceRegistryStub(link.channel)
                message, back = await self._unary(
                    stub.Register, link, wire.to_pb(asked), path, deadline
                )
            self._admit(back, path, link, f"network service {asked.name!r}")
            return Registered(wire.service(message), back)

    async def unregister_service(
        self,
        asked: Service,
        path: RegistrationPath = RegistrationPath(),  # noqa: B008 - frozen
        *,
        deadline: float | None = None,
    ) -> None:
        """Forget the service; OK if it is not there."""
        async with self._link() as link:
            with link.errors():
                stub = NetworkServiceRegistryStub(link.channel)
                await self._unary(stub.Unregister, link, wire.to_pb(asked), path, deadline)

    async def find_services(
        self,
        query: Service = Service(),  # noqa: B008 - frozen
        *,
        deadline: float | None = None,
    ) -> list[Service]:
        """All that answer query."""
        asked = pb.NetworkServiceQuery(network_service=wire.to_pb(query))
        async with self._link() as link:
            stub = NetworkServiceRegistryStub(link.channel)
            return await self._found(stub.Find, link, asked, wire.found_service, deadline)

    def watch_services(
        self,
        query: Service = Service(),  # noqa: B008 - frozen
    ) -> AsyncGenerator[Found[Service], None]:
        """What answers query, and every change of it; see `watch_endpoints`."""
        asked = pb.NetworkServiceQuery(network_service=wire.to_pb(query), watch=True)
        return self._watched(NetworkServiceRegistryStub, asked, wire.found_service)

    # -- what both share

    @asynccontextmanager
    async def _link(self, private: str = "") -> AsyncIterator[Link]:
        async with self._peers.link(
            self.url, private=private, dial_timeout=self._dial_timeout
        ) as link:
            yield link

    def _within(self, deadline: float | None) -> float:
        if deadline is None:
            return self._call_timeout
        left = deadline - asyncio.get_running_loop().time()
        if left <= 0:
            raise DeadlineError(f"no time is left for a call to the registry at {self.url}")
        return min(left, self._call_timeout)

    async def _unary(
        self, method: Any, link: Link, message: Any, path: RegistrationPath, deadline: float | None
    ) -> tuple[Any, RegistrationPath]:
        """The answer, and the path in its header (an empty one where there is none)."""
        metadata = link.metadata(self._lifetime) | {registration.PATH: registration.write(path)}
        async with method.open(timeout=self._within(deadline), metadata=metadata) as stream:
            await stream.send_message(message, end=True)
            await stream.recv_initial_metadata()
            back = _path_of(stream.initial_metadata)
            answer = await stream.recv_message()
            await stream.recv_trailing_metadata()  # raises what the status says
        if answer is None:
            raise UnavailableError(f"{link.url} answered without a message")
        return answer, back

    def _admit(self, back: RegistrationPath, sent: RegistrationPath, link: Link, what: str) -> None:
        """The client's policies, where a path begins; managers only pass paths on (§4.4)."""
        if sent.index == 0:
            registration.admit_reply(back, link.handshake, time.time_ns(), what)

    async def _found(
        self,
        method: Any,
        link: Link,
        asked: Any,
        read: Callable[[Any], Found[T]],
        deadline: float | None,
    ) -> list[T]:
        found: list[T] = []
        size = 0
        with link.errors():
            metadata = link.metadata(self._lifetime)
            async with method.open(timeout=self._within(deadline), metadata=metadata) as stream:
                await stream.send_message(asked, end=True)
                while (message := await stream.recv_message()) is not None:
                    one = read(message)
                    size += message.ByteSize()
                    if not one.deleted:
                        found.append(one.item)
                    if len(found) > MOST_FOUND or size > self._most_bytes:
                        await stream.cancel()
                        raise ExhaustedError(
                            f"{link.url} answers with more than {MOST_FOUND} resources, or more"
                            f" than {self._most_bytes} bytes",
                            hint="ask for a name or a service",
                        )
        return found

    async def _watched(
        self, stub: Any, asked: Any, read: Callable[[Any], Found[T]]
    ) -> AsyncGenerator[Found[T], None]:
        async with self._link() as link:
            with link.errors():
                metadata = link.metadata(self._lifetime)
                async with stub(link.channel).Find.open(metadata=metadata) as stream:
                    await stream.send_message(asked, end=True)
                    while True:
                        message = await unless(stream.recv_message(), link.outdating())
                        if message is None:
                            if link.outdated:
                                await stream.cancel()
                            return
                        yield read(message)


async def keep_registered(
    client: RegistryClient,
    endpoint: Endpoint,
    services: Sequence[Service] = (),
    *,
    socket: int | None = None,
    on_registered: Callable[[Endpoint], None] | None = None,
    on_failure: Callable[[NsmError], None] | None = None,
    unregister: bool = True,
) -> NoReturn:
    """Keep endpoint registered, with its services, until cancelled (`wire.md` §6.7).

    Registers again after two thirds of what is left of it, and whenever its
    watch ends or says that it is gone; a try that fails is repeated after pauses
    that grow, but little where the registry or the manager is away: a call to nobody costs
    little, and until it is registered again nobody finds it. Nor do those say anything of the
    pauses with one that is back. on_failure is told of each, and may raise to give up. At the
    end the endpoint is unregistered.
    """
    keep = _Kept(client, endpoint, services, socket)
    here, away = _Pauses(LONGEST_PAUSE), _Pauses(AWAY_PAUSE)
    try:
        while True:
            pauses = here
            try:
                held = await keep.register()
                away.again()
                if on_registered:
                    on_registered(held)
                began = time.monotonic()
                due = await keep.watch(_refresh_in(held))
                if due or time.monotonic() - began > _STEADY:
                    here.again()
                if due:
                    continue
            except NsmError as error:
                if isinstance(error, UnavailableError):
                    pauses = away
                if on_failure:
                    on_failure(error)
            await asyncio.sleep(pauses.next())
    finally:
        if unregister:
            await keep.unregister()


class _Kept:
    """One endpoint and what its registry last answered for it."""

    def __init__(
        self,
        client: RegistryClient,
        endpoint: Endpoint,
        services: Sequence[Service],
        socket: int | None,
    ) -> None:
        self._client = client
        self._services = [Registered(service, RegistrationPath()) for service in services]
        self._endpoint = Registered(endpoint, RegistrationPath())
        self._expires = endpoint.expires
        self._socket = socket
        self._held = False

    async def register(self) -> Endpoint:
        # A service that nobody holds any more (its registry began anew) comes back with us.
        away: UnavailableError | None = None
        for place, service in enumerate(self._services):
            try:
                answer = await self._client.register_service(service.item, service.path)
            except UnavailableError as why:
                away = why  # the node's manager, which may not be, is to know us all the same
                break
            self._services[place] = answer
        asked = replace(self._endpoint.item, expires=self._expires)
        self._held = True  # or may be: an answer can get lost
        self._endpoint = await self._client.register_endpoint(
            asked, self._endpoint.path, socket=self._socket
        )
        if away:
            raise away
        return self._endpoint.item

    async def watch(self, seconds: float) -> bool:
        """True after seconds; False earlier, when the registry has us no more or cannot say."""
        query = Endpoint(name=self._endpoint.item.name)
        try:
            async with (
                asyncio.timeout(seconds) as limit,
                contextlib.aclosing(self._client.watch_endpoints(query)) as seen,
            ):
                async for found in seen:
                    if found.deleted:
                        return False
        except TimeoutError:
            if not limit.expired():
                raise
            return True
        return False

    async def unregister(self) -> None:
        """Best effort: what is not taken back here ends with its expiry."""
        if not self._held:
            return
        with contextlib.suppress(NsmError, TimeoutError):
            async with asyncio.timeout(GOODBYE):
                await self._client.unregister_endpoint(
                    self._endpoint.item, self._endpoint.path, socket=self._socket
                )


class _Pauses:
    """Pauses that grow, with jitter: many endpoints lose one registry at the same moment."""

    def __init__(self, most: float) -> None:
        self._pause, self._most = FIRST_PAUSE, most

    def next(self) -> float:
        pause, self._pause = self._pause, min(self._pause * GROWTH, self._most)
        return pause * random.uniform(0.75, 1.25)  # noqa: S311 - jitter

    def again(self) -> None:
        self._pause = FIRST_PAUSE


def _refresh_in(held: Endpoint) -> float:
    """Seconds until two thirds of what is left have passed; a minute is left if it is not said."""
    left = 60.0 if held.expires is None else (held.expires - time.time_ns()) / SECOND
    return max(_LEAST, left * 2 / 3)


def _private(asked: Endpoint) -> str:
    """Whose calls carry a descriptor have a connection of their own where peers keep those."""
    return f"endpoint {asked.name}" if asked.url.startswith("unix://") else ""


async def _send_socket(link: Link, asked: Endpoint, socket: int | None) -> Endpoint:
    """Asked with its socket's `inode://` URL, and that socket on its way; asked itself on TCP."""
    if link.fds is None or not asked.url.startswith("unix://"):
        return asked
    if socket is not None:
        return replace(asked, url=link.fds.send(socket))
    path = asked.url.removeprefix("unix://")
    try:
        fd = await opened(os.open, path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidError(
            f"endpoint {asked.name!r} cannot be registered: its socket {path}: {error.strerror}",
            hint="listen on it first",
        ) from error
    try:
        return replace(asked, url=link.fds.send(fd))
    finally:
        os.close(fd)


def _path_of(metadata: Any) -> RegistrationPath:
    texts = metadata.getall(registration.PATH, ()) if metadata is not None else ()
    text = texts[-1] if texts else None  # the last wins (`wire.md` §6.1)
    return registration.parse(text) if isinstance(text, str) else RegistrationPath()

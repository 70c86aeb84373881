"""The registry's two gRPC services, on top of whatever holds the registrations (`wire.md` §6).

A registration's way through is the same in a registry and in a manager: step
onto the path, judge its tokens, hand the resource to the store, answer with the
path stepped back. Only the store differs: one keeps, the other passes on.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

from google.protobuf.empty_pb2 import Empty
from grpclib.server import Stream

from nsm import registration
from nsm.caller import Caller
from nsm.errors import DeniedError, InvalidError
from nsm.identity import tokens
from nsm.limits import Places
from nsm.model import Endpoint, Found, Service
from nsm.proto import registry_pb2 as pb
from nsm.proto.registry_grpc import (
    NetworkServiceEndpointRegistryBase,
    NetworkServiceRegistryBase,
)
from nsm.registration import SERVER_POLICIES, Registration, RegistrationPath
from nsm.rpc import wire
from nsm.rpc.server import current_caller
from nsm.rpc.streams import send

HEALTHY = ("registry.NetworkServiceRegistry", "registry.NetworkServiceEndpointRegistry")
RECORD_BYTES = 64 * 1024  # of one service or endpoint as it travels


class Store(Protocol):
    """What registrations are handed to: `nsm.registrar.Registrar`, or a manager's own."""

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """The endpoint as it is held, and the path at this hop's own index, cut where it ends."""

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Forget; OK if it is not there."""

    def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What answers query; with watch also every later change, without an end."""

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """The service as it is held, and the path."""

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Forget; OK if it is not there."""

    def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """What answers query; with watch also every later change, without an end."""


def handlers(
    store: Store,
    *,
    lifetime: int,
    policies: frozenset[str] = SERVER_POLICIES,
    record_bytes: int = RECORD_BYTES,
    places: Places | None = None,
    door: bool = False,
) -> "list[Endpoints | Services]":
    """Both services, for `nsm.rpc.server.serve`. lifetime of our tokens in ns; door as in
    `nsm.hop.Hop`: of who comes over a unix socket no path says whose place it takes."""
    places = places or Places("this registry", what="registrations")
    gate = Gate(lifetime, policies, record_bytes, places, door=door)
    return [Services(store, gate), Endpoints(store, gate)]


class Gate:
    """Lets a registration in: onto the path, and past the policies."""

    def __init__(
        self,
        lifetime: int,
        policies: frozenset[str],
        record_bytes: int,
        places: Places,
        *,
        door: bool,
    ) -> None:
        self._lifetime = lifetime
        self._policies = policies
        self._record_bytes = record_bytes
        self._places = places
        self._door = door

    def enter(self, caller: Caller, what: str) -> Registration:
        """The registration of what as it stands here. Raises DeniedError and InvalidError."""
        shown = caller.handshake
        now = time.time_ns()
        own = tokens.issue(
            shown.own, shown.peer_id, self._lifetime, peer_not_after=shown.peer_not_after, now=now
        )
        text = caller.metadata.get(registration.PATH)
        if text is None and self._policies:
            raise registration.denied(
                f"{what}, registered by {shown.peer_id}",
                'the call has no metadata "path", which proves who asks'
                ' (an endpoint sends {"Index":0,"PathSegments":null})',
            )
        came = registration.parse(text) if text else RegistrationPath()
        path = registration.enter(came, caller.token, own.text)
        if reason := registration.refusal(path, shown, now, self._policies):
            raise registration.denied(f"{what}, registered by {shown.peer_id}", reason)
        try:
            ids = registration.left_ids(path, shown)
        except DeniedError as unreadable:
            raise registration.denied(what, unreadable.message) from unreadable
        vouched = own.expires if caller.token_expires is None else caller.token_expires
        return Registration(caller, path, ids, min(own.expires, vouched), self._policies)

    def answered(self, path: RegistrationPath, by: Registration) -> RegistrationPath:
        """What came back over path, as its caller can prove it."""
        shown = by.caller.handshake
        return registration.answered(path, shown, self._lifetime, time.time_ns())

    @asynccontextmanager
    async def place(self, by: Registration) -> AsyncIterator[None]:
        """A place to write, of which there are only so many. Raises ExhaustedError."""
        peer = str(by.caller.id)
        whose = (peer, peer if self._door and by.caller.unix else by.owner)
        async with self._places.entered(whose) as ticket, self._places.place(ticket):
            yield

    async def received(self, stream: "Stream[Any, Any]", kind: str) -> Any:
        """The call's message, if it is one we take."""
        message = await stream.recv_message()
        if message is None:
            raise InvalidError(f"the call carries no {kind}")
        if (size := message.ByteSize()) > self._record_bytes:
            raise InvalidError(
                f"the {kind} has {size} bytes; this registry takes at most {self._record_bytes}",
                hint="fewer or shorter labels, or raise NSM_MAX_RECORD of the registry",
            )
        return message


class Endpoints(NetworkServiceEndpointRegistryBase):
    """Register, Unregister and Find of endpoints."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    async def Register(  # noqa: N802 - gRPC's name
        self, stream: "Stream[pb.NetworkServiceEndpoint, pb.NetworkServiceEndpoint]"
    ) -> None:
        """Offer services under a name, or refresh that."""
        asked, by = await self._entered(stream)
        async with self._gate.place(by):
            held, path = await self._store.register_endpoint(asked, by)
        await _answer(stream, self._gate.answered(path, by), wire.to_pb(held))

    async def Unregister(  # noqa: N802 - gRPC's name
        self, stream: "Stream[pb.NetworkServiceEndpoint, Empty]"
    ) -> None:
        """Offer nothing under that name any more."""
        asked, by = await self._entered(stream)
        async with self._gate.place(by):
            await self._store.unregister_endpoint(asked, by)
        await _answer(stream, by.path, Empty())

    async def Find(  # noqa: N802 - gRPC's name
        self,
        stream: "Stream[pb.NetworkServiceEndpointQuery, pb.NetworkServiceEndpointResponse]",
    ) -> None:
        """Who offers what; with watch, every change of it until the caller ends the stream."""
        asked = await self._gate.received(stream, "query for endpoints")
        query = wire.endpoint(asked.network_service_endpoint)
        found = self._store.find_endpoints(query, asked.watch, current_caller(stream))
        if asked.watch:
            await stream.send_initial_metadata()  # the first answer may be long in coming
        async with contextlib.aclosing(found):
            async for one in found:
                await send(
                    stream,
                    pb.NetworkServiceEndpointResponse(
                        network_service_endpoint=wire.to_pb(one.item), deleted=one.deleted
                    ),
                )

    async def _entered(self, stream: "Stream[Any, Any]") -> tuple[Endpoint, Registration]:
        asked = wire.endpoint(await self._gate.received(stream, "network service endpoint"))
        by = self._gate.enter(current_caller(stream), f"endpoint {asked.name[:256]!r}")
        return replace(asked, path_ids=registration.path_ids(asked.path_ids, by.ids)), by


class Services(NetworkServiceRegistryBase):
    """Register, Unregister and Find of network services."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    async def Register(  # noqa: N802 - gRPC's name
        self, stream: "Stream[pb.NetworkService, pb.NetworkService]"
    ) -> None:
        """Say what a service is."""
        asked, by = await self._entered(stream)
        async with self._gate.place(by):
            held, path = await self._store.register_service(asked, by)
        await _answer(stream, self._gate.answered(path, by), wire.to_pb(held))

    async def Unregister(self, stream: "Stream[pb.NetworkService, Empty]") -> None:  # noqa: N802
        """Forget a service."""
        asked, by = await self._entered(stream)
        async with self._gate.place(by):
            await self._store.unregister_service(asked, by)
        await _answer(stream, by.path, Empty())

    async def Find(  # noqa: N802 - gRPC's name
        self, stream: "Stream[pb.NetworkServiceQuery, pb.NetworkServiceResponse]"
    ) -> None:
        """Which services there are; with watch, every change until the caller ends the stream."""
        asked = await self._gate.received(stream, "query for network services")
        query = wire.service(asked.network_service)
        found = self._store.find_services(query, asked.watch, current_caller(stream))
        if asked.watch:
            await stream.send_initial_metadata()
        async with contextlib.aclosing(found):
            async for one in found:
                await send(
                    stream,
                    pb.NetworkServiceResponse(
                        network_service=wire.to_pb(one.item), deleted=one.deleted
                    ),
                )

    async def _entered(self, stream: "Stream[Any, Any]") -> tuple[Service, Registration]:
        asked = wire.service(await self._gate.received(stream, "network service"))
        by = self._gate.enter(current_caller(stream), f"network service {asked.name[:256]!r}")
        return replace(asked, path_ids=registration.path_ids(asked.path_ids, by.ids)), by


async def claim_socket(caller: Caller, url: str, patience: float) -> int | None:
    """The endpoint's listening socket behind an `inode://` URL; the descriptor is yours.

    None for any other URL, which needs no descriptor, and for a caller that has
    none to send (TCP). Raises UnavailableError if it does not come in time.
    """
    if caller.fds is None or not url.startswith("inode://"):
        return None
    return await caller.fds.claim(url, patience)


def send_socket(caller: Caller, fd: int) -> str:
    """Send a listening socket beside a Find's answer; returns its `inode://` URL."""
    if caller.fds is None:
        raise InvalidError(
            f"{caller.id} called over TCP, which carries no file descriptor",
            hint="sockets of this node are found over the manager's unix socket",
        )
    return caller.fds.send(fd)


async def _answer(stream: "Stream[Any, Any]", path: RegistrationPath, message: Any) -> None:
    back = registration.write(registration.leave(path))
    await stream.send_initial_metadata(metadata={registration.PATH: back})
    await stream.send_message(message)

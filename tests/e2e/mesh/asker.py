"""Workloads that do as they are told: each in a client's namespace, under its group, so with its
SPIFFE id. What they ask and how they misbehave is an order; what came of it is the answer.

    python -P -m tests.e2e.mesh.asker FD SEATS

One process imports everything and forks one child for each seat. A child reads orders,
one JSON object a line, from its socket, works on them side by side, and answers each
with its number. Raw calls are made by stock grpcio with tokens by PyJWT, unless
descriptors are to travel.
"""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty

from forwarder.mechanisms import vxlan
from labs import become
from nsm import mechanisms, model
from nsm.caller import Caller, inode_url
from nsm.client import Client, Settings, Why, Wire
from nsm.connections import Held
from nsm.endpoint import Endpoint
from nsm.errors import Code, NsmError
from nsm.hop import Established, Hop
from nsm.identity.background import background
from nsm.identity.files import file_source
from nsm.identity.source import Source
from nsm.identity.workload import workload_source
from nsm.kernel.topology import enter_named
from nsm.model import Connection, Request
from nsm.proto import connection_pb2, health_pb2, networkservice_pb2, registry_pb2
from nsm.proto.networkservice_grpc import NetworkServiceStub as LinkStub
from nsm.rpc import services
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.server import serve
from nsm.rpc.status import error_of_status
from nsm.undo import Undo

METHODS: dict[str, tuple[str, Any, Any]] = {
    "Request": (
        "/networkservice.NetworkService/Request",
        networkservice_pb2.NetworkServiceRequest,
        connection_pb2.Connection,
    ),
    "Close": ("/networkservice.NetworkService/Close", connection_pb2.Connection, Empty),
    "RegisterService": (
        "/registry.NetworkServiceRegistry/Register",
        registry_pb2.NetworkService,
        registry_pb2.NetworkService,
    ),
    "UnregisterService": (
        "/registry.NetworkServiceRegistry/Unregister",
        registry_pb2.NetworkService,
        Empty,
    ),
    "RegisterEndpoint": (
        "/registry.NetworkServiceEndpointRegistry/Register",
        registry_pb2.NetworkServiceEndpoint,
        registry_pb2.NetworkServiceEndpoint,
    ),
    "Health": (
        "/grpc.health.v1.Health/Check",
        health_pb2.HealthCheckRequest,
        health_pb2.HealthCheckResponse,
    ),
    "Monitor": (
        "/connection.MonitorConnection/MonitorConnections",
        connection_pb2.MonitorScopeSelector,
        connection_pb2.ConnectionEvent,
    ),
}
Order = dict[str, Any]


class Far:
    """The route of a hop that answers with VXLAN, and makes nothing in any kernel."""

    def __init__(self, listen: str, vnis: list[int], keeps: bool) -> None:
        self._own = str(urlsplit(listen).hostname)
        self._vnis = list(vnis)
        self._keeps = keeps
        self.proposed: list[int] = []
        self.closed = 0
        self.held: set[str] = set()
        self.seen: list[dict[str, Any]] = []

    async def establish(
        self, asked: Request, held: Held[str], caller: Caller, undo: Undo
    ) -> Established:
        (offer,) = asked.preferences
        context = asked.connection.context
        self.seen.append(
            {
                "labels": dict(asked.connection.labels),
                "excluded": list(context.ip.excluded_prefixes) if context and context.ip else None,
            }
        )
        self.proposed.append(mechanisms.vni(offer))
        vni = self.proposed[-1] if self._keeps and self.proposed[-1] else self._vnis.pop(0)
        agreed = vxlan.answer(offer, ip_address(self._own), 4789, 1446, vni)
        self.held.add(asked.connection.id)
        return Established(replace(asked.connection, mechanism=agreed))

    async def withdraw(self, conn: Connection, memory: str | None, caller: Caller | None) -> None:
        self.closed += 1
        self.held.discard(conn.id)


class Asker:
    """One seat's wires, endpoints and streams, and the orders it obeys."""

    def __init__(self, seat: dict[str, str], source: Source) -> None:
        self._seat = seat
        self._source = source
        self._tasks: asyncio.TaskGroup
        self._ends: dict[str, tuple[asyncio.Event, asyncio.Task[NsmError | None]]] = {}
        self._heard: dict[str, dict[str, Any]] = {}
        self._told: dict[str, list[list[str]]] = {}
        self._wires: dict[str, Wire] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._gates: dict[str, asyncio.Event] = {}
        self._asked: dict[str, int] = {}
        self._far: dict[str, Far] = {}
        self._flood: asyncio.Task[None] | None = None
        self._refused: list[dict[str, str]] = []

    async def obey(self, orders: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=orders, limit=64 << 20)
        async with background() as self._tasks:
            while line := await reader.readline():
                self._tasks.create_task(self._answer(json.loads(line), writer), name="order")
            for ended, task in list(self._ends.values()):
                ended.set()
                await asyncio.wait({task}, timeout=2)

    async def _answer(self, order: Order, writer: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        try:
            answer = await getattr(self, order.pop("do"))(
                **{k: v for k, v in order.items() if k != "n"}
            )
        except NsmError as error:
            answer = {"code": Code(error.code).name, "text": str(error)}
        except grpc.aio.AioRpcError as error:
            answer = {"code": error.code().name, "text": error.details() or ""}
        except Exception as defect:  # noqa: BLE001 - the test is to see it
            answer = {"code": "DEFECT", "text": repr(defect)}
        answer = {"code": "OK", "text": "", **(answer or {})}
        answer |= {"n": order["n"], "seconds": time.monotonic() - began}
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()

    # --- wires, as a program of a user has them ---------------------------------------------

    async def connect(self, url: str, **options: Any) -> dict[str, Any]:
        """Hold a wire until `close`; what is told of it later is in `told`."""
        settings = {k: options.pop(k) for k in ("namespace", "request_timeout") if k in options}
        told: list[list[str]] = []

        def changed(what: Any, _: Any, error: NsmError | None) -> None:
            told.append([str(what), str(error or "")])

        made: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        ended = asyncio.Event()

        async def hold() -> NsmError | None:
            try:
                async with (
                    Client(
                        self._seat["name"],
                        source=self._source,
                        manager=options.pop("manager", self._seat["manager"]),
                        settings=Settings(on_change=changed, **settings),
                    ) as client,
                    client.connect(url, **options) as wire,
                ):
                    self._told[wire.id] = told
                    self._ends[wire.id] = ended, mine
                    self._wires[wire.id] = wire
                    conn = wire.connection
                    made.set_result(
                        {
                            "wire": wire.id,
                            "interface": wire.interface,
                            "src": [str(a.ip) for a in wire.addresses],
                            "dst": [str(a.ip) for a in wire.peer_addresses],
                            "path": [{"name": s.name, "id": s.id} for s in conn.segments],
                        }
                    )
                    await ended.wait()
            except NsmError as error:
                if made.done():
                    return error
                made.set_exception(error)
            return None

        mine = self._tasks.create_task(hold(), name=f"wire {url}")
        return await made

    async def close(self, wire: str) -> None:
        ended, task = self._ends.pop(wire)
        ended.set()
        if error := await task:
            raise error

    async def flood(self, url: str, count: int) -> None:
        """Ask for so many wires at once, over one connection, until `calm`."""
        self._refused.clear()

        async def ask(client: Client) -> None:
            try:
                async with client.connect(url):
                    await asyncio.Event().wait()
            except NsmError as error:
                self._refused.append({"code": Code(error.code).name, "text": str(error)})

        async def all_of_them() -> None:
            async with (
                Client(
                    self._seat["name"],
                    source=self._source,
                    manager=self._seat["manager"],
                    settings=Settings(request_timeout=60.0),
                ) as client,
                asyncio.TaskGroup() as tasks,
            ):
                for _ in range(count):
                    tasks.create_task(ask(client))

        self._flood = self._tasks.create_task(all_of_them(), name="flood")

    async def refused(self) -> dict[str, Any]:
        return {"refused": self._refused}

    async def calm(self) -> None:
        """Take the flood back, and return when it is."""
        assert self._flood
        self._flood.cancel()
        await asyncio.wait({self._flood})

    async def refresh(self, wire: str) -> None:
        """Ask for the wire again now, as its client does by itself in some minutes."""
        self._wires[wire].news.add(Why.REFRESH)

    async def told(self, wire: str) -> dict[str, Any]:
        return {"told": self._told[wire]}

    # --- endpoints --------------------------------------------------------------------------

    async def serve(
        self, name: str, offers: list[str], refuse: list[str] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Serve until `end`. refuse is a code and a text; with gate, all wait for `open`.

        announces is a descriptor that is said to come, and does not.
        """
        announced = options.pop("announces", "")
        gate = self._gates[name] = asyncio.Event()
        if not options.pop("gate", False):
            gate.set()
        self._asked[name] = 0

        async def announce(*_: object) -> str:
            return str(announced)

        async def answer(conn: Connection) -> Connection:
            self._asked[name] += 1
            await gate.wait()
            if refuse:
                raise error_of_status(Code[refuse[0]], refuse[1])
            return conn

        ended = asyncio.Event()
        ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

        async def hold() -> NsmError | None:
            try:
                async with Endpoint(
                    name,
                    offers,
                    source=self._source,
                    manager=self._seat["manager"],
                    answer=answer,
                    **options,
                ) as endpoint:
                    self._endpoints[name] = endpoint
                    if announced:
                        endpoint.route._send_namespace = announce  # type: ignore[method-assign]
                    ready.set_result({"urls": list(endpoint.urls)})
                    await ended.wait()
            except NsmError as error:
                if ready.done():
                    return error
                ready.set_exception(error)
            return None

        task = self._tasks.create_task(hold(), name=f"endpoint {name}")
        self._ends[f"endpoint {name}"] = ended, task
        return await ready

    async def tunnels(
        self, name: str, service: str, listen: str, vnis: list[int], *, keeps: bool = True
    ) -> None:
        """Be another node's manager until `end`: Requests are answered with the next of vnis.

        Registered straight at the registry, as managers are. keeps is what upstream's
        do with an identifier that is proposed to them.
        """
        ended = asyncio.Event()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        far = self._far[name] = Far(listen, vnis, keeps)
        hop: Hop[str] = Hop(
            name,
            far,
            lifetime=600 * 10**9,
            spawn=lambda work, what: self._tasks.create_task(work, name=what),
        )
        until = time.time_ns() + 60 * 10**9
        endpoint = model.Endpoint(name=name, services=(service,), url=listen, expires=until)

        async def hold() -> NsmError | None:
            try:
                async with (
                    serve([listen], services.of(hop), self._source),
                    Peers(self._source, dial_timeout=2.0) as peers,
                ):
                    registry = RegistryClient(peers, self._seat["registry"])
                    await registry.register_service(model.Service(service, payload="ETHERNET"))
                    await registry.register_endpoint(endpoint)
                    ready.set_result(None)
                    await ended.wait()
                    await registry.unregister_endpoint(endpoint)
                    await registry.unregister_service(model.Service(service))
                    hop.stop()
            except NsmError as error:
                if ready.done():
                    return error
                ready.set_exception(error)
            return None

        task = self._tasks.create_task(hold(), name=f"endpoint {name}")
        self._ends[f"endpoint {name}"] = ended, task
        await ready

    async def tunneled(self, name: str) -> dict[str, Any]:
        far = self._far[name]
        return {"proposed": far.proposed, "closed": far.closed, "held": sorted(far.held),
                "seen": far.seen}  # fmt: skip

    async def end(self, name: str) -> None:
        await self.close(f"endpoint {name}")

    async def open(self, name: str) -> None:
        self._gates[name].set()

    async def serves(self, name: str) -> dict[str, Any]:
        endpoint = self._endpoints.get(name)
        held = [conn.id for conn in endpoint.connections] if endpoint else []
        return {"asked": self._asked[name], "held": held}

    # --- raw calls --------------------------------------------------------------------------

    async def call(
        self,
        method: str,
        message: dict[str, Any],
        *,
        to: str = "manager",
        timeout: float = 10.0,
        **how: Any,
    ) -> dict[str, Any]:
        """One call by stock grpcio. how: token, identity, metadata, streaming (see below)."""
        path, asked, answered = METHODS[method]
        metadata = [*self._token(to, **how), *map(tuple, how.get("metadata", ()))]
        async with self._channel(to, how.get("identity")) as channel:
            sent = json_format.ParseDict(message, asked())
            rpc = channel.unary_unary(
                path,
                request_serializer=asked.SerializeToString,
                response_deserializer=answered.FromString,
            )
            call = rpc(sent, timeout=timeout, metadata=metadata)
            answer = await call
            headers = {k: v for k, v in await call.initial_metadata() if isinstance(v, str)}
        return {"answer": json_format.MessageToDict(answer), "headers": headers}

    async def watch(self, name: str, selector: dict[str, Any], to: str = "manager") -> None:
        """Keep what a monitor stream tells, for `heard`, until it ends or `unwatch`."""
        path, asked, answered = METHODS["Monitor"]
        heard = self._heard[name] = {"events": [], "code": "", "text": ""}
        ended = asyncio.Event()

        async def follow() -> None:
            async with self._channel(to, None) as channel:
                rpc = channel.unary_stream(
                    path,
                    request_serializer=asked.SerializeToString,
                    response_deserializer=answered.FromString,
                )
                sent = json_format.ParseDict(selector, asked())
                call = rpc(sent, metadata=self._token(to))
                stop = self._tasks.create_task(_after(ended, call.cancel), name="unwatch")
                try:
                    async for event in call:
                        heard["events"].append(_shown(event))
                    heard["code"] = (await call.code()).name
                except grpc.aio.AioRpcError as error:
                    heard["code"], heard["text"] = error.code().name, error.details() or ""
                except asyncio.CancelledError:
                    heard["code"] = "CANCELLED"
                stop.cancel()

        task = self._tasks.create_task(follow(), name=f"monitor {name}")
        self._ends[f"monitor {name}"] = ended, task

    async def heard(self, name: str) -> dict[str, Any]:
        return {"heard": self._heard[name]}

    async def unwatch(self, name: str) -> None:
        await self.close(f"monitor {name}")

    async def link(
        self,
        message: dict[str, Any],
        *,
        method: str = "Request",
        send: str = "",
        name: str = "",
        to: str = "manager",
        timeout: float = 10.0,
        identity: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """A Request over a connection on which descriptors travel.

        send is a file whose descriptor goes beside the call; name one that is only named.
        """
        async with contextlib.AsyncExitStack() as stack:
            source = self._source
            if identity:
                domains = {identity["domain"]: Path(identity["bundle"])}
                files = file_source(Path(identity["cert"]), Path(identity["key"]), domains)
                source = await stack.enter_async_context(files)
            peers = await stack.enter_async_context(Peers(source, dial_timeout=2.0))
            link = await stack.enter_async_context(peers.link(self._seat[to]))
            if send:
                fd = os.open(send, os.O_RDONLY)
                stack.callback(os.close, fd)
                assert link.fds is not None
                url = link.fds.send(fd)
            else:
                facts = os.stat(name or "/proc/self/ns/net")
                url = inode_url(facts.st_dev, facts.st_ino)
            _, asked, _ = METHODS[method]
            sent = json_format.ParseDict(message, asked())
            for preference in getattr(sent, "mechanism_preferences", ()):
                preference.parameters["inodeURL"] = url
            with link.errors():
                stub = getattr(LinkStub(link.channel), method)
                metadata = link.metadata(600 * 10**9)
                answer = await stub(sent, timeout=timeout, metadata=metadata)
            return {"answer": json_format.MessageToDict(answer)}

    async def mint(self, to: str = "manager", **how: Any) -> dict[str, Any]:
        """A token of ours, for somebody else to use."""
        return {"token": self._token(to, **how)[0][1]}

    async def meets(self, name: str, url: str, id_: str, dns: str) -> None:
        """Know somebody else by that name, for calls to it."""
        self._seat |= {name: url.removeprefix("tcp://"), f"{name}_id": id_, f"{name}_dns": dns}

    async def who(self) -> dict[str, Any]:
        return {"id": str(self._source.identity.svid.id), "pid": os.getpid()}

    def _token(self, to: str, **how: Any) -> list[tuple[str, str]]:
        """The two keys of metadata, made by PyJWT: right, or wrong in the way that is asked for.

        token: None for none at all, or {text, aud, sub, exp (seconds from now), alg, key, header}.
        """
        asked = how.get("token", {})
        if asked is None:
            return []
        own = self._source.identity.svid
        exp = int(time.time()) + asked.get("exp", 600)
        header = datetime.fromtimestamp(asked.get("header", exp), UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )
        said = {"sub": str(own.id), "aud": [self._seat[f"{to}_id"]], "exp": exp}
        said |= {key: asked[key] for key in ("sub", "aud") if key in asked}
        alg = asked.get("alg", "ES256")
        key: Any = own.key
        if asked.get("key") == "another":
            key = ec.generate_private_key(ec.SECP256R1())
        if how.get("identity"):
            key = Path(how["identity"]["key"]).read_bytes()
            said["sub"] = asked.get("sub", how["identity"]["id"])
        if alg == "HS256":
            key = base64.b64encode(b"x" * 48).decode()
        text = asked.get("text") or jwt.encode(said, None if alg == "none" else key, algorithm=alg)
        return [("nsm-client-token", text), ("nsm-client-token-expires", header)]

    @asynccontextmanager
    async def _channel(
        self, to: str, identity: dict[str, str] | None
    ) -> AsyncIterator[grpc.aio.Channel]:
        held = self._source.identity
        if identity:
            chain, key, bundle = (
                Path(identity[one]).read_bytes() for one in ("cert", "key", "bundle")
            )
        else:
            chain, key = held.svid.chain_pem(), held.svid.key_pem()
            known = held.bundles[held.svid.id.trust_domain]
            bundle = b"".join(one.public_bytes(Encoding.PEM) for one in known)
        credentials = grpc.ssl_channel_credentials(bundle, key, chain)
        options = (
            ("grpc.ssl_target_name_override", self._seat[f"{to}_dns"]),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
        )
        async with grpc.aio.secure_channel(self._seat[to], credentials, options) as channel:
            yield channel


async def _after(event: asyncio.Event, act: Callable[[], Any]) -> None:
    await event.wait()
    act()


def _shown(event: Any) -> dict[str, Any]:
    return {
        "type": connection_pb2.ConnectionEventType.Name(event.type),
        "connections": {
            id_: {
                "service": conn.network_service,
                "state": connection_pb2.State.Name(conn.state),
                "path": [[s.name, s.id] for s in conn.path.path_segments],
                "expires": [s.expires.ToNanoseconds() for s in conn.path.path_segments],
                "index": conn.path.index,
            }
            for id_, conn in event.connections.items()
        },
    }


async def live(seat: dict[str, str], orders: socket.socket) -> None:
    async with workload_source(seat["identity"], patience=10) as source:
        await Asker(seat, source).obey(orders)


def main() -> None:
    """Fork a child for each seat, and wait for all of them."""
    seats = json.loads(sys.argv[1])
    children = []
    for seat in seats:
        pid = os.fork()
        if pid == 0:
            for other in seats:
                if other is not seat:
                    os.close(other["fd"])
            enter_named(seat["namespace"])
            become.group(seat["gid"])
            orders = socket.socket(fileno=seat["fd"])
            orders.setblocking(False)
            asyncio.run(live(seat, orders))
            os._exit(0)
        children.append(pid)
    for seat in seats:
        os.close(seat["fd"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for pid in children:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()

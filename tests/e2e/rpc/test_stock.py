"""Stock grpcio as the independent peer, at both ends."""
# ruff: noqa: N802 - methods have the protocol's names

import asyncio
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nsm.errors import Code, DeadlineError, DeniedError, NotFoundError, PeerError
from nsm.identity.source import HeldIdentity
from nsm.proto import connection_pb2_grpc, networkservice_pb2_grpc
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc.health import Health
from nsm.rpc.peers import Peers
from nsm.rpc.server import Call, Server, serve
from tests.e2e.rpc.echo import (
    LIFE,
    Connection,
    Echo,
    Monitor,
    Selector,
    request,
    stock_credentials,
    stock_options,
    target,
)
from tests.support.certs import Authority
from tests.support.wait import until

MIB = 1024 * 1024


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    return f"unix://{tmp_path}/s.sock" if request.param == "unix" else "tcp://127.0.0.1:0"


@asynccontextmanager
async def served(listen: str, *handlers: Any, **options: Any) -> AsyncIterator[tuple[Server, Any]]:
    """A server with a DNS name beside its SPIFFE id, and a stock grpcio channel to it."""
    authority = Authority("a.test")
    source = authority.source("/server", dns=["server.test"])
    credentials = stock_credentials(authority.source("/client").identity)
    async with (
        serve([listen], handlers, source, **options) as server,
        grpc.aio.secure_channel(target(server.urls[0]), credentials, stock_options()) as channel,
    ):
        yield server, channel


async def test_a_stock_grpcio_client_calls_a_server_whose_certificate_also_has_a_dns_name(
    listen: str,
) -> None:
    echo = Echo()
    async with served(listen, echo) as (_, channel):
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        answer = await stub.Request(
            request("c-1", network_service="icmp"), timeout=5, metadata=[("path", "{}")]
        )
    assert answer.network_service == "icmp"
    assert str(echo.callers[0].id) == "spiffe://a.test/client"
    assert echo.callers[0].unix == listen.startswith("unix")
    assert echo.callers[0].metadata["path"] == "{}"
    assert 0 < (echo.callers[0].deadline or 0) - asyncio.get_running_loop().time() <= 5


async def test_a_synchronous_stock_client_works_too(listen: str) -> None:
    authority = Authority("a.test")
    source = authority.source("/server", dns=["server.test"])
    credentials = stock_credentials(authority.source("/client").identity)

    def call(url: str) -> Any:
        with grpc.secure_channel(target(url), credentials, stock_options()) as channel:
            return networkservice_pb2_grpc.NetworkServiceStub(channel).Request(
                request("c-7"), timeout=5
            )

    async with serve([listen], [Echo()], source) as server:
        assert (await asyncio.to_thread(call, server.urls[0])).id == "c-7"


async def test_the_health_service_answers_the_stock_health_client(listen: str) -> None:
    health = Health("networkservice.NetworkService")
    async with served(listen, health) as (_, channel):
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "networkservice.NetworkService"):
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as unknown:
            await stub.Check(health_pb2.HealthCheckRequest(service="x"), timeout=5)
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        health.set(False)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()


async def test_errors_reach_a_stock_client_with_code_and_text(listen: str) -> None:
    lines: list[Call] = []

    async def fail(caller: Any, connection: Any) -> Any:
        if connection.id == "defect":
            raise KeyError("secret-token")
        raise DeniedError("spiffe://a.test/client may not: no sufficient privileges")

    async with served(listen, Echo(fail), on_call=lines.append) as (_, channel):
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as denied:
            await stub.Request(request(), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as defect:
            await stub.Request(request("defect"), timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as absent:
            await channel.unary_unary("/no.Such/Method")(b"", timeout=5)
    assert denied.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert denied.value.details().endswith("no sufficient privileges")
    assert defect.value.code() == grpc.StatusCode.INTERNAL
    assert "secret" not in defect.value.details()
    assert absent.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert [(line.method[-8:], line.code, str(line.caller)) for line in lines] == [
        ("/Request", Code.PERMISSION_DENIED, "spiffe://a.test/client"),
        ("/Request", Code.INTERNAL, "spiffe://a.test/client"),
    ]


async def test_a_compressed_message_is_answered_unimplemented(listen: str) -> None:
    async with served(listen, Echo()) as (_, channel):
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Request(request(), timeout=5, compression=grpc.Compression.Gzip)
        assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in refused.value.details()
        assert (await stub.Request(request(), timeout=5)).id == "c-1"


async def test_a_message_of_4_mib_passes_and_one_byte_more_is_refused(listen: str) -> None:
    async with served(listen, Echo()) as (_, channel):
        call = channel.unary_unary(
            "/networkservice.NetworkService/Request",
            request_serializer=None,
            response_deserializer=None,
        )
        body = request("c", labels={"k": "v" * (4 * MIB)}).SerializeToString()
        surplus = len(body) - 4 * MIB
        exact = request("c", labels={"k": "v" * (4 * MIB - surplus)}).SerializeToString()
        assert len(exact) == 4 * MIB
        await call(exact, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(exact + b"\0", timeout=20)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(4 * MIB + 1) in refused.value.details()


async def test_130_streams_of_one_stock_channel_are_all_open(listen: str) -> None:
    monitor = Monitor(asyncio.Event().wait)
    async with served(listen, monitor) as (server, channel):
        stub = connection_pb2_grpc.MonitorConnectionStub(channel)
        calls = [stub.MonitorConnections(Selector()) for _ in range(130)]
        async with asyncio.timeout(20):
            for call in calls:
                await call.read()
        assert monitor.open == 130
        assert server.connections == 1
        for call in calls:
            call.cancel()
        await until(lambda: monitor.open == 0, "130 cancelled streams to end", bar=1.0)


async def test_a_stop_tells_open_streams_unavailable_and_lets_running_calls_end(
    listen: str,
) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def slowly(caller: Any, connection: Any) -> Any:
        started.set()
        await release.wait()
        return connection

    monitor = Monitor(asyncio.Event().wait)
    async with served(listen, monitor, Echo(slowly)) as (server, channel):
        watch = connection_pb2_grpc.MonitorConnectionStub(channel).MonitorConnections(Selector())
        await watch.read()
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        running = stub.Request(request("c-9"), timeout=20)
        waiting = asyncio.ensure_future(running)
        await started.wait()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(server.stop())
            with pytest.raises(grpc.aio.AioRpcError) as told:
                await watch.read()
            assert told.value.code() == grpc.StatusCode.UNAVAILABLE
            assert "stopping" in told.value.details()
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Request(request("late"), timeout=5)
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
            assert not stopping.done()
            release.set()
            assert (await waiting).id == "c-9"


async def test_calls_that_outlive_the_grace_are_told_unavailable(listen: str) -> None:
    started = asyncio.Event()

    async def forever(caller: Any, connection: Any) -> Any:
        started.set()
        await asyncio.Event().wait()

    async with served(listen, Echo(forever), grace=0.1) as (server, channel):
        running = networkservice_pb2_grpc.NetworkServiceStub(channel).Request(request(), timeout=20)
        waiting = asyncio.ensure_future(running)
        await started.wait()
        await server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as told:
            await waiting
        assert told.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_200_mb_are_refused_while_memory_stays_flat(listen: str) -> None:
    authority = Authority("a.test")
    source = authority.source("/server", dns=["server.test"])
    client = authority.source("/client").identity
    async with serve([listen], [Echo()], source) as server:
        process = await asyncio.create_subprocess_exec(
            *_python("tests.e2e.rpc.flood"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said, _ = await process.communicate(_told(client, server.urls[0]))
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert said.decode().startswith("RESOURCE_EXHAUSTED"), said
    assert (after - before) / 1024 < 30, f"peak grew by {(after - before) / 1024:.0f} MB"


async def test_a_deadline_is_the_callers_and_ends_the_handler(listen: str) -> None:
    lines: list[Call] = []

    async def forever(caller: Any, connection: Any) -> Any:
        await asyncio.Event().wait()

    async with served(listen, Echo(forever), on_call=lines.append) as (_, channel):
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await stub.Request(request(), timeout=0.2)
        assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: lines, "the handler to end at the deadline", bar=0.5)
        assert lines[0].code in (Code.DEADLINE_EXCEEDED, Code.CANCELLED)


@pytest.mark.parametrize("taken", [False, True], ids=["", "by a call of its own"])
async def test_a_handler_that_fails_at_its_deadline_has_no_defect(
    listen: str, caplog: pytest.LogCaptureFixture, taken: bool
) -> None:
    """As one does that gives up by itself at that very moment, or whose own call does."""
    lines: list[Call] = []

    async def too_late(caller: Any, connection: Any) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            while taken and task and task.cancelling():
                task.uncancel()  # it takes that end for one of its own
            raise DeadlineError("not there in time") from None

    async with served(listen, Echo(too_late), on_call=lines.append) as (_, channel):
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Request(request(), timeout=0.2)
        await until(lambda: lines, "the handler to end", bar=0.5)
    assert lines[0].code is Code.DEADLINE_EXCEEDED
    assert not [one for one in caplog.records if one.levelname == "ERROR"]


class _StockServer(networkservice_pb2_grpc.NetworkServiceServicer):
    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    async def Request(self, asked: Any, context: Any) -> Any:
        self.seen.append(dict(context.invocation_metadata()))
        if asked.connection.id == "absent":
            await context.abort(grpc.StatusCode.NOT_FOUND, "network service x is not found")
        if asked.connection.id == "go":
            await context.abort(grpc.StatusCode.UNKNOWN, "all forwarders have failed")
        if asked.connection.id == "large":
            return Connection(labels={"k": "v" * 5 * MIB})
        return asked.connection


@asynccontextmanager
async def stock_server(
    listen: str, source: HeldIdentity
) -> AsyncIterator[tuple[str, _StockServer]]:
    """A stock grpcio server that shows an SVID with nothing but its SPIFFE id."""
    identity = source.identity
    servicer = _StockServer()
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)])
    networkservice_pb2_grpc.add_NetworkServiceServicer_to_server(servicer, server)
    roots = b"".join(a.public_bytes(serialization.Encoding.PEM) for a in identity.authorities)
    credentials = grpc.ssl_server_credentials(
        [(identity.svid.key_pem(), identity.svid.chain_pem())], roots, require_client_auth=True
    )
    port = server.add_secure_port(target(listen), credentials)
    await server.start()
    try:
        yield (listen if listen.startswith("unix") else f"tcp://127.0.0.1:{port}"), servicer
    finally:
        await server.stop(None)


async def test_our_links_call_a_stock_grpcio_server(listen: str) -> None:
    authority = Authority("a.test")
    async with (
        stock_server(listen, authority.source("/stock")) as (url, servicer),
        Peers(authority.source("/us")) as peers,
        peers.link(url) as link,
    ):
        assert str(link.handshake.peer_id) == "spiffe://a.test/stock"
        stub = NetworkServiceStub(link.channel)
        with link.errors():
            metadata = link.metadata(LIFE)
            assert (await stub.Request(request("c-3"), metadata=metadata, timeout=5)).id
        assert servicer.seen[0]["nsm-client-token"] == metadata["nsm-client-token"]
        with pytest.raises(NotFoundError, match=r"^network service x is not found$"), link.errors():
            await stub.Request(request("absent"), timeout=5)
        with (
            pytest.raises(PeerError, match=r"^all forwarders have failed$") as failed,
            link.errors(),
        ):
            await stub.Request(request("go"), timeout=5)
        assert failed.value.code is Code.UNKNOWN
        with pytest.raises(Exception, match="at most 4194304"), link.errors():
            await stub.Request(request("large"), timeout=20)
        with link.errors():
            assert (await stub.Request(request("c-4"), timeout=5)).id == "c-4"


def _python(module: str) -> list[str]:
    import sys

    return [sys.executable, "-m", module]


def _told(identity: Any, url: str) -> bytes:
    import json

    roots = b"".join(a.public_bytes(serialization.Encoding.PEM) for a in identity.authorities)
    return json.dumps(
        {
            "url": url,
            "roots": roots.decode(),
            "key": identity.svid.key_pem().decode(),
            "chain": identity.svid.chain_pem().decode(),
        }
    ).encode()

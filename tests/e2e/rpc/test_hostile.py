"""Peers with a good certificate and bad manners: each harms its own connection only."""

import asyncio
import errno
import logging
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import grpc
import pytest
from grpclib.exceptions import StreamTerminatedError
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ResponseReceived

from nsm.errors import UnavailableError
from nsm.proto import networkservice_pb2_grpc
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc.grpclib_private import Limits
from nsm.rpc.peers import Peers
from nsm.rpc.server import Server, serve
from nsm.rpc.tls import context_of
from tests.e2e.rpc.echo import HEADERS, Echo, request, stock_credentials, stock_options, target
from tests.support.certs import Authority
from tests.support.wait import until

A = Authority("a.test")


@asynccontextmanager
async def raw(
    tmp_path: Any, echo: Echo | None = None, **limits: Any
) -> AsyncIterator[tuple[Server, Any, Any, Any]]:
    """A server, and an HTTP/2 connection to it that the test drives by hand."""
    url = f"unix://{tmp_path}/s.sock"
    bounds = replace(Limits(), **limits)
    async with serve([url], [echo or Echo()], A.source("/s"), limits=bounds) as server:
        reader, writer = await asyncio.open_unix_connection(
            f"{tmp_path}/s.sock",
            ssl=context_of(A.source("/c").identity, server=False),
            server_hostname="",
        )
        h2 = H2Connection(
            H2Configuration(
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                header_encoding="utf-8",
            )
        )
        h2.initiate_connection()
        writer.write(h2.data_to_send())
        await until(lambda: server.connections == 1, "the server to see the connection", bar=0.5)
        yield server, reader, writer, h2
        writer.transport.abort()
        if server.refusing or echo:
            return
        async with Peers(A.source("/d")) as peers, peers.link(url) as link:
            with link.errors():
                stub = NetworkServiceStub(link.channel)
                assert (await stub.Request(request(), timeout=5)).id, "others are served as before"


async def answers(reader: Any, h2: Any, *names: str) -> dict[str, Any]:
    """Read until all events of these names came."""
    found: dict[str, Any] = {}
    async with asyncio.timeout(10):
        while not set(names) <= set(found):
            data = await reader.read(65536)
            assert data, f"the connection ended; so far: {sorted(found)}"
            for event in h2.receive_data(data):
                found[type(event).__name__] = event
    return found


async def test_noise_instead_of_http2_ends_that_connection(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with raw(tmp_path) as (server, reader, writer, _):
        writer.write(os.urandom(4096))
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
        await until(lambda: server.connections == 0, "the connection to go", bar=0.5)
    assert "closed: it" in caplog.text


async def test_a_frame_larger_than_any_may_be_is_not_read_first(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw(tmp_path) as (server, _reader, writer, _):
        writer.write(b"\xff\xff\xff\0\0\0\0\0\1")  # 16 MiB announced, none sent
        await until(lambda: server.connections == 0, "the connection to go", bar=0.5)
    assert "larger than any may be" in caplog.text


async def test_a_call_without_a_path_ends_that_connection(tmp_path: Any) -> None:
    async with raw(tmp_path) as (server, reader, writer, h2):
        h2.send_headers(1, [h for h in HEADERS if h[0] != ":path"])
        writer.write(h2.data_to_send())
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
        await until(lambda: server.connections == 0, "the connection to go", bar=0.5)


async def test_more_headers_than_the_bound_are_answered_and_far_more_end_the_connection(
    tmp_path: Any,
) -> None:
    async with raw(tmp_path) as (server, reader, writer, h2):
        h2.send_headers(1, [*HEADERS, *((f"k{n}", "v" * 1000) for n in range(70))])
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ResponseReceived")
        assert ("grpc-status", "8") in found["ResponseReceived"].headers
        h2.send_headers(3, [*HEADERS, *((f"k{n}", "v" * 1000) for n in range(1100))])
        writer.write(h2.data_to_send())
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
        await until(lambda: server.connections == 0, "the connection to go", bar=0.5)


async def test_a_stock_client_is_told_of_the_bound_on_headers(tmp_path: Any) -> None:
    source = A.source("/s", dns=["server.test"])
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo()], source) as server,
        grpc.aio.secure_channel(
            target(server.urls[0]), stock_credentials(A.source("/c").identity), stock_options()
        ) as channel,
    ):
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Request(request(), metadata=[("k", "v" * 100_000)], timeout=5)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Request(request(), metadata=[("k", "v" * 10_000)], timeout=5)).id


async def test_an_empty_frame_in_the_middle_of_a_message_changes_nothing(tmp_path: Any) -> None:
    async with raw(tmp_path) as (_, reader, writer, h2):
        body = request("c-1").SerializeToString()
        whole = struct.pack(">BI", 0, len(body)) + body
        h2.send_headers(1, HEADERS)
        for byte in whole:
            h2.send_data(1, bytes([byte]))
            h2.send_data(1, b"")
        h2.send_data(1, b"", end_stream=True)
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "DataReceived", "TrailersReceived")
        assert ("grpc-status", "0") in found["TrailersReceived"].headers


async def test_a_message_that_breaks_off_is_a_status_and_not_a_defect(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw(tmp_path) as (_, reader, writer, h2):
        h2.send_headers(1, HEADERS)
        h2.send_data(1, struct.pack(">BI", 0, 100) + b"half", end_stream=True)
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ResponseReceived")
        assert ("grpc-status", "13") in found["ResponseReceived"].headers
    assert "defect" not in caplog.text


async def test_a_million_frames_of_one_byte_cost_no_more_than_their_bytes(tmp_path: Any) -> None:
    async with raw(tmp_path) as (_, _reader, writer, h2):
        h2.send_headers(1, HEADERS)
        h2.send_data(1, struct.pack(">BI", 0, 1_000_000))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        frame = b"\0\0\1\0\0\0\0\0\1x"
        writer.write(h2.data_to_send())
        for _ in range(100):
            writer.write(frame * 1000)
            await writer.drain()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert (after - before) / 1024 < 20


async def test_who_asks_and_never_reads_is_cut_off(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with raw(tmp_path, unread=256 * 1024) as (server, reader, writer, _):
        reader._transport.pause_reading()
        ping = b"\0\0\x08\x06\0\0\0\0\0abcdefgh"
        for _ in range(400):
            if writer.transport.is_closing() or server.connections == 0:
                break
            writer.write(ping * 1000)
            try:
                async with asyncio.timeout(0.5):
                    await writer.drain()
            except (OSError, TimeoutError):
                break
        await until(lambda: server.connections == 0, "the connection to be cut", bar=1.0)
    assert "does not read" in caplog.text


async def test_messages_that_do_not_end_are_held_up_to_a_bound(tmp_path: Any) -> None:
    size, bound = 60_000, 200_000
    async with raw(tmp_path, message=size, window=70_000, unfinished=bound) as made:
        server, reader, writer, h2 = made
        refused: list[Any] = []

        async def hear() -> None:
            data = await reader.read(65536)
            assert data
            refused.extend(e for e in h2.receive_data(data) if isinstance(e, ResponseReceived))

        async with asyncio.timeout(10):
            for number in range(1, 41, 2):
                h2.send_headers(number, HEADERS)
                h2.send_data(number, struct.pack(">BI", 0, size))
                left = size - 1
                while left and not refused:
                    if room := min(left, 16_384, h2.local_flow_control_window(number)):
                        h2.send_data(number, b"x" * room)
                        left -= room
                    writer.write(h2.data_to_send())
                    if not room:
                        await hear()
                if refused:
                    break
            while not refused:
                await hear()
        assert ("grpc-status", "8") in refused[0].headers
        (protocol,) = server._connections
        held = sum(len(s.inbox._data) for s in protocol.processor.streams.values())
        assert held == protocol.connection.unread <= bound + 70_000


async def test_a_message_that_does_not_come_ends_its_call(tmp_path: Any) -> None:
    async with raw(tmp_path, request=0.2) as (server, reader, writer, h2):
        h2.send_headers(1, HEADERS)
        h2.send_data(1, struct.pack(">BI", 0, 100) + b"half")
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ResponseReceived")
        assert ("grpc-status", "4") in found["ResponseReceived"].headers
        await until(lambda: not server._running, "the call to end", bar=0.5)


async def test_a_binary_header_that_cannot_be_decoded_is_refused(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw(tmp_path) as (_, reader, writer, h2):
        h2.send_headers(1, [*HEADERS, ("x-bin", "a")])
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ResponseReceived")
        assert ("grpc-status", "3") in found["ResponseReceived"].headers
    assert "Server error" not in caplog.text


async def test_calls_taken_back_count_until_they_have_ended(tmp_path: Any) -> None:
    begun, tidied = 0, asyncio.Event()

    async def tidy(caller: Any, connection: Any) -> Any:
        nonlocal begun
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            await tidied.wait()

    body = request("c-1").SerializeToString()
    async with raw(tmp_path, echo=Echo(tidy), streams=10) as (server, reader, writer, h2):
        for number in range(1, 21, 2):
            h2.send_headers(number, HEADERS)
            h2.send_data(number, struct.pack(">BI", 0, len(body)) + body, end_stream=True)
        writer.write(h2.data_to_send())
        await until(lambda: begun == 10, "ten calls to run", bar=0.5)
        for number in range(1, 21, 2):
            h2.reset_stream(number)
        h2.send_headers(21, HEADERS)
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ResponseReceived")
        assert ("grpc-status", "8") in found["ResponseReceived"].headers
        tidied.set()
        await until(lambda: not server._running, "the calls to end", bar=0.5)
        h2.send_headers(23, HEADERS)
        h2.send_data(23, b"", end_stream=True)
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ResponseReceived")
        assert ("grpc-status", "8") not in found["ResponseReceived"].headers


async def test_who_takes_back_calls_without_end_is_told_to_calm_down(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw(tmp_path, resets=50) as (server, reader, writer, h2):
        for number in range(1, 103, 2):
            h2.send_headers(number, HEADERS)
            h2.reset_stream(number)
        writer.write(h2.data_to_send())
        found = await answers(reader, h2, "ConnectionTerminated")
        assert found["ConnectionTerminated"].error_code == ErrorCodes.ENHANCE_YOUR_CALM
        await until(lambda: server.connections == 0, "the connection to go", bar=0.5)
    assert "took 51 calls back" in caplog.text


async def test_streams_beyond_the_bound_end_that_connection_and_no_more_are_begun(
    tmp_path: Any,
) -> None:
    async with raw(tmp_path, streams=10) as (server, reader, writer, h2):
        for n in range(1, 41, 2):
            h2.send_headers(n, HEADERS)
        writer.write(h2.data_to_send())
        async with asyncio.timeout(5):
            while await reader.read(65536):
                pass
        await until(lambda: not server._running, "its calls to end", bar=0.5)


async def test_a_stop_says_goodbye_with_a_goaway_that_blames_nobody(tmp_path: Any) -> None:
    async with raw(tmp_path) as (server, reader, _writer, h2):
        await server.stop()
        found = await answers(reader, h2, "ConnectionTerminated")
        assert found["ConnectionTerminated"].error_code == 0


async def test_two_tokens_are_none(tmp_path: Any) -> None:
    echo = Echo()
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [echo], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
        peers.link(server.urls[0]) as link,
    ):
        stub = NetworkServiceStub(link.channel)
        good = list(link.metadata(10**9).items())
        await stub.Request(request(), metadata=good * 2, timeout=5)
        await stub.Request(request(), metadata=good, timeout=5)
        await stub.Request(
            request(), metadata=[good[0], ("nsm-client-token-expires", "soon")], timeout=5
        )
    assert [bool(c.token) for c in echo.callers] == [False, True, True]
    assert [bool(c.token_expires) for c in echo.callers] == [False, True, False]
    assert good[0][1] not in repr(echo.callers)


async def test_of_other_metadata_the_last_value_counts(tmp_path: Any) -> None:
    echo = Echo()
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [echo], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
        peers.link(server.urls[0]) as link,
    ):
        twice = [("path", "first"), ("path", "last")]
        await NetworkServiceStub(link.channel).Request(request(), metadata=twice, timeout=5)
    assert echo.callers[0].metadata["path"] == "last"


async def test_connections_beyond_the_bound_wait_for_a_place(tmp_path: Any) -> None:
    bounds = replace(Limits(), connections=2)
    async with serve(
        [f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s"), limits=bounds
    ) as server:

        async def one(path: str) -> None:
            async with (
                Peers(A.source(path), dial_timeout=5) as peers,
                peers.link(server.urls[0]),
            ):
                assert server.connections <= 2

        async with asyncio.TaskGroup() as group:
            for n in range(8):
                group.create_task(one(f"/c{n}"))


async def test_silent_connections_do_not_shut_others_out(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bounds = replace(Limits(), handshakes=8, handshake=60.0)
    urls = [f"unix://{tmp_path}/s.sock", "tcp://127.0.0.1:0"]
    async with serve(urls, [Echo()], A.source("/s"), limits=bounds) as server:
        port = int(server.urls[1].rsplit(":", 1)[1])
        with ExitStack() as stack:

            def silent(source: str) -> socket.socket:
                return stack.enter_context(
                    socket.create_connection(("127.0.0.1", port), source_address=(source, 0))
                )

            slow = silent("127.0.0.1")
            flood = [silent("127.0.0.2") for _ in range(20)]
            for _ in range(20):
                one = stack.enter_context(socket.socket(socket.AF_UNIX))
                one.connect(f"{tmp_path}/s.sock")
            await until(lambda: len(server._handshakes) == 8, "all places to be taken", bar=0.5)
            await until(lambda: _ended(flood[0]), "the oldest of the flood to end", bar=0.5)
            for url in server.urls:
                async with Peers(A.source("/c")) as peers, peers.link(url) as link:
                    stub = NetworkServiceStub(link.channel)
                    assert (await stub.Request(request(), timeout=5)).id
            assert not _ended(slow), "who has one connection only keeps it"
    assert "did not go on either" in caplog.text


async def test_one_peer_has_at_most_a_part_of_all_connections(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    bounds = replace(Limits(), connections=8)
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s"), limits=bounds) as server,
        AsyncExitStack() as stack,
    ):

        async def connected(path: str) -> None:
            peers = await stack.enter_async_context(Peers(A.source(path)))
            link = await stack.enter_async_context(peers.link(server.urls[0]))
            assert (await NetworkServiceStub(link.channel).Request(request(), timeout=5)).id

        await connected("/c")
        await connected("/c")
        with pytest.raises((UnavailableError, OSError, StreamTerminatedError)):
            await connected("/c")
        assert "has 2 connections already" in caplog.text
        await connected("/d")
        await until(lambda: server.connections == 3, "the refused one to go", bar=0.5)
    assert not server._links


async def test_an_accept_that_fails_is_tried_again(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c"), dial_timeout=5) as peers,
    ):
        listener = server._listeners[0]
        listening = listener.sock

        class Failing:
            """The listening socket; the first accept fails as a firewall makes it."""

            def __getattr__(self, name: str) -> Any:
                return getattr(listening, name)

            def accept(self) -> Any:
                listener.sock = listening
                raise PermissionError(errno.EPERM, "Operation not permitted")

        listener.sock = cast("socket.socket", Failing())
        async with peers.link(server.urls[0]) as link:
            assert (await NetworkServiceStub(link.channel).Request(request(), timeout=5)).id
    assert "cannot accept: Operation not permitted" in caplog.text


def _ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return not sock.recv(1)
    except BlockingIOError:
        return False
    except ConnectionError:
        return True

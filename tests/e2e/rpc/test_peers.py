"""Connections bound to certificates: pooled, rotated, own ones for descriptors, gone and back."""
# ruff: noqa: N802 - methods have the protocol's names

import asyncio
import gc
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from nsm.errors import ExhaustedError, TakenError, UnavailableError
from nsm.identity import tokens
from nsm.identity.source import Identity
from nsm.proto.connection_grpc import MonitorConnectionStub
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc import peers as rpc_peers
from nsm.rpc.grpclib_private import Limits
from nsm.rpc.peers import Link, Peers
from nsm.rpc.server import serve
from tests.e2e.rpc.echo import LIFE, Echo, Monitor, Selector, request
from tests.e2e.rpc.test_stock import stock_server
from tests.support.certs import Authority, source
from tests.support.wait import until, write

A = Authority("a.test")


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    return f"unix://{tmp_path}/s.sock" if request.param == "unix" else "tcp://127.0.0.1:0"


async def call(link: Link, identifier: str = "c-1") -> Any:
    with link.errors():
        stub = NetworkServiceStub(link.channel)
        return await stub.Request(request(identifier), metadata=link.metadata(LIFE), timeout=10)


async def test_links_share_a_connection_and_each_token_fits_its_handshake(listen: str) -> None:
    echo = Echo()
    async with serve([listen], [echo], A.source("/s")) as server, Peers(A.source("/c")) as peers:

        async def one() -> None:
            async with peers.link(server.urls[0]) as link:
                await call(link)

        async with asyncio.TaskGroup() as group:
            for _ in range(50):
                group.create_task(one())
        assert (server.connections, peers.connections) == (1, 1)
    for caller in echo.callers:
        assert tokens.signed_by(caller.token, caller.handshake.peer_leaf)
        said = tokens.claims(caller.token)
        assert (said.sub, said.aud) == ("spiffe://a.test/c", ("spiffe://a.test/s",))
        assert caller.token_expires is not None
        assert abs(caller.token_expires - said.exp) < 10**9
        assert not {k for k in caller.metadata if "token" in k}


async def test_a_new_certificate_opens_a_new_connection_and_old_streams_go_on(
    listen: str,
) -> None:
    ours, theirs = A.source("/c"), A.source("/s")
    echo, monitor = Echo(), Monitor(asyncio.Event().wait)
    async with serve([listen], [echo, monitor], theirs) as server, Peers(ours) as peers:
        url = server.urls[0]
        async with peers.link(url) as watching:
            stub = MonitorConnectionStub(watching.channel)
            async with stub.MonitorConnections.open() as stream:
                await stream.send_message(Selector())
                await stream.recv_message()
                for n in range(3):
                    fresh = A.svid("/c")
                    ours.replace(Identity(fresh, ours.identity.bundles))
                    await until(lambda own=fresh: peers._contexts.newest[0].svid is own, "context")
                    async with peers.link(url) as link:
                        await call(link, f"c-{n}")
                        assert link.handshake.own is fresh
                    assert echo.callers[-1].handshake.peer_leaf == fresh.leaf
                    assert tokens.signed_by(echo.callers[-1].token, fresh.leaf)
                assert watching.outdated
                async with asyncio.timeout(1):
                    await watching.outdating()
                assert monitor.open == 1, "the stream goes on over the old connection"
                await stream.cancel()
        await until(lambda: peers.connections == 1, "the old connections to close", bar=0.5)
        await until(lambda: server.connections == 1, "the server to see it", bar=0.5)


async def test_accepted_connections_keep_the_certificate_they_showed(listen: str) -> None:
    theirs = A.source("/s")
    echo = Echo()
    async with serve([listen], [echo], theirs) as server, Peers(A.source("/c")) as peers:
        first = theirs.identity.svid
        async with peers.link(server.urls[0]) as link:
            await call(link)
            fresh = A.svid("/s")
            theirs.replace(Identity(fresh, theirs.identity.bundles))
            await until(lambda: server._contexts.newest[0].svid is fresh, "the context")
            await call(link)
        assert [c.handshake.own for c in echo.callers] == [first, first]
        async with Peers(A.source("/d")) as others, others.link(server.urls[0]) as link:
            await call(link)
            assert link.handshake.peer_leaf == fresh.leaf
        assert echo.callers[-1].handshake.own is fresh


async def test_half_of_the_peers_remaining_life_opens_a_new_connection(listen: str) -> None:
    short = source(A.svid("/s", life=timedelta(seconds=66), age=timedelta(seconds=60)), A)
    async with (
        serve([listen], [Echo()], short) as server,
        Peers(A.source("/c")) as peers,
        peers.link(server.urls[0]) as link,
    ):
        assert not link.outdated
        await link.outdating()
        assert time.time() < short.identity.svid.leaf.not_valid_after_utc.timestamp() - 1


async def test_a_server_that_went_away_and_came_back_is_reached_by_the_next_link(
    tmp_path: Any,
) -> None:
    url = f"unix://{tmp_path}/s.sock"
    async with Peers(A.source("/c")) as peers:
        for _ in range(3):
            async with serve([url], [Echo()], A.source("/s")), peers.link(url) as link:
                await call(link)
            with pytest.raises(UnavailableError, match=r"s\.sock"):
                async with peers.link(url) as link:
                    await call(link)


async def test_calls_in_flight_are_told_unavailable_with_the_url(listen: str) -> None:
    started = asyncio.Event()

    async def forever(caller: Any, connection: Any) -> Any:
        started.set()
        await asyncio.Event().wait()

    async with (
        serve([listen], [Echo(forever)], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
    ):
        url = server.urls[0]
        async with peers.link(url) as link:
            asked = asyncio.ensure_future(call(link))
            await started.wait()
            for connection in list(server._connections):
                connection.abort()
            with pytest.raises(UnavailableError) as told:
                await asked
            assert url in str(told.value)
            with pytest.raises(UnavailableError, match="ended"):
                await call(link)


async def test_a_goaway_lets_running_calls_end_and_new_ones_connect_anew(listen: str) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def slowly(caller: Any, connection: Any) -> Any:
        if connection.id == "slow":
            started.set()
            await release.wait()
        return connection

    async with (
        serve([listen], [Echo(slowly)], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
    ):
        async with peers.link(server.urls[0]) as link:
            asked = asyncio.ensure_future(call(link, "slow"))
            await started.wait()
            next(iter(server._connections)).connection.goaway()
            await until(lambda: link.outdated, "the GOAWAY to be seen", bar=0.5)
            async with peers.link(server.urls[0]) as other:
                assert (await call(other)).id == "c-1"
            assert server.connections == 2
            release.set()
            assert (await asked).id == "slow"
        await until(lambda: server.connections == 1, "the old connection to close", bar=0.5)


async def test_a_stock_stream_is_not_cut_by_our_goaway_at_stop_but_told(listen: str) -> None:
    # grpcio's server sends GOAWAY at a graceful stop: our running call must survive it
    import grpc

    from nsm.proto import networkservice_pb2_grpc
    from tests.e2e.rpc.echo import target

    started, release = asyncio.Event(), asyncio.Event()

    class Slow(networkservice_pb2_grpc.NetworkServiceServicer):
        async def Request(self, asked: Any, context: Any) -> Any:
            started.set()
            await release.wait()
            return asked.connection

    identity = A.source("/stock").identity
    server = grpc.aio.server()
    networkservice_pb2_grpc.add_NetworkServiceServicer_to_server(Slow(), server)
    port = server.add_secure_port(
        target(listen),
        grpc.ssl_server_credentials(
            [(identity.svid.key_pem(), identity.svid.chain_pem())],
            A.certificate.public_bytes(serialization.Encoding.PEM),
            require_client_auth=True,
        ),
    )
    url = listen if listen.startswith("unix") else f"tcp://127.0.0.1:{port}"
    await server.start()
    async with Peers(A.source("/c")) as peers, peers.link(url) as link:
        asked = asyncio.ensure_future(call(link, "c-5"))
        await started.wait()
        stopping = asyncio.ensure_future(server.stop(5))
        await until(lambda: link.outdated, "the GOAWAY to be seen", bar=0.5)
        release.set()
        assert (await asked).id == "c-5"
    await stopping


async def test_calls_with_descriptors_share_a_connection_where_the_peer_frees_them(
    tmp_path: Any,
) -> None:
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
    ):

        async def one(n: int) -> None:
            async with peers.link(server.urls[0], private=f"c-{n}") as link:
                await call(link)

        async with asyncio.TaskGroup() as group:
            for n in range(30):
                group.create_task(one(n))
        assert server.connections == 1
        await peers.release("c-1")
        assert peers.connections == 1


async def test_calls_with_descriptors_have_a_connection_of_their_own_where_it_keeps_them(
    tmp_path: Any,
) -> None:
    async with (
        stock_server(f"unix://{tmp_path}/s.sock", A.source("/stock")) as (url, _),
        Peers(A.source("/c")) as peers,
    ):

        async def one(n: int) -> None:
            async with peers.link(url, private=f"c-{n}") as link:
                await call(link)

        for _ in range(2):
            async with asyncio.TaskGroup() as group:
                for n in range(5):
                    group.create_task(one(n))
            assert peers.connections == 5
        async with peers.link(url) as link:
            await call(link)
        assert peers.connections == 6
        for n in range(5):
            await peers.release(f"c-{n}")
        await until(lambda: peers.connections == 1, "the wires' connections to close", bar=0.5)


async def test_130_streams_are_open_at_once_over_links(listen: str) -> None:
    monitor = Monitor(asyncio.Event().wait)
    async with (
        serve([listen], [monitor], A.source("/s"), limits=replace(Limits(), streams=50)) as server,
        Peers(A.source("/c")) as peers,
    ):

        async def watch(opened: asyncio.Event) -> None:
            async with peers.link(server.urls[0]) as link:
                stub = MonitorConnectionStub(link.channel)
                async with stub.MonitorConnections.open() as stream:
                    await stream.send_message(Selector())
                    await stream.recv_message()
                    opened.set()
                    await asyncio.Event().wait()

        opened = [asyncio.Event() for _ in range(130)]
        tasks = [asyncio.ensure_future(watch(each)) for each in opened]
        async with asyncio.timeout(20):
            for each in opened:
                await each.wait()
        assert monitor.open == 130
        assert server.connections == 3
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: monitor.open == 0, "cancelled streams to end at the server", bar=1.0)


async def test_one_link_with_more_streams_than_the_peer_takes_is_told(listen: str) -> None:
    monitor = Monitor(asyncio.Event().wait)
    async with (
        serve([listen], [monitor], A.source("/s"), limits=replace(Limits(), streams=2)) as server,
        Peers(A.source("/c")) as peers,
        peers.link(server.urls[0]) as link,
    ):
        stub = MonitorConnectionStub(link.channel)
        async with stub.MonitorConnections.open() as one, stub.MonitorConnections.open() as two:
            await one.send_message(Selector())
            await two.send_message(Selector())
            with pytest.raises(ExhaustedError, match="2 calls already run"), link.errors():
                async with stub.MonitorConnections.open() as three:
                    await three.send_message(Selector())
            await one.cancel()
            await two.cancel()


async def test_a_dial_nobody_answers_ends_in_time_and_its_waiters_share_it(tmp_path: Any) -> None:
    silent = socket.socket(socket.AF_UNIX)
    silent.bind(str(tmp_path / "s.sock"))
    silent.listen(1)  # accepts in the kernel, says nothing
    async with Peers(A.source("/c"), dial_timeout=0.3) as peers:

        async def one() -> None:
            with pytest.raises(UnavailableError, match=r"s\.sock: no answer within 0\.3 s"):
                async with peers.link(f"unix://{tmp_path}/s.sock"):
                    pass

        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(one())
        assert time.monotonic() - start < 3
    silent.close()


async def test_a_peer_that_sends_everybody_away_is_not_stormed(
    listen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dials, dial = 0, rpc_peers.dial

    async def sent_away(*how: Any) -> Any:
        nonlocal dials
        dials += 1
        protocol = await dial(*how)
        asyncio.get_running_loop().call_soon(lambda: protocol.goaway_came())  # before it is used
        return protocol

    monkeypatch.setattr(rpc_peers, "dial", sent_away)
    async with (
        serve([listen], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c"), dial_timeout=0.5) as peers,
    ):
        with pytest.raises(UnavailableError, match=r"no answer within 0\.5 s"):
            async with peers.link(server.urls[0]):
                pass
    assert 1 < dials < 10, "each dial waits longer than the one before"


async def test_a_caller_that_gives_up_dialling_does_not_take_the_others_along(
    listen: str,
) -> None:
    async with serve([listen], [Echo()], A.source("/s")) as server, Peers(A.source("/c")) as peers:

        async def one() -> str:
            async with peers.link(server.urls[0]) as link:
                return str((await call(link)).id)

        first, second = asyncio.ensure_future(one()), asyncio.ensure_future(one())
        await asyncio.sleep(0)
        first.cancel()
        assert await second == "c-1"
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_connection_that_nobody_waited_for_closes_too(listen: str) -> None:
    async with (
        serve([listen], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c"), idle=0.2) as peers,
    ):

        async def one() -> None:
            async with peers.link(server.urls[0]):
                pass

        impatient = asyncio.ensure_future(one())
        await asyncio.sleep(0)
        impatient.cancel()
        await until(lambda: server.connections == 1, "the dial to end", bar=0.5)
        await until(lambda: server.connections == 0, "the unused connection to close", bar=0.4)
        assert peers.connections == 0


async def test_a_connection_without_links_closes_after_its_idle_time(listen: str) -> None:
    async with (
        serve([listen], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c"), idle=0.2) as peers,
    ):
        async with peers.link(server.urls[0]) as link:
            await call(link)
        await until(lambda: server.connections == 0, "the idle connection to close", bar=0.4)


async def test_addresses_that_are_taken_name_their_holder(tmp_path: Any) -> None:
    async with serve(
        [f"unix://{tmp_path}/s.sock", "tcp://127.0.0.1:0"], [Echo()], A.source("/s")
    ) as server:
        for url in server.urls:
            with pytest.raises(TakenError) as taken:
                async with serve([url], [Echo()], A.source("/t"), variable="NSM_LISTEN_ON"):
                    pass
            said = str(taken.value)
            assert f"process {os.getpid()}" in said, said
            assert url in said
            assert "NSM_LISTEN_ON" in said
        async with Peers(A.source("/c")) as peers, peers.link(server.urls[0]) as link:
            assert (await call(link)).id, "the first is not harmed"


async def test_a_stale_socket_is_replaced_and_ours_is_removed_at_the_end(tmp_path: Any) -> None:
    path = tmp_path / "deep" / "er" / "s.sock"
    path.parent.mkdir(parents=True)
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    async with serve([f"unix://{path}"], [Echo()], A.source("/s")):
        assert path.stat().st_mode & 0o777 == 0o777
        assert os.listdir(path.parent) == ["s.sock"]
        async with Peers(A.source("/c")) as peers, peers.link(f"unix://{path}") as link:
            assert (await call(link)).id
    assert os.listdir(path.parent) == []
    path.write_text("precious")
    with pytest.raises(TakenError, match="is no socket"):
        async with serve([f"unix://{path}"], [Echo()], A.source("/s")):
            pass
    assert path.read_text() == "precious"


async def test_nothing_listens_before_it_is_published(tmp_path: Any) -> None:
    path = tmp_path / "new" / "s.sock"
    async with serve([f"unix://{path}"], [Echo()], A.source("/s"), publish=False) as server:
        assert not path.exists()
        await server.publish()
        assert path.exists()


@pytest.mark.parametrize("url", ["tcp://[::1]:0", "tcp://:0"])
async def test_ipv6_and_all_addresses(url: str) -> None:
    async with serve([url], [Echo()], A.source("/s")) as server, Peers(A.source("/c")) as peers:
        port = server.urls[0].rpartition(":")[2]
        for host in ["[::1]"] + (["127.0.0.1", "localhost"] if url == "tcp://:0" else []):
            for shape in (f"tcp://{host}:{port}", f"{host}:{port}", f"dns:///{host}:{port}"):
                async with peers.link(shape) as link:
                    assert (await call(link)).id


@pytest.mark.long
async def test_5000_calls_leave_no_descriptor_and_no_task(tmp_path: Any) -> None:
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
    ):

        async def some(count: int) -> None:
            for n in range(count):
                async with peers.link(server.urls[0], private=f"c-{n}") as link:
                    fd = os.open("/proc/self/ns/net", os.O_PATH)
                    link.fds.send(fd)
                    os.close(fd)
                    await call(link)

        await some(50)
        gc.collect()
        before = len(asyncio.all_tasks())
        held = len(os.listdir("/proc/self/fd"))
        start = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(some(500))
        print(f"{5000 / (time.monotonic() - start):.0f} calls a second")
        await until(lambda: len(asyncio.all_tasks()) == before, "tasks to end", bar=0.5)
        assert len(os.listdir("/proc/self/fd")) <= held + 1, "one file, not yet swept"
        assert server.connections == 1
        assert not server._running


async def test_100_dials_at_once_are_all_answered_in_time(tmp_path: Any) -> None:
    identity = A.source("/s").identity
    url = f"unix://{tmp_path}/s.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.e2e.rpc.serving",
        url,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin
    assert process.stdout
    process.stdin.write(
        identity.svid.key_pem()
        + identity.svid.chain_pem()
        + A.certificate.public_bytes(serialization.Encoding.PEM)
    )
    process.stdin.write_eof()
    try:
        assert (await process.stdout.readline()).strip() == b"serving"
        took: list[float] = []

        async def one(n: int) -> None:
            async with Peers(ours, dial_timeout=5) as peers:
                start = time.monotonic()
                async with peers.link(url):
                    took.append(time.monotonic() - start)

        ours = A.source("/c")
        await one(0)
        took.clear()
        async with asyncio.TaskGroup() as group:
            for n in range(100):
                group.create_task(one(n))
        took.sort()
        print(f"100 dials at once: median {took[50] * 1e3:.0f} ms, worst {took[-1] * 1e3:.0f} ms")
        write("the slowest of 100 dials at once", took[-1], 0.3)
        assert took[-1] < 3
    finally:
        process.terminate()
        await process.wait()


async def test_whoever_asked_is_answered_where_the_connection_further_on_ends(listen: str) -> None:
    """A hop in the middle: its own call is cut off, and its caller is told so at once."""
    asked = asyncio.Event()

    async def hang(*_: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    async with (
        serve(["tcp://127.0.0.1:0"], [Echo(hang)], A.source("/far")) as far,
        Peers(A.source("/middle")) as onward,
        Peers(A.source("/c")) as peers,
    ):

        async def pass_on(*_: Any) -> Any:
            async with onward.link(far.urls[0]) as link:
                return await call(link)

        async with (
            serve([listen], [Echo(pass_on)], A.source("/middle")) as middle,
            peers.link(middle.urls[0]) as link,
        ):
            calling = asyncio.create_task(call(link))
            await asked.wait()
            for connection in onward._all():
                connection.protocol.abort()
            await until(calling.done, "an answer", bar=0.5)
            with pytest.raises(UnavailableError, match="was cut off"):
                await calling


@pytest.mark.parametrize("first", ["the connection", "the task"])
async def test_a_task_that_is_cancelled_as_its_connection_ends_is_cancelled(
    listen: str, first: str
) -> None:
    """Who tries again and again would otherwise outlive whoever ended it."""
    asked = asyncio.Event()

    async def hang(*_: Any) -> Any:
        asked.set()
        await asyncio.Event().wait()

    async with (
        serve([listen], [Echo(hang)], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
        peers.link(server.urls[0]) as link,
    ):

        async def again_and_again() -> None:
            while True:
                with suppress(UnavailableError):
                    await call(link)
                await asyncio.sleep(0)

        calling = asyncio.create_task(again_and_again())
        await asked.wait()
        ends = [lambda: link._connection.protocol.connection_lost(None), calling.cancel]
        for end in ends if first == "the connection" else reversed(ends):
            end()
        await until(calling.done, "its end", bar=0.1, record=False)
        assert calling.cancelled()
        assert calling.cancelling() == 1, "by whoever cancelled it"

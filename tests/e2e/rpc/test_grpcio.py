"""A real grpc.aio channel to a server whose certificate has nothing but a SPIFFE id."""

import asyncio
import gc
import os
from typing import Any

import grpc
import pytest

from nsm import grpcio
from nsm.identity import tokens
from nsm.identity.source import Identity
from nsm.proto import connection_pb2_grpc, networkservice_pb2_grpc
from nsm.rpc.server import serve
from tests.e2e.rpc.echo import Echo, Monitor, Selector, request
from tests.support.certs import Authority
from tests.support.wait import until

A, C = Authority("a.test"), Authority("c.test")


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    return f"unix://{tmp_path}/s.sock" if request.param == "unix" else "tcp://127.0.0.1:0"


async def test_calls_of_every_kind_carry_a_token_for_their_handshake(listen: str) -> None:
    echo, monitor = Echo(), Monitor(asyncio.Event().wait)
    async with serve([listen], [echo, monitor], A.source("/s")) as server:
        async with grpcio.channel(server.urls[0], A.source("/c")) as channel:
            assert isinstance(channel, grpc.aio.Channel)
            stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
            asked = request("c-1", labels={"big": "x" * 200_000})
            assert await stub.Request(asked, timeout=5) == asked.connection
            watch = connection_pb2_grpc.MonitorConnectionStub(channel).MonitorConnections(
                Selector()
            )
            await watch.read()
            watch.cancel()
        await until(lambda: server.connections == 0, "the door to close", bar=0.5)
    caller = echo.callers[0]
    assert str(caller.id) == "spiffe://a.test/c"
    assert tokens.signed_by(caller.token, caller.handshake.peer_leaf)
    assert tokens.claims(caller.token).aud == ("spiffe://a.test/s",)
    assert caller.token_expires is not None


async def test_descriptors_travel_both_ways_through_the_door(tmp_path: Any) -> None:
    async def swap(caller: Any, connection: Any) -> Any:
        fd = await caller.fds.claim(connection.labels["there"])
        os.close(fd)
        with open(tmp_path / "back", "w") as file:
            connection.labels["back"] = caller.fds.send(file.fileno())
        return connection

    url = f"unix://{tmp_path}/s.sock"
    async with (
        serve([url], [Echo(swap)], A.source("/s")),
        grpcio.door(url, A.source("/c")) as door,
    ):
        fd = os.open("/proc/self/ns/net", os.O_PATH)
        there = await door.send(fd)
        os.close(fd)
        stub = networkservice_pb2_grpc.NetworkServiceStub(door.channel)
        reply = await stub.Request(request(labels={"there": there}), timeout=5)
        fd = await door.claim(reply.labels["back"])
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "back")
        os.close(fd)


async def test_a_server_that_is_not_there_or_not_trusted_is_an_rpc_error_that_says_so(
    listen: str, tmp_path: Any
) -> None:
    async with grpcio.channel(f"unix://{tmp_path}/none", A.source("/c")) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="cannot connect to unix") as gone:
            await networkservice_pb2_grpc.NetworkServiceStub(channel).Request(request(), timeout=5)
        assert gone.value.code() == grpc.StatusCode.UNAVAILABLE
    async with (
        serve([listen], [Echo()], C.source("/s", A)) as server,
        grpcio.channel(server.urls[0], A.source("/c")) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="does not chain") as refused:
            await networkservice_pb2_grpc.NetworkServiceStub(channel).Request(request(), timeout=5)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


async def test_a_new_certificate_moves_new_calls_and_leaves_streams(listen: str) -> None:
    ours = A.source("/c")
    echo, monitor = Echo(), Monitor(asyncio.Event().wait)
    async with (
        serve([listen], [echo, monitor], A.source("/s")) as server,
        grpcio.door(server.urls[0], ours) as door,
    ):
        stub = networkservice_pb2_grpc.NetworkServiceStub(door.channel)
        watch = connection_pb2_grpc.MonitorConnectionStub(door.channel).MonitorConnections(
            Selector()
        )
        await watch.read()
        for n in range(5):
            fresh = A.svid("/c")
            ours.replace(Identity(fresh, ours.identity.bundles))
            await until(
                lambda own=fresh: door._newest and door._newest.handshake.own is own,
                "the door to show the new certificate",
                bar=0.5,
            )
            await stub.Request(request(f"c-{n}"), timeout=5)
            caller = echo.callers[-1]
            assert caller.handshake.peer_leaf == fresh.leaf
            assert tokens.signed_by(caller.token, fresh.leaf)
            assert monitor.open == 1, "the stream goes on"
        watch.cancel()
        del watch
        gc.collect()  # grpcio closes a connection when the last call's object is gone
        await until(lambda: server.connections == 1, "the old connections to close", bar=1.0)


async def test_the_door_survives_a_server_that_went_away_and_came_back(tmp_path: Any) -> None:
    url = f"unix://{tmp_path}/s.sock"
    async with grpcio.channel(url, A.source("/c")) as channel:
        stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
        for _ in range(3):
            async with serve([url], [Echo()], A.source("/s")):
                answer = await stub.Request(request(), timeout=5, wait_for_ready=True)
                assert answer.id == "c-1"
            with pytest.raises(grpc.aio.AioRpcError) as gone:
                await stub.Request(request(), timeout=5)
            assert gone.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_the_door_lets_only_this_process_in(tmp_path: Any) -> None:
    url = f"unix://{tmp_path}/s.sock"
    async with (
        serve([url], [Echo()], A.source("/s")),
        grpcio.channel(url, A.source("/c")),
    ):
        doors = [d for d in os.listdir("/tmp") if d.startswith("vwire-door-")]
        modes = [os.stat(f"/tmp/{d}").st_mode & 0o777 for d in doors]
        assert doors
        assert set(modes) == {0o700}
        knock = await asyncio.create_subprocess_exec(
            "python3",
            "-c",
            "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
            "print(s.recv(9))",
            f"/tmp/{doors[-1]}/door",
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await knock.communicate()
        assert said.strip() == b"b''"

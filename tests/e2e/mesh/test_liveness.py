"""How others find out whether a process of the mesh is there: health, dials, dead connections."""

import asyncio
import ctypes
import os
import re
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nsm.identity.authority import Authority
from tests.e2e.mesh.conftest import DOMAIN, Mesh, identity
from tests.e2e.mesh.test_identities import context, own_socket
from tests.support.wait import write

NETWORK_SERVICE = ("networkservice.NetworkService", "connection.MonitorConnection")
REGISTRY = ("registry.NetworkServiceRegistry", "registry.NetworkServiceEndpointRegistry")
SERVED = {  # upstream's names (`wire.md` §11.4), by process
    "nsmgr": (*NETWORK_SERVICE, *REGISTRY),
    "forwarder": NETWORK_SERVICE,
    "responder": NETWORK_SERVICE,
    "registry": REGISTRY,
}
PIDFD_GETFD = 438  # the number of the system call; os has none of that name
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.mark.parametrize("process", SERVED)
def test_every_process_serves_health_under_upstreams_names(mesh, process):
    """As a probe asks: stock grpcio, somebody of the node, no token."""
    probe = mesh.askers["operator"]
    url = {
        "nsmgr": mesh.url("node-1"),
        "forwarder": mesh.url("node-1", "forwarder.sock"),
        "responder": f"unix://{own_socket(mesh, mesh.pid('node-1/responder'))}",
        "registry": "tcp://198.18.0.1:5002",
    }[process]
    who = "endpoint/responder" if process == "responder" else f"node/node-1/{process}"
    entry = mesh.entry(who)
    probe.have("meets", name="probed", url=url, id_=entry.spiffe_id, dns=entry.dns)
    for service in ("", *SERVED[process]):
        answer = probe.have(
            "call", method="Health", message={"service": service}, to="probed", token=None
        )
        assert answer["answer"] == {"status": "SERVING"}, service
    others = {*NETWORK_SERVICE, *REGISTRY} - {*SERVED[process]}
    for service in (*others, "nobody.Knows"):
        answer = probe.ask(
            "call", method="Health", message={"service": service}, to="probed", token=None
        )
        assert answer["code"] == "NOT_FOUND", (service, answer)


async def test_100_dials_at_once_at_a_manager_are_all_answered_in_time(
    mesh: Mesh, home: Authority, tmp_path: Path
):
    """Go peers give a dial 300 ms; counted to the server's first frame, as theirs is."""
    tls = context(
        identity(tmp_path, home, f"spiffe://{DOMAIN}/client/alice", home), ssl.PROTOCOL_TLS_CLIENT
    )
    door = mesh.paths.node("node-1", "nsm.io.sock")
    took: list[float] = []

    async def dial() -> None:
        began = time.monotonic()
        reader, writer = await asyncio.open_unix_connection(door, ssl=tls, server_hostname="")
        try:
            frame = await reader.readexactly(9)
            took.append(time.monotonic() - began)
            assert frame[3] == 4, "SETTINGS comes first (RFC 9113 §3.4)"
        finally:
            writer.transport.abort()

    await dial()
    took.clear()
    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(dial())
    assert len(took) == 100
    write("the slowest of 100 dials at once at a manager", max(took), 0.3)
    assert max(took) < 3


@contextmanager
def sockets_of(pid: int) -> Iterator[list[socket.socket]]:
    """A process's own established TCP connections, to ask the kernel about."""
    pidfd, found = os.pidfd_open(pid), []
    try:
        for number in os.listdir(f"/proc/{pid}/fd"):
            if not re.match(r"socket:", os.readlink(f"/proc/{pid}/fd/{number}")):
                continue
            one = socket.socket(fileno=_libc.syscall(PIDFD_GETFD, pidfd, int(number), 0))
            if one.family in (socket.AF_INET, socket.AF_INET6) and _connected(one):
                found.append(one)
            else:
                one.close()
        yield found
    finally:
        for one in found:
            one.close()
        os.close(pidfd)


def _connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return one.type == socket.SOCK_STREAM


@pytest.mark.parametrize("process", ["node-1/registry", "node-1/nsmgr", "node-3/nsmgr"])
def test_a_connection_whose_peer_is_silent_ends_by_the_kernel(mesh, process):
    """Not by HTTP/2 pings, to which Go's servers answer with GOAWAY."""
    with sockets_of(mesh.pid(process)) as connections:
        assert connections, "it has connections of the underlay"
        for one in connections:
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 20_000
            assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 2

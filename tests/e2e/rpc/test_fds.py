"""File descriptors beside real TLS, both ways; the kernel says what a descriptor is."""

import array
import asyncio
import fcntl
import os
import resource
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection

from nsm.caller import Credentials, ended
from nsm.errors import InvalidError, UnavailableError
from nsm.proto.connection_grpc import MonitorConnectionStub
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc.fds import FdSocket, Received, url_of
from nsm.rpc.grpclib_private import Limits
from nsm.rpc.peers import Link, Peers
from nsm.rpc.server import serve
from nsm.rpc.tls import context_of
from tests.e2e.rpc.echo import HEADERS, Echo, Monitor, Selector, request
from tests.support.certs import Authority
from tests.support.wait import until

A = Authority("a.test")


@asynccontextmanager
async def linked(tmp_path: Any, echo: Echo, **limits: Any) -> AsyncIterator[Link]:
    bounds = replace(Limits(), **limits)
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [echo], A.source("/s"), limits=bounds) as server,
        Peers(A.source("/c"), limits=bounds) as peers,
        peers.link(server.urls[0], private="c-1") as link,
    ):
        yield link


async def call(link: Link, *urls: str) -> Any:
    with link.errors():
        stub = NetworkServiceStub(link.channel)
        asked = request("c-1", labels={str(n): url for n, url in enumerate(urls)})
        return await stub.Request(asked, metadata=link.metadata(10**9), timeout=10)


def path(tmp_path: Any, name: str = "file") -> int:
    (tmp_path / name).write_text(name)
    return os.open(tmp_path / name, os.O_PATH)


async def test_a_descriptor_travels_with_a_request_and_stays_o_path(tmp_path: Any) -> None:
    got: list[str] = []

    async def claim(caller: Any, connection: Any) -> Any:
        assert caller.process.pid == os.getpid()
        assert caller.process.uid == os.getuid()
        fd = await caller.fds.claim(connection.labels["0"])
        flags = int(Path(f"/proc/self/fdinfo/{fd}").read_text().split("flags:\t")[1].split()[0], 8)
        got.append(os.readlink(f"/proc/self/fd/{fd}"))
        assert flags & os.O_PATH
        assert flags & os.O_CLOEXEC
        os.close(fd)
        return connection

    async with linked(tmp_path, Echo(claim)) as link:
        fd = path(tmp_path)
        url = link.fds.send(fd)
        found = os.fstat(fd)
        assert url == f"inode://{found.st_dev}/{found.st_ino}"
        os.close(fd)  # a duplicate travels
        await call(link, url)
    assert got == [str(tmp_path / "file")]


async def test_a_descriptor_travels_with_a_response(tmp_path: Any) -> None:
    async def answer(caller: Any, connection: Any) -> Any:
        fd = path(tmp_path, "answer")
        connection.labels["back"] = caller.fds.send(fd)
        os.close(fd)
        return connection

    async with linked(tmp_path, Echo(answer)) as link:
        reply = await call(link)
        fd = await link.fds.claim(reply.labels["back"])
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / "answer")
        os.close(fd)


async def test_a_hundred_descriptors_travel_with_one_call_each_way(tmp_path: Any) -> None:
    async def swap(caller: Any, connection: Any) -> Any:
        for key, url in list(connection.labels.items()):
            fd = await caller.fds.claim(url)
            connection.labels[key] = caller.fds.send(fd)
            os.close(fd)
        return connection

    before = _open()
    async with linked(tmp_path, Echo(swap)) as link:
        urls = []
        for n in range(100):
            fd = path(tmp_path, f"f{n}")
            urls.append(link.fds.send(fd))
            os.close(fd)
        reply = await call(link, *urls)
        for n in range(100):
            fd = await link.fds.claim(reply.labels[str(n)])
            assert os.readlink(f"/proc/self/fd/{fd}") == str(tmp_path / f"f{n}")
            os.close(fd)
    await until(lambda: _open() <= before, "every descriptor to be closed", bar=0.5)


async def test_a_descriptor_may_come_after_its_request(tmp_path: Any) -> None:
    waiting = asyncio.Event()

    async def claim(caller: Any, connection: Any) -> Any:
        if "0" in connection.labels:
            waiting.set()
            os.close(await caller.fds.claim(connection.labels["0"], 5.0))
        return connection

    async with linked(tmp_path, Echo(claim)) as link:
        fd = path(tmp_path)
        asked = asyncio.ensure_future(call(link, url_of(fd)))
        await waiting.wait()
        link.fds.send(fd)  # rides on whatever is written next
        os.close(fd)
        await call(link)
        assert (await asked).id == "c-1"


async def test_a_descriptor_that_never_comes_ends_the_call_in_a_sentence(tmp_path: Any) -> None:
    async def claim(caller: Any, connection: Any) -> Any:
        return await caller.fds.claim(connection.labels["0"], 0.2)

    async with linked(tmp_path, Echo(claim)) as link:
        with pytest.raises(UnavailableError, match=r"inode://4/42 came from spiffe://a\.test/c"):
            await call(link, "inode://4/42")
        with pytest.raises(InvalidError, match="names no passed file descriptor"):
            await call(link, "file:///etc/passwd")


async def test_the_same_file_twice_in_one_request_can_be_claimed_twice(tmp_path: Any) -> None:
    async def twice(caller: Any, connection: Any) -> Any:
        for _ in range(2):
            os.close(await caller.fds.claim(connection.labels["0"]))
        return connection

    before = _open()
    async with linked(tmp_path, Echo(twice)) as link:
        fd = path(tmp_path)
        for _ in range(2):
            url = link.fds.send(fd)
        os.close(fd)
        for _ in range(2):
            await call(link, url)
            fd = os.open(tmp_path / "file", os.O_PATH)
            link.fds.send(fd)
            os.close(fd)
    await until(lambda: _open() <= before, "every descriptor to be closed", bar=0.5)


async def test_an_unclaimed_descriptor_is_closed_and_pins_no_namespace(tmp_path: Any) -> None:
    async with linked(tmp_path, Echo(), fd_age=0.3) as link:
        workload = subprocess.Popen(["unshare", "-n", "sleep", "60"])
        try:
            own = os.stat("/proc/self/ns/net").st_ino
            name = f"/proc/{workload.pid}/ns/net"
            inode = await until(
                lambda: (n := os.stat(name).st_ino) != own and n, "the namespace", bar=0.5
            )
            fd = os.open(name, os.O_PATH)
            link.fds.send(fd)
            os.close(fd)
            await call(link)
            assert _holds(inode), "it arrived"
        finally:
            workload.kill()
            workload.wait()
        await until(lambda: not _holds(inode), "the unclaimed namespace to be let go", bar=0.6)


async def test_a_stream_that_stays_open_keeps_no_unclaimed_descriptor(tmp_path: Any) -> None:
    """A manager's monitor stream beside a Request that was given up: its answer's one came late."""

    async def answer(caller: Any, connection: Any) -> Any:
        fd = path(tmp_path, "late")
        caller.fds.send(fd)
        os.close(fd)
        return connection

    bounds = replace(Limits(), fd_age=0.2)
    stays = asyncio.Event()
    async with (
        serve(
            [f"unix://{tmp_path}/s.sock"],
            [Echo(answer), Monitor(stays.wait)],
            A.source("/s"),
            limits=bounds,
        ) as server,
        Peers(A.source("/c"), limits=bounds) as peers,
        peers.link(server.urls[0]) as watching,
        MonitorConnectionStub(watching.channel).MonitorConnections.open(
            metadata=watching.metadata(10**9)
        ) as stream,
    ):
        await stream.send_message(Selector(), end=True)
        await stream.recv_message()
        async with peers.link(server.urls[0]) as link:
            inode = os.fstat(fd := path(tmp_path)).st_ino
            link.fds.send(fd)
            os.close(fd)
            await call(link)
        assert server.connections == 1
        late = (tmp_path / "late").stat().st_ino
        assert _holds(inode), "it arrived"
        assert _holds(late), "and so did the one of the answer"
        await until(lambda: not _holds(inode) and not _holds(late), "both to be let go", bar=0.1)
        stays.set()


async def test_a_claimed_descriptor_is_its_claimers_alone_when_the_call_ends(
    tmp_path: Any,
) -> None:
    kept: list[int] = []

    async def keep(caller: Any, connection: Any) -> Any:
        kept.append(await caller.fds.claim(connection.labels["0"]))
        return connection

    async with linked(tmp_path, Echo(keep)) as link:
        fd = path(tmp_path)
        url, inode = link.fds.send(fd), os.fstat(fd).st_ino
        os.close(fd)
        await call(link, url)
        assert _holds(inode) == kept  # ours; the connection's own is closed
        os.close(kept[0])
        assert not _holds(inode)


async def test_more_unclaimed_descriptors_than_the_bound_push_the_oldest_out(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with linked(tmp_path, Echo(), fds=10) as link:
        inodes = []
        for n in range(30):
            fd = path(tmp_path, f"f{n}")
            inodes.append(os.fstat(fd).st_ino)
            link.fds.send(fd)
            os.close(fd)
            await call(link)
        assert sum(len(_holds(n)) for n in inodes) == 10
        assert _holds(inodes[-1])
    assert "more than 10 file descriptors" in caplog.text
    assert not any(_holds(n) for n in inodes), "the connection's end closes them"


async def test_a_connection_that_ends_tells_who_waits_for_a_descriptor(tmp_path: Any) -> None:
    ended: list[BaseException] = []
    waiting = asyncio.Event()

    async def claim(caller: Any, connection: Any) -> Any:
        waiting.set()
        try:
            return await caller.fds.claim("inode://1/2", 30)
        except BaseException as error:
            ended.append(error)
            raise

    async with linked(tmp_path, Echo(claim)) as link:
        asked = asyncio.ensure_future(call(link))
        await waiting.wait()
        link._connection.protocol.abort()
        with pytest.raises(UnavailableError, match=r"s\.sock"):
            await asked
        await until(lambda: ended, "the handler to be told", bar=0.5)


async def test_each_descriptor_rides_on_a_byte_and_the_last_on_all_that_is_left(
    tmp_path: Any,
) -> None:
    ours, theirs = socket.socketpair()
    sock = FdSocket(fileno=ours.detach())
    fds = [path(tmp_path, f"f{n}") for n in range(3)]
    for fd in fds:
        sock.queue(fd, 10)
    assert sock.send(b"abcdef") == 6
    seen = []
    for _ in range(3):
        data, ancillary, _, _ = theirs.recvmsg(100, socket.CMSG_SPACE(64 * 4))
        passed = [f for _, _, raw in ancillary for f in array.array("i", raw)]
        seen.append((data, len(passed)))
        for fd in passed:
            os.close(fd)
    assert seen == [(b"a", 1), (b"b", 1), (b"cdef", 1)]
    for fd in fds:
        os.close(fd)
    sock.close()
    theirs.close()


async def test_several_descriptors_in_one_message_are_all_taken(tmp_path: Any) -> None:
    ours, theirs = socket.socketpair()
    sock = FdSocket(fileno=ours.detach())
    got: list[int] = []
    sock.arrived = got.append
    fds = array.array("i", [path(tmp_path, f"f{n}") for n in range(64)])
    theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    assert sock.recv(10) == b"x"
    assert len(got) == 64
    assert not any(os.get_inheritable(fd) for fd in got)
    for fd in (*fds, *got):
        os.close(fd)
    sock.close()
    theirs.close()


async def test_a_link_to_a_listening_socket_that_came_as_a_descriptor(tmp_path: Any) -> None:
    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
    ):
        fd = os.open(tmp_path / "s.sock", os.O_PATH)
        os.rename(tmp_path / "s.sock", tmp_path / "elsewhere")
        async with peers.link(f"unix:///proc/self/fd/{fd}") as link:
            assert (await call(link)).id == "c-1"
        os.close(fd)
        os.rename(tmp_path / "elsewhere", tmp_path / "s.sock")
        assert server.connections == 1


async def test_a_descriptor_number_that_is_used_again_reaches_the_new_socket(
    tmp_path: Any,
) -> None:
    urls = [f"unix://{tmp_path}/{n}.sock" for n in "ab"]
    async with (
        serve(urls[:1], [Echo()], A.source("/a")),
        serve(urls[1:], [Echo()], A.source("/b")),
        Peers(A.source("/c")) as peers,
    ):
        spare = os.open("/dev/null", os.O_RDONLY)
        for name in "abab":
            fd = os.open(tmp_path / f"{name}.sock", os.O_PATH)
            os.dup2(fd, spare)
            os.close(fd)
            async with peers.link(f"unix:///proc/self/fd/{spare}") as link:
                assert link.handshake.peer_id.path == f"/{name}"
                assert (await call(link)).id
        assert peers.connections == 2
        os.close(spare)
        with pytest.raises(UnavailableError, match="no such descriptor"):
            async with peers.link(f"unix:///proc/self/fd/{spare}"):
                pass


def _send_files(sock: socket.socket, count: int) -> None:
    for _ in range(count):
        file = os.memfd_create("x")
        socket.send_fds(sock, [b"\1"], [file])
        os.close(file)


@contextmanager
def _strangers(path: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections on which a TLS record begins and does not end."""
    with ExitStack() as stack:
        made = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(count)]
        for one in made:
            one.connect(path)
            one.send(b"\x16\x03\x01\x10\x00")
        yield made


async def test_who_has_not_shown_a_certificate_makes_us_hold_few_descriptors(
    tmp_path: Any,
) -> None:
    async with serve([f"unix://{tmp_path}/s.sock"], [Echo()], A.source("/s")):
        before = _open()
        with _strangers(f"{tmp_path}/s.sock", 2) as made:
            for one in made:
                await asyncio.to_thread(_send_files, one, 200)
            sent = 2 + 2 * 2 + 2 * 64  # both ends of each, a handle on the process, the files
            await until(lambda: _open() >= before + sent, "the descriptors to come", bar=0.5)
            await until(lambda: _unread(made) == 0, "all to be read", bar=0.5)
            assert _open() == before + sent
        await until(lambda: _open() <= before, "every descriptor to be closed", bar=0.5)


async def test_strangers_descriptors_leave_room_for_those_of_callers(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    claimed = asyncio.Event()

    async def claim(caller: Any, connection: Any) -> Any:
        await claimed.wait()
        os.close(await caller.fds.claim(connection.labels["0"], 1.0))
        return connection

    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo(claim)], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
        peers.link(server.urls[0]) as link,
    ):
        resource.setrlimit(resource.RLIMIT_NOFILE, (800, hard))
        try:
            fd = path(tmp_path)
            url = link.fds.send(fd)
            os.close(fd)
            async with asyncio.TaskGroup() as group:
                asked = group.create_task(call(link, url))
                await until(lambda: len(_held()) == 1, "the caller's descriptor", bar=0.5)
                with _strangers(f"{tmp_path}/s.sock", 8) as made:
                    for one in made:
                        await asyncio.to_thread(_send_files, one, 64)
                    await until(lambda: _unread(made) == 0, "all to be read", bar=0.5)
                    assert sum(_held()) == 800 // 4
                    claimed.set()
                    assert (await asked).id
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert "holds most of 200 file descriptors" in caplog.text
    assert not _held()


def _held() -> list[int]:
    return [len(one) for one in Received._holding]


def _unread(made: list[socket.socket]) -> int:
    """Bytes these unix sockets sent that the other end has not read."""
    left = array.array("i", [0])
    total = 0
    for one in made:
        fcntl.ioctl(one, termios.TIOCOUTQ, left)
        total += left[0]
    return total


CONNECT_AND_END = """
import socket, sys
made = socket.socket(socket.AF_UNIX)
made.connect(sys.argv[1])
with socket.socket(fileno=0) as back:
    socket.send_fds(back, [b"x"], [made.fileno()])
"""


async def _connected_by_another(path: str) -> tuple[socket.socket, int]:
    """A connection made by a process that has ended since, and that process's number."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        run = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CONNECT_AND_END, path, stdin=theirs
        )
        assert await run.wait() == 0
        _, [fd], _, _ = socket.recv_fds(ours, 1, 1)
    return socket.socket(fileno=fd), run.pid


async def test_a_caller_is_known_to_run_and_one_that_handed_its_connection_on_to_have_ended(
    tmp_path: Any,
) -> None:
    seen: list[tuple[Credentials, bool]] = []

    async def look(caller: Any, connection: Any) -> Any:
        seen.append((caller.process, await asyncio.to_thread(ended, caller.process)))
        return connection

    before = _open()
    url = f"unix://{tmp_path}/s.sock"
    async with serve([url], [Echo(look)], A.source("/s")) as server, Peers(A.source("/c")) as peers:
        async with peers.link(url) as link:
            await call(link)
        made, pid = await _connected_by_another(f"{tmp_path}/s.sock")
        context = context_of(A.source("/c").identity, server=False)
        _reader, writer = await asyncio.open_unix_connection(
            sock=made, ssl=context, server_hostname=""
        )
        h2 = H2Connection(H2Configuration(header_encoding="utf-8"))
        h2.initiate_connection()
        h2.send_headers(1, HEADERS)
        h2.send_data(1, struct.pack(">BI", 0, 0), end_stream=True)
        writer.write(h2.data_to_send())
        await until(lambda: len(seen) == 2, "the second call", bar=0.5)
        writer.transport.abort()
        await until(lambda: server.connections == 1, "its connection to end", bar=0.5)
        assert not ended(seen[0][0])
    assert [(who.pid, gone) for who, gone in seen] == [(os.getpid(), False), (pid, True)]
    await until(lambda: _open() <= before, "every handle to be closed", bar=0.5)
    assert ended(seen[0][0])  # its connection ended: nothing is believed of it any more


def test_a_process_has_ended_when_its_handle_says_so_or_is_another_file() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        handle = os.pidfd_open(process.pid)
        who = Credentials(process.pid, 0, 0, handle)
        assert not ended(who)
        assert ended(Credentials(process.pid, 0, 0))
        other = os.pidfd_open(os.getpid())
        assert ended(Credentials(process.pid, 0, 0, other))
        os.close(other)
        process.kill()
    assert ended(who)
    os.close(handle)
    assert ended(who)


def _open() -> int:
    return len(os.listdir("/proc/self/fd"))


def _holds(inode: int) -> list[int]:
    """Our descriptors of that inode, as the kernel lists them."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.stat(f"/proc/self/fd/{name}").st_ino == inode:
                found.append(int(name))
        except OSError:
            continue
    return found


async def test_many_answers_that_name_one_file_at_once_bring_it_to_each_call(tmp_path: Any) -> None:
    calls, came = 40, asyncio.Barrier(40)
    fd = path(tmp_path, "shared")

    async def answer(caller: Any, connection: Any) -> Any:
        await came.wait()
        connection.labels["back"] = caller.fds.send(fd)
        return connection

    async def ask(peers: Peers, url: str) -> None:
        async with peers.link(url) as link:
            back = (await call(link)).labels["back"]
            os.close(await link.fds.claim(back, 5.0))

    async with (
        serve([f"unix://{tmp_path}/s.sock"], [Echo(answer)], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(calls):
            group.create_task(ask(peers, server.urls[0]))
    os.close(fd)

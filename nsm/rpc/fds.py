"""File descriptors beside TLS: they ride on the raw socket's bytes (`wire.md` §5).

Nothing in a call announces a descriptor. A receiver keeps what came with a
connection's bytes, by (device, inode), until a call asks for the file that its
message names, which may be before or after the descriptor arrives. What nobody
asks for is closed soon, because a held descriptor keeps a network namespace,
and every device in it, alive.
"""

import array
import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import resource
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from nsm.caller import Credentials, inode_url, parse_inode_url
from nsm.errors import ExhaustedError, UnavailableError
from nsm.identity.attest import connected

log = logging.getLogger(__name__)

ROOM = 64  # descriptors one read has room for; one more and the kernel drops the rest
_SPACE = socket.CMSG_SPACE(ROOM * array.array("i").itemsize)
_RETRY_FULL = 0.005  # seconds between attempts at a unix socket whose backlog is full
_SHARE = 4  # one part in so many of the open files a process may have is for unclaimed ones
_MOST = 16384  # unclaimed ones, however many files it may have open
_HARD = 8  # a running call keeps unclaimed descriptors alive this many times longer

Key = tuple[int, int]  # st_dev, st_ino


def duplicate(fd: int) -> int:
    """Another descriptor of the same file, closed on exec; O_PATH stays O_PATH."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)


def url_of(fd: int) -> str:
    """The `inode://dev/ino` of an open descriptor of ours."""
    found = os.fstat(fd)
    return inode_url(found.st_dev, found.st_ino)


class _TooManyInFlightError(Exception):
    """The kernel takes no more descriptors of this user before some are received."""


def key_of(fd: int) -> Key:
    """Device and inode of a descriptor somebody sent, from what the kernel has cached.

    `fstat` would ask the file system, and a file of a hung network or FUSE one
    would stop the event loop of whoever received it. Raises OSError.
    """
    if _libc.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_INO, _statx_buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    ino, major, minor = _STATX.unpack_from(_statx_buffer, _STATX_AT)
    return os.makedev(major, minor), ino


_CLOEXEC = int(socket.MSG_CMSG_CLOEXEC)  # an enum's own arithmetic costs a microsecond a read
_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _STATX_INO = 0x1000, 0x4000, 0x100
_STATX = struct.Struct("=Q96xII")  # stx_ino, then stx_dev_major and stx_dev_minor
_STATX_AT = 32  # where stx_ino begins
_statx_buffer = ctypes.create_string_buffer(256)  # used by the loop's thread only


_REPEATS = 16  # times the limit: how often few files may be queued before a peer reads


class FdSocket(socket.socket):
    """A connected unix stream socket whose every read takes descriptors and whose writes
    carry the queued ones: each on a message of one byte of its own, as upstream does it.
    """

    def __init__(
        self,
        family: int = socket.AF_UNIX,
        type: int = socket.SOCK_STREAM,  # noqa: A002 - the base class's name
        proto: int = 0,
        fileno: int | None = None,
    ) -> None:
        super().__init__(family, type, proto, fileno)
        self.process: Credentials | None = None  # its handle is closed with the socket
        self.arrived: Callable[[int], None] = os.close
        self.closed: Callable[[], None] | None = None
        self._queue: deque[Key] = deque()
        self._files: dict[Key, list[int]] = {}  # the duplicate, and how often it is in the queue

    def queue(self, fd: int, limit: int) -> Key:
        """Let a duplicate of fd ride on the next bytes; at most limit wait at once."""
        found = os.fstat(fd)
        key = (found.st_dev, found.st_ino)
        # Sent as often as it was queued, though receivers match by inode: each call
        # counts on one of its own, and one that ends takes what it claimed with it.
        if key in self._files and len(self._queue) < _REPEATS * limit:
            self._files[key][1] += 1
            self._queue.append(key)
            return key
        if len(self._files) >= limit or key in self._files:
            raise ExhaustedError(
                f"{limit} file descriptors already wait to be sent on this connection",
                hint="the peer does not read",
            )
        self._files[key] = [duplicate(fd), 1]
        self._queue.append(key)
        return key

    def _sent(self) -> None:
        key = self._queue.popleft()
        held = self._files[key]
        held[1] -= 1
        if not held[1]:
            os.close(self._files.pop(key)[0])

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer)[: nbytes or None]
        got, ancillary, notes, _ = self.recvmsg_into([view], _SPACE, int(flags) | _CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                for fd in fds:
                    self.arrived(fd)
        if notes & socket.MSG_CTRUNC:
            log.warning(
                "file descriptors of a peer are lost: it sent more than %d at once, or this "
                "process may have no more open (RLIMIT_NOFILE)",
                ROOM,
            )
        return got

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        buffer = bytearray(bufsize)
        return bytes(buffer[: self.recv_into(buffer, 0, flags)])

    def send(self, data: Any, flags: int = 0) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while self._queue and done < len(view):
                # A byte for each, as Go does, but the last one comes with all that is left: a
                # receiver's read ends behind what a descriptor came with, so this saves one.
                until = done + 1 if len(self._queue) > 1 else None
                done += self._send_first(view[done:until], flags)
                if until is None:
                    return done
            return done + super().send(view[done:], flags) if done < len(view) else done
        except (BlockingIOError, InterruptedError):
            if done:
                return done
            raise
        except _TooManyInFlightError:
            return done + super().send(view[done:], flags)  # the descriptors later
        except (BrokenPipeError, ConnectionResetError):
            if self._said_something():
                return len(view)  # nobody reads it, but reading goes on and has the reason
            raise

    def _send_first(self, data: memoryview, flags: int) -> int:
        """Send data with the first descriptor of the queue; how many bytes went."""
        fd = self._files[self._queue[0]][0]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        try:
            sent = self.sendmsg([data], rights, flags)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise _TooManyInFlightError from None
            raise
        self._sent()
        return sent

    def _said_something(self) -> bool:
        """Whether the peer's last words, such as a TLS alert, are still to be read."""
        with contextlib.suppress(OSError):
            return bool(super().recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False

    def close(self) -> None:
        super().close()
        process, self.process = self.process, None
        if process is not None and process.pidfd is not None:
            os.close(process.pidfd)
        while self._queue:
            self._sent()
        if self.closed:
            closed, self.closed = self.closed, None
            closed()


async def connect(path: str) -> FdSocket:
    """A non-blocking connection to the unix socket at path. Raises OSError."""
    sock = FdSocket()
    try:
        sock.setblocking(False)
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:  # the backlog is full; a unix socket cannot wait for a place
                await asyncio.sleep(_RETRY_FULL)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def credentials_of(sock: socket.socket) -> Credentials:
    """The process at the other end of a unix socket, by SO_PEERCRED."""
    return Credentials(
        *array.array("i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    )


def process_of(sock: socket.socket) -> Credentials:
    """As `credentials_of`, with a handle on that very process, the caller's to close."""
    who = connected(sock)
    return Credentials(who.pid, who.uid, who.gid, who.pidfd if who.pidfd >= 0 else None)


def _most_held() -> int:
    """How many unclaimed descriptors all connections of this process may hold together."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if soft == resource.RLIM_INFINITY else min(soft // _SHARE, _MOST)


@dataclass(slots=True)
class _Held:
    fd: int
    since: float
    arrivals: int = 1
    claims: int = 0
    users: set[object] = field(default_factory=set)  # calls that claimed it and still run


class Received:
    """What came with one connection's bytes and was not claimed yet.

    At most limit descriptors, and few before the peer has shown who it is; each for
    age seconds after it came, or up to eight times that while a call runs that may
    still ask. A claimed one goes when the calls that claimed it have ended. All
    connections of a process together hold a part of what it may have open: who
    holds most of it, strangers first, loses its oldest to the next that comes.
    """

    _holding: ClassVar[set["Received"]] = set()  # those that hold any
    _total: ClassVar[int] = 0

    def __init__(self, limit: int, age: float, whose: str = "the peer") -> None:
        self.whose = whose
        self.admitted = False  # whether the peer's handshake is over and good
        self._limit = limit
        self._complained = False
        self._age = age
        self._held: dict[Key, _Held] = {}
        self._waiting: dict[Key, list[asyncio.Future[None]]] = {}
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None
        self._open = True

    def __len__(self) -> int:
        return len(self._held)

    def arrive(self, fd: int) -> None:
        """Take a descriptor that just came; never raises."""
        try:
            key = key_of(fd)
        except OSError as error:
            log.warning("%s sent a file descriptor that cannot be looked at: %s", self.whose, error)
            os.close(fd)
            return
        if not self._open:
            os.close(fd)
            return
        loop = asyncio.get_running_loop()
        if key in self._held:
            os.close(fd)
            self._held[key].arrivals += 1
            self._held[key].since = loop.time()
        else:
            limit = self._limit if self.admitted else min(self._limit, ROOM)
            if len(self._held) >= limit:
                self.evict(f"sent more than {limit}")
            elif Received._total >= (most := _most_held()):
                greediest = max(Received._holding, key=lambda one: (not one.admitted, len(one)))
                greediest.evict(f"holds most of {most}")
            self._held[key] = _Held(fd, loop.time())
            Received._total += 1
            Received._holding.add(self)
        for waiting in self._waiting.pop(key, ()):
            if not waiting.done():
                waiting.set_result(None)
        if self._timer is None:
            self._timer = loop.call_later(self._age, self._sweep)

    async def claim(self, url: str, patience: float, call: object) -> int:
        """A descriptor of its own for the claimer; see `nsm.caller.Fds.claim`."""
        key, loop = parse_inode_url(url), asyncio.get_running_loop()
        until = loop.time() + patience
        while key not in self._held:
            left = until - loop.time()
            if not self._open:
                raise UnavailableError(
                    f"the connection of {self.whose} ended before the file descriptor of {url} came"
                )
            if left <= 0:
                raise UnavailableError(
                    f"no file descriptor of {url} came from {self.whose} within {patience:g} s",
                    hint="send the open file beside the call, on the same unix connection",
                )
            arrival: asyncio.Future[None] = loop.create_future()
            self._waiting.setdefault(key, []).append(arrival)
            try:
                await asyncio.wait({arrival}, timeout=left)
            finally:
                others = self._waiting.get(key, [])
                if arrival in others:
                    others.remove(arrival)
                    if not others:
                        del self._waiting[key]
        held = self._held[key]
        if call not in held.users:
            held.users.add(call)
            held.claims += 1
        return duplicate(held.fd)

    def begin(self) -> None:
        """A call begins that may ask for descriptors."""
        self._running += 1

    def end(self, call: object, *, long: bool = False) -> None:
        """A call ended, one that had begun unless long: what it claimed is not kept for it."""
        self._running -= not long
        for key, held in list(self._held.items()):
            if call in held.users:
                held.users.discard(call)
                if not held.users and held.claims >= held.arrivals:
                    self._drop(key)

    def close(self) -> None:
        """The connection ended: everything goes, and who waits is told."""
        self._open = False
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for key in list(self._held):
            self._drop(key)
        for waiting in [w for some in self._waiting.values() for w in some]:
            if not waiting.done():
                waiting.set_result(None)
        self._waiting.clear()

    def evict(self, why: str) -> None:
        """Close the oldest; why says what the peer did, before "file descriptors"."""
        self._drop(next(iter(self._held)))  # the oldest: the newest is about to be asked for
        if not self._complained:
            self._complained = True
            log.warning(
                "%s %s file descriptors that no call asked for; the oldest are closed",
                self.whose,
                why,
            )

    def _drop(self, key: Key) -> None:
        os.close(self._held.pop(key).fd)
        Received._total -= 1
        if not self._held:
            Received._holding.discard(self)

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        keep = self._age * (_HARD if self._running else 1)
        for key, held in list(self._held.items()):
            if not held.users and now - held.since >= keep:
                self._drop(key)
        self._timer = loop.call_later(self._age, self._sweep) if self._held else None


class CallFds:
    """One call's view of its connection's descriptors: the `nsm.caller.Fds` of that call.

    long: it may run for hours, so that nothing is kept because it might ask.
    """

    def __init__(
        self, received: Received, sock: FdSocket, limit: int, *, long: bool = False
    ) -> None:
        self._received = received
        self._sock = sock
        self._limit = limit
        self._long = long
        self._ended = False
        if not long:
            received.begin()

    async def claim(self, url: str, patience: float = 2.0) -> int:
        """See `nsm.caller.Fds.claim`."""
        return await self._received.claim(url, patience, self)

    def send(self, fd: int) -> str:
        """See `nsm.caller.Fds.send`."""
        if self._sock.fileno() < 0:
            raise UnavailableError(
                f"the connection of {self._received.whose} ended before a file descriptor was sent"
            )
        return inode_url(*self._sock.queue(fd, self._limit))

    def end(self) -> None:
        """The call ended."""
        if not self._ended:
            self._ended = True
            self._received.end(self, long=self._long)

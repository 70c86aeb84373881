"""Speaking rtnetlink: messages out, answers in, and the kernel's refusals as our errors.

A small codec of our own, because a wire has to cost what its kernel objects
cost: several messages leave in one `sendmsg`, only the last and the refused
ones are answered. pyroute2 would take eleven times as long for the same wire.
The rest of the project reaches netlink through this package only, and errno
numbers become named errors only here (`explain`).

Everything here blocks, for as long as the kernel works. Call it in a thread.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Self

from nsm.errors import (
    ExhaustedError,
    InternalError,
    InvalidError,
    NotFoundError,
    NsmError,
    PreconditionError,
    RightsError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)

# linux/netlink.h, linux/rtnetlink.h
REQUEST, ACK, ECHO, DUMP = 0x1, 0x4, 0x8, 0x300
REPLACE, EXCL, CREATE, APPEND = 0x100, 0x200, 0x400, 0x800
_DUMP_INTR = 0x10
_ERROR, _DONE = 2, 3
NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWNEIGH, DELNEIGH, GETNEIGH = 28, 29, 30
NEWRULE, DELRULE, GETRULE = 32, 33, 34
NEWNSID, DELNSID, GETNSID = 88, 89, 90
ROUTE, GENERIC = 0, 16
NESTED = 0x8000
SOL_NETLINK = 270
SO_SNDBUFFORCE = 32  # asm-generic/socket.h; Python has no name for it
_CAP_ACK, _EXT_ACK, _STRICT = 10, 11, 12

_PARTS = 1024  # of a sendmsg (UIO_MAXIOV)
_ROOM = 1 << 16  # bytes that every socket has for sending
_HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_PATIENCE = struct.pack("=qq", 10, 0)  # seconds; the kernel answers at once or has a defect


class NameTakenError(TakenError):
    """An interface of that name is there, and it is not this wire's."""


class VniTakenError(TakenError):
    """Another tunnel of the underlay has that VNI on that port: agree on another one."""


class PortTakenError(TakenError):
    """Another socket of the underlay has that UDP port: draw another one."""


class RouteTakenError(TakenError):
    """Somebody else's route to the same prefix is there; theirs stays."""


class NamespaceGoneError(NotFoundError):
    """The namespace went away, and with it everything of ours that stood in it."""


class Refusal(Exception):  # noqa: N818 - not an error yet: the caller decides what it means
    """The kernel said no to one message."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(number, text)
        self.errno = number
        self.text = text

    def __str__(self) -> str:
        said = os.strerror(self.errno)
        return f"{said} ({self.text})" if self.text else said


# --- messages --------------------------------------------------------------------------------


def attr(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = 4 + len(value)
    return _ATTR.pack(size, kind) + value + b"\0" * (-size % 4)


def u32(kind: int, value: int) -> bytes:
    """A 32-bit attribute."""
    return struct.pack("=HHI", 8, kind, value)


def text(kind: int, value: str) -> bytes:
    """A string attribute, zero-terminated."""
    return attr(kind, value.encode() + b"\0")


def nested(kind: int, *parts: bytes) -> bytes:
    """Attributes in an attribute."""
    return attr(kind | NESTED, b"".join(parts))


def message(kind: int, flags: int, body: bytes) -> bytearray:
    """A whole message; its sequence number is set when it is sent."""
    return bytearray(_HEADER.pack(16 + len(body), kind, flags | REQUEST, 0, 0) + body)


def attrs(data: memoryview, start: int) -> Iterator[tuple[int, memoryview]]:
    """The attributes of a message or a nest, from offset start; stops at garbage."""
    end = len(data)
    while start + 4 <= end:
        size, kind = _ATTR.unpack_from(data, start)
        if size < 4 or start + size > end:
            return
        yield kind & 0x3FFF, data[start + 4 : start + size]
        start += size + 3 & ~3


def table(
    data: memoryview, start: int, wanted: frozenset[int] | None = None
) -> dict[int, memoryview]:
    """The attributes by number, the last one of each, all or those wanted.

    The same as `dict(attrs(data, start))`; written out because a look at a wire reads
    some hundred attributes.
    """
    found: dict[int, memoryview] = {}
    end, read = len(data), _ATTR.unpack_from
    while start + 4 <= end:
        size, kind = read(data, start)
        if size < 4 or start + size > end:
            break
        kind &= 0x3FFF
        if wanted is None or kind in wanted:
            found[kind] = data[start + 4 : start + size]
        start += size + 3 & ~3
    return found


def number(value: memoryview) -> int:
    """A little integer attribute in the host's byte order."""
    return int.from_bytes(value, "little" if _LITTLE else "big")


def signed(value: memoryview) -> int:
    """A signed 32-bit attribute."""
    return int(struct.unpack("=i", value)[0])


def string(value: memoryview) -> str:
    """A string attribute; what is not UTF-8 is kept readable."""
    return bytes(value).rstrip(b"\0").decode(errors="backslashreplace")


_LITTLE = struct.pack("=H", 1) == b"\x01\x00"


# --- sockets ---------------------------------------------------------------------------------


class Socket:
    """One netlink socket for one batch, in the namespace its thread was in when it was made."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sequence = 0
        # without the echo of our message the kernel's sentence follows the errno at a fixed place
        sock.setsockopt(SOL_NETLINK, _CAP_ACK, 1)
        sock.setsockopt(SOL_NETLINK, _EXT_ACK, 1)
        # strict: dumps filter by device in the kernel, so that a wire's look costs a wire
        sock.setsockopt(SOL_NETLINK, _STRICT, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _PATIENCE)

    @classmethod
    def here(cls, protocol: int = ROUTE) -> Self:
        """A socket in the namespace the calling thread is in: ROUTE or GENERIC."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        return cls(socket.socket(socket.AF_NETLINK, kind, protocol))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def close(self) -> None:
        """Close it; a second time does nothing."""
        self._sock.close()

    def do(self, batch: Sequence[bytearray]) -> list[Refusal | None]:
        """Send all messages at once; per message the kernel's refusal, or None if it was done.

        A refused message does not stop the ones behind it.
        """
        if not batch:
            return []
        first = self._sequence + 1
        self._number(batch, last_acknowledged=True)
        last = self._sequence
        self._send(batch)
        results: list[Refusal | None] = [None] * len(batch)
        while True:
            for kind, _, sequence, data in self._receive():
                if kind != _ERROR or not first <= sequence <= last:
                    continue
                code = struct.unpack_from("=i", data)[0]
                if code:
                    results[sequence - first] = Refusal(-code, _sentence(data))
                if sequence == last:
                    return results

    def _send(self, batch: Sequence[bytearray]) -> None:
        """All of it in one call, however much: the kernel works it off without a break."""
        if len(batch) <= _PARTS and sum(map(len, batch)) <= _ROOM:
            self._sock.sendmsg(batch)
            return
        whole = b"".join(batch)
        with suppress(PermissionError):  # then what is too long is refused
            self._sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 2 * len(whole))
        try:
            self._sock.send(whole)
        except OSError as failure:
            if failure.errno != errno.EMSGSIZE:
                raise
            raise Refusal(errno.EMSGSIZE) from failure

    def ask(self, question: bytearray) -> memoryview:
        """The one answer to a question; raises Refusal."""
        (answer,) = self.ask_all([question])
        if isinstance(answer, Refusal):
            raise answer
        return answer

    def ask_all(self, questions: Sequence[bytearray]) -> list[memoryview | Refusal]:
        """One answer to each question, in their order; all are sent at once.

        At most some thirty of them: the answers wait in the socket's buffer.
        """
        if not questions:
            return []
        first = self._sequence + 1
        self._number(questions, last_acknowledged=False)
        self._sock.sendmsg(questions)
        answers: dict[int, memoryview | Refusal] = {}
        while len(answers) < len(questions):
            for kind, _, sequence, data in self._receive():
                if sequence < first:
                    continue
                if kind == _ERROR:
                    answers[sequence] = Refusal(-struct.unpack_from("=i", data)[0], _sentence(data))
                else:
                    answers[sequence] = data
        return [answers[first + n] for n in range(len(questions))]

    def dump(self, question: bytearray) -> list[tuple[int, memoryview]]:
        """All answers to a dump, as (message type, body); raises Refusal.

        The kernel puts a dump's error into its end mark, and says when the thing
        dumped changed meanwhile: then all of it is asked again.
        """
        struct.pack_into("=H", question, 6, REQUEST | DUMP)
        for _ in range(10):
            self._number([question], last_acknowledged=False)
            self._sock.send(question)
            answers, whole = self._dumped(self._sequence)
            if whole:
                return answers
        return answers  # it changes all the time: this is as good as any moment

    def _dumped(self, expected: int) -> tuple[list[tuple[int, memoryview]], bool]:
        answers: list[tuple[int, memoryview]] = []
        whole = True
        while True:
            for kind, flags, sequence, data in self._receive():
                if sequence != expected:
                    continue
                whole = whole and not flags & _DUMP_INTR
                if kind in (_DONE, _ERROR):
                    code = struct.unpack_from("=i", data)[0] if len(data) >= 4 else 0
                    if code:
                        raise Refusal(-code, _sentence(data))
                    return answers, whole
                answers.append((kind, data))

    def _number(self, batch: Sequence[bytearray], *, last_acknowledged: bool) -> None:
        for entry in batch:
            self._sequence += 1
            struct.pack_into("=I", entry, 8, self._sequence)
        if last_acknowledged:
            (flags,) = struct.unpack_from("=H", batch[-1], 6)
            struct.pack_into("=H", batch[-1], 6, flags | ACK)

    def _receive(self) -> Iterator[tuple[int, int, int, memoryview]]:
        try:
            data = memoryview(self._sock.recv(1 << 16))
        except BlockingIOError:
            raise InternalError("the kernel did not answer a netlink message within 10 s") from None
        return split(data)


def split(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """The messages of one datagram: type, flags, sequence number, body."""
    offset = 0
    while offset + 16 <= len(data):
        size, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if size < 16:
            return
        yield kind, flags, sequence, data[offset + 16 : offset + size]
        offset += size + 3 & ~3


def _sentence(data: memoryview) -> str:
    """The kernel's own words to a refusal (NLMSGERR_ATTR_MSG), if it has any."""
    for start in (20, 4):  # an error holds our header first, a dump's end does not
        if len(data) > start:
            for kind, value in attrs(data, start):
                if kind == 1:
                    return string(value)
    return ""


# --- errors ----------------------------------------------------------------------------------

_MEANING: dict[int, tuple[type[NsmError], str]] = {
    errno.EEXIST: (TakenError, ""),
    errno.EADDRINUSE: (TakenError, "another socket of the underlay has the UDP port"),
    errno.EPERM: (RightsError, "it needs CAP_NET_ADMIN and CAP_SYS_ADMIN"),
    errno.EACCES: (RightsError, "it needs CAP_NET_ADMIN; for IPv6 addresses: is disable_ipv6 set?"),
    errno.EROFS: (RightsError, "mount /proc/sys read-write for this process"),
    errno.EOPNOTSUPP: (UnsupportedError, "the running kernel has no such feature"),
    errno.EAFNOSUPPORT: (UnsupportedError, "the running kernel has no such address family"),
    errno.EINVAL: (InvalidError, ""),
    errno.ERANGE: (InvalidError, ""),
    errno.EADDRNOTAVAIL: (InvalidError, ""),
    errno.ENAMETOOLONG: (InvalidError, ""),
    errno.ENODEV: (PreconditionError, ""),
    errno.ENOENT: (PreconditionError, ""),
    errno.ESRCH: (PreconditionError, ""),
    errno.ENONET: (PreconditionError, "the underlay's namespace is gone"),
    errno.ENETUNREACH: (PreconditionError, "no route leads there"),
    errno.EHOSTUNREACH: (PreconditionError, "no route leads there"),
    errno.ENETDOWN: (PreconditionError, "bring the device up"),
    errno.EBUSY: (UnavailableError, ""),
    errno.EAGAIN: (UnavailableError, ""),
    errno.ENOBUFS: (ExhaustedError, "the kernel is out of memory for it"),
    errno.ENOMEM: (ExhaustedError, "the kernel is out of memory for it"),
    errno.ENOSPC: (ExhaustedError, "a limit of the kernel is reached"),
    errno.EMFILE: (ExhaustedError, "raise the limit of open files"),
    errno.ENFILE: (ExhaustedError, "raise fs.file-max"),
}


def explain(refusal: Refusal | OSError, command: str, where: object) -> NsmError:
    """The refusal as one of our errors: what was tried, where, and what the kernel said."""
    code = refusal.errno or errno.EIO
    kind, hint = _MEANING.get(code, (InternalError, ""))
    said = str(refusal) if isinstance(refusal, Refusal) else os.strerror(code)
    return kind(f"`{command}` in {where}: {said}", hint=hint)

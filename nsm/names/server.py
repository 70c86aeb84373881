"""A DNS server's sockets: questions come in by UDP and TCP, answers go out whole or cut.

    async with serving(answer, [("172.16.0.1", 53)], Sockets(routing.inside)):
        ...

Whoever sends something here is a stranger: what is no question gets no answer (an answer
to an answer would come back for ever), what is a wrong question gets a short one, and
whatever is sent, no more is done at once than there is room for.
"""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import structlog

from nsm import domains
from nsm.errors import PreconditionError, RightsError, TakenError
from nsm.identity.background import background

AT_ONCE = 256  # questions being answered; datagrams beyond that are dropped, as by a full network
STREAMS = 64  # TCP connections at once
IDLE = 10.0  # seconds a TCP connection may be silent
PATIENCE = 8.0  # seconds for one answer: who asks has given up by then
PAYLOAD = 1232  # bytes of a datagram that no path cuts to pieces
_HEADER = struct.Struct("!6H")
_FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}
log = structlog.get_logger(__name__)

Server = tuple[str, int]
Answerer = Callable[[dns.message.QueryMessage, str], Awaitable[dns.message.Message]]
"""Given a question and the address of who asks: the answer."""
Inside = Callable[[Callable[[], socket.socket]], socket.socket]


class Sockets:
    """Makes sockets in a network namespace: this process's, or where `inside` leads a thread."""

    def __init__(self, inside: Inside | None = None) -> None:
        self._inside = inside

    async def make(self, host: str, kind: socket.SocketKind) -> socket.socket:
        """A socket of the family of host; the caller closes it."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        inside = self._inside
        if inside is None:
            return _made(family, kind)
        return await asyncio.to_thread(inside, lambda: _made(family, kind))


def _made(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    made = socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    # an address that is not there yet will be; binding to it need not wait for it
    made.setsockopt(*_FREEBIND[family], 1)
    return made


@asynccontextmanager
async def serving(
    answer: Answerer, addresses: Sequence[Server], sockets: Sockets
) -> AsyncIterator[None]:
    """Answer questions at these addresses, by UDP and TCP, for as long as the block lasts.

    Raises TakenError where another server has an address, RightsError.
    """
    await asyncio.to_thread(prepare)
    loop = asyncio.get_running_loop()
    async with background() as tasks:
        desk = _Desk(answer, tasks)
        listening: list[asyncio.Server] = []
        transports: list[asyncio.DatagramTransport] = []
        try:
            for where in addresses:
                datagrams = await _bound(where, socket.SOCK_DGRAM, sockets)
                transport, _ = await loop.create_datagram_endpoint(
                    lambda: _Datagrams(desk), sock=datagrams
                )
                transports.append(transport)
                streams = await _bound(where, socket.SOCK_STREAM, sockets)
                listening.append(await asyncio.start_server(desk.connected, sock=streams))
            yield
        finally:
            for server in listening:
                server.close()
            for transport in transports:
                transport.close()
            desk.close()


def prepare() -> None:
    """Import what dnspython imports when a record first comes. Blocks."""
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]


async def _bound(where: Server, kind: socket.SocketKind, sockets: Sockets) -> socket.socket:
    made = await sockets.make(where[0], kind)
    try:
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
    except OSError as wrong:
        made.close()
        shown = domains.show_server(where)
        if wrong.errno == errno.EADDRINUSE:
            raise TakenError(
                f"another program answers DNS at {shown} already",
                hint="stop it, or have names served at another address",
            ) from wrong
        if wrong.errno in (errno.EACCES, errno.EPERM):
            raise RightsError(
                f"may not answer DNS at {shown}", hint="ports below 1024 need CAP_NET_BIND_SERVICE"
            ) from wrong
        raise PreconditionError(
            f"cannot answer DNS at {shown}: {os.strerror(wrong.errno or 0)}"
        ) from wrong
    return made


class _Desk:
    """Takes messages, sees that they are questions, and has them answered."""

    def __init__(self, answer: Answerer, tasks: asyncio.TaskGroup) -> None:
        self._answer = answer
        self._tasks = tasks
        self._busy = 0
        self._streams: set[asyncio.StreamWriter] = set()

    def datagram(
        self, data: bytes, whose: tuple[str, int], transport: asyncio.DatagramTransport
    ) -> None:
        """Answer it, unless it is no question or there is no room."""
        if self._busy >= AT_ONCE or not whose[1]:
            return
        self._busy += 1
        self._tasks.create_task(self._datagram(data, whose, transport), name="a DNS question")

    async def _datagram(
        self, data: bytes, whose: tuple[str, int], transport: asyncio.DatagramTransport
    ) -> None:
        try:
            wire = await self._answered(data, whose[0], datagram=True)
            if wire and not transport.is_closing():
                transport.sendto(wire, whose)
        finally:
            self._busy -= 1

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection beside the others."""
        if len(self._streams) >= STREAMS:
            writer.transport.abort()
            return
        self._streams.add(writer)
        self._tasks.create_task(self._stream(reader, writer), name="a DNS connection")

    async def _stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whose = writer.get_extra_info("peername") or ("", 0)
        try:
            while True:
                async with asyncio.timeout(IDLE):
                    (size,) = struct.unpack("!H", await reader.readexactly(2))
                    data = await reader.readexactly(size)
                wire = await self._answered(data, whose[0], datagram=False)
                if wire is None:
                    return
                writer.write(struct.pack("!H", len(wire)) + wire)
                async with asyncio.timeout(IDLE):
                    await writer.drain()
        except (OSError, EOFError, TimeoutError):  # they went, or said nothing
            return
        finally:
            self._streams.discard(writer)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    def close(self) -> None:
        for writer in self._streams:
            writer.transport.abort()

    async def _answered(self, data: bytes, whose: str, *, datagram: bool) -> bytes | None:
        """The answer as it goes out; None where there is to be none."""
        if len(data) < _HEADER.size:
            return None
        id_, flags, *counts = _HEADER.unpack_from(data)
        if flags & dns.flags.QR:
            return None
        if dns.opcode.from_flags(flags) != dns.opcode.QUERY:
            return _short(id_, flags, dns.rcode.NOTIMP)
        if counts[0] != 1 or counts[1]:
            return _short(id_, flags, dns.rcode.FORMERR)
        try:
            query = dns.message.from_wire(data)
        except (dns.exception.DNSException, ValueError, struct.error):
            return _short(id_, flags, dns.rcode.FORMERR)
        if not isinstance(query, dns.message.QueryMessage) or len(query.question) != 1:
            return _short(id_, flags, dns.rcode.FORMERR)
        try:
            async with asyncio.timeout(PATIENCE):
                response = await self._judged(query, whose)
            return _wire(query, response, datagram=datagram)
        except TimeoutError:
            return _short(id_, flags, dns.rcode.SERVFAIL)
        except Exception:  # a stranger's question must not end the server
            log.exception("a DNS question could not be answered", whose=whose)
            return _short(id_, flags, dns.rcode.SERVFAIL)

    async def _judged(self, query: dns.message.QueryMessage, whose: str) -> dns.message.Message:
        question = query.question[0]
        if query.edns > 0:
            response = reply(query)
            response.set_rcode(dns.rcode.BADVERS)
            return response
        if question.rdclass != dns.rdataclass.IN or question.rdtype in _NOT_ASKED:
            return refused(query)
        return await self._answer(query, whose)


_NOT_ASKED = {
    dns.rdatatype.AXFR,
    dns.rdatatype.IXFR,
    dns.rdatatype.OPT,
    dns.rdatatype.TSIG,
    dns.rdatatype.TKEY,
    dns.rdatatype.MAILA,
    dns.rdatatype.MAILB,
}


class _Datagrams(asyncio.DatagramProtocol):
    def __init__(self, desk: _Desk) -> None:
        self._desk = desk

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._desk.datagram(data, addr, self._transport)


def reply(query: dns.message.Message) -> dns.message.Message:
    """An answer to be filled; with EDNS where the question has it."""
    return dns.message.make_response(query, recursion_available=True, our_payload=PAYLOAD)


def refused(query: dns.message.Message) -> dns.message.Message:
    """The answer to what is not answered here."""
    response = reply(query)
    response.set_rcode(dns.rcode.REFUSED)
    return response


def failed(query: dns.message.Message, why: str) -> dns.message.Message:
    """The answer where nobody could say; why goes to who can read it (RFC 8914)."""
    response = reply(query)
    response.set_rcode(dns.rcode.SERVFAIL)
    if query.edns >= 0:
        error = dns.edns.EDEOption(dns.edns.EDECode.NETWORK_ERROR, why[:200])
        response.use_edns(0, payload=PAYLOAD, options=[error])
    return response


def _wire(
    query: dns.message.QueryMessage, response: dns.message.Message, *, datagram: bool
) -> bytes:
    room = 65535
    if datagram:
        room = min(max(query.payload, 512), PAYLOAD) if query.edns >= 0 else 512
    with suppress(dns.exception.TooBig):
        return response.to_wire(max_size=room)
    # a part of the addresses would be believed to be all of them
    response.answer, response.authority, response.additional = [], [], []
    response.flags |= dns.flags.TC
    return response.to_wire(max_size=room)


def _short(id_: int, flags: int, code: dns.rcode.Rcode) -> bytes:
    kept = flags & (0x7800 | dns.flags.RD)
    return _HEADER.pack(id_, dns.flags.QR | kept | code, 0, 0, 0, 0)

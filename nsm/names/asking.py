"""Questions to other DNS servers: by UDP, by TCP where an answer was cut; several at once.

A server that did not say, said garbage, failed or refused has not answered: the next, or
the others, are heard. Whoever answers first is not always right, so the caller says what
a good answer is.
"""

import asyncio
import os
import socket
import struct
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import dns.edns
import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype

from nsm import domains
from nsm.identity.background import background
from nsm.names.server import PAYLOAD, Server, Sockets

TRY = 0.5  # seconds until a datagram is sent again; the next wait is twice as long
_SAID = (dns.rcode.NOERROR, dns.rcode.NXDOMAIN)


@dataclass(frozen=True, slots=True)
class Said:
    """What one server came to: its message, or why there is none."""

    server: Server
    message: dns.message.QueryMessage | None = None
    why: str = ""

    @property
    def refused(self) -> bool:
        """Whether it says that it is not the one to be asked."""
        return self.message is not None and self.message.rcode() == dns.rcode.REFUSED

    @property
    def answered(self) -> bool:
        """Whether it said what is, or that there is nothing."""
        return self.message is not None and self.message.rcode() in _SAID


async def ask(
    query: dns.message.QueryMessage,
    server: Server,
    patience: float,
    sockets: Sockets,
    source: str = "",
) -> Said:
    """What the server says to the question within patience seconds; never raises for it."""
    who = domains.show_server(server)
    try:
        async with asyncio.timeout(patience):
            message = await _by_datagram(query, server, sockets, source)
            if query.edns >= 0 and message.rcode() in (dns.rcode.FORMERR, dns.rcode.NOTIMP):
                plain = dns.message.make_query(
                    query.question[0].name, query.question[0].rdtype, flags=query.flags
                )
                message = await _by_datagram(plain, server, sockets, source)
            if message.flags & dns.flags.TC:
                message = await _by_stream(query, server, sockets, source)
    except TimeoutError:
        return Said(server, why=f"{who} did not answer within {patience:g} s")
    except (OSError, EOFError) as wrong:
        why = os.strerror(wrong.errno) if isinstance(wrong, OSError) and wrong.errno else str(wrong)
        return Said(server, why=f"{who}: {why}")
    except (dns.exception.DNSException, ValueError, struct.error) as wrong:
        return Said(server, why=f"{who} answered what is no answer: {type(wrong).__name__}")
    code = message.rcode()
    why = "" if code in _SAID else f"{who} answered {dns.rcode.to_text(code)}"
    return Said(server, message, why)


async def hear(
    query: dns.message.QueryMessage,
    servers: Sequence[Server],
    patience: float,
    sockets: Sockets,
    *,
    source: str = "",
    stagger: float = 0.0,
) -> AsyncGenerator[Said, None]:
    """What servers say, in the order in which they do.

    stagger: each is asked only when the one before did not answer, or not for so long.
    Close it (`aclosing`) when enough was heard: who did not answer yet is no longer waited for.
    """
    async with background() as tasks:
        heard: asyncio.Queue[Said] = asyncio.Queue()

        async def one(server: Server) -> None:
            heard.put_nowait(await ask(query, server, patience, sockets, source))

        waiting, missing = list(servers), len(servers)
        while missing:
            while waiting:
                tasks.create_task(one(waiting.pop(0)), name="a question to a DNS server")
                if stagger:
                    break
            try:
                async with asyncio.timeout(stagger if waiting else None):
                    said = await heard.get()
            except TimeoutError:
                continue
            missing -= 1
            yield said


async def _by_datagram(
    query: dns.message.QueryMessage, server: Server, sockets: Sockets, source: str
) -> dns.message.QueryMessage:
    loop = asyncio.get_running_loop()
    with await sockets.make(server[0], socket.SOCK_DGRAM) as own:
        if source:
            own.bind((source, 0))
        # connected, so that the kernel takes answers from there alone, and tells of a refusal
        own.connect(server)
        wire, wait = query.to_wire(), TRY
        while True:
            await loop.sock_sendall(own, wire)
            try:
                async with asyncio.timeout(wait):
                    while True:
                        data = await loop.sock_recv(own, 65535)
                        if found := _reading(query, data):
                            return found
            except TimeoutError:
                wait *= 2


def _reading(query: dns.message.QueryMessage, data: bytes) -> dns.message.QueryMessage | None:
    """The message where it answers the question; None for what anybody may have sent."""
    try:
        return _read(query, data)
    except (dns.exception.DNSException, ValueError, struct.error):
        if len(data) >= 12 and data[:2] == struct.pack("!H", query.id):
            raise
        return None


def _read(query: dns.message.QueryMessage, data: bytes) -> dns.message.QueryMessage:
    message = dns.message.from_wire(data, ignore_trailing=True)
    if message.id == query.id and not message.question and message.rcode() not in _SAID:
        message.question = list(query.question)  # as servers do that read no further
    if not isinstance(message, dns.message.QueryMessage) or not query.is_response(message):
        raise ValueError("the answer to another question")
    return message


async def _by_stream(
    query: dns.message.QueryMessage, server: Server, sockets: Sockets, source: str
) -> dns.message.QueryMessage:
    loop = asyncio.get_running_loop()
    with await sockets.make(server[0], socket.SOCK_STREAM) as own:
        if source:
            own.bind((source, 0))
        await loop.sock_connect(own, server)
        wire = query.to_wire()
        await loop.sock_sendall(own, struct.pack("!H", len(wire)) + wire)
        (size,) = struct.unpack("!H", await _exactly(own, 2))
        return _read(query, await _exactly(own, size))


async def _exactly(own: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(own, size - len(data))
        if not more:
            raise EOFError("it closed the connection before the answer's end")
        data += more
    return data


def question(
    name: str,
    kind: dns.rdatatype.RdataType | str,
    *,
    flags: int = dns.flags.RD,
    dnssec: bool = False,
    options: Sequence[dns.edns.Option] = (),
) -> dns.message.QueryMessage:
    """A question of ours, with an id of its own."""
    made = dns.message.make_query(
        name, kind, use_edns=0, payload=PAYLOAD, want_dnssec=dnssec, options=list(options)
    )
    made.flags = dns.flags.Flag(flags)
    return made

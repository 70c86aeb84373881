"""The one place that reaches into grpclib 0.4.9 and h2 (both pinned by what is used here).

grpclib takes our sockets and TLS contexts, but leaves gaps that hostile or merely
different peers find: no limit on a message, 100 streams and a silent wait for the
101st, no answer to an unknown encoding, no way to stop that peers would call
UNAVAILABLE, a GOAWAY that cuts running calls, an empty DATA frame that breaks a
message. They are closed here, each by overriding the smallest piece; nobody
else imports a private name.
"""
# ruff: noqa: SLF001 - that is what this module is for

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Protocol

import grpclib.client
import grpclib.server
from grpclib.config import Configuration
from grpclib.const import Cardinality, Status
from grpclib.const import Handler as Method
from grpclib.encoding.proto import ProtoCodec
from grpclib.events import _DispatchServerEvents
from grpclib.exceptions import GRPCError
from grpclib.metadata import decode_bin_value, encode_grpc_message
from grpclib.protocol import Connection, EventsProcessor, H2Protocol
from grpclib.protocol import Stream as H2Stream
from grpclib.utils import DeadlineWrapper, Wrapper
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import ConnectionTerminated, StreamReset
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings
from h2.stream import StreamClosedBy
from h2.utilities import SizeLimitDict
from hyperframe.frame import Frame, GoAwayFrame

from nsm.caller import Caller, Credentials
from nsm.errors import ExhaustedError, UnauthenticatedError, UnavailableError
from nsm.identity.source import Handshake, Identity
from nsm.rpc.fds import CallFds, FdSocket, Received
from nsm.rpc.tls import handshake_of, refusal

log = logging.getLogger(__name__)
# h2 writes every frame out for a logger that throws the text away: a tenth of its reading.
Frame.__repr__ = object.__repr__  # type: ignore[method-assign]

MIB = 1024 * 1024
# Experimental range of RFC 7540 §11.3; peers ignore a setting they do not know. It says:
# received file descriptors are freed when a call ends, so calls with fds may share a connection.
FREES_FDS = 0xF7D5
_LAST = 2**31 - 1
_HARD = 16  # times the bound on headers that are still read, to say what is wrong
_RESETS_IN = 10.0  # seconds in which a peer's resets are counted
_HEADER = 32  # bytes that HTTP/2 counts for a header beside its name and value


@dataclass(frozen=True, slots=True)
class Limits:
    """What one peer may make us hold; each bound is refused with a status or a closed door."""

    streams: int = 1024  # calls at once on one connection (MAX_CONCURRENT_STREAMS)
    connections: int = 4096  # accepted at once, handshakes included; more wait in the backlog
    handshakes: int = 256  # TLS handshakes at once; one more ends one that does not go on
    handshake: float = 5.0  # seconds until an unfinished one is dropped
    message: int = 4 * MIB  # bytes of a message, as upstream's gRPC has it
    header_list: int = 64 * 1024  # bytes of all headers of a call
    request: float = 15.0  # seconds until a call's one message must be here
    window: int = 4 * MIB  # bytes of a connection that wait unread here, beside what follows
    unfinished: int = 16 * MIB  # bytes of a connection's messages whose end is not here
    resets: int = 1000  # calls that a peer may take back on one connection in ten seconds
    unread: int = 4 * MIB  # bytes of answers that a peer may leave unread
    fds: int = 256  # file descriptors of one connection that nobody asked for
    fd_age: float = 2.0  # seconds until such a one is closed: it keeps a namespace alive


class Inbox:
    """A stream's bytes that nobody read yet; the peer may send more once they are read.

    In grpclib's place, whose own keeps every frame as an object (a hundred bytes
    for a frame of one) and takes an empty frame in mid-message for its end.
    """

    until: float | None = None  # loop time at which nobody waits for a message any more

    def __init__(self, ack: Callable[[int], None], wire: "Wire") -> None:
        self._ack = ack
        self._wire = wire
        self._data = bytearray()
        self._unacked = 0
        self._eof = False
        self._more = asyncio.Event()

    def add(self, data: bytes, ack_size: int) -> None:
        """Bytes of a DATA frame, and what it cost of the flow-control window."""
        self._data += data
        self._wire.unread += len(data)
        self._unacked += ack_size
        self._more.set()

    def eof(self) -> None:
        """The peer sends no more."""
        self._eof = True
        self._more.set()

    async def read(self, size: int) -> bytes:
        """Exactly size bytes; none at the stream's end. Raises GRPCError in the middle."""
        while len(self._data) < size and not self._eof:
            if self._wire.unread > self._wire.limits.unfinished:
                raise GRPCError(
                    Status.RESOURCE_EXHAUSTED,
                    f"the messages begun on this connection have {self._wire.unread} bytes and "
                    "no end; send one after the other",
                )
            self._release(self._unacked)  # what is wanted may not be held back by the window
            self._more.clear()
            if self.until is None:
                await self._more.wait()
                continue
            try:
                async with asyncio.timeout_at(self.until):
                    await self._more.wait()
            except TimeoutError:
                raise GRPCError(
                    Status.DEADLINE_EXCEEDED, "the call's message did not come in time"
                ) from None
        if len(self._data) < size:
            if not self._data:
                return b""
            raise GRPCError(Status.INTERNAL, "the stream ended in the middle of a message")
        taken = bytes(self._data[:size])
        del self._data[:size]
        self._wire.unread -= size
        self._release(self._unacked - len(self._data))
        return taken

    def _release(self, size: int) -> None:
        if size > 0:
            self._unacked -= size
            self._ack(size)

    def unacked_size(self) -> int:
        """What the window still owes the peer, asked once when the call is over."""
        owed, self._unacked = self._unacked, 0
        self._wire.unread -= len(self._data)
        self._data.clear()
        return owed


class CallStream(H2Stream):
    """An HTTP/2 stream that refuses a message too large before reading it."""

    connection: "Wire"
    caller: Caller | None = None
    fds: CallFds | None = None
    _at_prefix = True

    def init_stream(self, stream_id: int, connection: Connection) -> None:
        super().init_stream(stream_id, connection)
        self.inbox = Inbox(partial(connection.ack, stream_id), self.connection)
        self.buffer = self.inbox  # type: ignore[assignment]  # its stand-in

    @property
    def cut(self) -> bool:
        """Whether grpclib has cancelled its handler: at the deadline, or as the caller went."""
        return bool(self.wrapper and self.wrapper.cancelled)

    async def recv_data(self, size: int) -> bytes:
        """grpclib asks in turn for a message's five bytes of prefix and for the message."""
        if not self._at_prefix:
            self._at_prefix = True
            return await self.buffer.read(size)
        prefix: bytes = await self.buffer.read(size)
        if prefix:
            compressed, length = struct.unpack(">BI", prefix)
            if compressed:
                raise GRPCError(
                    Status.INTERNAL, "a message is marked as compressed without a grpc-encoding"
                )
            if length > self.connection.limits.message:
                raise GRPCError(
                    Status.RESOURCE_EXHAUSTED,
                    f"a message of {length} bytes; at most {self.connection.limits.message} are "
                    "read here",
                )
            self._at_prefix = False
        return prefix

    async def send_request(
        self, headers: Any, end_stream: bool = False, *, _processor: EventsProcessor
    ) -> Callable[[], None]:
        limit = self._h2_connection.remote_settings.max_concurrent_streams
        if self._h2_connection.open_outbound_streams >= limit:
            raise ExhaustedError(
                f"{limit} calls already run on this connection, as many as the peer takes",
                hint="open another link",
            )
        return await super().send_request(headers, end_stream, _processor=_processor)

    def answer(self, status: Status, text: str, *extra: tuple[str, str]) -> None:
        """End the call at once with a status, without a task and without waiting."""
        headers = [
            (":status", "200"),
            ("content-type", "application/grpc+proto"),
            ("grpc-status", str(status.value)),
            ("grpc-message", encode_grpc_message(text)),
            *extra,
        ]
        assert self.id is not None
        self._h2_connection.send_headers(self.id, headers, end_stream=True)
        if self.closable:
            self.reset_nowait()
        self.connection.flush()


class Corked:
    """A transport that joins what one turn of the event loop writes: headers, message and
    trailers become one TLS record and wake the peer once instead of three times.
    """

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        """Send data at the end of this turn."""
        if not self._parts:
            self._loop.call_soon(self._uncork)
        self._parts.append(data)

    def close(self) -> None:
        """Send what waits, and close."""
        self._uncork()
        self._transport.close()

    def _uncork(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts.clear()
            if not self._transport.is_closing():
                self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class Wire(Connection):
    """One HTTP/2 connection and what is known of its other end."""

    def __init__(
        self, connection: H2Connection, transport: Any, *, config: Configuration, limits: Limits
    ) -> None:
        super().__init__(connection, transport, config=config)
        self.limits = limits
        self.unread = 0  # bytes of messages that nobody took yet
        self.handshake: Handshake | None = None
        self.sock: FdSocket | None = None
        self.received: Received | None = None
        self.process: Credentials | None = None

    def create_stream(self, *, stream_id: int | None = None, wrapper: Any = None) -> CallStream:
        return CallStream(
            self, self._connection, self._transport, stream_id=stream_id, wrapper=wrapper
        )

    def ack(self, stream_id: int, size: int) -> None:
        if not self.is_closing():
            super().ack(stream_id, size)

    def flush(self) -> None:
        if not self.is_closing():
            super().flush()

    def call_fds(self, *, long: bool = False) -> CallFds | None:
        """The descriptors' view of one new call, a long stream perhaps; None on TCP."""
        if self.sock is None or self.received is None:
            return None
        return CallFds(self.received, self.sock, self.limits.fds, long=long)

    def goaway(self) -> None:
        """Tell the peer that this connection takes no new call (all older ones are answered)."""
        if not self.is_closing():
            frame = GoAwayFrame(0, last_stream_id=_LAST, error_code=ErrorCodes.NO_ERROR)
            self._transport.write(frame.serialize())


class Resets(SizeLimitDict):
    """How a connection's streams were closed, of which h2 keeps 65,536, nine megabytes.

    What comes late for one that was reset is no offence, so those are kept. For any other it
    ends the connection, known or not.
    """

    def __setitem__(self, key: int, value: Any) -> None:
        if value in (StreamClosedBy.SEND_RST_STREAM, StreamClosedBy.RECV_RST_STREAM):
            super().__setitem__(key, value)


class Events(EventsProcessor):
    """grpclib's dispatcher, which survives what it does not know and lets calls end in peace."""

    def __init__(self, handler: Any, connection: Wire, protocol: "Http2") -> None:
        super().__init__(handler, connection)
        self._protocol = protocol

    def process(self, event: Any) -> None:
        if event.__class__ in getattr(self, "processors", ()):
            super().process(event)  # others (unknown frames, ALTSVC, 1xx) mean nothing here

    def process_remote_settings_changed(self, event: Any) -> None:
        super().process_remote_settings_changed(event)
        self._protocol.settings_came()

    def process_stream_reset(self, event: StreamReset) -> None:
        super().process_stream_reset(event)
        if event.remote_reset:
            self._protocol.reset_came()

    def process_connection_terminated(self, event: ConnectionTerminated) -> None:
        if event.error_code != ErrorCodes.NO_ERROR:
            super().process_connection_terminated(event)
            return
        self._protocol.goaway_came()
        for number, stream in list(self.streams.items()):
            if event.last_stream_id is not None and number > event.last_stream_id:
                stream.__terminated__("the peer is stopping and did not take it any more")


class Http2(H2Protocol):
    """A connection from its first byte on: TLS facts, settings, the end."""

    connection: Wire
    processor: Events

    def __init__(
        self,
        handler: Any,
        *,
        client: bool,
        identity: Identity,
        limits: Limits,
        sock: FdSocket | None,
        whose: str,
    ) -> None:
        super().__init__(
            handler,
            Configuration(_keepalive_time=None),  # Go servers answer pings with GOAWAY
            H2Configuration(
                client_side=client,
                header_encoding="utf-8",
                validate_inbound_headers=not client,  # a call without a path must not be begun
                validate_outbound_headers=False,
                normalize_inbound_headers=False,
                normalize_outbound_headers=False,
            ),
        )
        self.identity = identity
        self.limits = limits
        self.sock = sock
        self.whose = whose
        self.refused: UnauthenticatedError | None = None
        self.lost = False
        self.transport: Any = None
        self.reason = ""  # why the connection ended, where somebody said so
        if sock is not None:
            self._received = Received(limits.fds, limits.fd_age, whose)
            sock.arrived = self._received.arrive
            sock.closed = self._received.close

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        h2 = H2Connection(config=self.h2_config)
        # Huffman coding is done in Python here: 150 us a call for a token it cannot shorten much.
        h2.encoder.encode = partial(h2.encoder.encode, huffman=False)  # type: ignore[method-assign]
        client = self.h2_config.client_side
        values = {
            SettingCodes.MAX_CONCURRENT_STREAMS: self.limits.streams,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.limits.header_list,
            SettingCodes.INITIAL_WINDOW_SIZE: self.limits.window,
        }
        if client:
            values[SettingCodes.ENABLE_PUSH] = 0
        h2.local_settings = Settings(client=client, initial_values=values)
        h2._closed_streams = Resets(size_limit=2 * self.limits.streams)
        # beyond this the connection ends; between the two the call is answered with a status
        h2.decoder.max_header_list_size = self.limits.header_list * _HARD
        refuse = h2._frame_dispatch_table[GoAwayFrame]
        h2._frame_dispatch_table[GoAwayFrame] = partial(_goaway, refuse)
        h2.initiate_connection()
        first = h2.data_to_send()
        transport.write(first if client else _with_setting(first, FREES_FDS, 1))
        h2.increment_flow_control_window(self.limits.window - 65535)
        self.connection = Wire(h2, Corked(transport), config=self.config, limits=self.limits)
        self.connection.sock = self.sock
        if self.sock is not None:
            self.connection.received = self._received
            self.connection.process = self.sock.process
        try:
            shown = handshake_of(transport.get_extra_info("ssl_object"), self.identity)
            self.connection.handshake = shown
            if self.sock is not None:
                self._received.whose = f"{shown.peer_id} ({self.whose})"
                self._received.admitted = True
        except UnauthenticatedError as error:
            self.refused = error
        self.connection.flush()
        self.processor = Events(self.handler, self.connection, self)

    def data_received(self, data: bytes) -> None:
        try:
            events = self.connection.feed(data)
            self.connection.flush()
            for event in events:
                self.processor.process(event)
            self.connection.flush()
            waiting = self.connection._connection.incoming_buffer._data
            if (
                int.from_bytes(waiting[:3], "big")
                > self.connection._connection.max_inbound_frame_size
            ):
                self._broken("its next frame is larger than any may be")  # h2 would read it first
            if self.transport.get_write_buffer_size() > self.limits.unread:
                self._broken("it asks and does not read the answers")
                self.abort()
        except H2Error as error:
            self._broken(f"it broke HTTP/2: {error or type(error).__name__}")
        except Exception:  # whatever a peer's bytes do to the parser ends its connection only
            log.exception("defect while reading from %s", self.whose)
            self._broken("its bytes could not be read")

    def _broken(self, why: str) -> None:
        self.reason = why
        log.warning("connection of %s closed: %s", self.whose, why)
        self.connection.flush()  # the GOAWAY that says what was wrong
        self.processor.close(why)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost = True
        if said := refusal(exc):
            self.refused = UnauthenticatedError(
                f"{self.whose} refused our certificate of {self.identity.svid.id}: {said}",
                hint="each needs the other's bundle, a certificate that holds, a right clock",
            )
        if self.sock is not None:
            self._received.close()
        if hasattr(self, "processor"):
            self.processor.close(self.reason or "the connection ended")

    def abort(self) -> None:
        """End the connection at once, whatever is unsent."""
        if self.transport is not None:
            self.transport.abort()

    def settings_came(self) -> None:
        """The peer's SETTINGS are known."""

    def reset_came(self) -> None:
        """The peer took a call back."""

    def goaway_came(self) -> None:
        """The peer takes no new call on this connection."""

    @property
    def frees_fds(self) -> bool:
        """Whether the peer said that it frees received file descriptors."""
        return bool(self.connection._connection.remote_settings.get(FREES_FDS, 0))

    @property
    def stream_limit(self) -> int:
        """How many calls the peer takes at once on this connection."""
        return int(self.connection._connection.remote_settings.max_concurrent_streams)


def _with_setting(frames: bytes, setting: int, value: int) -> bytes:
    """The SETTINGS frame that frames begin with, one longer: h2's cuts identifiers to 8 bits."""
    end = 9 + int.from_bytes(frames[:3], "big")
    longer = (end - 9 + 6).to_bytes(3, "big")
    return longer + frames[3:end] + struct.pack(">HI", setting, value) + frames[end:]


def _goaway(refuse: Callable[[Any], Any], frame: GoAwayFrame) -> Any:
    """h2 ends a connection at any GOAWAY; one without an error only announces the end."""
    if frame.error_code != ErrorCodes.NO_ERROR:
        return refuse(frame)
    event = ConnectionTerminated()
    event.error_code = ErrorCodes.NO_ERROR
    event.last_stream_id = frame.last_stream_id
    event.additional_data = None
    return [], [event]


# -- client -----------------------------------------------------------------------------------


class ClientHttp2(Http2):
    """A dialled connection; `ready` is done when the server took us, or said why not."""

    def __init__(self, **facts: Any) -> None:
        super().__init__(grpclib.client.Handler(), client=True, **facts)
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.tcp: Any = None  # its socket, set by who dials over TCP
        self.on_lost: Callable[[], None] = _nothing
        self.on_goaway: Callable[[], None] = _nothing

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.refused:
            transport.abort()

    def settings_came(self) -> None:
        # with TLS 1.3 a client's handshake is over before the server has looked at its certificate
        if not self.ready.done():
            self.ready.set_result(None)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if not self.ready.done():
            self.ready.set_result(None)
        self.on_lost()

    def goaway_came(self) -> None:
        self.on_goaway()

    def eof_received(self) -> None:
        """The peer closed its side: the transport closes ours."""


def _nothing() -> None:
    pass


class Waiting(Wrapper):
    """What a call of ours waits in. grpclib cancels the task there when the connection ends, and
    raises something else in it: here the task counts as cancelled no more after that, and one
    that somebody else cancelled at the same moment is told so, or it would never end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[asyncio.Task[Any], int] = {}
        self._ours: dict[asyncio.Task[Any], int] = {}

    def __enter__(self) -> None:
        super().__enter__()
        for task in self._tasks - self._before.keys():
            self._before[task], self._ours[task] = task.cancelling(), 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        for _ in range(self._ours.pop(task, 0)):
            task.uncancel()
        others = task.cancelling() - self._before.pop(task, 0)
        if kind is asyncio.CancelledError and others > 0:
            self._tasks.discard(task)
            return
        super().__exit__(kind, error, trace)

    def cancel(self, error: Exception) -> None:
        for task in self._tasks:
            self._ours[task] += 1
        super().cancel(error)


class WaitingInTime(Waiting, DeadlineWrapper):
    """The same, with a deadline."""


# Its streams make theirs by these names.
vars(grpclib.client).update(Wrapper=Waiting, DeadlineWrapper=WaitingInTime)


class LinkChannel(grpclib.client.Channel):
    """What generated stubs take for a channel: one connection, never dialled anew by itself."""

    def __init__(self, protocol: ClientHttp2, url: str, authority: str) -> None:
        super().__init__(codec=ProtoCodec())
        self._scheme = "https"
        self._authority = authority
        self._url = url
        self._live = protocol

    async def __connect__(self) -> ClientHttp2:
        if self._live.lost:
            raise self._live.refused or UnavailableError(
                f"the connection to {self._url} ended", hint="the next call connects anew"
            )
        return self._live


# -- server -----------------------------------------------------------------------------------


class Gate(Protocol):
    """What a connection's handler asks its server."""

    refusing: str  # not empty: no new call is taken, and why

    @property
    def methods(self) -> Mapping[str, Method]:
        """What is served, by path."""
        ...

    def made(self, protocol: "ServerHttp2") -> None:
        """A connection finished its handshake."""
        ...

    def expired(self, protocol: "ServerHttp2") -> None:
        """The certificate that a connection's peer showed holds no more."""
        ...

    def gone(self, protocol: "ServerHttp2") -> None:
        """A connection ended."""
        ...


class CallHandler(grpclib.server.Handler):
    """Takes a connection's calls, or answers at once why not."""

    def __init__(self, gate: Gate) -> None:
        super().__init__(dict(gate.methods), ProtoCodec(), None, _DispatchServerEvents())
        self._gate = gate
        self.protocol: ServerHttp2

    def accept(self, stream: Any, headers: Any, release_stream: Callable[[], Any]) -> None:
        said = dict(headers)
        limit = self.protocol.limits.header_list
        method, encoding = said.get(":path", ""), said.get("grpc-encoding", "identity")
        shown = self.protocol.connection.handshake
        if shown is not None and time.time_ns() > shown.peer_not_after:
            self._gate.expired(self.protocol)
        if self.protocol.refused:
            stream.answer(Status.UNAUTHENTICATED, str(self.protocol.refused))
        elif self._gate.refusing:
            stream.answer(Status.UNAVAILABLE, self._gate.refusing)
        elif method not in self.mapping:
            stream.answer(Status.UNIMPLEMENTED, f"nobody here serves {method[:200]}")
        elif encoding != "identity":
            stream.answer(
                Status.UNIMPLEMENTED,
                f"messages in the encoding {encoding[:50]!r} are not read here; send them plain",
                ("grpc-accept-encoding", "identity"),
            )
        elif (size := sum(len(k) + len(v) + _HEADER for k, v in headers)) > limit:
            stream.answer(
                Status.RESOURCE_EXHAUSTED, f"headers of {size} bytes; at most {limit} are read here"
            )
        elif key := _unreadable(headers):
            stream.answer(Status.INVALID_ARGUMENT, f"the value of {key[:100]!r} is no base64")
        elif self._crowded():
            stream.answer(
                Status.RESOURCE_EXHAUSTED,
                f"{self.protocol.limits.streams} calls of this connection have not ended yet",
            )
        else:
            super().accept(stream, headers, release_stream)
            self._tasks[stream].add_done_callback(partial(self._done, stream))
            return
        release_stream()

    def __gc_step__(self) -> None:
        """Nothing is left to collect: grpclib keeps up to ten ended calls, 7 kB each."""

    def _done(self, stream: Any, task: "asyncio.Task[None]") -> None:
        if self._tasks.get(stream) is task:
            del self._tasks[stream]
        self._cancelled.discard(task)

    def _crowded(self) -> bool:
        """Whether as many calls run as may: one taken back runs on until it has tidied up."""
        limit = self.protocol.limits.streams
        if len(self._tasks) + len(self._cancelled) < limit:
            return False
        self.__gc_collect__()
        return len(self._tasks) + len(self._cancelled) >= limit


def _unreadable(headers: Any) -> str:
    """The name of a binary header that cannot be decoded, if there is one."""
    for key, value in headers:
        if key.endswith("-bin") and not key.startswith("grpc-"):
            try:
                decode_bin_value(value.encode("ascii"))
            except ValueError:
                return str(key)
    return ""


class ServerHttp2(Http2):
    """An accepted connection."""

    def __init__(self, gate: Gate, **facts: Any) -> None:
        handler = CallHandler(gate)
        handler.protocol = self
        super().__init__(handler, client=False, **facts)
        self._gate = gate
        self.expiry: asyncio.TimerHandle | None = None  # when its peer's certificate expires
        self._resets, self._resets_since = 0, 0.0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._gate.made(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._gate.gone(self)

    def reset_came(self) -> None:
        """See `Http2.reset_came`: whoever begins calls to take them back makes work for two."""
        now = asyncio.get_running_loop().time()
        if now - self._resets_since > _RESETS_IN:
            self._resets_since, self._resets = now, 0
        self._resets += 1
        if self._resets > self.limits.resets and not self.connection.is_closing():
            self.connection._connection.close_connection(ErrorCodes.ENHANCE_YOUR_CALM)
            self._broken(f"it took {self._resets} calls back within {_RESETS_IN:g} s")


def stream_of(stream: grpclib.server.Stream[Any, Any]) -> CallStream:
    """The HTTP/2 stream below a handler's stream."""
    found = stream._stream
    assert isinstance(found, CallStream)
    return found


def method(original: Method, wrapped: Callable[[grpclib.server.Stream[Any, Any]], Any]) -> Method:
    """The same method, served by wrapped."""
    return Method(wrapped, original.cardinality, original.request_type, original.reply_type)


__all__ = [
    "MIB",
    "Cardinality",
    "ClientHttp2",
    "Gate",
    "Limits",
    "LinkChannel",
    "Method",
    "ServerHttp2",
    "method",
    "stream_of",
]

"""TLS of the mesh: mutual, 1.2 or newer, h2, no host names (`wire.md` §4.1).

OpenSSL proves that the peer holds the key of a certificate which *some*
authority we know signed. Whether that authority may speak for the peer's trust
domain is decided by `nsm.identity.verify.peer_id`, on the chain taken from here,
before a byte of any call is read. Contexts are built in a thread, once per
identity; a key reaches OpenSSL through a memory file and never through a disk.
"""

import asyncio
import logging
import os
import socket
import ssl
from asyncio.sslproto import SSLProtocol
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from nsm.errors import UnauthenticatedError
from nsm.identity.source import Handshake, Identity, Source, not_after
from nsm.identity.verify import peer_id

log = logging.getLogger(__name__)

P = TypeVar("P", bound=asyncio.Protocol)
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; those of 1.3 are all good


def context_of(identity: Identity, *, server: bool) -> ssl.SSLContext:
    """A context that shows identity's certificate and asks for one. Blocks for about 1 ms."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.check_hostname = False  # a SPIFFE id is the only name
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    # a bundle may hold an intermediate authority as its anchor
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    # a resumed session would show no chain to verify
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    if server:
        context.sslobject_class = _Object
        context.num_tickets = 0
    authorities = b"".join(a.public_bytes(Encoding.DER) for a in identity.authorities)
    if authorities:
        context.load_verify_locations(cadata=authorities)
    memory = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        with open(memory, "wb", closefd=False) as file:
            file.write(identity.svid.key_pem() + identity.svid.chain_pem())
        context.load_cert_chain(f"/proc/self/fd/{memory}")
    finally:
        os.close(memory)
    return context


class _Object(ssl.SSLObject):
    """Sends the alert of a failed handshake, which asyncio (3.11) forgets: without it a peer
    learns nothing but that the connection ended."""

    tell: Callable[[], object] | None = None

    def do_handshake(self) -> None:
        """As in the base class."""
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLError:
            if self.tell is not None:
                with suppress(OSError):
                    self.tell()
            raise


class Telling:
    """A context for one accepted socket, given to asyncio in the context's place."""

    def __init__(self, context: ssl.SSLContext, sock: socket.socket) -> None:
        self._context = context
        self._sock = sock

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **how: Any) -> Any:
        """As `ssl.SSLContext.wrap_bio`."""
        made = self._context.wrap_bio(incoming, outgoing, **how)
        assert isinstance(made, _Object)
        made.tell = lambda: self._sock.send(outgoing.read())
        return made


class _Layer(SSLProtocol):
    """asyncio's TLS, with a buffer of two records in place of 256 KiB for each connection.

    It is how much is read at a time: what is longer comes in several turns.
    """

    max_size = 32 * 1024


async def secured(
    make: Callable[[], P],
    connect: Callable[[Callable[[], asyncio.BaseProtocol]], Awaitable[object]],
    context: "ssl.SSLContext | Telling",
    *,
    server: bool,
    patience: float,
    shutdown: float,
) -> tuple[P, asyncio.Transport]:
    """Have connect make a connection, and TLS on it: what asyncio does if it is given a context.

    The handshake may take patience seconds, the goodbye shutdown seconds. Raises what connect
    raises, and OSError (ssl.SSLError is one).
    """
    protocol, done = make(), asyncio.get_running_loop().create_future()
    tls: Any = _Layer  # its stub knows neither fractions of a second nor a `Telling`
    layer = tls(
        asyncio.get_running_loop(),
        protocol,
        context,
        done,
        server,
        ssl_handshake_timeout=patience,
        ssl_shutdown_timeout=shutdown,
    )
    transport: asyncio.Transport = layer._app_transport  # noqa: SLF001 - as asyncio's loops do
    try:
        await connect(lambda: layer)
        await done
    except BaseException:
        done.cancel()  # nobody waits for it any more
        transport.close()
        raise
    return protocol, transport


class Contexts:
    """The context for new connections: the source's newest identity, built beforehand."""

    def __init__(self, source: Source, *, server: bool) -> None:
        self._source = source
        self._server = server
        self._newest: tuple[Identity, ssl.SSLContext] | None = None
        self._seen: Identity | None = None  # not the newest if no context can be made of it

    @property
    def newest(self) -> tuple[Identity, ssl.SSLContext]:
        """The identity to show and its context; `build` must have run."""
        if self._newest is None:
            raise RuntimeError("build() comes first")
        return self._newest

    async def build(self) -> None:
        """Build the context of the source's identity as it is now. Raises ssl.SSLError."""
        identity = self._seen = self._source.identity
        context = await asyncio.to_thread(context_of, identity, server=self._server)
        self._newest = identity, context

    async def replaced(self) -> None:
        """Wait for the source to have another identity than `newest`, and build its context.

        One that TLS cannot work with is passed over: the last good one stays.
        """
        while True:
            assert self._seen is not None  # build() comes first
            await self._source.changed(self._seen)
            try:
                await self.build()
            except OSError as why:  # ssl.SSLError is one
                log.warning(
                    "the new identity of %s cannot be used; the last good stays: %s",
                    self._seen.svid.id,
                    why,
                )
            else:
                return


def handshake_of(ssl_object: Any, own: Identity) -> Handshake:
    """What a finished handshake proved. Raises UnauthenticatedError saying what is wrong."""
    if ssl_object is None:
        raise UnauthenticatedError("the connection has no TLS")
    if ssl_object.selected_alpn_protocol() != "h2":
        raise UnauthenticatedError(
            "the peer did not agree on the protocol 'h2'", hint="offer ALPN h2, as gRPC demands"
        )
    try:
        chain = tuple(x509.load_der_x509_certificate(c) for c in _chain(ssl_object))
        name = peer_id(chain, own.bundles)
        ends = not_after(chain[0])
    except UnauthenticatedError:
        raise
    except Exception as unreadable:  # what a peer can write into a certificate has no end
        raise UnauthenticatedError(
            f"the peer's certificates cannot be read ({type(unreadable).__name__}: {unreadable})",
            hint="every certificate it shows must be one, its own and those above it",
        ) from unreadable
    return Handshake(
        own=own.svid, peer_id=name, peer_leaf=chain[0], peer_not_after=ends, chain=chain
    )


async def unproven(
    handshakes: Sequence[Handshake], own: Identity
) -> list[UnauthenticatedError | None]:
    """Why each handshake of before would not be accepted under own's bundles; None if it would."""

    def why(shown: Handshake) -> UnauthenticatedError | None:
        try:
            peer_id(shown.chain, own.bundles)
        except UnauthenticatedError as refusal:
            return refusal
        return None

    return await asyncio.to_thread(lambda: [why(shown) for shown in handshakes])


def _chain(ssl_object: Any) -> list[bytes]:
    """The certificates the peer showed, leaf first, as DER."""
    if hasattr(ssl_object, "get_unverified_chain"):  # public since Python 3.13
        return list(ssl_object.get_unverified_chain() or ())
    shown = ssl_object._sslobj.get_unverified_chain() or ()  # noqa: SLF001 - the same, before 3.13
    return [c.public_bytes(_DER) for c in shown]


_DER = 2  # _ssl.ENCODING_DER


def refusal(error: BaseException | None) -> str:
    """What the peer's TLS alert says about *our* certificate; empty if it says nothing."""
    reason = getattr(error, "reason", None) if isinstance(error, ssl.SSLError) else None
    return _ALERTS.get(reason or "", "")


_ALERTS = {
    "TLSV1_ALERT_UNKNOWN_CA": "no authority it knows signed our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a certificate and we showed none",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate is expired there",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "our certificate is revoked",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it does not accept our certificate",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it does not accept this kind of certificate",
    "TLSV1_ALERT_ACCESS_DENIED": "it refuses us",
    "TLSV1_ALERT_DECRYPT_ERROR": "it could not verify our signature",
}

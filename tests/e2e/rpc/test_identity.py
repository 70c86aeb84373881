"""Who is let in, and who is talked to: every good and bad certificate, both ways."""

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from nsm import grpcio
from nsm.errors import UnauthenticatedError, UnavailableError
from nsm.identity.source import HeldIdentity, Source, Svid
from nsm.proto import connection_pb2_grpc, networkservice_pb2_grpc
from nsm.proto.connection_grpc import MonitorConnectionStub
from nsm.proto.networkservice_grpc import NetworkServiceStub
from nsm.rpc import addresses
from nsm.rpc.grpclib_private import Limits, LinkChannel
from nsm.rpc.peers import Link, Peers, dial
from nsm.rpc.server import serve
from nsm.rpc.tls import Contexts, context_of
from tests.e2e.rpc.echo import Echo, Monitor, Selector, request, target
from tests.support.certs import Authority, source
from tests.support.wait import until
from tests.unit.identity.forge import root, unreadable

A, B, C = Authority("a.test"), Authority("b.test"), Authority("c.test")


@pytest.fixture(params=["unix", "tcp"])
def listen(request: pytest.FixtureRequest, tmp_path: Any) -> str:
    return f"unix://{tmp_path}/s.sock" if request.param == "unix" else "tcp://127.0.0.1:0"


@asynccontextmanager
async def called(listen: str, server: Source, client: Source) -> AsyncIterator[tuple[Echo, Any]]:
    """A server, and one call to it."""
    echo = Echo()
    async with serve([listen], [echo], server) as serving, Peers(client) as peers:

        async def call() -> Any:
            async with peers.link(serving.urls[0], dial_timeout=3) as link:
                with link.errors():
                    return await NetworkServiceStub(link.channel).Request(request(), timeout=5)

        yield echo, call


async def test_two_federated_trust_domains_talk(listen: str) -> None:
    async with called(listen, A.source("/s", B), B.source("/c", A)) as (echo, call):
        assert (await call()).id == "c-1"
    assert str(echo.callers[0].id) == "spiffe://b.test/c"
    assert str(echo.callers[0].handshake.own.id) == "spiffe://a.test/s"


async def test_a_client_whose_authority_the_server_does_not_know_is_refused(
    listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with called(listen, A.source("/s"), source(C.svid("/c"), C, A)) as (echo, call):
        with pytest.raises(UnauthenticatedError, match="refused our certificate of spiffe://c"):
            await call()
    assert not echo.callers
    assert "does not chain to any bundle" in caplog.text


async def test_a_server_whose_authority_the_client_does_not_know_is_refused(listen: str) -> None:
    async with called(listen, source(C.svid("/s"), C, A), A.source("/c")) as (echo, call):
        with pytest.raises(UnauthenticatedError, match="does not chain to any bundle"):
            await call()
    assert not echo.callers


async def test_a_trusted_authority_cannot_speak_for_another_trust_domain(
    listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    forged = source(B.svid("/admin", trust_domain="a.test"), A, B)
    caplog.set_level(logging.WARNING)
    async with called(listen, A.source("/s", B), forged) as (echo, call):
        with pytest.raises(UnauthenticatedError, match=r"bundle of its own trust domain 'a\.test'"):
            await call()
    assert not echo.callers
    assert "own trust domain 'a.test'" in caplog.text
    async with called(listen, forged, A.source("/c", B)) as (echo, call):
        with pytest.raises(UnauthenticatedError, match=r"own trust domain 'a\.test'"):
            await call()
    assert not echo.callers


async def test_an_expired_certificate_is_refused_on_both_sides(listen: str) -> None:
    old = source(A.svid("/old", life=timedelta(minutes=1), age=timedelta(minutes=2)), A)
    async with called(listen, A.source("/s"), old) as (echo, call):
        with pytest.raises(UnauthenticatedError, match="expired"):
            await call()
    async with called(listen, old, A.source("/c")) as (echo, call):
        with pytest.raises(UnauthenticatedError, match="expired"):
            await call()
    assert not echo.callers


@pytest.mark.parametrize("by", ["timer", "call"])
async def test_an_expired_peer_is_asked_to_connect_anew_and_its_connection_ends(
    listen: str, by: str
) -> None:
    brief = source(A.svid("/c", life=timedelta(seconds=62)), A)
    async with serve([listen], [Echo()], A.source("/s"), grace=0.3) as server:
        contexts = Contexts(brief, server=False)
        await contexts.build()
        url = server.urls[0]
        protocol = await dial(url, addresses.parse(url), contexts, Limits(), 3)
        left = asyncio.Event()
        protocol.on_goaway = left.set
        stub = NetworkServiceStub(LinkChannel(protocol, url, "localhost"))
        assert (await stub.Request(request(), timeout=5)).id
        (accepted,) = server._connections
        if by == "call":  # a machine that slept wakes up with its timers behind
            assert accepted.expiry is not None
            accepted.expiry.cancel()
            ends = brief.identity.svid.not_after
            await until(lambda: time.time_ns() > ends, "the certificate to expire", bar=3)
        else:
            await until(left.is_set, "the goodbye", bar=3)
        with pytest.raises(GRPCError, match="expired") as refused:
            await stub.Request(request(), timeout=5)
        assert refused.value.status is Status.UNAUTHENTICATED
        assert left.is_set()
        await until(lambda: protocol.lost and not server.connections, "its end", bar=0.5)


def _without(held: HeldIdentity, domain: str) -> None:
    held.replace(
        replace(
            held.identity, bundles={k: v for k, v in held.identity.bundles.items() if k != domain}
        )
    )


async def _watched(link: Link, then: Callable[[], None]) -> None:
    """Open a stream on link, do what is to be done then, and wait for the stream's end."""
    with link.errors():
        async with MonitorConnectionStub(link.channel).MonitorConnections.open() as stream:
            await stream.send_message(Selector(), end=True)
            await stream.recv_message()
            then()
            async with asyncio.timeout(5):
                await stream.recv_message()


async def test_a_peer_whose_domain_is_trusted_no_more_loses_its_connection(
    listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    own = A.source("/s", B)
    monitor = Monitor(asyncio.Event().wait)
    async with (
        serve([listen], [Echo(), monitor], own) as server,
        Peers(A.source("/c")) as ours,
        Peers(B.source("/c", A)) as theirs,
        ours.link(server.urls[0]) as kept,
        theirs.link(server.urls[0]) as lost,
    ):
        with pytest.raises(UnavailableError):
            await _watched(lost, lambda: _without(own, "b.test"))
        await until(lambda: not monitor.open, "the call to end", bar=0.5)
        assert server.connections == 1
        assert (await NetworkServiceStub(kept.channel).Request(request(), timeout=5)).id
    assert "no bundle of the trust domain 'b.test'" in caplog.text


async def test_a_server_whose_domain_is_trusted_no_more_loses_links_and_doors(
    listen: str,
) -> None:
    client = B.source("/c", A)
    monitor = Monitor(asyncio.Event().wait)
    async with (
        serve([listen], [monitor], A.source("/s", B)) as server,
        Peers(client) as peers,
        peers.link(server.urls[0]) as link,
        grpcio.channel(server.urls[0], client) as channel,
    ):
        watch = connection_pb2_grpc.MonitorConnectionStub(channel).MonitorConnections(Selector())
        await watch.read()
        with pytest.raises(UnauthenticatedError, match="no bundle"):
            await _watched(link, lambda: _without(client, "a.test"))
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(watch.read(), 5)
        await until(lambda: server.connections == 0, "both connections to end", bar=0.5)


async def test_a_client_without_a_certificate_is_refused(
    listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname = False
    bare.verify_mode = ssl.CERT_NONE
    bare.set_alpn_protocols(["h2"])
    async with serve([listen], [Echo()], A.source("/s")) as server:
        reader, writer = await _raw(server.urls[0], bare)
        with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
            await reader.read()
        writer.close()
        await until(lambda: "peer did not return" in caplog.text, "the log line", bar=0.5)


@pytest.fixture(params=["version", "date"])
def unread(request: pytest.FixtureRequest) -> bytes:
    """A certificate (PEM) that we cannot read and OpenSSL passes on."""
    return ssl.DER_cert_to_PEM_cert(unreadable(request.param)).encode()


def _showing(shown: Svid, above: bytes, tmp_path: Any, *, server: bool) -> ssl.SSLContext:
    """A context of the ssl module's own that shows a certificate and one above it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    file = tmp_path / "shown.pem"
    file.write_bytes(shown.key_pem() + shown.chain_pem() + above)
    context.load_cert_chain(file)
    return context


async def test_an_unreadable_certificate_ends_its_connection_and_not_the_server(
    listen: str, tmp_path: Any, unread: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    context = _showing(A.svid("/junk"), unread, tmp_path, server=False)
    async with (
        serve([listen], [Echo()], A.source("/s")) as server,
        Peers(A.source("/c")) as peers,
    ):
        _, writer = await _raw(server.urls[0], context)
        await until(lambda: "cannot be read" in caplog.text, "the refusal", bar=0.5)
        async with peers.link(server.urls[0]) as link:
            assert (await NetworkServiceStub(link.channel).Request(request(), timeout=5)).id
        writer.transport.abort()


async def test_an_unreadable_certificate_of_a_server_is_a_refusal_to_links_and_doors(
    tmp_path: Any, unread: bytes
) -> None:
    context = _showing(A.svid("/junk"), unread, tmp_path, server=True)
    url = f"unix://{tmp_path}/j.sock"
    async with await asyncio.start_unix_server(
        lambda _, writer: writer.close(), f"{tmp_path}/j.sock", ssl=context
    ):
        async with Peers(A.source("/c")) as peers:
            with pytest.raises(UnauthenticatedError, match="cannot be read"):
                async with peers.link(url):
                    pass
        async with grpcio.channel(url, A.source("/c")) as channel:
            stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
            for _ in range(2):
                with pytest.raises(grpc.aio.AioRpcError, match="cannot be read"):
                    await stub.Request(request(), timeout=5)


async def test_an_identity_that_tls_cannot_work_with_is_passed_over(
    listen: str, caplog: pytest.LogCaptureFixture
) -> None:
    own, client = A.source("/s"), A.source("/c")
    good = own.identity
    weak = root("a.test", key=rsa.generate_private_key(65537, 1024)).cert
    bad = replace(good, svid=replace(good.svid, chain=(*good.svid.chain, weak)))
    async with serve([listen], [Echo()], own) as server, Peers(client) as peers:

        async def shown() -> int:
            async with peers.link(server.urls[0]) as link:
                assert (await NetworkServiceStub(link.channel).Request(request(), timeout=5)).id
                return link.handshake.peer_leaf.serial_number

        own.replace(bad)
        await until(lambda: "the last good stays" in caplog.text, "the complaint", bar=0.5)
        client.replace(replace(client.identity, svid=bad.svid))
        await until(lambda: caplog.text.count("last good stays") == 2, "the client's", bar=0.5)
        assert await shown() == good.svid.leaf.serial_number
        renewed = A.svid("/s")
        own.replace(replace(good, svid=renewed))
        client.replace(A.source("/c").identity)

        async def renewed_shown() -> bool:
            return await shown() == renewed.leaf.serial_number

        await until(renewed_shown, "the renewed certificate", bar=0.5)


async def test_tls_1_1_is_refused_and_1_2_is_not(
    listen: str, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    own = A.source("/s")
    assert context_of(own.identity, server=True).minimum_version is ssl.TLSVersion.TLSv1_2
    context = _showing(A.svid("/c"), b"", tmp_path, server=False)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # OpenSSL's own policy would not even offer 1.1
    async with serve([listen], [Echo()], own) as server:
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError) as refused:
            await _raw(server.urls[0], context)
        assert refused.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"
        await until(lambda: "unsupported protocol" in caplog.text, "the log line", bar=0.5)
        assert server.connections == 0
        context.maximum_version = context.minimum_version = ssl.TLSVersion.TLSv1_2
        _, writer = await _raw(server.urls[0], context)
        assert writer.get_extra_info("ssl_object").version() == "TLSv1.2"
        await until(lambda: server.connections == 1, "the connection with 1.2", bar=0.5)
        writer.transport.abort()


async def test_plaintext_is_refused(listen: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    async with serve([listen], [Echo()], A.source("/s")) as server:
        reader, writer = await _raw(server.urls[0], None)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()
        await until(lambda: "TLS handshake failed" in caplog.text, "the log line", bar=0.5)
        assert server.connections == 0


async def test_a_client_that_does_not_offer_h2_is_told_why(listen: str) -> None:
    context = context_of(A.source("/c").identity, server=False)
    context.set_alpn_protocols(["http/1.1"])
    async with serve([listen], [Echo()], A.source("/s")) as server:
        _, writer = await _raw(server.urls[0], context)
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
        writer.close()


async def test_a_handshake_that_does_not_go_on_is_dropped(listen: str) -> None:
    limits = replace(Limits(), handshake=0.2, handshakes=2)
    async with (
        serve([listen], [Echo()], A.source("/s"), limits=limits) as server,
        Peers(A.source("/c")) as peers,
    ):
        idle = [await _raw(server.urls[0], None) for _ in range(4)]
        for reader, writer in idle:  # all four: the places are given on
            async with asyncio.timeout(5):
                assert await reader.read() == b""
            writer.close()
        async with peers.link(server.urls[0]) as link:
            assert (await NetworkServiceStub(link.channel).Request(request(), timeout=5)).id


async def test_no_key_is_ever_a_file_and_none_is_in_a_repr(tmp_path: Any) -> None:
    import os
    import tempfile

    before = set(os.listdir(tempfile.gettempdir()))
    identity = A.source("/s").identity
    context_of(identity, server=True)
    assert set(os.listdir(tempfile.gettempdir())) == before
    assert "PRIVATE" not in repr(identity)
    assert not [f for f in os.listdir("/proc/self/fd") if "svid" in _link(f)]


async def test_a_link_to_nobody_says_so_and_names_the_url(tmp_path: Any) -> None:
    async with Peers(A.source("/c")) as peers:
        for url in (f"unix://{tmp_path}/none.sock", "tcp://127.0.0.1:1", "127.0.0.1:1"):
            with pytest.raises(UnavailableError) as refused:
                async with peers.link(url):
                    pass
            assert url in str(refused.value)
        assert peers.connections == 0


def _link(fd: str) -> str:
    import os

    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


async def _raw(url: str, context: ssl.SSLContext | None) -> Any:
    name = "" if context else None
    if url.startswith("unix://"):
        return await asyncio.open_unix_connection(
            url.removeprefix("unix://"), ssl=context, server_hostname=name
        )
    host, port = target(url).rsplit(":", 1)
    return await asyncio.open_connection(host, int(port), ssl=context, server_hostname=name)

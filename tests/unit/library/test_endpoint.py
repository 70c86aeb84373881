"""What an endpoint answers, asked by stock grpcio and by our own calls."""

import asyncio
import contextlib
import os
import stat
import time
from dataclasses import replace

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from nsm import policy
from nsm.descriptors import Descriptors
from nsm.endpoint import Endpoint
from nsm.errors import (
    DeniedError,
    ExhaustedError,
    InvalidError,
    TakenError,
    UnavailableError,
    UnsupportedError,
)
from nsm.identity import tokens
from nsm.model import (
    SECOND,
    Connection,
    Context,
    DNSConfig,
    EventType,
    IPContext,
    Mechanism,
    Path,
    PolicyRoute,
    Request,
    Route,
    Segment,
    Selector,
)
from nsm.offers import Limits, Offers
from nsm.proto import (
    connection_pb2,
    connection_pb2_grpc,
    health_pb2,
    health_pb2_grpc,
    networkservice_pb2,
    networkservice_pb2_grpc,
)
from nsm.registrar import Registrar
from nsm.rpc import registry_services
from nsm.rpc.calls import Calls
from nsm.rpc.peers import Peers
from nsm.rpc.server import serve
from tests.support.certs import Authority
from tests.support.wait import until

KERNEL = Mechanism("LOCAL", "KERNEL")
POOL = [["10.0.0.0/24"]]


def here() -> str:
    found = os.stat("/proc/self/ns/net")
    return f"inode://{found.st_dev}/{found.st_ino}"


class Asker:
    """A forwarder, as far as an endpoint sees one."""

    def __init__(self, calls: Calls, url: str) -> None:
        self.calls = calls
        self.url = url

    async def ask(self, id_="c-1", *, offer=(KERNEL,), **fields) -> Connection:
        conn = Connection(
            id=id_,
            service="echo",
            context=Context(ip=IPContext()),
            path=Path((Segment("fwd", id_),)),
        )
        return await self.again(replace(conn, **fields), offer=offer)

    async def again(self, conn: Connection, *, offer=(KERNEL,)) -> Connection:
        with Descriptors() as fds:
            answer = await self.calls.request(self.url, Request(conn, offer), fds=fds, within=5)
            policy.admit_reply(answer.connection, answer.handshake)
            mechanism = answer.connection.mechanism
            if mechanism.type == "KERNEL":
                found = os.fstat(fds.get(mechanism.get("inodeURL")))
                assert (found.st_dev, found.st_ino) == os.stat("/proc/self/ns/net")[2:0:-1]
        return answer.connection

    async def close(self, conn: Connection) -> None:
        with Descriptors() as fds:
            await self.calls.close(self.url, conn, fds=fds)


@contextlib.asynccontextmanager
async def served(authority: Authority, url: str, **options):
    options = {"prefixes": POOL} | options
    async with (
        Endpoint(
            "nse-1", ["echo"], source=authority.source("/nse"), listen=url, **options
        ) as endpoint,
        Peers(authority.source("/fwd")) as peers,
    ):
        yield endpoint, Asker(Calls(peers, 600 * SECOND), url)


async def test_a_request_gets_addresses_a_name_and_our_namespace_beside_the_reply(authority, door):
    async with served(authority, door) as (endpoint, asker):
        made = await asker.ask()
        assert made.id == "c-1"
        assert made.index == 0
        assert [segment.name for segment in made.segments] == ["fwd", "nse-1"]
        assert made.endpoint == "nse-1"
        assert made.payload == "ETHERNET"
        assert made.mechanism.get("inodeURL") == here()
        assert made.mechanism.get("name").startswith("echo-")
        assert len(made.mechanism.get("name")) == 15
        assert made.context.ip == IPContext(
            src_ip_addrs=("10.0.0.1/32",),
            dst_ip_addrs=("10.0.0.0/32",),
            src_routes=(Route("10.0.0.0/32"),),
            dst_routes=(Route("10.0.0.1/32"),),
        )
        interface = made.mechanism.get("name")
        assert made.segments[1].metrics["server_interface"] == f"KERNEL/{interface}"
        assert len(endpoint.connections) == 1


async def test_stock_grpcio_gets_the_same_answer(authority, door):
    """The independent peer: its TLS, its HTTP/2, its protobuf; only the token is made here."""
    async with Endpoint(
        "nse-1",
        ["echo"],
        source=authority.source("/nse", dns=["nse.local"]),
        listen=door,
        prefixes=[["10.0.0.0/24"], ["fd00::/64"]],
    ) as endpoint:
        own = authority.svid("/stock")
        token = tokens.issue(
            own,
            endpoint._source.identity.svid.id,
            600 * SECOND,
            peer_not_after=None,
            now=time.time_ns(),
        )
        metadata = (
            ("nsm-client-token", token.text),
            ("nsm-client-token-expires", tokens.format_instant(token.expires)),
        )
        credentials = grpc.ssl_channel_credentials(
            authority.certificate.public_bytes(Encoding.PEM), own.key_pem(), own.chain_pem()
        )
        options = (("grpc.ssl_target_name_override", "nse.local"),)
        async with grpc.aio.secure_channel(door, credentials, options) as channel:
            asked = networkservice_pb2.NetworkServiceRequest()
            asked.connection.id = "stock-0"
            asked.connection.network_service = "echo"
            asked.connection.path.path_segments.add(name="stock", id="stock-0")
            asked.mechanism_preferences.add(cls="LOCAL", type="MEMIF")
            asked.mechanism_preferences.add(cls="LOCAL", type="KERNEL", parameters={"name": "x1"})
            stub = networkservice_pb2_grpc.NetworkServiceStub(channel)
            made = await stub.Request(asked, metadata=metadata, timeout=5)
            assert made.mechanism.type == "KERNEL"
            assert made.mechanism.parameters == {"name": "x1", "inodeURL": here()}
            assert made.context.ip_context.src_ip_addrs == ["10.0.0.1/32", "fd00::1/128"]
            assert made.context.ip_context.dst_ip_addrs == ["10.0.0.0/32", "fd00::/128"]
            assert [s.name for s in made.path.path_segments] == ["stock", "nse-1"]
            assert all(s.expires.seconds > time.time() for s in made.path.path_segments)

            refreshed = await stub.Request(
                networkservice_pb2.NetworkServiceRequest(connection=made),
                metadata=metadata,
                timeout=5,
            )
            assert refreshed.context == made.context
            assert refreshed.mechanism == made.mechanism

            monitor = connection_pb2_grpc.MonitorConnectionStub(channel)
            seen = monitor.MonitorConnections(
                connection_pb2.MonitorScopeSelector(), metadata=metadata
            )
            first = await seen.read()
            assert [c.network_service for c in first.connections.values()] == ["echo"]

            health = health_pb2_grpc.HealthStub(channel)
            for service in ("", "networkservice.NetworkService", "connection.MonitorConnection"):
                question = health_pb2.HealthCheckRequest(service=service)
                assert (await health.Check(question, timeout=5)).status == 1

            await stub.Close(made, metadata=metadata, timeout=5)
            gone = await seen.read()
            assert gone.type == connection_pb2.DELETE
            assert endpoint.connections == ()

            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Request(asked, timeout=5)
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
            assert refused.value.details().endswith("no sufficient privileges")


async def test_a_refresh_returns_the_same(authority, door):
    async with served(authority, door) as (_, asker):
        once = await asker.ask()
        again = await asker.again(once)
        assert (again.context, again.mechanism) == (once.context, once.mechanism)


async def test_wires_of_one_endpoint_have_their_own_addresses_and_names(authority, door):
    async with served(authority, door) as (_, asker):
        made = [await asker.ask(f"c-{n}") for n in range(20)]
        addresses = [c.ip.src_ip_addrs + c.ip.dst_ip_addrs for c in made]
        assert len({one for pair in addresses for one in pair}) == 40
        assert len({c.mechanism.get("name") for c in made}) == 20


async def test_what_a_close_gives_back_can_be_had_again(authority, door):
    async with served(authority, door, prefixes=[["10.0.0.0/31"]]) as (endpoint, asker):
        made = await asker.ask("c-1")
        with pytest.raises(ExhaustedError, match=r"in 10.0.0.0/31 \(2 addresses, 2 held\)"):
            await asker.ask("c-2")
        await asker.close(made)
        assert endpoint.connections == ()
        assert (await asker.ask("c-2")).ip.src_ip_addrs == ("10.0.0.1/32",)


async def test_closing_what_is_unknown_is_fine(authority, door):
    async with served(authority, door) as (_, asker):
        made = await asker.ask()
        await asker.close(made)
        await asker.close(made)


async def test_noop_gets_no_interface_and_a_refusal_of_another_wire_leaves_it_alone(
    authority, door
):
    async with served(authority, door) as (_, asker):
        made = await asker.ask(offer=(Mechanism("LOCAL", "NOOP"),))
        assert made.mechanism == Mechanism("LOCAL", "NOOP")
        assert (await asker.again(made)).ip == made.ip


async def test_mechanisms_it_does_not_serve_are_refused_with_what_it_serves(authority, door):
    async with served(authority, door) as (endpoint, asker):
        with pytest.raises(UnsupportedError, match=r"requested mechanism: MEMIF.*KERNEL or NOOP"):
            await asker.ask(offer=(Mechanism("LOCAL", "MEMIF"),))
        assert len(endpoint.route.addresses) == 0


@pytest.mark.parametrize("name", ["sixteen-bytes-xx", "a/b", ".."])
def test_an_interface_name_linux_would_refuse_is_refused_before_anything_serves(authority, name):
    with pytest.raises(InvalidError, match="of endpoint 'nse-1'"):
        Endpoint("nse-1", ["echo"], source=authority.source("/nse"), interface=name)


async def test_a_name_a_forwarder_asks_for_is_taken_checked_and_given_once(authority, door):
    async with served(authority, door) as (endpoint, asker):
        named = (KERNEL.with_(name="nse0"),)
        assert (await asker.ask("c-1", offer=named)).mechanism.get("name") == "nse0"
        with pytest.raises(TakenError, match=r"'nse0' for connection .* is that of connection"):
            await asker.ask("c-2", offer=named)
        with pytest.raises(InvalidError, match="has 20 bytes, and Linux takes at most 15"):
            await asker.ask("c-3", offer=(KERNEL.with_(name="n" * 20),))
        assert len(endpoint.route.addresses) == 1, "what was refused holds addresses"


async def test_dns_and_policy_routes_are_told_once_however_often_it_is_refreshed(authority, door):
    rule = PolicyRoute("172.16.2.201/24", "17", "6666", "", (Route("172.16.4.0/24"),))
    names = DNSConfig(("10.0.0.9",), ("td.test",))

    async def rules():
        return (rule,)

    async with served(authority, door, dns=[names], policies=rules) as (_, asker):
        once = await asker.ask()
        assert once.context.dns.configs == (names,)
        assert once.ip.policies == (rule,)
        assert once.ip.src_ip_addrs == ("10.0.0.1/32", "172.16.2.201/24")
        assert (await asker.again(once)).context == once.context


async def test_the_users_function_has_the_last_word(authority, door):
    async def answer(conn: Connection) -> Connection:
        if conn.labels.get("tier") != "db":
            raise DeniedError(f"{conn.id} is no database client")
        return replace(conn, context=replace(conn.context, mtu=1400))

    async with served(authority, door, answer=answer) as (endpoint, asker):
        assert (await asker.ask("c-1", labels={"tier": "db"})).context.mtu == 1400
        with pytest.raises(DeniedError, match="is no database client"):
            await asker.ask("c-2")
        assert len(endpoint.route.addresses) == 1


async def test_an_idle_endpoint_refuses_in_upstreams_words(authority, door):
    async with served(authority, door) as (endpoint, asker):
        made = await asker.ask()
        idle = asyncio.create_task(endpoint.idle(0.05))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(idle), 0.2)
        await asker.close(made)
        await idle
        with pytest.raises(UnavailableError, match="endpoint expired"):
            await asker.ask("c-2")


async def test_events_reach_whoever_asked_for_the_connection(authority, door):
    async with served(authority, door) as (_, asker):
        stream = asker.calls.monitor(door, Selector((Segment("fwd", "c-1"),)))
        async with contextlib.aclosing(stream) as events:
            assert (await anext(events)).connections == {}
            made = await asker.ask()
            await asker.ask("another")
            up = await anext(events)
            assert up.type == EventType.UPDATE
            await asker.close(made)
            assert (await anext(events)).type == EventType.DELETE


@contextlib.asynccontextmanager
async def registry(authority: Authority, url: str):
    """A registry of ours on a unix socket; yields what it holds."""
    registrar = Registrar(Offers(Limits()))
    handlers = registry_services.handlers(registrar, lifetime=600 * SECOND)
    async with (
        serve([url], handlers, authority.source("/registry")),
        Peers(authority.source("/looker")) as peers,
    ):
        from nsm.rpc.registry import RegistryClient

        yield RegistryClient(peers, url)


async def test_it_is_registered_inside_the_block_with_its_service_and_not_after(
    authority, door, tmp_path
):
    async with registry(authority, door) as found:
        async with Endpoint(
            "nse-1",
            ["echo", "ping"],
            source=authority.source("/nse"),
            manager=door,
            labels={"app": "x"},
            payload="IP",
        ) as endpoint:
            directory = os.path.dirname(endpoint.urls[0].removeprefix("unix://"))
            assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
            (held,) = await found.find_endpoints()
            assert held.name == "nse-1"
            assert held.services == ("echo", "ping")
            assert held.labels == {"echo": {"app": "x"}, "ping": {"app": "x"}}
            assert held.url.startswith("inode://")
            services = await found.find_services()
            assert {(one.name, one.payload) for one in services} == {("echo", "IP"), ("ping", "IP")}
        assert await found.find_endpoints() == []
        assert not os.path.exists(directory)


async def test_a_name_that_somebody_else_holds_is_refused_at_once(authority, door):
    second = Endpoint("nse-1", ["echo"], source=authority.source("/b"), manager=door)
    async with (
        registry(authority, door),
        Endpoint("nse-1", ["echo"], source=authority.source("/a"), manager=door),
    ):
        with pytest.raises((DeniedError, TakenError), match="nse-1"):
            await second.__aenter__()


async def test_without_a_manager_it_says_so_when_its_patience_ends(authority, door):
    with pytest.raises(UnavailableError, match=r"door\.sock"):
        async with Endpoint(
            "nse-1", ["echo"], source=authority.source("/nse"), manager=door, patience=0.3
        ):
            pass


async def test_it_comes_back_to_a_registry_that_was_restarted(authority, door):
    source = authority.source("/nse")
    async with contextlib.AsyncExitStack() as outer:
        first = contextlib.AsyncExitStack()
        await first.enter_async_context(registry(authority, door))
        await outer.enter_async_context(Endpoint("nse-1", ["echo"], source=source, manager=door))
        await first.aclose()
        found = await outer.enter_async_context(registry(authority, door))
        await until(found.find_endpoints, "an endpoint registers again after a restart", bar=1)

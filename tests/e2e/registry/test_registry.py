"""The registry's process as its callers meet it: stock grpcio, tokens of PyJWT, kill -9."""

import asyncio
import contextlib
import json
import signal
import socket
import sqlite3
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.e2e.registry.lab import (
    EMPTY,
    REGISTRY,
    Endpoint,
    Lab,
    Service,
    lab,
    token,
    verified,
)
from tests.support.wait import until, write

NSE = "spiffe://td/nse"


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Lab]:
    async with lab(tmp_path) as one:
        yield one


@pytest.fixture
async def running(made: Lab) -> Lab:
    await made.start()
    return made


def endpoint(name: str = "nse-1", **more: Any) -> Any:
    return Endpoint(name=name, network_service_names=["icmp"], url="tcp://10.0.0.5:5001", **more)


def leaf(running: Lab) -> x509.Certificate:
    """The registry's certificate as a plain TLS client sees it."""
    context = ssl.create_default_context(cadata=running.authority.bundle_pem().decode())
    context.check_hostname = False
    svid = running.svid("looker")
    chain, key = running.folder / "c.pem", running.folder / "k.pem"
    chain.write_bytes(svid.chain_pem())
    key.write_bytes(svid.key_pem())
    context.load_cert_chain(chain, key)
    context.set_alpn_protocols(["h2"])
    host, port = running.tcp.removeprefix("tcp://").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), 5) as raw,
        context.wrap_socket(raw) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    assert der
    return x509.load_der_x509_certificate(der)


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
async def test_a_stock_client_registers_and_can_prove_the_answer(running: Lab, tcp: bool) -> None:
    async with running.stock("nse", tcp=tcp) as nse:
        own = token(nse.svid, REGISTRY)
        held, path = await nse.register(endpoint(), own=own)
        found = await nse.find(name="nse-1")
    assert list(held.path_ids) == [NSE, REGISTRY]
    assert path["Index"] == 0
    assert path["PathSegments"][0]["token"] == own
    assert len(path["PathSegments"]) == 2
    claims = verified(path["PathSegments"][1]["token"], leaf(running), NSE)
    assert claims == {"sub": REGISTRY, "aud": [NSE], "exp": claims["exp"]}
    assert 590 < claims["exp"] - time.time() <= 600
    assert 50 < held.expiration_time.seconds - time.time() <= 60
    assert abs(held.initial_registration_time.seconds - time.time()) < 5
    assert [f.network_service_endpoint for f in found] == [held]


async def test_a_registration_through_a_manager_names_everybody(running: Lab) -> None:
    manager_id = "spiffe://td/nsmgr"
    nse = running.svid("nse")
    async with running.stock("nsmgr") as manager:
        first = token(nse, manager_id)
        body = [{"token": first}, {"token": token(manager.svid, NSE)}]
        came = json.dumps({"Index": 1, "PathSegments": body})
        own = token(manager.svid, REGISTRY)
        held, path = await manager.register(
            endpoint(path_ids=[NSE, manager_id]), path=came, own=own
        )
        assert list(held.path_ids) == [NSE, manager_id, REGISTRY]
        assert path["Index"] == 1
        assert [s["token"] for s in path["PathSegments"]][:2] == [first, own]
        # A refresh sends everything back; what lies beyond a hop's own place is replaced or cut.
        stale = {"Index": 1, "PathSegments": [*path["PathSegments"], {"token": "stale"}]}
        held, path = await manager.register(held, path=json.dumps(stale))
        assert len(path["PathSegments"]) == 3
        assert list(held.path_ids) == [NSE, manager_id, REGISTRY]
        # Another manager may come for the same owner; another owner may not.
        body[0] = {"token": token(running.svid("other"), manager_id)}
        foreign = json.dumps({"Index": 1, "PathSegments": body})
        refused = await manager.refused(endpoint(path_ids=[NSE, manager_id]), path=foreign)
        assert "spiffe://td/other asks" in (refused.details() or "")


async def test_what_proves_nothing_is_denied_on_register_and_unregister(running: Lab) -> None:
    async with running.stock("nse") as nse:
        await nse.register(endpoint())
        cases: dict[str, tuple[str, dict[str, Any]]] = {
            "no path": ('no metadata "path"', {"path": None}),
            "no token": ("it has no token", {"own": ""}),
            "expired": ("expired", {"own": token(nse.svid, REGISTRY, life=-1)}),
            "for another": ("meant for", {"own": token(nse.svid, "spiffe://td/nsmgr")}),
            "replayed": ("not signed", {"own": token(running.svid("nse"), REGISTRY)}),
            "forged": ("says it is", {"own": token(nse.svid, REGISTRY, sub="spiffe://td/other")}),
            "aud no array": ("meant for", {"own": token(nse.svid, REGISTRY, aud=REGISTRY)}),
            "garbage": ("no JWT", {"own": "garbage"}),
        }
        for name, (says, about) in cases.items():
            for error in (
                await nse.refused(endpoint(), **about),
                await nse.refused(Service(name="icmp"), **about),
            ):
                assert error.code() == StatusCode.PERMISSION_DENIED, name
                assert says in (error.details() or ""), (name, error.details())
                assert (error.details() or "").endswith("no sufficient privileges"), name
            with pytest.raises(grpc.aio.AioRpcError, match="no sufficient privileges"):
                await nse.unregister(endpoint(), **about)
        assert len(await nse.find(name="nse-1")) == 1  # Find needs no token and no path
        none_of_it = running.log()
    assert "eyJ" not in none_of_it


async def test_a_bad_path_is_a_sentence(running: Lab) -> None:
    async with running.stock("nse") as nse:
        error = await nse.refused(endpoint(), path="{")
        assert error.code() == StatusCode.INVALID_ARGUMENT
        assert "path metadata cannot be read: it is no JSON" in (error.details() or "")
        past = json.dumps({"Index": 1, "PathSegments": [{"token": "x"}]})
        error = await nse.refused(endpoint(), path=past)
        assert "Path.Index+1==2 should be less or equal" in (error.details() or "")


async def test_every_refusal_says_what_and_what_to_do(made: Lab) -> None:
    await made.start(NSM_MAX_PER_OWNER="2", NSM_MAX_RECORD="2000")
    async with made.stock("nse") as nse, made.stock("other") as other:
        await nse.register(endpoint())
        await nse.register(Service(name="icmp", payload="ETHERNET"))
        for who, asked, code, says in (
            (nse, endpoint(""), "INVALID_ARGUMENT", "NetworkServiceEndpoint.Name can not be zero"),
            (nse, Service(), "INVALID_ARGUMENT", "NetworkService.Name can not be zero valued"),
            (nse, endpoint("nse-2"), "RESOURCE_EXHAUSTED", "raise NSM_MAX_PER_OWNER"),
            (nse, endpoint("n" * 513), "INVALID_ARGUMENT", "has 513 characters in its name"),
            (nse, endpoint("n" * 2100), "INVALID_ARGUMENT", "takes at most 2000"),
            (nse, endpoint("a@far"), "UNIMPLEMENTED", "NSM_PROXY_REGISTRY_URL is not set"),
            (other, endpoint(), "PERMISSION_DENIED", "'nse-1' belongs to spiffe://td/nse"),
            (other, Service(name="icmp"), "PERMISSION_DENIED", "payload 'ETHERNET' where 'IP'"),
        ):
            error = await who.refused(asked)
            assert error.code().name == code, error.details()
            assert says in (error.details() or "")
        error = await nse.refused(endpoint(expiration_time={"seconds": 5}))
        assert "compare the clocks" in (error.details() or "")
        with pytest.raises(grpc.aio.AioRpcError, match="of another domain"):
            await nse.find(network_service_names=["icmp@far"])
        # The same content from another identity is fine, and the owner stays.
        answer, _ = await other.register(Service(name="icmp", payload="ETHERNET"))
        assert answer.path_ids[0] == "spiffe://td/other"
        (held,) = await other.find_services(name="icmp")
        assert held.network_service.path_ids[0] == NSE


async def test_who_registers_without_end_is_refused_and_the_others_are_served(made: Lab) -> None:
    store = str(made.folder / "kept.sqlite")
    await made.start(NSM_STORE=store, NSM_MAX_WRITES="4", NSM_MAX_WRITES_PER_CLIENT="3")
    async with made.stock("nse") as nse, made.stock("other") as other:
        await nse.register(endpoint())
        await other.register(endpoint("calm"))
        assert made.process is not None
        made.process.send_signal(signal.SIGSTOP)  # so that all of them come at once
        flood = [asyncio.create_task(nse.register(endpoint(f"nse-{n}"))) for n in range(60)]
        calm = asyncio.create_task(other.register(endpoint("calm")))
        await asyncio.wait([*flood, calm], timeout=0.3)
        made.process.send_signal(signal.SIGCONT)
        answers = await asyncio.gather(*flood, return_exceptions=True)
        assert (await calm)[0].name == "calm"
        errors = [one for one in answers if isinstance(one, grpc.aio.AioRpcError)]
        assert 0 < len(errors) < 60
        for error in errors:
            assert error.code() == StatusCode.RESOURCE_EXHAUSTED, error.details()
        said = errors[0].details() or ""
        assert f"{NSE} has 3 registrations under way at registry, which takes 3 of one" in said
        assert "raise NSM_MAX_WRITES_PER_CLIENT there" in said
        await nse.register(endpoint("after"))


async def test_a_watch_tells_what_is_there_and_every_change(running: Lab) -> None:
    async with running.stock("nse") as nse:
        held, path = await nse.register(endpoint())
        watch = nse.watch(network_service_names=["icmp"])
        assert (await watch.read()).network_service_endpoint == held
        held.ClearField("expiration_time")
        again, _ = await nse.register(held, path=json.dumps(path))  # unchanged, told all the same
        told = await watch.read()
        assert (told.network_service_endpoint, told.deleted) == (again, False)
        assert again.initial_registration_time == held.initial_registration_time
        await nse.unregister(again)
        told = await watch.read()
        assert (told.network_service_endpoint, told.deleted) == (again, True)
        await nse.unregister(again)  # not there: fine
        watch.cancel()


async def test_what_a_newer_peer_says_comes_back_whole(running: Lab) -> None:
    more = endpoint()
    more.MergeFromString(b"\xfa\x06\x05later")  # field 111, of no version we know
    async with running.stock("nse") as nse:
        await nse.register(more)
        (found,) = await nse.find(name="nse-1")
    assert b"\xfa\x06\x05later" in found.network_service_endpoint.SerializeToString()


async def test_an_endpoint_that_is_not_refreshed_ends_and_its_name_is_free(made: Lab) -> None:
    await made.start(NSM_EXPIRE_PERIOD="700ms")
    async with made.stock("nse") as nse, made.stock("other") as other:
        watch = other.watch(name="nse-1")
        began = time.monotonic()
        held, _ = await nse.register(endpoint())
        assert (await watch.read()).deleted is False
        last = await watch.read()
        write("an endpoint's end after its 0.7 s", time.monotonic() - began - 0.7, 0.1)
        assert (last.deleted, last.network_service_endpoint) == (True, held)
        assert await other.find(name="nse-1") == []
        taken, _ = await other.register(endpoint())
        assert taken.path_ids[0] == "spiffe://td/other"
        watch.cancel()


async def test_kill_9_loses_no_registration_and_no_owner(made: Lab) -> None:
    store = str(made.folder / "registry.sqlite")
    await made.start(NSM_STORE=store, NSM_EXPIRE_PERIOD="2s", NSM_MAX_WRITES_PER_CLIENT="200")
    async with made.stock("nse") as nse:
        await asyncio.gather(*(nse.register(endpoint(f"nse-{n}")) for n in range(200)))
        before, _ = await nse.register(endpoint("nse-7"))
        await nse.unregister(endpoint("nse-9"))
        await nse.register(Service(name="icmp", payload="ETHERNET"))
        assert await made.stop(signal.SIGKILL) == -signal.SIGKILL
    ended = time.monotonic() + 2.1  # everything would have
    await until(lambda: time.monotonic() > ended, "that", bar=2.1, record=False)
    await made.start(NSM_STORE=store, NSM_EXPIRE_PERIOD="2s")
    assert "holds 199 endpoints, 1 services" in made.line
    async with made.stock("nse") as nse, made.stock("other") as other:
        found = await other.find(network_service_names=["icmp"])
        assert len(found) == 199
        for one in found:  # upstream's forwarders leave out what says it has ended
            assert one.network_service_endpoint.expiration_time.seconds >= int(time.time())
        error = await other.refused(endpoint("nse-7"))
        assert "belongs to spiffe://td/nse" in (error.details() or "")
        error = await other.refused(Service(name="icmp"))
        assert error.code() == StatusCode.PERMISSION_DENIED
        after, _ = await nse.register(endpoint("nse-7"))
        assert after.initial_registration_time == before.initial_registration_time
        await until(lambda: _only(other, "nse-7"), "the grace to end for all but one", bar=2.5)

    with contextlib.closing(sqlite3.connect(f"file:{store}?mode=ro", uri=True)) as reader:
        assert reader is not None  # the file is SQLite's, whoever looks


async def _drain(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def _only(client: Any, name: str) -> bool:
    found = await client.find()
    return [f.network_service_endpoint.name for f in found] in ([name], [])


async def test_a_stop_ends_watches_unavailable_and_exits_0(running: Lab) -> None:
    async with running.stock("nse") as nse:
        await nse.register(endpoint())
        watch = nse.watch()
        await watch.read()
        stopping = asyncio.ensure_future(running.stop())
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await watch.read()
        assert ended.value.code() == StatusCode.UNAVAILABLE
        assert "stopping" in (ended.value.details() or "")
        assert await stopping == 0
    assert not (running.folder / "registry.sock").exists()


async def test_it_is_healthy_under_upstreams_names(running: Lab) -> None:
    async with running.stock("prober") as prober:
        health = health_pb2_grpc.HealthStub(prober.channel)
        for name in (
            "",
            "registry.NetworkServiceRegistry",
            "registry.NetworkServiceEndpointRegistry",
        ):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_200_watchers_hear_of_a_change_at_once(running: Lab) -> None:
    async with running.stock("nse") as nse, running.stock("watcher") as watcher:
        held, _ = await nse.register(endpoint())
        quick = [watcher.watch(name="nse-1") for _ in range(200)]
        for one in quick:
            assert (await one.read()).network_service_endpoint == held
        began = time.monotonic()
        await nse.register(endpoint())
        await asyncio.gather(*(one.read() for one in quick))
        write("200 watchers to hear of a change", time.monotonic() - began, 0.5)
        for one in quick:
            one.cancel()


@pytest.mark.long
async def test_a_watcher_that_does_not_read_is_cut_and_the_others_hear_all(made: Lab) -> None:
    await made.start()
    big = {"icmp": {"labels": {f"k{n}": "v" * 4000 for n in range(5)}}}
    async with (
        made.stock("nse") as nse,
        made.stock("watcher") as watcher,
        made.stock("asleep") as sleeper,
    ):
        quick = [watcher.watch(name="nse-1") for _ in range(3)]
        asleep = sleeper.watch(name="nse-1")  # asks, and reads no answer
        await asyncio.gather(
            asleep.wait_for_connection(), *(q.wait_for_connection() for q in quick)
        )
        for _ in range(400):  # 8 MB: more than grpcio takes in unread
            await nse.register(endpoint(network_service_labels=big))
            told = await asyncio.gather(*(one.read() for one in quick))
            assert all(len(one.SerializeToString()) > 20_000 for one in told)
        await until(lambda: "watcher too slow" in made.log(), "a slow watcher to be cut", bar=6.0)
        with pytest.raises(grpc.aio.AioRpcError) as cut:
            await asyncio.wait_for(_drain(asleep), 20)
        assert cut.value.code() == StatusCode.RESOURCE_EXHAUSTED
        says = "watcher too slow: it read nothing for 5 s; watch again"
        assert cut.value.details() == says
        await nse.register(endpoint())
        for one in quick:
            assert (await one.read()).network_service_endpoint.name == "nse-1"
            one.cancel()


@pytest.mark.parametrize(
    ("settings", "code", "says"),
    [
        ({"NSM_STORE": "/nowhere/at/all"}, 3, "/nowhere/at/all cannot be opened: No such file"),
        ({"NSM_STORE": "{folder}/text"}, 3, "is damaged: file is not a database"),
        # not 2: systemd starts no wrong setting again, and an address comes with the network
        ({"NSM_LISTEN_ON": "tcp://198.51.100.1:5002"}, 3, "Cannot assign requested address"),
        ({"NSM_EXPIRE_PERIOD": "soon"}, 2, "NSM_EXPIRE_PERIOD is 'soon'; expected a duration"),
        ({"NSM_MAX_NAMES": "0"}, 2, "NSM_MAX_NAMES is '0'; expected a whole number above zero"),
        ({"NSM_REGISTRY_SERVER_POLICIES": "("}, 2, "which is no pattern"),
    ],
)
async def test_what_keeps_it_from_starting_is_a_sentence(
    made: Lab, settings: dict[str, str], code: int, says: str
) -> None:
    (made.folder / "text").write_text("this is no database at all " * 100)
    settings = {key: value.format(folder=made.folder) for key, value in settings.items()}
    process = await made.spawn(**settings)
    assert await asyncio.wait_for(process.wait(), 20) == code
    assert says in made.log().replace('\\"', '"')


async def test_policies_can_be_switched_off_as_upstreams_and_are_said_to_be(made: Lab) -> None:
    await made.start(NSM_REGISTRY_SERVER_POLICIES="none")
    async with made.stock("nse") as nse, made.stock("other") as other:
        await nse.endpoints.Register(endpoint(), timeout=5)  # no token, no path
        taken, _ = await other.register(endpoint(), path=EMPTY)
        assert taken.path_ids[0] == "spiffe://td/other"
    assert "policies are off" in made.log()


async def test_a_thousand_registrations_at_once_are_kept_in_a_few_transactions(made: Lab) -> None:
    bounds = {"NSM_MAX_WRITES": "4000", "NSM_MAX_WRITES_PER_CLIENT": "1000"}  # 1000 of one client
    await made.start(NSM_STORE=str(made.folder / "r.sqlite"), **bounds)
    async with made.stock("nse") as nse:
        began = time.monotonic()
        await asyncio.gather(*(nse.register(endpoint(f"nse-{n}")) for n in range(1000)))
        seconds = time.monotonic() - began
        write("1000 registrations at once", seconds, 5.0)
        print(f"1000 registrations at once: {seconds:.2f} s")
        assert len(await nse.find(network_service_names=["icmp"])) == 1000

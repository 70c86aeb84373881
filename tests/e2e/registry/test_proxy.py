"""Names of other domains: a registry, its proxy, and another domain's registry, as processes.

What the other domain holds is asked of its registry itself; a file says where it is.
"""

import asyncio
import contextlib
import json
import signal
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from nsm.caller import Caller
from nsm.errors import (
    DeniedError,
    ExhaustedError,
    InvalidError,
    NotFoundError,
    NsmError,
    UnauthenticatedError,
    UnavailableError,
)
from nsm.identity import tokens
from nsm.identity.source import HeldIdentity, Identity
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.offers import Offers
from nsm.registrar import Registrar
from nsm.rpc.registry import RegistryClient, keep_registered
from nsm.rpc.registry_services import handlers
from nsm.rpc.server import serve
from tests.e2e.registry import lab
from tests.e2e.registry.realms import Realms
from tests.e2e.registry.two import DOOR, ENDPOINT, HERE, NAMES, Two
from tests.support.nameserver import free_port
from tests.support.wait import until, write

pytestmark = pytest.mark.long


async def test_a_registration_crosses_and_its_path_comes_back_whole(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    held = await nse.register_endpoint(ENDPOINT)
    hops = ["spiffe://one.test/nse", two.registry.id, two.proxy.id, two.far.id]
    assert list(held.item.path_ids) == hops
    assert [tokens.claims(token).sub for token in held.path.tokens] == hops
    assert held.path.index == 0
    assert replace(held.item, expires=None, registered=None, path_ids=()) == ENDPOINT
    (found,) = await there.find_endpoints()
    assert replace(found, expires=None, registered=None, path_ids=()) == HERE
    assert found.path_ids[0] == "spiffe://one.test/nse"
    again = await nse.register_endpoint(replace(held.item, expires=None), held.path)
    assert again.item.registered == held.item.registered
    await nse.unregister_endpoint(again.item, again.path)
    assert await there.find_endpoints() == []
    assert await nse.find_endpoints(Endpoint(services=("icmp",))) == []  # never was of domain one


async def test_stock_grpc_and_jwt_agree(two: Two, there: RegistryClient) -> None:
    asked = lab.Endpoint(name="nse-1@two", network_service_names=["icmp@two"], url=ENDPOINT.url)
    async with two.one.stock("nse", two.registry) as stock:
        held, path = await stock.register(asked, own=lab.token(stock.svid, two.registry.id))
        (seen,) = await stock.find(network_service_names=["icmp@two"])
    assert (path["Index"], len(path["PathSegments"])) == (0, 4)
    found = seen.network_service_endpoint
    assert (found.name, list(found.network_service_names)) == ("nse-1@two", ["icmp@two"])
    assert (held.url, found.url) == (ENDPOINT.url, DOOR)
    assert [one.name for one in await there.find_endpoints()] == ["nse-1"]


async def test_services_cross_too(two: Two, nse: RegistryClient, there: RegistryClient) -> None:
    held = await nse.register_service(Service("icmp@two", "ETHERNET"))
    assert (held.item.name, len(held.path.tokens)) == ("icmp@two", 4)
    assert [s.name for s in await there.find_services()] == ["icmp"]
    (found,) = await nse.find_services(Service("icmp@two"))
    assert (found.name, found.payload) == ("icmp@two", "ETHERNET")
    await nse.unregister_service(held.item, held.path)
    assert await there.find_services() == []


async def test_a_name_of_the_other_domain_belongs_to_who_registered_it(
    two: Two, nse: RegistryClient
) -> None:
    await nse.register_endpoint(ENDPOINT)
    async with two.one.client("other", two.registry) as other:
        with pytest.raises(DeniedError) as refused:
            await other.register_endpoint(ENDPOINT)
    hops = ("the proxy for other domains at " + two.proxy.url, "the registry of domain 'two' at ")
    for part in (*hops, two.far.url, "'nse-1' belongs to spiffe://one.test/nse"):
        assert part in refused.value.message
    assert refused.value.message.startswith(hops[0])


async def test_a_name_without_a_domain_stays_what_it_is_beside_a_service_of_one(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    held = await nse.register_endpoint(Endpoint("nse-2", ("icmp@two",), url="tcp://192.0.2.1:1"))
    assert (held.item.name, held.item.services) == ("nse-2", ("icmp@two",))
    (found,) = await there.find_endpoints()
    assert (found.name, found.services) == ("nse-2", ("icmp",))
    await nse.unregister_endpoint(held.item, held.path)
    assert await there.find_endpoints() == []


async def test_found_endpoints_are_met_at_the_domains_door_as_the_file_says_now(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    await there.register_endpoint(HERE)

    async def url() -> str:
        (found,) = await nse.find_endpoints(Endpoint(services=("icmp@two",)))
        assert (found.name, found.labels) == ("nse-1@two", {"icmp@two": {"app": "x"}})
        return found.url

    assert await url() == DOOR
    two.say(two={"registry": [two.far.url]})  # a floating domain
    assert await url() == HERE.url
    two.say(text="two:\n  registry: [tcp://nowhere]\n")  # a broken file changes nothing
    assert await url() == HERE.url
    assert await url() == HERE.url
    told = [line for line in two.proxy.log().splitlines() if "the last good ones stay" in line]
    assert len(told) == 1
    assert f"{two.file}:2: 'tcp://nowhere' is no address of a process" in told[0]
    two.file.unlink()
    assert await url() == HERE.url
    two.say(two={"registry": [two.far.url], "nsmgr-proxy": ["tcp://127.0.0.9:5004"]})
    assert await url() == "tcp://127.0.0.9:5004"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("two:\n  registri: [tcp://h:1]\n", ":2: domain 'two' has no 'registri'"),
        ("two: {registry: tcp://h:1}\n two: 3\n", ":2: "),
        ("two:\n  registry:\n  - tcp://h:1\n  - h\n", ":4: 'h' is no address of a process"),
        ("- two\n", ":1: the file is no mapping"),
        (None, "cannot be read: No such file or directory"),
    ],
)
async def test_a_start_with_a_broken_file_says_where(
    made: Realms, tmp_path: Path, text: str | None, says: str
) -> None:
    (one,) = await made.make("one.test", programs=NAMES)
    file = tmp_path / "domains.yaml"
    if text is not None:
        file.write_text(text)
    proxy = one.place("registry-proxy", "registry-proxy")
    process = await proxy.spawn(NSM_DOMAINS_PATH=str(file))
    assert await asyncio.wait_for(process.wait(), 30) == 2
    assert f"{file}" in proxy.log()
    assert says in proxy.log()


@contextlib.contextmanager
def silent(host: str, port: int) -> Iterator[None]:
    """Somebody who takes connections and says nothing."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()
        yield


async def test_addresses_are_tried_in_turn_and_a_dead_one_costs_one_dial(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    await there.register_endpoint(HERE)
    query = Endpoint(services=("icmp@two",))
    dead, mute = f"tcp://127.0.0.9:{free_port()}", f"tcp://127.0.0.8:{free_port()}"
    with silent("127.0.0.8", int(mute.rpartition(":")[2])):
        two.say(two={"registry": [dead, mute, two.far.url]})
        began = time.monotonic()
        assert len(await nse.find_endpoints(query)) == 1
        first = time.monotonic() - began
        assert first > 0.7  # what the silent one may take
        began = time.monotonic()
        for _ in range(10):
            assert len(await nse.find_endpoints(query)) == 1
        write("10 finds past a silent address", time.monotonic() - began, 0.5)
        assert time.monotonic() - began < 7  # that which answered is first now
        two.say(two={"registry": [dead, mute]})
        with pytest.raises(UnavailableError) as failed:
            await nse.find_endpoints(query)
    for part in (
        "no registry of domain 'two' answers; tried: ",
        f"the registry of domain 'two' at {dead}: cannot connect",
        "Connection refused",
        f"the registry of domain 'two' at {mute}: cannot connect",
        "no answer within 0.75 s",
    ):
        assert part in failed.value.message


async def test_a_domain_that_we_do_not_trust_is_refused_and_nothing_reaches_it(
    made: Realms, two: Two, nse: RegistryClient
) -> None:
    (stranger,) = await made.make("stranger.test", programs=NAMES)
    registry = await stranger.start("registry")
    two.say(far={"registry": [registry.url]}, two={"registry": [registry.url, two.far.url]})
    asked = Endpoint("nse-1@far", ("icmp@far",), url=ENDPOINT.url)
    for call in (nse.register_endpoint, nse.find_endpoints):
        with pytest.raises(UnauthenticatedError) as refused:
            await call(asked)
        assert f"the registry of domain 'far' at {registry.url}" in refused.value.message
        assert "does not chain to any bundle here" in refused.value.message
    async with stranger.client("looker", registry) as looker:
        assert await looker.find_endpoints() == []
    # One that cannot prove itself is passed over for one that can.
    await nse.register_endpoint(ENDPOINT)


async def test_a_domain_that_does_not_trust_us_keeps_us_out(
    made: Realms, two: Two, nse: RegistryClient
) -> None:
    stranger, _ = await made.make("stranger.test", "friend.test", programs=NAMES)
    registry = await stranger.start("registry")
    (two.one.folder / "federation" / "stranger.test.pem").write_bytes(
        stranger.authority.bundle_pem()
    )  # we believe them, and they do not believe us
    two.say(far={"registry": [registry.url]})

    async def refused() -> str:
        with pytest.raises(NsmError) as why:
            await nse.register_endpoint(Endpoint("nse-1@far", ("icmp@far",), url=ENDPOINT.url))
        return why.value.message if "no bundle" not in why.value.message else ""

    message = await until(refused, "the proxy to have the stranger's bundle", bar=5)
    assert f"the registry of domain 'far' at {registry.url}" in message
    async with stranger.client("looker", registry) as looker:
        assert await looker.find_endpoints() == []


async def test_nobody_speaks_for_another_trust_domain(two: Two, there: RegistryClient) -> None:
    # A manager of domain two's stands before domain one's proxy with a path of domain one's.
    stolen = lab.token(two.one.svid("nse"), "spiffe://two.test/nsmgr")
    async with two.two.stock("nsmgr", two.proxy) as stock:
        body = [{"token": stolen}, {"token": lab.token(stock.svid, "spiffe://one.test/nse")}]
        error = await stock.refused(
            lab.Endpoint(name="nse-1@two", network_service_names=["icmp@two"]),
            path=json.dumps({"Index": 1, "PathSegments": body}),
            own=lab.token(stock.svid, two.proxy.id),
        )
    assert error.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "nobody of the trust domain two.test may speak" in (error.details() or "")
    assert await there.find_endpoints() == []


async def test_what_is_no_name_of_another_domain_is_a_sentence(two: Two) -> None:
    async with two.one.client("looker", two.proxy) as looker:
        services, endpoints = looker.find_services, looker.find_endpoints
        for call, asked, says in (
            (services, Service("icmp"), "domain cannot be empty: 'icmp'"),
            (services, Service(), "domain cannot be empty"),
            (endpoints, Endpoint("nse-1"), "domain cannot be empty: 'nse-1'"),
            (looker.register_endpoint, HERE, "domain cannot be empty: 'nse-1'"),
            (services, Service("icmp@"), "'icmp@' says no domain"),
            (services, Service("@two"), "'@two' says no name"),
            (services, Service("icmp@a b"), "'a b' is no domain"),
            (endpoints, Endpoint(services=("a@x", "b@y")), "are of two domains"),
        ):
            with pytest.raises(InvalidError) as refused:
                await call(asked)  # type: ignore[operator]
            assert says in refused.value.message


async def test_an_address_is_a_domain(two: Two, nse: RegistryClient, there: RegistryClient) -> None:
    await there.register_endpoint(HERE)
    domain = two.far.url.removeprefix("tcp:")
    (found,) = await nse.find_endpoints(Endpoint(services=(f"icmp@{domain}",)))
    assert (found.name, found.url) == (f"nse-1@{domain}", HERE.url)


async def test_a_registry_without_a_proxy_says_so(two: Two, there: RegistryClient) -> None:
    with pytest.raises(NsmError, match="NSM_PROXY_REGISTRY_URL is not set"):
        await there.find_endpoints(Endpoint(services=("icmp@one",)))


async def test_a_proxy_that_is_away_is_named_and_one_that_returns_is_used(
    two: Two, nse: RegistryClient
) -> None:
    await two.proxy.stop()
    with pytest.raises(UnavailableError) as away:
        await nse.find_services(Service("icmp@two"))
    assert f"the proxy for other domains at {two.proxy.url}: cannot connect" in away.value.message
    await nse.register_endpoint(HERE)  # our own names need nobody else
    await two.proxy.start(NSM_DOMAINS_PATH=str(two.file))
    assert await nse.find_services(Service("icmp@two")) == []


class Seen:
    """A watch in the background: what it told, and how it ended."""

    def __init__(self, client: RegistryClient, query: Endpoint) -> None:
        self.told: list[Found[Endpoint]] = []
        self.ended: NsmError | None = None
        self.silently = False
        self.task = asyncio.create_task(self._follow(client, query))

    async def _follow(self, client: RegistryClient, query: Endpoint) -> None:
        try:
            async with contextlib.aclosing(client.watch_endpoints(query)) as changes:
                async for one in changes:
                    self.told.append(one)
            self.silently = True
        except NsmError as error:
            self.ended = error

    @property
    def last(self) -> tuple[str, str, bool] | None:
        """Name, URL, and whether it is gone."""
        if not self.told:
            return None
        one = self.told[-1]
        return one.item.name, one.item.url, one.deleted

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def watch(nse: RegistryClient) -> AsyncIterator[Seen]:
    seen = Seen(nse, Endpoint(services=("icmp@two",)))
    yield seen
    await seen.end()


async def test_a_watch_tells_changes_of_the_other_domain(
    two: Two, watch: Seen, there: RegistryClient
) -> None:
    held = await there.register_endpoint(HERE)
    await until(lambda: watch.last == ("nse-1@two", DOOR, False), "the watch to tell")
    await there.unregister_endpoint(held.item, held.path)
    await until(lambda: watch.last == ("nse-1@two", DOOR, True), "the watch to tell of the end")
    assert len(watch.told) == 2
    assert watch.ended is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_watch_whose_other_end_ends_is_ended_and_says_by_whom(
    two: Two, watch: Seen, there: RegistryClient, how: signal.Signals
) -> None:
    await there.register_endpoint(HERE)
    await until(lambda: watch.last, "the watch to tell")
    await two.far.stop(how)
    await until(lambda: watch.ended or watch.silently, "the watch to end")
    assert isinstance(watch.ended, UnavailableError)
    for part in (two.proxy.url, f"the registry of domain 'two' at {two.far.url}: "):
        assert part in watch.ended.message


async def test_a_watch_of_a_domain_that_moved_ends(
    two: Two, watch: Seen, there: RegistryClient
) -> None:
    await there.register_endpoint(HERE)
    await until(lambda: watch.last, "the watch to tell")
    two.say(two={"registry": ["tcp://127.0.0.1:1"]})  # the old registry goes on, forgotten
    await until(lambda: watch.ended or watch.silently, "the watch to end", bar=6)
    assert isinstance(watch.ended, UnavailableError)
    assert "no longer where its registry is" in watch.ended.message


async def test_a_watch_goes_to_the_address_that_answers(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    two.say(two={"registry": [f"tcp://127.0.0.9:{free_port()}", two.far.url]})
    watch = Seen(nse, Endpoint(services=("icmp@two",)))
    try:
        await there.register_endpoint(HERE)
        await until(lambda: watch.last == ("nse-1@two", HERE.url, False), "the watch to tell")
        two.say(two={"registry": [f"tcp://127.0.0.9:{free_port()}"]})
        other = Seen(nse, Endpoint(services=("icmp@two",)))
        await until(lambda: other.ended or other.silently, "a watch of nobody to end")
        assert isinstance(other.ended, UnavailableError)
        assert "Connection refused" in other.ended.message
    finally:
        await watch.end()


@pytest.mark.parametrize("at", ["registry", "proxy"])
async def test_only_so_many_may_watch_other_domains(two: Two, at: str) -> None:
    here = two.registry if at == "registry" else two.proxy
    await here.stop()
    told = {"NSM_PROXY_REGISTRY_URL": two.proxy.url}
    if at == "proxy":
        told = {"NSM_DOMAINS_PATH": str(two.file)}
    await here.start(NSM_MAX_WATCHERS_PER_ID="2", **told)
    query = Endpoint(services=("icmp@two",))
    async with two.one.client("looker", here) as looker:
        some = [Seen(looker, query) for _ in range(3)]
        try:
            await until(lambda: any(one.ended for one in some), "one watch too many to end")
            (ended,) = [one.ended for one in some if one.ended]
            assert isinstance(ended, ExhaustedError)
            assert "spiffe://one.test/looker has 2 watch streams open" in ended.message
        finally:
            for one in some:
                await one.end()


class Abrupt(Registrar):
    """A registry that ends its watches with OK, as upstream's do behind a hop of theirs."""

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        async with contextlib.aclosing(super().find_endpoints(query, False, caller)) as found:
            async for one in found:
                yield one


@pytest.mark.parametrize("told", [0, 1])
async def test_a_watch_that_ends_without_a_word_is_ended_with_one(
    two: Two, nse: RegistryClient, told: int
) -> None:
    registrar = Abrupt(Offers())
    for _ in range(told):
        registrar.offers.endpoints.put(HERE)
    source = HeldIdentity(Identity(two.two.svid("abrupt"), two.two.known))
    async with serve(["tcp://127.0.0.1:0"], handlers(registrar, lifetime=SECOND), source) as far:
        two.say(two={"registry": list(far.urls)})
        seen = Seen(nse, Endpoint(services=("icmp@two",)))
        await until(lambda: seen.ended or seen.silently, "the watch to end")
        assert isinstance(seen.ended, UnavailableError)
        assert f"{far.urls[0]}: the watch ended" in seen.ended.message
        assert len(seen.told) == told


async def test_an_endpoint_keeps_itself_registered_over_a_restart_of_the_other_registry(
    two: Two, nse: RegistryClient, there: RegistryClient
) -> None:
    failures: list[NsmError] = []
    keeping = asyncio.create_task(
        keep_registered(nse, ENDPOINT, on_failure=failures.append)  # type: ignore[arg-type]
    )

    async def held() -> list[str]:
        with contextlib.suppress(NsmError):
            return [one.name for one in await there.find_endpoints()]
        return []

    try:
        await until(held, "the endpoint to be there")
        await two.far.stop(signal.SIGKILL)
        await two.far.start()
        await until(held, "the endpoint to be there again", bar=2)
        assert failures
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    await until(lambda: _nothing(held), "the endpoint to be gone")


async def _nothing(held: object) -> bool:
    return not await held()  # type: ignore[operator]


async def test_a_domain_nobody_knows_is_a_sentence(two: Two, nse: RegistryClient) -> None:
    await two.proxy.stop()
    dead = f"127.0.0.1:{free_port(kind=socket.SOCK_DGRAM)}"
    await two.proxy.start(NSM_DOMAINS_PATH=str(two.file), NSM_DNS_SERVERS=dead)
    with pytest.raises(UnavailableError) as failed:
        await nse.find_services(Service("icmp@elsewhere"))
    for part in ("'elsewhere'", "SRV of registry.nsm-system.elsewhere.", f"{dead}: Connection"):
        assert part in str(failed.value)
    two.say(two={"nsmgr-proxy": [DOOR]})
    with pytest.raises(NotFoundError, match="domain 'two' has no registry in "):
        await nse.find_services(Service("icmp@two"))

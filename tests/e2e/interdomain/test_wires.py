"""A wire from one domain to another: eight hops, each vouched for, and packets both ways."""

import signal
import time
from collections import Counter

import pytest
from cryptography import x509

from nsm.identity.verify import leaf_id, peer_id
from tests.e2e.interdomain.domains import Domains, requests, write
from tests.e2e.wires.nodes import (
    Flow,
    addresses,
    far_end,
    flow,
    identity,
    lasting,
    link,
    nothing_more,
)
from tests.e2e.wires.sealed import kind
from tests.support.wait import until
from tests.support.wait import write as measured

WIRES = {  # by service: who offers it, where that is reached, by what tunnel
    "frames@two": ("pong", "172.16.1.0", "vxlan"),
    "packets@two": ("sealed", "172.16.2.0", "wireguard"),
    "loose@three": ("floater", "172.16.3.0", "wireguard"),
}
# A lease outlasts what eight processes take for a request on a busy machine.
STEADY = {"NSM_MAX_TOKEN_LIFETIME": "12s", "NSM_REQUEST_TIMEOUT": "4s"}


def none_lost(echoes: Flow, least: int = 20) -> bool:
    """Whether all came back; the last may be on its way when it is asked."""
    return echoes.sent > least and echoes.sent - echoes.received <= 1


@pytest.mark.parametrize("service", WIRES)
async def test_a_client_of_one_domain_has_a_wire_to_an_endpoint_of_another(
    mesh: Domains, service: str
):
    endpoint, far, tunnel = WIRES[service]
    client, there = mesh.space("app"), mesh.space(endpoint)
    began = time.monotonic()
    app = mesh.client("app", f"kernel://{service}/nsm-1")
    measured(f"a wire to {service} from the client's start", time.monotonic() - began, 1.0)
    (own,) = addresses(client, "nsm-1")
    assert await client.pings(far)
    assert await there.pings(own)
    assert kind(link(client, "nsm-1")) == tunnel
    (up,) = await until(lambda: app.told, "the client has told", record=False)
    assert up["service"] == service
    assert up["endpoint"] == f"{endpoint}@{service.partition('@')[2]}"
    assert len(up["path"]) == 8
    print(service, up["ms"], up["stages"])
    assert app.end() == 0, app.words
    assert client.links() == there.links() == set()


@pytest.mark.parametrize(
    ("place", "service", "hops"),
    [
        ("beside", "frames@two", 7),
        ("beside", "packets@two", 7),
        ("near", "packets@two", 7),
        ("near", "loose@three", 7),
        ("beside", "loose@three", 4),  # on its own node: that manager knows it by its full name
    ],
)
async def test_a_domain_that_calls_itself_by_its_name_reaches_its_own_endpoints(
    mesh: Domains, place: str, service: str, hops: int
):
    endpoint, far, _ = WIRES[service]
    client = mesh.space(place)
    app = mesh.client(place, f"kernel://{service}/nsm-1")
    assert await client.pings(far)
    (own,) = addresses(client, "nsm-1")
    assert await mesh.space(endpoint).pings(own)
    (up,) = await until(lambda: app.told, "the client has told", record=False)
    assert (up["service"], up["endpoint"]) == (service, f"{endpoint}@{service.partition('@')[2]}")
    assert len(up["path"]) == hops
    assert ("nsmgr-proxy-two" in [one["name"] for one in up["path"]]) == (hops == 7)
    assert app.end() == 0, app.words


async def test_a_node_is_not_led_to_itself_by_a_tunnel_that_cannot_be(mesh: Domains):
    late = mesh.asks("near", "kernel://frames@two/nsm-1", NSM_PATIENCE="100ms")
    assert late.ended() != 0
    assert "who asks and who answers is the same node, 198.18.0.2" in late.words
    assert "without @DOMAIN" in late.words
    assert mesh.space("near").links() == mesh.space("pong").links() == set()


@pytest.mark.parametrize("service", WIRES)
async def test_each_hop_vouches_for_the_one_before_over_the_whole_way(mesh: Domains, service: str):
    endpoint = WIRES[service][0]
    node = "b2" if endpoint == "floater" else "b"
    pem = mesh.directory / "leaves.pem"
    pem.write_text(mesh.leaves())
    looker = mesh.looker("app", f"kernel://{service}/nsm-1", LOOKER_LEAVES=str(pem))
    (seen,) = looker.told
    ids = [
        "one.test/client/app",
        "one.test/node/a/nsmgr",
        "one.test/node/a/forwarder",
        "one.test/node/a/nsmgr-proxy",
        "two.test/node/b/nsmgr-proxy",
        f"two.test/node/{node}/nsmgr",
        f"two.test/node/{node}/forwarder",
        f"two.test/endpoint/{endpoint}",
    ]
    ids = [f"spiffe://{one}" for one in ids]
    assert [one["sub"] for one in seen["path"]] == ids
    assert [one["aud"] for one in seen["path"]] == [[one] for one in (*ids[1:], ids[-2])]
    assert [one["signers"] for one in seen["path"]] == [[one] for one in ids]
    believed = {
        domain.trust_domain: mesh.authority(name).certificates
        for name, domain in mesh.lab.clusters.items()
    }
    leaves = x509.load_pem_x509_certificates(pem.read_bytes())
    for leaf in leaves:
        id_ = leaf_id(leaf)
        assert peer_id([leaf], {id_.trust_domain: believed[id_.trust_domain]}) == id_
    assert {str(leaf_id(leaf)) for leaf in leaves} >= set(ids[1:])
    assert all(one["expires"] > time.time_ns() for one in seen["path"])
    assert [one["metrics"].get("border", "") for one in seen["path"]][3:5] == [
        "out of this domain", "into this domain",
    ]  # fmt: skip
    assert (seen["service"], seen["mechanism"]) == (service, "KERNEL")
    assert looker.end() == 0, looker.words


async def test_what_clusters_say_of_themselves_is_on_a_request_that_passes_as_soon_as_it_is_said(
    mesh: Domains,
):
    try:
        write(mesh.labels_file("one"), "{clusterName: wins-nowhere, region: north}")
        write(mesh.labels_file("two"), "clusterName: second")

        def labels() -> dict[str, str]:
            looker = mesh.looker("app", "kernel://frames@two/nsm-1?mine=x")
            (seen,) = looker.told
            assert looker.end() == 0, looker.words
            return {key: seen["labels"].get(key, "") for key in ("clusterName", "region", "mine")}

        wanted = {"clusterName": "second", "region": "north", "mine": "x"}
        await until(lambda: labels() == wanted, "labels of both clusters", bar=2)
    finally:
        mesh.labels_file("one").unlink()
        mesh.labels_file("two").unlink()

    await until(lambda: labels()["region"] == "", "no labels any more", bar=2)


@pytest.mark.parametrize(
    "service",
    [one if one == "packets@two" else pytest.param(one, marks=pytest.mark.long) for one in WIRES],
)
async def test_a_wire_is_refreshed_through_both_domains_and_stays_what_it_is(
    mesh: Domains, service: str
):
    endpoint, far, _ = WIRES[service]
    client, there = mesh.space("app"), mesh.space(endpoint)
    hops = [mesh.now[one] for one in ("a/nsmgr-proxy", "b/nsmgr-proxy")]
    app = mesh.client("app", f"kernel://{service}/nsm-1", **STEADY)

    def ends() -> list[object]:
        return [identity(link(client, "nsm-1")), identity(far_end(client, "nsm-1", there))]

    before, granted = ends(), requests(hops)
    with flow(client, far) as echoes:
        await until(
            lambda: all(now >= then + 5 for now, then in zip(requests(hops), granted, strict=True)),
            "five refreshes",
            bar=8,
        )
    assert ends() == before
    assert none_lost(echoes), echoes
    assert [one["event"] for one in app.told] == ["up"], app.told
    assert app.end() == 0, app.words


@pytest.mark.long
async def test_twenty_wires_at_once_cross_the_border_and_all_carry(mesh: Domains):
    client = mesh.space("app")
    urls = [f"kernel://frames@two/w-{n}" for n in range(10)]
    urls += [f"kernel://packets@two/s-{n}" for n in range(10)]
    began = time.monotonic()
    app = mesh.client("app", *urls)
    measured("twenty wires at once", time.monotonic() - began, 5.0)
    for number in range(10):
        for device, endpoint in ((f"w-{number}", "pong"), (f"s-{number}", "sealed")):
            (own,) = addresses(client, device)
            assert await mesh.space(endpoint).pings(own)
    assert app.end() == 0, app.words


@pytest.mark.long
async def test_wires_that_came_and_went_leave_nothing_open_between_domains(mesh: Domains):
    between = [
        mesh.now[f"{node}/{name}"]
        for node in ("a", "b")
        for name in ("nsmgr-proxy", "registry-proxy", "registry", "nsmgr")
    ]

    def held() -> dict[str, Counter[str]]:
        return {one.name: Counter(one.fds) for one in between}

    def come_and_go() -> None:
        app = mesh.client("app", *(f"kernel://{service}" for service in WIRES))
        assert app.end() == 0, app.words

    come_and_go()
    before = await lasting(held)
    for _ in range(10):
        come_and_go()
    await nothing_more(held, before, "as many files open as before")


@pytest.mark.long
async def test_the_wire_of_a_client_that_is_no_more_ends_in_both_domains(mesh: Domains):
    client, there = mesh.space("app"), mesh.space("pong")
    app = mesh.client("app", "kernel://frames@two/nsm-1", **STEADY)
    assert app.end(signal.SIGKILL) == -signal.SIGKILL
    assert len(client.links()) == len(there.links()) == 1
    await until(
        lambda: client.links() == there.links() == set(), "the end of the last lease", bar=13
    )


async def test_what_is_lost_in_the_other_domain_is_told_the_client_and_made_anew(mesh: Domains):
    client, there = mesh.space("app"), mesh.space("pong")
    app = mesh.client("app", "kernel://frames@two/nsm-1")
    before = identity(far_end(client, "nsm-1", there))
    (device,) = there.links()
    there.do("link", "delete", device)
    mesh.now["b/forwarder"].end(signal.SIGKILL)
    await until(
        lambda: "down" in [one["event"] for one in app.told], "the client hears of it", bar=2
    )
    down = next(one for one in app.told if one["event"] == "down")
    assert (down["service"], down["endpoint"]) == ("frames@two", "pong@two")
    mesh.start("b/forwarder").ready()
    await until(lambda: [one["event"] for one in app.told][-1] == "up", "up again", bar=3)
    assert await client.pings("172.16.1.0")
    assert identity(far_end(client, "nsm-1", there)) != before
    assert app.end() == 0, app.words


@pytest.mark.long
async def test_where_an_endpoint_is_gone_another_of_its_domain_takes_over(mesh: Domains):
    """A reselect, over two borders."""
    client, there = mesh.space("app"), mesh.space("pong")
    second = mesh.second("pong", "second", "b2", "172.16.9.0/24")
    try:
        apps = [mesh.client("app", f"kernel://frames@two/nsm-{n}") for n in (1, 2)]
        await until(lambda: all(app.told for app in apps), "both have told", record=False)
        ends = {app.told[-1]["endpoint"]: app for app in apps}
        assert set(ends) == {"pong@two", "second@two"}, "they take turns"
        assert second.end() == 0, second.words
        moved = ends["second@two"]
        await until(
            lambda: (moved.told[-1]["event"], moved.told[-1]["endpoint"]) == ("up", "pong@two"),
            "the other endpoint",
            bar=5,
        )
        for name in ("nsm-1", "nsm-2"):
            (own,) = addresses(client, name)
            assert await there.pings(own)
        assert ends["pong@two"].told[-1]["event"] == "up"
        assert len(ends["pong@two"].told) == 1
        for app in apps:
            assert app.end() == 0, app.words
    finally:
        if second.status is None:
            second.end()

"""Whoever stands between two domains may go and come back: wires stay, and go on."""

import signal

import pytest

from tests.e2e.interdomain.domains import Domains, requests
from tests.e2e.interdomain.test_wires import STEADY, WIRES, none_lost
from tests.e2e.wires.nodes import addresses, far_end, flow, identity, link
from tests.support.wait import until

VICTIMS = (
    "a/nsmgr-proxy", "b/nsmgr-proxy", "a/registry-proxy", "b/registry-proxy",
    "a/registry", "b/registry", "c/registry",
)  # fmt: skip
KILLED = ("a/nsmgr-proxy",)  # the sample: registries are killed in tests/e2e/test_kill_matrix.py
CASES = [
    pytest.param(
        victim,
        number,
        id=f"{victim.replace('/', '-')}-{how}",
        marks=() if victim in KILLED and how == "killed" else pytest.mark.long,
    )
    for victim in VICTIMS
    for how, number in {"stopped": signal.SIGTERM, "killed": signal.SIGKILL}.items()
]
DOORMEN = ("a/nsmgr-proxy", "b/nsmgr-proxy")


@pytest.fixture(scope="module")
def steady(domains: Domains):
    """Wires that are there before the first victim falls, and after the last."""
    urls = [f"kernel://{service}/w-{n}" for n, service in enumerate(WIRES)]
    app = domains.now["app/steady"] = domains.client("app", *urls, name="steady", **STEADY)
    before = standing(domains)
    yield app
    assert standing(domains) == before, "a wire was made anew meanwhile"
    assert app.end() == 0, app.words
    assert domains.space("app").links() == set()
    print("said to be down meanwhile:", sum(one["event"] == "down" for one in app.told))


def standing(mesh: Domains) -> list[object]:
    client = mesh.space("app")
    ends = [(f"w-{n}", mesh.space(endpoint)) for n, (endpoint, *_) in enumerate(WIRES.values())]
    return [
        pair
        for name, there in ends
        for pair in (identity(link(client, name)), identity(far_end(client, name, there)))
    ]


async def refreshed(mesh: Domains, times: int = 2) -> None:
    """Wait until both proxies have granted that many Requests for each steady wire."""
    granted = requests(mesh.now[one] for one in DOORMEN)

    def both() -> bool:
        now = requests(mesh.now[one] for one in DOORMEN)
        return all(b >= a + times * len(WIRES) for a, b in zip(granted, now, strict=True))

    await until(both, "refreshes through both proxies", bar=8)


@pytest.mark.parametrize(("victim", "number"), CASES)
async def test_one_between_domains_goes_and_comes_back_and_no_packet_is_lost(
    mesh: Domains, steady, victim: str, number: int
):
    client, there = mesh.space("app"), mesh.space("pong")
    await refreshed(mesh, 1)
    wires = standing(mesh)
    leaving = mesh.client("app", "kernel://frames@two/leaving", name="leaving")
    with flow(client, "172.16.1.0") as frames, flow(client, "172.16.3.0") as loose:
        code = mesh.now[victim].end(number)
        assert code == (0 if number == signal.SIGTERM else -number), mesh.now[victim].words
        mesh.start(victim).ready()
        # Close after the restart, before anybody refreshed what is closed.
        assert leaving.end() == 0, leaving.words
        assert client.links() == {"w-0", "w-1", "w-2"}
        assert len(there.links()) == 1
        fresh = mesh.client("app", *(f"kernel://{service}" for service in WIRES), name="fresh")
        told = await until(lambda fresh=fresh: len(fresh.told) == 3 and fresh.told, "three are up")
        for one in told:
            (own,) = addresses(client, one["interface"])
            assert await mesh.space(one["endpoint"].partition("@")[0]).pings(own)
        assert fresh.end() == 0, fresh.words
        await refreshed(mesh)
        assert standing(mesh) == wires
    for counts in (frames, loose):
        assert none_lost(counts), counts

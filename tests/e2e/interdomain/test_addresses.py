"""Nodes that other domains reach by other addresses than their own does (`wire.md` §9.5).

Each domain's nodes stand behind an address translation: from outside only the outer
addresses are there, and what leaves is seen to come from them.
"""

import subprocess
from collections.abc import AsyncIterator

import pytest
import yaml

from tests.e2e.interdomain.domains import ADDRESSES, Domains, requests, write
from tests.e2e.interdomain.test_failures import refused
from tests.e2e.interdomain.test_wires import WIRES
from tests.e2e.wires.nodes import addresses, link
from tests.e2e.wires.sealed import kind, sealed
from tests.support.wait import until

OUTER = {node: inner.replace("198.18.0.", "198.19.0.") for node, inner in ADDRESSES.items()}
OF = {"one": ("a",), "two": ("b", "b2")}
# A quarter of a request's time is for the far end to prove its key: on a busy machine too.
PATIENT = {"NSM_MAX_TOKEN_LIFETIME": "20s", "NSM_REQUEST_TIMEOUT": "10s"}
NAT = """
table ip translation {{
  chain in {{ type nat hook prerouting priority -100; ip daddr {outer} dnat to {inner}; }}
  chain out {{ type nat hook postrouting priority 100; ip daddr 198.19.0.0/24 snat to {outer}; }}
  chain hidden {{
    type filter hook prerouting priority -200;
    ip saddr {{ {foreign} }} ip protocol udp drop
  }}
}}
"""


@pytest.fixture
async def translated(mesh: Domains) -> AsyncIterator[Domains]:
    """Outer addresses on every node, and inner ones that do not pass a border."""
    for cluster, nodes in OF.items():
        foreign = [ADDRESSES[n] for other, them in OF.items() if other != cluster for n in them]
        for node in nodes:
            space = mesh.space(node)
            space.do("addr", "add", f"{OUTER[node]}/24", "dev", "eth0")
            rules = NAT.format(inner=ADDRESSES[node], outer=OUTER[node], foreign=", ".join(foreign))
            subprocess.run(
                ["ip", "netns", "exec", space.name, "nft", "-f", "-"],
                input=rules, text=True, check=True,
            )  # fmt: skip
        known = {ADDRESSES[node]: OUTER[node] for node in nodes}
        await outside(mesh, cluster, yaml.safe_dump(known))
    yield mesh
    for cluster, nodes in OF.items():
        mesh.addresses_file(cluster).unlink()
        for node in nodes:
            space = mesh.space(node)
            space.do("addr", "del", f"{OUTER[node]}/24", "dev", "eth0")
            space.run("nft", "delete", "table", "ip", "translation")


async def outside(mesh: Domains, cluster: str, known: str) -> None:
    """Write by which addresses a domain is reached, and wait until its proxy has read that."""
    proxy = mesh.now[{"one": "a/nsmgr-proxy", "two": "b/nsmgr-proxy"}[cluster]]
    offset = proxy.log_file.stat().st_size
    write(mesh.addresses_file(cluster), known)

    def read() -> bool:
        said = [one for one in proxy.after(offset) if one["event"] == "file read"]
        return any(one["of"] == "addresses outside" for one in said)

    await until(read, "the proxy knows the addresses", bar=3, record=False)


@pytest.mark.parametrize(
    "service", [pytest.param("frames@two", marks=pytest.mark.long), "packets@two"]
)
async def test_tunnels_end_at_outer_addresses_and_begin_at_inner_ones(
    translated: Domains, service: str
):
    mesh = translated
    endpoint, far, _ = WIRES[service]
    client, there = mesh.space("app"), mesh.space(endpoint)
    app = mesh.client("app", f"kernel://{service}/nsm-1", **PATIENT)
    assert await client.pings(far)
    (own,) = addresses(client, "nsm-1")
    assert await there.pings(own)
    (device,) = there.links()
    if kind(link(client, "nsm-1")) == "vxlan":
        ends = [link(client, "nsm-1"), link(there, device)]
        data = [one["linkinfo"]["info_data"] for one in ends]
        assert [one["remote"] for one in data] == [OUTER["b"], OUTER["a"]]
        assert [one["local"] for one in data] == [ADDRESSES["a"], ADDRESSES["b"]]
    else:
        ends = [sealed(client, "nsm-1"), sealed(there, device)]
        assert [one.endpoint.rpartition(":")[0] for one in ends] == [OUTER["b"], OUTER["a"]]
    proxies = [mesh.now[one] for one in ("a/nsmgr-proxy", "b/nsmgr-proxy")]
    granted = requests(proxies)
    await until(
        lambda: all(b >= a + 2 for a, b in zip(granted, requests(proxies), strict=True)),
        "refreshes with addresses that are translated",
        bar=20,
    )
    assert await client.pings(far)
    assert [(one["event"], one["error"]) for one in app.told] == [("up", "")]
    assert app.end() == 0, app.words


@pytest.mark.parametrize(("cluster", "node"), [("one", "a"), ("two", "b")])
async def test_an_address_that_the_file_does_not_list_is_told_with_what_to_add(
    mesh: Domains, cluster: str, node: str
):
    try:
        await outside(mesh, cluster, "192.0.2.1: 192.0.2.2")
        refused(
            mesh, "kernel://frames@two/nsm-1", "FAILED_PRECONDITION",
            f"'{ADDRESSES[node]}'", str(mesh.addresses_file(cluster)),
            f"add the line  {ADDRESSES[node]}: ",
        )  # fmt: skip
    finally:
        mesh.addresses_file(cluster).unlink()
    assert mesh.space("pong").links() == set()

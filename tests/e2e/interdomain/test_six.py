"""Domains whose nodes have IPv6 only: the doors, the tunnels, and addresses that are translated."""

from collections.abc import Iterator

import pytest
import yaml

from tests.e2e.interdomain.domains import Domains
from tests.e2e.interdomain.test_addresses import outside
from tests.e2e.interdomain.test_failures import refused
from tests.e2e.interdomain.test_wires import WIRES
from tests.e2e.wires.nodes import addresses, link
from tests.e2e.wires.sealed import kind, sealed
from tests.support.wait import until

OUTER = {"a": "fd00:19::1", "b": "fd00:19::2"}


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Domains]:
    with Domains(tmp_path_factory.mktemp("d"), six=True).up() as made:
        yield made


@pytest.mark.parametrize("service", WIRES)
async def test_a_wire_crosses_where_there_is_no_ipv4(mesh: Domains, service: str):
    endpoint, far, tunnel = WIRES[service]
    app = mesh.client("app", f"kernel://{service}/nsm-1")
    client = mesh.space("app")
    assert await client.pings(far)
    (own,) = addresses(client, "nsm-1")
    assert await mesh.space(endpoint).pings(own)
    assert kind(link(client, "nsm-1")) == tunnel
    (up,) = await until(lambda: app.told, "the client has told", record=False)
    assert len(up["path"]) == 8
    assert app.end() == 0, app.words


@pytest.mark.long
async def test_outer_addresses_are_written_over_inner_ones(mesh: Domains):
    """Each node answers at both; the tunnel is told the outer ones."""
    try:
        for cluster, node in (("one", "a"), ("two", "b")):
            space = mesh.space(node)
            space.do("addr", "add", f"{OUTER[node]}/64", "dev", "eth0", "nodad")
            inner = mesh.at[node].replace("::", ":0:0::")  # as somebody may well write it
            await outside(mesh, cluster, yaml.safe_dump({inner: OUTER[node]}))
        app = mesh.client("app", "kernel://frames@two/nsm-1")
        data = link(mesh.space("app"), "nsm-1")["linkinfo"]["info_data"]
        (device,) = mesh.space("pong").links()
        back = link(mesh.space("pong"), device)["linkinfo"]["info_data"]
        assert (data["local6"], data["remote6"]) == (mesh.at["a"], OUTER["b"])
        assert (back["local6"], back["remote6"]) == (mesh.at["b"], OUTER["a"])
        assert app.end() == 0, app.words
        sealing = mesh.client("app", "kernel://packets@two/nsm-1")
        assert sealed(mesh.space("app"), "nsm-1").endpoint.startswith(f"[{OUTER['b']}]:")
        assert sealing.end() == 0, sealing.words
        await outside(mesh, "two", "fd00:19::99: fd00:19::98")
        refused(
            mesh, "kernel://frames@two/nsm-1", "FAILED_PRECONDITION",
            f"'{mesh.at['b']}'", f"add the line  {mesh.at['b']}: ",
        )  # fmt: skip
    finally:
        for cluster, node in (("one", "a"), ("two", "b")):
            mesh.addresses_file(cluster).unlink(missing_ok=True)
            mesh.space(node).run("ip", "addr", "del", f"{OUTER[node]}/64", "dev", "eth0")

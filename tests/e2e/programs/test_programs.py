"""Client, responder, library and examples as a person starts them, asked of the kernel."""

import os
import signal
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nsm.identity.workload import workload_source
from tests.e2e.programs.mesh import DOMAIN, ROOT, Mesh, mesh, status
from tests.e2e.wires.nodes import flow
from tests.support.spaces import kernel_state, space
from tests.support.wait import until


@pytest.fixture
async def node(tmp_path: Path):
    async with mesh(tmp_path, {"nsmgr": ["nsmgr.local"], "responder": ["nse.local"]}) as made:
        yield made


@pytest.fixture
def here():
    with space("app") as made:
        yield made


@pytest.fixture
def there():
    with space("nse") as made:
        yield made


async def test_the_client_program_holds_its_wires_and_ctrl_c_takes_them_back(node, here, there):
    file = node.directory / "status"
    await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24,fd09::/64")
    before = kernel_state(here, there)
    app = await node.client(
        here, "kernel://echo/nsm-1,kernel://ping/nsm-2?a=b", NSM_STATUS_FILE=str(file)
    )
    line = await app.ready()
    assert "wires nsm-1 10.9.0.1 fd09::1 ↔ 10.9.0.0 fd09::, nsm-2 10.9.0.3" in line, app.log
    assert here.links() == {"nsm-1", "nsm-2"}
    assert await here.pings("10.9.0.0")
    assert await here.pings("fd09::")
    assert await here.pings("10.9.0.2")
    await until(
        lambda: [one["event"] for one in status(file)] == ["up", "up"], "both lines", bar=0.1
    )
    up = status(file)[0]
    assert up["id"] == "app-0"
    assert up["url"] == "kernel://echo/nsm-1"
    assert up["endpoint"] == "nse-1"
    assert up["src"] == ["10.9.0.1/32", "fd09::1/128"]
    assert [one["name"] for one in up["path"]] == ["app", "nsmgr-1", "forwarder-1", "nse-1"]
    assert "eyJ" not in file.read_text(), "a token is in the status file"
    assert await app.end(signal.SIGINT) == 130
    assert kernel_state(here, there) == before
    assert [one["event"] for one in status(file)] == ["up", "up", "closed", "closed"]


async def test_a_killed_clients_wires_are_taken_over_by_its_next_life(node, here, there):
    await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    first = await node.client(here, "kernel://echo/nsm-1,kernel://ping")
    assert await first.ready(), first.log
    assert await here.pings("10.9.0.0")  # so that the ends know each other's hardware addresses
    await until(
        lambda: "tentative" not in str((here.ip("addr"), there.ip("addr"))), "own addresses"
    )
    before = {
        what: there_is
        for what, there_is in kernel_state(here, there).items()
        if "neigh" not in what
    }
    indexes = {link["ifname"]: link["ifindex"] for link in here.ip("link")}
    async with without_loss(here):
        await first.kill()
        second = await node.client(here, "kernel://echo/nsm-1,kernel://ping")
        assert await second.ready(), second.log
    assert {link["ifname"]: link["ifindex"] for link in here.ip("link")} == indexes
    after = kernel_state(here, there)
    assert {what: after[what] for what in before} == before
    assert await second.end() == 0
    assert here.links() == set()


@asynccontextmanager
async def without_loss(here):
    """Packets flow to the endpoint for the block, and none is lost."""
    with flow(here, "10.9.0.0") as echoes:
        yield
    assert echoes.received == echoes.sent > 0, echoes


@pytest.mark.long  # tests/e2e/test_kill_matrix.py has them each time
@pytest.mark.parametrize("victim", ["nsmgr", "forwarder"])
async def test_a_killed_process_of_the_mesh_costs_no_packet_and_the_wire_is_kept(
    node, here, there, victim
):
    file = node.directory / "status"
    await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    app = await node.client(here, "kernel://echo/nsm-1", NSM_STATUS_FILE=str(file))
    assert await app.ready(), app.log
    indexes = {link["ifname"]: link["ifindex"] for link in here.ip("link")}
    async with without_loss(here):
        await getattr(node, victim).kill()
        refused = "wire is not refreshed"
        await until(
            lambda: sum(refused in line for line in app.log) >= 5, "five tries to refresh", bar=3
        )
        await getattr(node, {"nsmgr": "start_manager", "forwarder": "start_forwarder"}[victim])()
        again = "wire is refreshed again"
        late = f"refresh after a new {victim}"
        await until(lambda: any(again in line for line in app.log), late, bar=2)
        await until(lambda: status(file)[-1]["event"] == "up", "the line", bar=0.1)
    assert {link["ifname"]: link["ifindex"] for link in here.ip("link")} == indexes
    assert {one["endpoint"] for one in status(file)} == {"nse-1"}
    other = await node.client(here, "kernel://ping/nsm-2", NSM_NAME="other")
    assert await other.ready(), other.log
    assert await app.end() == 0
    assert await other.end() == 0
    assert here.links() == set()


async def test_when_an_endpoint_goes_with_its_namespace_another_takes_its_place(node, here, there):
    file = node.directory / "status"
    with space("gone") as gone:
        first = await node.responder(gone, NSM_CIDR_PREFIX="10.9.0.0/24")
        app = await node.client(here, "kernel://echo/nsm-1", NSM_STATUS_FILE=str(file))
        assert await app.ready(), app.log
        await node.responder(there, NSM_NAME="nse-2", NSM_CIDR_PREFIX="10.8.0.0/24")
        await first.kill()
    await until(lambda: status(file)[-1]["endpoint"] == "nse-2", "another endpoint", bar=2)
    last = status(file)[-1]
    assert (last["event"], last["src"], last["dst"]) == ("up", ["10.8.0.1/32"], ["10.8.0.0/32"])
    (link,) = here.ip("-4", "addr", "show", "nsm-1")
    assert [info["local"] for info in link["addr_info"]] == ["10.8.0.1"]
    assert {route["dst"] for route in here.ip("route")} == {"10.8.0.0"}
    assert await here.pings("10.8.0.0")
    assert await app.end() == 0
    assert here.links() == set()


@pytest.mark.long
async def test_an_endpoint_that_stays_dead_is_replaced_when_its_registration_ends(
    tmp_path, here, there
):
    """Its namespace lives, so packets flow: until it is known to be over, nothing is changed."""
    file = tmp_path / "status"
    with space("other") as other:
        async with mesh(tmp_path, {}, NSM_EXPIRE_PERIOD="3s") as node:
            first = await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
            app = await node.client(here, "kernel://echo/nsm-1", NSM_STATUS_FILE=str(file))
            assert await app.ready(), app.log
            assert await here.pings("10.9.0.0")
            before = wire_of(here)
            async with without_loss(here):
                await first.kill()
                await node.responder(other, NSM_NAME="nse-2", NSM_CIDR_PREFIX="10.8.0.0/24")
                refused = "cannot connect to endpoint nse-1"
                await until(lambda: any(refused in line for line in app.log), "a refusal")
                assert wire_of(here) == before
                gone = "endpoint nse-1 not found"
                await until(
                    lambda: any(gone in line for line in app.log),
                    "the end of a dead endpoint's registration",
                    bar=3,
                )
                assert wire_of(here) == before
            await until(lambda: status(file)[-1]["endpoint"] == "nse-2", "a new endpoint", bar=11)
            (link,) = here.ip("-4", "addr", "show", "nsm-1")
            assert [info["local"] for info in link["addr_info"]] == ["10.8.0.1"]
            assert {route["dst"] for route in here.ip("route")} == {"10.8.0.0"}
            assert await here.pings("10.8.0.0")
            await until(lambda: not there.links(), "nothing is left at the dead one", bar=0.5)
            assert await app.end() == 0
            assert here.links() == other.links() == set()


def wire_of(here) -> object:
    """All that a wire must keep: the device's number, its addresses and routes."""
    (link,) = here.ip("-4", "addr", "show", "nsm-1")
    told = [info["local"] for info in link["addr_info"]]
    return link["ifindex"], link["address"], told, here.ip("route")


@pytest.mark.parametrize(
    ("services", "code", "sentence"),
    [
        ("kernel://echo/nsm-1-is-too-long", 2, "has 17 bytes, and Linux takes at most 15"),
        ("echo", 2, "names no mechanism"),
        ("vfio://echo", 3, "mechanism 'vfio' of vfio://echo is not one this client can use"),
        ("kernel://nobody", 1, "nobody"),
    ],
)
async def test_what_cannot_be_had_ends_the_client_with_a_sentence(
    node, here, services, code, sentence
):
    before = kernel_state(here)
    app = await node.client(here, services, NSM_PATIENCE="500ms", NSM_REQUEST_TIMEOUT="4s")
    assert await app.ready() == ""
    assert await app.ended() == code, app.log
    assert sentence in app.log[-1]
    assert kernel_state(here) == before


async def test_a_name_that_is_taken_in_the_namespace_is_refused_and_stays_whose_it_is(
    node, here, there
):
    await node.responder(there)
    here.do("link", "add", "nsm-1", "type", "bridge")
    before = kernel_state(here, there)
    app = await node.client(here, "kernel://echo/nsm-1", NSM_PATIENCE="100ms")
    assert await app.ready() == ""
    assert await app.ended() == 1
    assert "nsm-1" in app.log[-1]
    assert kernel_state(here, there) == before


async def test_without_a_manager_the_client_says_where_it_looked(node, here):
    app = await node.client(
        here, "kernel://echo", NSM_CONNECT_TO="unix:///nowhere.sock", NSM_PATIENCE="100ms"
    )
    assert await app.ready() == ""
    assert await app.ended() == 4
    assert "cannot connect to unix:///nowhere.sock" in app.log[-1]


async def test_ctrl_c_on_the_endpoint_takes_its_registration_back_and_leaves_its_wires(
    node, here, there
):
    nse = await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    app = await node.client(here, "kernel://echo/nsm-1")
    assert await app.ready(), app.log
    assert await nse.end(signal.SIGINT) == 130
    assert not list(node.directory.glob("nse-*")), "its socket's directory is left"
    assert await here.pings("10.9.0.0"), "the wire went with the process"
    late = await node.client(
        here, "kernel://ping", NSM_NAME="late", NSM_PATIENCE="100ms", NSM_REQUEST_TIMEOUT="4s"
    )
    assert await late.ready() == ""
    assert await late.ended() == 1, late.log
    assert here.links() == {"nsm-1"}


async def test_an_endpoint_that_was_killed_gives_nobody_elses_address_away(node, here, there):
    first = await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    app = await node.client(here, "kernel://echo/nsm-1")
    assert await app.ready(), app.log
    await first.kill()
    second = await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    assert any("addresses of an earlier life are kept" in line for line in second.log)
    late = await node.client(here, "kernel://ping/nsm-2", NSM_NAME="late")
    assert await late.ready(), late.log
    (link,) = here.ip("-4", "addr", "show", "nsm-2")
    assert [info["local"] for info in link["addr_info"]] == ["10.9.0.3"]
    assert await here.pings("10.9.0.0")
    assert await here.pings("10.9.0.2")


async def test_an_idle_responder_ends_by_itself(node, there):
    nse = await node.responder(there, NSM_IDLE_TIMEOUT="300ms")
    assert await nse.ended() == 0
    assert any("no wire for the idle time" in line for line in nse.log)


async def test_a_service_without_room_says_which_pool(node, here, there):
    await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/31")
    app = await node.client(here, "kernel://echo/nsm-1,kernel://ping/nsm-2", NSM_PATIENCE="100ms")
    assert await app.ready() == ""
    assert await app.ended() == 1
    assert "10.9.0.0/31 (2 addresses, 2 held)" in app.log[-1]
    assert here.links() == set(), "the wire that was had is left"


async def test_two_lines_of_python_serve_and_get_a_service(node, here, there):
    examples = ROOT / "examples"
    nse = await node.start(
        sys.executable, str(examples / "endpoint.py"), "udp", "10.8.0.0/24",
        kind="responder", where=there,
    )  # fmt: skip
    await until(lambda: "udp is served; Ctrl-C ends it" in nse.log, "the example's service", bar=3)
    app = await node.start(
        sys.executable, str(examples / "client.py"), "kernel://udp/nsm-1",
        kind="client", where=here,
    )  # fmt: skip
    wanted = "nsm-1: 10.8.0.1 to udp-1 at 10.8.0.0; Ctrl-C ends it"
    await until(lambda: wanted in app.log, "the example's wire", bar=3)
    echoed = here.run(
        sys.executable,
        "-c",
        "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(5);"
        "s.sendto(b'hello', ('10.8.0.0', 7)); print(s.recv(9))",
    )
    assert echoed.stdout.strip() == "b'hello'", echoed
    assert await app.end(signal.SIGINT) == 0
    assert here.links() == set()
    assert await nse.end(signal.SIGINT) == 0


async def test_stock_grpcio_gets_a_wire_with_nothing_of_ours(node: Mesh, here, there):
    example = ROOT / "examples" / "stock_grpcio_client.py"
    assert len(example.read_text().splitlines()) <= 60
    await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    await certificates(node)
    app = await node.start(
        sys.executable, str(example), "echo", "nsm-1", node.manager, f"spiffe://{DOMAIN}/nsmgr",
        "nsmgr.local", "cert.pem", "key.pem", "bundle.pem",
        where=here,
    )  # fmt: skip
    await until(lambda: "nsm-1 10.9.0.1/32" in app.log, "stock grpcio's wire", bar=3)
    assert here.links() == {"nsm-1"}
    assert await here.pings("10.9.0.0")
    maps = Path(f"/proc/{app.process.pid}/maps").read_text()
    assert "grpc/_cython" in maps
    assert "cryptography" not in maps
    assert await app.end(signal.SIGINT) == 0, app.log
    assert here.links() == set()


async def certificates(node: Mesh) -> None:
    """What an agent would write for a client that reads files: as the issuer gives it."""
    writer = await node.start(
        sys.executable, "-c",
        "import asyncio, sys, tests.e2e.programs.test_programs as t;"
        "asyncio.run(t.write_certificates(sys.argv[1]))",
        node.agent,
        kind="other",
    )  # fmt: skip
    assert await writer.ended() == 0, writer.log


async def write_certificates(agent: str) -> None:
    async with workload_source(agent, patience=10) as source:
        identity = source.identity
    assert isinstance(identity.svid.key, ec.EllipticCurvePrivateKey)
    bundle = identity.bundles[DOMAIN]
    pem = serialization.Encoding.PEM
    os.umask(0o077)
    Path("cert.pem").write_bytes(identity.svid.chain_pem())
    Path("key.pem").write_bytes(identity.svid.key_pem())
    Path("bundle.pem").write_bytes(b"".join(one.public_bytes(pem) for one in bundle))


@pytest.mark.long
async def test_fifty_wires_of_one_client_come_and_go(node, here, there):
    await node.responder(there, NSM_CIDR_PREFIX="10.9.0.0/24")
    before = kernel_state(here, there)
    began = time.monotonic()
    app = await node.client(here, ",".join(f"kernel://echo/w-{n}" for n in range(50)))
    assert await app.ready(), app.log
    took = time.monotonic() - began
    assert here.links() == {f"w-{n}" for n in range(50)}
    addresses = [i["local"] for link in here.ip("addr") for i in link["addr_info"]]
    assert len(addresses) == len(set(addresses))
    assert await app.end() == 0
    assert kernel_state(here, there) == before
    print(f"50 wires of one client, one after the other: {took:.2f} s with its start")

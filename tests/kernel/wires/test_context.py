"""What an agreed connection context becomes at both ends (`wire.md` §10.6), asked of the kernel."""

import pytest

from forwarder.crossconnect import client_side, endpoint_side, macs
from nsm import mechanisms
from nsm.kernel.node import Kernel
from nsm.kernel.state import LocalWire
from nsm.model import Connection, Context, EthernetContext, IPContext, Mechanism, Neighbour, Route
from nsm.undo import Undo
from tests.support.spaces import Space, ip

pytestmark = pytest.mark.kernel

NSC, NSE = ("172.16.0.1/32", "2001:db8::1/128"), ("172.16.0.0/32", "2001:db8::/128")
CONTEXT = IPContext(
    NSC,
    NSE,
    src_routes=(Route("10.9.0.0/16"), Route("2001:db8:9::/48"), Route("10.8.0.0/16", "10.77.0.1")),
    dst_routes=(Route("10.5.0.0/16"),),
    neighbours=(Neighbour("172.16.0.9", "02:00:00:00:00:09"),),
)


async def joined(
    kernel: Kernel, client: Space, server: Space, conn: Connection, **endpoint: str
) -> None:
    """The wire as a forwarder makes it; endpoint are parameters of the endpoint's mechanism."""
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    near = Mechanism(mechanisms.LOCAL, mechanisms.KERNEL, {mechanisms.NAME: "nsm-1"})
    far = near.with_(**{mechanisms.NAME: "nsm-2"}, **endpoint)
    src_mac, dst_mac = macs(conn)
    wire = LocalWire(
        conn.id,
        client_side(conn, near, here, dst_mac),
        endpoint_side(conn, far, there, src_mac),
    )
    async with Undo() as undo:
        await kernel.ensure(wire, undo)


def connection(**more: object) -> Connection:
    return Connection("id-1", "svc", context=Context(CONTEXT, mtu=1400), **more)  # type: ignore[arg-type] # by name


def proc(space: Space, path: str) -> str:
    """A setting, as a process in there reads it from /proc/sys."""
    done = space.run("cat", f"/proc/sys/{path}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def infos(space: Space, name: str) -> list[dict[str, object]]:
    (link,) = space.ip("addr", "show", name)
    return [info for info in link["addr_info"] if info["scope"] == "global"]


@pytest.mark.parametrize(
    ("asked", "value"), [({"routeLocalNet": "true"}, "1"), ({"routeLocalNet": "false"}, "0")]
)
async def test_route_localnet_is_set_on_the_endpoints_interface_only_and_only_if_asked_for(
    kernel: Kernel, client: Space, server: Space, asked: dict[str, str], value: str
) -> None:
    await joined(kernel, client, server, connection(), **asked)
    assert proc(server, "net/ipv4/conf/nsm-2/route_localnet") == value
    assert proc(client, "net/ipv4/conf/nsm-1/route_localnet") == "0"
    for space in (client, server):
        for other in ("all", "default", "lo"):
            assert proc(space, f"net/ipv4/conf/{other}/route_localnet") == "0"


async def test_unprivileged_pings_are_allowed_in_both_namespaces_and_ipv6_on_both_interfaces(
    kernel: Kernel, client: Space, server: Space
) -> None:
    for space in (client, server):
        space.run("sysctl", "-w", "net.ipv6.conf.default.disable_ipv6=1")
        assert proc(space, "net/ipv4/ping_group_range").split() == ["1", "0"]
    await joined(kernel, client, server, connection())
    for space, name in ((client, "nsm-1"), (server, "nsm-2")):
        assert proc(space, "net/ipv4/ping_group_range").split() == ["0", "2147483647"]
        assert proc(space, f"net/ipv6/conf/{name}/disable_ipv6") == "0"
        assert proc(space, f"net/ipv4/conf/{name}/forwarding") == "0"


async def test_addresses_are_permanent_and_usable_at_once(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await joined(kernel, client, server, connection())
    for space, name, own in ((client, "nsm-1", NSC), (server, "nsm-2", NSE)):
        found = infos(space, name)
        assert {f"{one['local']}/{one['prefixlen']}" for one in found} == set(own)
        for one in found:
            assert one["valid_life_time"] == one["preferred_life_time"] == (1 << 32) - 1
            assert not one.get("tentative"), one
            assert not one.get("dadfailed"), one
            assert one.get("nodad", False) == (one["family"] == "inet6")
    assert await client.pings("2001:db8::")  # with duplicate detection, not for a second or two


async def test_gateways_are_taken_as_on_link_and_far_addresses_are_reached_directly(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await joined(kernel, client, server, connection())
    for space, name, to, via in (
        (client, "nsm-1", "10.9.0.0/16", "172.16.0.0"),
        (client, "nsm-1", "10.8.0.0/16", "10.77.0.1"),  # an address nobody has a route to
        (client, "nsm-1", "2001:db8:9::/48", "2001:db8::"),
        (server, "nsm-2", "10.5.0.0/16", "172.16.0.1"),
    ):
        (route,) = ip("-6" if ":" in to else "-4", "-n", space.name, "route", "show", to)
        assert (route["gateway"], route["dev"]) == (via, name)
        assert "onlink" in route["flags"]
    for space, name, far in ((client, "nsm-1", NSE), (server, "nsm-2", NSC)):
        for address in far:
            six = "-6" if ":" in address else "-4"
            (route,) = ip(six, "-n", space.name, "route", "show", address)
            assert route["dev"] == name
            assert "gateway" not in route
            assert six == "-6" or route["scope"] == "link"


async def test_an_address_somebody_else_put_there_goes_with_the_next_refresh(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await joined(kernel, client, server, connection())
    client.do("addr", "add", "10.99.0.1/24", "dev", "nsm-1")
    server.do("addr", "add", "2001:db8:99::1/64", "dev", "nsm-2")
    assert len(infos(client, "nsm-1")) == len(infos(server, "nsm-2")) == 3
    await joined(kernel, client, server, connection())
    assert {one["local"] for one in infos(client, "nsm-1")} == {"172.16.0.1", "2001:db8::1"}
    assert {one["local"] for one in infos(server, "nsm-2")} == {"172.16.0.0", "2001:db8::"}


async def test_macs_and_neighbours_are_the_contexts_at_both_ends(
    kernel: Kernel, client: Space, server: Space
) -> None:
    given = EthernetContext("02:00:00:00:00:01", "02:00:00:00:00:02")
    conn = Connection("id-1", "svc", context=Context(CONTEXT, ethernet=given), payload="IP")
    await joined(kernel, client, server, conn)
    for space, name, mac, far, far_mac in (
        (client, "nsm-1", given.src_mac, NSE, given.dst_mac),
        (server, "nsm-2", given.dst_mac, NSC, given.src_mac),
    ):
        (link,) = space.ip("link", "show", name)
        assert link["address"] == mac
        permanent = {
            one["dst"]: one["lladdr"]
            for one in space.ip("neigh", "show", "dev", name)
            if one["state"] == ["PERMANENT"]
        }
        assert permanent == {
            "172.16.0.9": "02:00:00:00:00:09",
            **{address.split("/")[0]: far_mac for address in far},
        }


async def test_an_interface_with_a_vlan_of_its_own_is_left_to_whoever_asked_for_it(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await joined(kernel, client, server, connection(), vlan="100")
    assert {one["local"] for one in infos(client, "nsm-1")} == {"172.16.0.1", "2001:db8::1"}
    (near,), (far,) = client.ip("link", "show", "nsm-1"), server.ip("link", "show", "nsm-2")
    assert (near["mtu"], far["mtu"]) == (1400, 1500)
    assert far["operstate"] == "UP"
    assert infos(server, "nsm-2") == []
    assert [one for one in server.ip("route") if one["dev"] == "nsm-2"] == []
    assert server.ip("neigh", "show", "nud", "permanent", "dev", "nsm-2") == []

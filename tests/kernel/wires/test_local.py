"""A local wire: one veth pair, made in two real namespaces; the stock tools are asked."""

import asyncio
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest

from nsm.errors import InvalidError
from nsm.kernel import owner
from nsm.kernel.netlink import NamespaceGoneError, NameTakenError, RouteTakenError
from nsm.kernel.node import Kernel
from nsm.kernel.state import Hop, Interface, LocalWire, Policy, Selector
from nsm.undo import Undo
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until

pytestmark = pytest.mark.kernel


async def wire(kernel: Kernel, client: Space, server: Space, id_: str = "id-1") -> LocalWire:
    here = await kernel.namespace(path=client.path, name="client")
    there = await kernel.namespace(path=server.path, name="server")
    four, six = ("172.16.0.1", "172.16.0.0"), ("2001:db8::1", "2001:db8::")
    return LocalWire(
        id_,
        Interface(
            here,
            "nsm-1",
            mtu=1450,
            addresses=(ip_interface(f"{four[0]}/32"), ip_interface(f"{six[0]}/128")),
            routes=(
                Hop(ip_network(f"{four[1]}/32")),
                Hop(ip_network(f"{six[1]}/128")),
                Hop(ip_network("10.9.0.0/16"), ip_address(four[1])),
            ),
            neighbours=((ip_address(four[1]), owner.mac(id_, "dst")),),
        ),
        Interface(
            there,
            "nsm-2",
            mtu=1450,
            addresses=(ip_interface(f"{four[1]}/32"), ip_interface(f"{six[1]}/128")),
            routes=(Hop(ip_network(f"{four[0]}/32")), Hop(ip_network(f"{six[0]}/128"))),
            neighbours=((ip_address(four[0]), owner.mac(id_, "src")),),
        ),
    )


async def ensured(kernel: Kernel, wanted: LocalWire, *spaces: Space) -> tuple[str, ...]:
    """Ensure it by fds as peers send them, opened for the call only."""
    fds = {}
    for space, side in zip(spaces, (wanted.src, wanted.dst), strict=False):
        fds[side.namespace] = os.open(space.path, os.O_PATH)
    try:
        async with Undo() as undo:
            made = await kernel.ensure(wanted, undo, fds=fds)
    finally:
        for fd in fds.values():
            os.close(fd)
    return tuple(map(str, made.steps))


async def test_packets_flow_both_ways_at_once_over_ipv4_and_ipv6(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await ensured(kernel, await wire(kernel, client, server), client, server)
    assert await client.pings("172.16.0.0")
    assert await server.pings("172.16.0.1")
    assert await client.pings("2001:db8::")
    assert await server.pings("2001:db8::1")
    (link,) = client.ip("link", "show", "nsm-1")
    assert link["linkinfo"]["info_kind"] == "veth"
    assert (link["mtu"], link["ifalias"]) == (1450, "nsm:id-1:src")
    assert link["address"] == owner.mac("id-1", "src")
    assert int(link["group"]) == kernel.group
    routes = {route["dst"]: route for route in client.ip("route")}
    assert routes["10.9.0.0/16"]["gateway"] == "172.16.0.0"
    assert routes["10.9.0.0/16"]["protocol"] == str(owner.PROTOCOL)
    (neighbour,) = (n for n in client.ip("neigh") if n["dst"] == "172.16.0.0")
    assert neighbour["state"] == ["PERMANENT"]
    assert client.run("sysctl", "-n", "net.ipv4.ping_group_range").stdout == "0\t2147483647\n"


async def test_a_full_packet_passes_and_one_byte_more_is_refused(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await ensured(kernel, await wire(kernel, client, server), client, server)
    assert await client.pings("172.16.0.0", "-M", "do", "-s", str(1450 - 28))
    assert not await client.pings("172.16.0.0", "-M", "do", "-s", str(1450 - 27))


async def test_ensuring_twice_does_nothing_the_second_time(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wanted = await wire(kernel, client, server)
    assert await ensured(kernel, wanted, client, server) != ()
    before = client.ip("link"), server.ip("link")
    assert await ensured(kernel, wanted, client, server) == ()
    assert (client.ip("link"), server.ip("link")) == before


async def test_a_refresh_changes_in_place_what_differs_and_keeps_the_device(
    kernel: Kernel, client: Space, server: Space
) -> None:
    first = await wire(kernel, client, server)
    await ensured(kernel, first, client, server)
    index = client.ip("link", "show", "nsm-1")[0]["ifindex"]
    second = replace(
        first,
        src=replace(
            first.src,
            mtu=1400,
            addresses=(ip_interface("172.16.0.3/32"),),
            routes=(Hop(ip_network("172.16.0.0/32")), Hop(ip_network("10.8.0.0/16"))),
            neighbours=(),
        ),
        dst=replace(first.dst, routes=(Hop(ip_network("172.16.0.3/32")),)),
    )
    steps = await ensured(kernel, second, client, server)
    assert steps[0] == "ip link set nsm-1 mtu 1400"
    assert index == client.ip("link", "show", "nsm-1")[0]["ifindex"]
    assert await client.pings("172.16.0.0")
    (link,) = client.ip("addr", "show", "nsm-1", "scope", "global")
    assert [a["local"] for a in link["addr_info"]] == ["172.16.0.3"]
    assert {route["dst"] for route in client.ip("route")} == {"172.16.0.0", "10.8.0.0/16"}
    assert await ensured(kernel, second, client, server) == ()


async def test_what_somebody_broke_is_mended(kernel: Kernel, client: Space, server: Space) -> None:
    wanted = await wire(kernel, client, server)
    await ensured(kernel, wanted, client, server)
    client.do("link", "set", "nsm-1", "down", "mtu", "1300")
    client.do("addr", "del", "172.16.0.1/32", "dev", "nsm-1")
    server.do("route", "del", "172.16.0.1/32")
    assert not await client.pings("172.16.0.0", "-W1")
    assert await ensured(kernel, wanted, client, server) != ()
    assert await client.pings("172.16.0.0")
    assert await client.pings("2001:db8::")


async def test_a_foreign_interface_of_that_name_is_left_and_named(
    kernel: Kernel, client: Space, server: Space
) -> None:
    client.do("link", "add", "nsm-1", "type", "bridge")
    wanted = await wire(kernel, client, server)
    before = kernel_state(client, server)
    with pytest.raises(NameTakenError) as refused:
        await ensured(kernel, wanted, client, server)
    assert "there is an interface nsm-1 in client already" in str(refused.value)
    assert "choose another name" in str(refused.value)
    assert kernel_state(client, server) == before


async def test_a_name_taken_at_the_far_end_leaves_nothing_at_the_near_one(
    kernel: Kernel, client: Space, server: Space
) -> None:
    await ensured(kernel, await wire(kernel, client, server, "id-0"), client, server)
    second = await wire(kernel, client, server, "id-2")
    second = replace(second, src=replace(second.src, name="nsm-9"))
    before = kernel_state(client, server)
    with pytest.raises(NameTakenError, match="nsm-2 in server already, which is wire id-0"):
        await ensured(kernel, second, client, server)
    assert kernel_state(client, server) == before


async def test_a_foreign_route_stays_and_the_refusal_leaves_nothing(
    kernel: Kernel, client: Space, server: Space
) -> None:
    client.do("link", "add", "eth0", "type", "bridge")
    client.do("link", "set", "eth0", "up")
    client.do("route", "add", "10.9.0.0/16", "dev", "eth0")
    before = kernel_state(client, server)
    with pytest.raises(RouteTakenError, match=r"ip route add 10.9.0.0/16 .* in client"):
        await ensured(kernel, await wire(kernel, client, server), client, server)
    assert kernel_state(client, server) == before


@pytest.mark.parametrize(
    ("to", "before", "after"),
    [
        ("10.9.0.0/16", "172.16.0.0", "172.16.5.0"),
        ("2001:db8:9::/48", "2001:db8::", "2001:db8:5::"),
    ],
)
async def test_a_route_that_gets_another_gateway_is_there_all_the_time(
    kernel: Kernel, client: Space, server: Space, tmp_path: Path, to: str, before: str, after: str
) -> None:
    """As when an endpoint is given another address."""
    wanted = await wire(kernel, client, server)

    def by(gateway: str) -> LocalWire:
        hop = Hop(ip_network(to), ip_address(gateway))
        return replace(wanted, src=replace(wanted.src, routes=(hop,)))

    await ensured(kernel, by(before), client, server)
    command = ["ip", "-n", client.name, "-o", "monitor", "route"]
    heard = tmp_path / "heard"

    def hears(address: str) -> bool:
        for verb in ("add", "del"):
            client.do("route", verb, address, "dev", "lo")
        return address in heard.read_text()

    with heard.open("w") as out, subprocess.Popen(command, stdout=out) as monitor:
        try:
            await until(lambda: hears("192.0.2.1"), "a monitor that listens")
            await ensured(kernel, by(after), client, server)
            await until(lambda: hears("192.0.2.2"), "all to be heard")
        finally:
            monitor.terminate()
    told = heard.read_text().splitlines()
    told = [line for line in told if line.removeprefix("Deleted ").startswith(to)]
    assert [line.startswith("Deleted") for line in told] == [False, True], told
    assert f"via {after} " in told[0]
    assert f"via {before} " in told[1]
    assert await ensured(kernel, by(after), client, server) == ()


async def test_two_wires_may_lead_to_the_same_prefix(
    kernel: Kernel, client: Space, server: Space
) -> None:
    first = await wire(kernel, client, server)
    second = await wire(kernel, client, server, "id-2")
    second = replace(
        second, src=replace(second.src, name="nsm-7"), dst=replace(second.dst, name="nsm-8")
    )
    await ensured(kernel, first, client, server)
    await ensured(kernel, second, client, server)
    assert await ensured(kernel, first, client, server) == ()
    assert await ensured(kernel, second, client, server) == ()
    await kernel.remove("id-1")
    assert await client.pings("172.16.0.0")


async def test_a_refused_step_takes_back_the_ones_before_it_and_is_told_as_a_command(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wanted = await wire(kernel, client, server)
    await ensured(kernel, wanted, client, server)
    before = kernel_state(client, server)
    bad = Hop(ip_network("10.77.0.0/16"), ip_address("127.0.0.1"))  # no gateway, says the kernel
    changed = replace(
        wanted,
        src=replace(
            wanted.src, mtu=1400, addresses=(ip_interface("172.16.9.9/32"),), routes=(bad,)
        ),
    )
    with pytest.raises(
        InvalidError, match=r"`ip route add 10.77.0.0/16 via 127.0.0.1 .*` in client"
    ):
        await ensured(kernel, changed, client, server)
    assert kernel_state(client, server) == before
    async with Undo() as undo:  # at once, for a caller that tries something else
        with pytest.raises(InvalidError):
            await kernel.ensure(changed, undo)
        assert kernel_state(client, server) == before
    assert client.ip("link", "show", "nsm-1")[0]["mtu"] == 1450


async def test_a_later_failure_of_the_attempt_takes_the_wire_back(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wanted = await wire(kernel, client, server)
    before = kernel_state(client, server)
    sysctl = client.run("sysctl", "net.ipv4.ping_group_range").stdout
    with pytest.raises(ZeroDivisionError) as failure:  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await kernel.ensure(wanted, undo)
            assert client.links()
            raise ZeroDivisionError
    assert not getattr(failure.value, "__notes__", [])
    assert kernel_state(client, server) == before
    assert client.run("sysctl", "net.ipv4.ping_group_range").stdout == sysctl


async def test_a_later_failure_of_a_refresh_brings_back_the_old_wire(
    kernel: Kernel, client: Space, server: Space
) -> None:
    first = await wire(kernel, client, server)
    await ensured(kernel, first, client, server)
    before = kernel_state(client, server)
    changed = replace(first, src=replace(first.src, mtu=1400, addresses=(), routes=()))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await kernel.ensure(changed, undo)
            raise ZeroDivisionError
    assert kernel_state(client, server) == before
    assert await ensured(kernel, first, client, server) == ()


async def test_a_cancelled_attempt_leaves_nothing(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wanted = await wire(kernel, client, server)
    before = kernel_state(client, server)

    async def attempt() -> None:
        async with Undo() as undo:
            await kernel.ensure(wanted, undo)
            await asyncio.Event().wait()

    for turns in (0, 1, 2, 3, 50):
        task = asyncio.ensure_future(attempt())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert kernel_state(client, server) == before


async def test_an_end_that_moves_to_another_namespace_keeps_its_index(
    kernel: Kernel, client: Space, server: Space, make_space: Callable[[str], Space]
) -> None:
    first = await wire(kernel, client, server)
    await ensured(kernel, first, client, server)
    index = client.ip("link", "show", "nsm-1")[0]["ifindex"]
    other = make_space("other")
    second = await wire(kernel, client, other)
    await ensured(kernel, second, client, other)
    assert client.ip("link", "show", "nsm-1")[0]["ifindex"] == index
    assert server.links() == set()
    assert await client.pings("172.16.0.0")


async def test_policies_get_a_rule_and_a_table_each_and_go_with_the_wire(
    kernel: Kernel, client: Space, server: Space
) -> None:
    before = kernel_state(client, server)
    plain = await wire(kernel, client, server)
    policies = (
        Policy(Selector(ip_network("172.16.0.1/32"), 6, None, (443, 443))),
        Policy(Selector(ip_network("2001:db8::1/128")), (Hop(ip_network("2001:db8:5::/48")),)),
    )
    wanted = replace(plain, src=replace(plain.src, policies=policies))
    await ensured(kernel, wanted, client, server)
    (rule,) = (r for r in client.ip("rule") if r["priority"] == owner.RULES.start)
    assert (rule["src"], rule["table"], rule["dport"]) == ("172.16.0.1", "1", 443)
    assert [r["dst"] for r in client.ip("route", "show", "table", "1")] == ["default"]
    assert (
        "2001:db8:5::/48 dev nsm-1" in client.run("ip", "-6", "route", "show", "table", "2").stdout
    )
    assert await ensured(kernel, wanted, client, server) == ()
    await ensured(kernel, plain, client, server)
    assert len(client.ip("rule")) == 3
    assert await ensured(kernel, plain, client, server) == ()
    await ensured(kernel, wanted, client, server)
    await kernel.remove("id-1")
    assert kernel_state(client, server) == before
    await ensured(kernel, wanted, client, server)
    client.run("ip", "link", "del", "nsm-1")  # by somebody in there; its rules stay
    assert len(client.ip("rule")) == 4
    assert await kernel.remove("id-1") == 0
    assert kernel_state(client, server) == before


async def test_ipv6_works_where_new_interfaces_have_it_disabled_and_ipv4_does_not_need_it(
    kernel: Kernel, client: Space, server: Space
) -> None:
    for space in (client, server):
        for which in ("default", "all"):
            space.run("sysctl", "-w", f"net.ipv6.conf.{which}.disable_ipv6=1")
    wanted = await wire(kernel, client, server)
    await ensured(kernel, wanted, client, server)
    assert await client.pings("2001:db8::")
    four = replace(
        wanted,
        connection="id-4",
        src=Interface(wanted.src.namespace, "v4", addresses=(ip_interface("10.4.0.1/31"),)),
        dst=Interface(wanted.dst.namespace, "v4", addresses=(ip_interface("10.4.0.0/31"),)),
    )
    await ensured(kernel, four, client, server)
    assert await client.pings("10.4.0.0")


async def test_two_ends_in_one_namespace_and_in_our_own_underlay(
    kernel: Kernel, client: Space
) -> None:
    here = await kernel.namespace(path=client.path, name="client")
    one = Interface(here, "one", addresses=(ip_interface("10.4.0.1/31"),))
    await ensured(kernel, LocalWire("same", one, replace(one, name="two", addresses=())), client)
    assert client.links() == {"one", "two"}
    own = Interface(kernel.own, "vw-own-test", ping=False)
    await ensured(kernel, LocalWire("own", replace(one, name="far"), own), client)
    assert client.links() == {"one", "two", "far"}
    assert await kernel.remove("own") == 2
    assert await kernel.remove("own") == 0


async def test_what_is_no_network_namespace_is_refused_and_not_opened(
    kernel: Kernel, tmp_path: os.PathLike[str]
) -> None:
    fifo = os.path.join(tmp_path, "fifo")
    os.mkfifo(fifo)
    for path in (fifo, "/dev/null", "/proc/self/ns/mnt", "/etc/passwd"):
        fd = os.open(path, os.O_PATH)
        try:
            with pytest.raises(InvalidError, match="not a network namespace"):
                await asyncio.wait_for(kernel.namespace(fd=fd, name="mallory"), 2)
        finally:
            os.close(fd)
    with pytest.raises(NamespaceGoneError):
        await kernel.namespace(pid=2**22 - 3, name="nobody")

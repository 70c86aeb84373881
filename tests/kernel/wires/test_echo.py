"""What of a wire can be told from its client's end: stock namespaces, stock firewalls."""

import asyncio
from dataclasses import replace
from ipaddress import ip_address, ip_interface

import pytest

from forwarder.probe import MOST, Probe, Proof, Verdict
from nsm.errors import UnavailableError
from nsm.kernel.echo import echoes
from nsm.kernel.node import WITHIN, Kernel
from nsm.kernel.state import RemoteWire, Wire
from nsm.model import Connection, Context, IPContext, Path, Segment
from tests.kernel.wires.test_local import ensured
from tests.kernel.wires.test_local import wire as local_wire
from tests.kernel.wires.test_remote import Nodes, halves, nodes
from tests.kernel.wires.test_swap import stand
from tests.support.callers import Mesh
from tests.support.spaces import Space, holders

pytestmark = pytest.mark.kernel
_ = nodes  # a fixture of another module's
FOUR, SIX = "172.16.0.0", "2001:db8::"
HOPS = ("nsc", "nsmgr-1", "fwd-1", "nsmgr-2", "fwd-2", "nse")


def made(*dst: str) -> Connection:
    """The connection as it is agreed on, at the client's forwarder."""
    ip = IPContext(src_ip_addrs=("172.16.0.1/32", "2001:db8::1/128"), dst_ip_addrs=dst)
    path = Path(tuple(Segment(name, f"id of {name}") for name in HOPS), 2)
    return Connection("id of fwd-1", "s", endpoint="nse", path=path, context=Context(ip=ip))


async def judged(kernel: Kernel, wire: Wire, *dst: str, patience: float = 8.0) -> Proof | None:
    deadline = asyncio.get_running_loop().time() + patience
    call = Mesh().call("nsc", deadline=deadline)
    return await Probe(kernel).judge(wire, made(*dst), {}, call)


def rules(space: Space, *lines: str, hook: str = "input") -> None:
    text = "\n".join(lines)
    done = space.run(
        "nft", f"table inet t {{ chain c {{ type filter hook {hook} priority 0;\n{text}\n }}\n }}"
    )
    assert done.returncode == 0, done.stderr


async def test_a_healthy_wire_is_proven_in_one_round_trip_and_nothing_stays_in_its_namespaces(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wire = await local_wire(kernel, client, server)
    await ensured(kernel, wire, client, server)
    proof = await judged(kernel, wire, f"{FOUR}/32", f"{SIX}/128")
    assert proof == Proof(Verdict.PROVEN)
    asked = await kernel.within(
        wire.src.namespace, lambda: echoes("nsm-1", [ip_address(FOUR), ip_address(SIX)], MOST)
    )
    assert all(0 < one.after < MOST / 4 for one in asked)
    assert not holders(wire.src.namespace.inode)
    await kernel.remove("id-1")


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ("meta l4proto { icmp, ipv6-icmp } drop", Verdict.NOT_PROVABLE),
        ("meta l4proto icmp reject with icmp port-unreachable", Verdict.PROVEN),
        ("meta l4proto icmp reject with icmp admin-prohibited", Verdict.PROVEN),
    ],
    ids=["drops", "refuses", "forbids"],
)
async def test_an_endpoint_that_answers_no_echo_is_not_broken(
    kernel: Kernel, client: Space, server: Space, rule: str, verdict: Verdict
) -> None:
    wire = await local_wire(kernel, client, server)
    await ensured(kernel, wire, client, server)
    rules(server, rule)
    proof = await judged(kernel, wire, f"{FOUR}/32", patience=1.0)
    assert proof is not None
    assert proof.verdict is verdict
    await kernel.remove("id-1")


async def test_endpoints_that_answer_nothing_hold_up_no_wire_that_is_taken_away(
    kernel: Kernel, client: Space, server: Space
) -> None:
    """Nor do they hold up one another for longer than one of them takes."""
    wire = await local_wire(kernel, client, server)
    await ensured(kernel, wire, client, server)
    rules(server, "icmp type echo-request drop")
    probe, call = Probe(kernel), Mesh().call("nsc")
    probing = [
        asyncio.ensure_future(probe.judge(wire, made(f"{FOUR}/32"), {}, call)) for _ in range(40)
    ]
    await asyncio.sleep(0)
    assert await kernel.remove("id-2") == 0
    assert not any(one.done() for one in probing), "each takes a second"
    proofs = await asyncio.gather(*probing)
    assert {one.verdict for one in proofs if one} == {Verdict.NOT_PROVABLE}
    waited = [one for one in proofs if one and "other wires are probed" in one.why]
    assert 0 < len(waited) <= 40 - WITHIN, "the others had their turn"
    await kernel.remove("id-1")


async def test_without_an_address_there_is_nothing_to_prove(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wire = await local_wire(kernel, client, server)
    await ensured(kernel, wire, client, server)
    assert await judged(kernel, wire) == Proof(Verdict.NOT_PROVABLE, "the endpoint has no address")
    await kernel.remove("id-1")


async def test_what_the_endpoints_namespace_says_is_unreachable_is_broken(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wire = await local_wire(kernel, client, server)
    away = ip_interface("172.16.9.9/32")
    src = replace(wire.src, routes=(*wire.src.routes, replace(wire.src.routes[0], to=away.network)))
    await ensured(kernel, replace(wire, src=src, dst=wire.dst), client, server)
    server.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    server.do("route", "add", "unreachable", "172.16.9.9/32")
    client.do("neigh", "replace", "172.16.9.9", "lladdr", mac(server), "dev", "nsm-1")
    with pytest.raises(UnavailableError, match=r"172.16.9.9: .* unreachable \(segment 5 .* nse\)"):
        await judged(kernel, wire, "172.16.9.9/32")
    await kernel.remove("id-1")


def mac(server: Space) -> str:
    (link,) = [one for one in server.ip("link") if one["ifname"] == "nsm-2"]
    return str(link["address"])


async def test_a_device_that_is_down_is_broken_here(
    kernel: Kernel, client: Space, server: Space
) -> None:
    wire = await local_wire(kernel, client, server)
    await ensured(kernel, wire, client, server)
    client.do("link", "set", "nsm-1", "down")
    with pytest.raises(UnavailableError, match=r"\(segment 2 of the path, fwd-1\)"):
        await judged(kernel, wire, f"{FOUR}/32")
    await kernel.remove("id-1")


async def test_a_node_where_no_tunnel_listens_says_so(kernel: Kernel, nodes: Nodes) -> None:
    near, _ = await halves(kernel, nodes)
    await stand(kernel, near)
    with pytest.raises(UnavailableError, match=r"192.0.2.2 says that no tunnel .* fwd-2\)"):
        await judged(kernel, near, f"{FOUR}/32", patience=1.0)
    await kernel.remove("id-1")


@pytest.mark.parametrize("room", [1280, 1450])
async def test_the_largest_packets_that_pass_where_nobody_says_that_others_are_too_large(
    kernel: Kernel, nodes: Nodes, room: int
) -> None:
    """As behind a hop whose next link takes so many bytes, and whose ICMP is filtered."""
    rules(nodes.far, f"ip length > {room} drop")
    near, far = await halves(kernel, nodes)
    near, far = (_only_four(one) for one in (near, far))
    await stand(kernel, near, far)
    proof = await judged(kernel, near, f"{FOUR}/32")
    assert proof is not None
    assert proof.verdict is Verdict.PROVEN
    assert room - 50 - 4 <= proof.mtu <= room - 50
    ping = ("ping", "-n", "-c1", "-W2", "-M", "do", FOUR, "-s")
    assert nodes.client.run(*ping, str(proof.mtu - 28)).returncode == 0
    await kernel.remove("id-1")


def _only_four(wire: RemoteWire) -> RemoteWire:
    end = wire.end
    return replace(
        wire,
        end=replace(
            end,
            addresses=tuple(one for one in end.addresses if one.version == 4),
            routes=tuple(one for one in end.routes if one.to.version == 4),
        ),
    )

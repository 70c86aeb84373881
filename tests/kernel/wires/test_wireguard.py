"""An encrypted wire between two nodes, by either engine; wg, ip, ss and a capture are asked."""

import asyncio
import statistics
import time

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment

from nsm.errors import UnavailableError
from nsm.kernel import owner
from nsm.kernel.node import Kernel
from tests.e2e.wires.capture import Capture, capture
from tests.kernel.wires.encrypted import ALIKE, Nodes, ensured, remains, retold
from tests.support.wait import until, write

pytestmark = pytest.mark.kernel
IPV4 = b"\x08\x00"  # what is in an Ethernet frame; one of ARP is shorter, and has other bytes there
INITIATION, ANSWER, DATA = 1, 2, 4
MARKER = b"what nobody between the nodes should read"


def messages(outside: Capture) -> list[tuple[int, str, int]]:
    """WireGuard's messages since the last call: their type, who sent them, to which port."""
    udp = [packet for packet in outside.packets() if packet.haslayer(UDP)]
    return [
        (bytes(packet[UDP].payload)[0], packet.payload.src, packet[UDP].dport) for packet in udp
    ]


@pytest.mark.parametrize("six", [False, pytest.param(True, marks=pytest.mark.long)])
async def test_packets_flow_both_ways_and_a_full_one_fits_in_one_piece(
    encrypting: Kernel, encrypted: Nodes, six: bool
) -> None:
    near, far = await encrypted.wires(encrypting, six=six)
    await ensured(encrypting, far, near)
    await encrypting.handshake(near, 5)
    for address in ("172.16.0.1", "2001:db8::1"):
        assert await encrypted.client.pings(address)
    for address in ("172.16.0.0", "2001:db8::"):
        assert await encrypted.server.pings(address)
    full = near.end.mtu - 28
    with capture(encrypted.near, "eth0") as outside:
        assert await encrypted.client.pings("172.16.0.1", "-M", "do", "-s", str(full))
        sent = [packet for packet in outside.packets() if packet.haslayer(UDP)]
    assert max(len(packet) for packet in sent) == 1514
    for packet in sent:
        assert not packet.haslayer(IPv6ExtHdrFragment)
        assert not packet.haslayer(IP) or not (packet[IP].flags.MF or packet[IP].frag)
    assert not await encrypted.client.pings("172.16.0.1", "-M", "do", "-s", str(full + 1))
    assert await ensured(encrypting, near, far) == ()


async def test_the_device_is_in_the_workload_and_its_socket_on_the_node(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far, near)
    (link,) = encrypted.client.ip("link", "show", "nsm-1")
    kind = {"kernel": "wireguard", "userspace": "tun"}[encrypted.engine]
    assert link["linkinfo"]["info_kind"] == kind
    assert (link["mtu"], link["link_type"], int(link["group"])) == (1440, "none", encrypting.group)
    mark = owner.Mark.parse(link["ifalias"])
    cookie = near.tunnel.underlay.cookie
    assert mark == owner.Mark(near.connection, "src", underlay=cookie, far="192.0.2.2:51901")
    # the node says nothing by itself, so that only the one end speaks first
    assert link["inet6_addr_gen_mode"] == "none"
    assert encrypted.near.links() == encrypted.far.links() == {"eth0"}
    assert ":51900 " in encrypted.near.run("ss", "-Hlun").stdout
    assert encrypted.client.run("ss", "-Hlun").stdout == ""
    said = encrypted.wg(near)
    assert (said.public, said.port) == (near.tunnel.key.public, 51900)
    (peer,) = said.peers
    assert peer.public == far.tunnel.key.public
    assert (peer.endpoint, peer.keepalive) == ("192.0.2.2:51901", "10")
    assert peer.allowed == {"0.0.0.0/0", "::/0"}
    assert encrypted.wg(far).peers[0].keepalive == "off"
    sysctl = encrypted.client.run("sysctl", "-n", "net.ipv4.ping_group_range").stdout
    assert sysctl == "0\t2147483647\n"


@ALIKE
async def test_between_the_nodes_are_handshakes_and_ciphertext_and_never_the_payload(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    with capture(encrypted.near, "eth0") as outside, capture(encrypted.server) as inside:
        await ensured(encrypting, far, near)
        await encrypting.handshake(near, 5)
        pattern = MARKER.hex()[:32]  # ping takes 16 bytes of it
        assert await encrypted.client.pings("172.16.0.1", "-p", pattern, "-s", "200")
        frames = outside.frames()
        assert any(MARKER[:16] in frame for frame in inside.frames())
    assert not any(MARKER[:8] in frame for frame in frames)
    seen = {frame[42] for frame in frames if frame[12:14] == IPV4 and frame[23] == 17}
    assert seen == {INITIATION, ANSWER, DATA}
    ports = {frame[34:38] for frame in frames if frame[12:14] == IPV4 and frame[23] == 17}
    one, other = (port.to_bytes(2, "big") for port in (51900, 51901))
    assert ports == {one + other, other + one}


async def test_only_one_end_begins_and_a_session_that_stands_is_left_alone(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    near = retold(near, keepalive=0)
    with capture(encrypted.near, "eth0") as outside:
        await ensured(encrypting, far, near)
        took = await encrypting.handshake(near, 5)
        write(f"a first handshake, {encrypted.engine}", took, 0.2)
        assert took > 0
        assert [sent[:2] for sent in messages(outside)] == [
            (INITIATION, "192.0.2.1"),
            (ANSWER, "192.0.2.2"),
            (DATA, "192.0.2.1"),
        ]
        before = encrypted.wg(near)
        assert await encrypting.handshake(near, 5) == 0
        assert await ensured(encrypting, far, near) == ()
        assert encrypted.wg(near) == before
        assert before.peers[0].keepalive == "off"
        assert messages(outside) == []
    assert encrypted.wg(far).peers[0].handshake


async def test_a_first_word_that_was_lost_is_said_again_within_fractions_of_a_second(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    with capture(encrypted.near, "eth0") as outside:
        await ensured(encrypting, near)
        await until(lambda: messages(outside), "a first word that nobody hears", bar=0.2)
        greeting = asyncio.ensure_future(encrypting.handshake(near, 30))
        await until(lambda: messages(outside), "another one", bar=0.5)
        await ensured(encrypting, far)
        began = time.monotonic()
        assert await greeting > 0
    # by itself WireGuard says the next word after 5 s
    write("a handshake begun before the far end was there", time.monotonic() - began, 1.0)
    assert time.monotonic() - began < 4
    assert await encrypted.client.pings("172.16.0.1")
    assert encrypted.wg(near).peers[0].keepalive == "10"


@ALIKE
async def test_nobody_there_is_told_with_address_port_and_what_to_look_at(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)
    near = retold(near, keepalive=0)
    await ensured(encrypting, near)
    with pytest.raises(UnavailableError) as refused:
        await encrypting.handshake(near, 0.4)
    said = str(refused.value)
    assert f"wire {near.connection}: nobody at 192.0.2.2 answered" in said
    assert "UDP port 51901 within 0.4 s; is that port open" in said
    assert encrypted.wg(near).peers[0].keepalive == "off"
    await ensured(encrypting, far)
    assert await encrypting.handshake(near, 5) > 0


@pytest.mark.needs_kernel("netem")
@pytest.mark.long
async def test_where_packets_are_lost_and_far_away_it_still_takes_no_five_seconds(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    """A third lost each way, 100 ms there and back."""
    for node in (encrypted.near, encrypted.far):
        bad = ("netem", "delay", "50ms", "loss", "33%")
        done = node.run("tc", "qdisc", "add", "dev", "eth0", "root", *bad)
        assert done.returncode == 0, done.stderr
    took = []
    for _ in range(10):
        near, far = await encrypted.wires(encrypting)
        await ensured(encrypting, far, near)
        began = time.monotonic()
        await encrypting.handshake(near, 60)
        took.append(time.monotonic() - began)
        await encrypting.remove(near.connection)
        await until(lambda: not remains(), "its ports are free", bar=0.2, record=False)
    print(f"{encrypted.engine}: {' '.join(f'{one:.2f}' for one in took)} s")
    what = f"a handshake over a bad line, {encrypted.engine}: the middle one of ten"
    write(what, statistics.median(took), 1.5)
    assert statistics.median(took) < 5


@ALIKE
async def test_two_wires_have_two_ports_and_each_its_own_keys(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    first = await encrypted.wires(encrypting)
    second = await encrypted.wires(encrypting, name="nsm-2", net=1)
    for near, far in (first, second):
        await ensured(encrypting, far, near)
        await encrypting.handshake(near, 5)
    assert await encrypted.client.pings("172.16.0.1")
    assert await encrypted.client.pings("172.16.1.1")
    sockets = encrypted.near.run("ss", "-Hlun").stdout
    assert ":51900 " in sockets
    assert ":51910 " in sockets
    publics = {encrypted.wg(wire).public for pair in (first, second) for wire in pair}
    assert len(publics) == 4
    assert await encrypting.remove(first[0].connection) == 2
    underlay = first[0].tunnel.underlay

    async def free() -> bool:
        return await encrypting.port_free(51900, underlay=underlay)

    await until(free, "a closed wire's port is free", bar=0.2)
    assert not await encrypting.port_free(51910, underlay=underlay)
    assert await encrypted.client.pings("172.16.1.1")


@pytest.mark.parametrize("times", [20, pytest.param(100, marks=pytest.mark.long)])
async def test_no_bring_up_is_slower_than_ten_times_the_others(
    encrypting: Kernel, encrypted: Nodes, times: int
) -> None:
    """A careless one is: where both ends speak first, or the first word is lost, it takes 5 s."""
    took = []
    for n in range(times):
        near, far = await encrypted.wires(encrypting)
        began = time.monotonic()
        await ensured(encrypting, far, near)
        await encrypting.handshake(near, 30)
        took.append(time.monotonic() - began)
        assert n % 10 or await encrypted.client.pings("172.16.0.1")
        await encrypting.remove(near.connection)
        await until(lambda: not remains(), "its ports are free", bar=0.2, record=False)
    middle, slowest = statistics.median(took), max(took)
    print(
        f"{encrypted.engine}: {len(took)} times, {middle * 1e3:.1f} ms, at most {slowest * 1e3:.1f}"
    )
    what = f"both ends and the handshake, {encrypted.engine}"
    write(f"{what}: the middle one of {len(took)}", middle, 0.2)
    write(f"{what}: the slowest / the middle one", slowest / middle, 10)
    assert slowest < 4
    assert slowest / middle < 100

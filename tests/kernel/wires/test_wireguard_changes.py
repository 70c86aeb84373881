"""An encrypted wire is changed in place, under traffic, and put back where an attempt fails."""

import asyncio
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest

from nsm.errors import InvalidError
from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.netlink import NameTakenError, PortTakenError
from nsm.kernel.node import Kernel
from nsm.kernel.state import Hop, LocalWire, Namespace, RemoteWire, VxlanTunnel
from nsm.undo import Undo
from tests.kernel.wires.encrypted import ALIKE, Nodes, Said, ensured, remains, retold
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until, write

pytestmark = pytest.mark.kernel
OTHER = "192.0.2.3"  # a second address of the far node


async def up(kernel: Kernel, nodes: Nodes) -> tuple[RemoteWire, RemoteWire]:
    near, far = await nodes.wires(kernel)
    nodes.far.do("addr", "add", f"{OTHER}/24", "dev", "eth0")
    await ensured(kernel, far, near)
    await kernel.handshake(near, 10)
    return near, far


class Traffic:
    """Pings from the client, 200 a second, while the block lasts; counted when it is over."""

    sent = lost = 0


@asynccontextmanager
async def traffic(client: Space) -> AsyncIterator[Traffic]:
    found, answers = Traffic(), 0
    process = await asyncio.create_subprocess_exec(
        *("ip", "netns", "exec", client.name, "ping", "-n", "-i", "0.005", "172.16.0.1"),
        stdout=asyncio.subprocess.PIPE,
    )
    lines: list[str] = []

    async def listen() -> None:
        nonlocal answers
        assert process.stdout is not None
        async for line in process.stdout:
            lines.append(line.decode())
            answers += b"time=" in line

    listening = asyncio.ensure_future(listen())
    try:
        await until(lambda: answers > 20, "twenty answers", bar=3, record=False)
        yield found
        before = answers
        await until(lambda: answers > before + 20, "twenty more", bar=3, record=False)
    finally:
        process.send_signal(signal.SIGINT)
        await listening
        await process.wait()
    counted = re.search(r"(\d+) packets transmitted, (\d+) received", "".join(lines))
    assert counted is not None
    found.sent = int(counted[1])
    # the last one is cut off with its answer on the way
    found.lost = max(found.sent - int(counted[2]) - 1, 0)


async def test_a_moved_far_end_is_followed_and_nothing_is_lost(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await up(encrypting, encrypted)
    async with traffic(encrypted.client) as seen:
        moved = retold(near, remote=ip_address(OTHER))
        steps = await ensured(encrypting, moved)
    assert [step.split(" ")[0:2] for step in steps[0].split("; ")] == [
        ["wg", "set"],
        ["ip", "link"],
    ]
    assert f"peer {far.tunnel.key.public} endpoint {OTHER}:51901" in steps[0]
    assert seen.lost == 0
    assert await ensured(encrypting, moved) == ()
    (link,) = encrypted.client.ip("link", "show", "nsm-1")
    mark = owner.Mark.parse(link["ifalias"])
    assert mark is not None
    assert mark.far == f"{OTHER}:51901"


@ALIKE
async def test_a_far_end_that_is_heard_from_elsewhere_is_not_told_to_come_back(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await up(encrypting, encrypted)
    encrypted.far.do("route", "replace", "192.0.2.1/32", "dev", "eth0", "src", OTHER)
    assert await encrypted.server.pings("172.16.0.0")

    async def roamed() -> bool:
        await encrypted.server.pings("172.16.0.0")
        return encrypted.wg(near).peers[0].endpoint == f"{OTHER}:51901"

    # the far end's socket remembers for a while from where it sends
    encrypted.tell(far, "peer", near.tunnel.key.public, "endpoint", "192.0.2.1:51900")
    await until(roamed, "the far end's packets come from elsewhere", bar=1)
    assert await ensured(encrypting, near) == ()
    assert encrypted.wg(near).peers[0].endpoint == f"{OTHER}:51901"


async def test_ports_are_changed_at_either_end_and_next_to_nothing_is_lost(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await up(encrypting, encrypted)
    async with traffic(encrypted.client) as seen:  # the far one first, as its answer tells it
        far, near = retold(far, port=51999), retold(near, remote_port=51999)
        await ensured(encrypting, far, near)
    assert seen.lost <= 5  # what was sent to the old port until it was told, 5 ms apart
    async with traffic(encrypted.client) as seen:  # the far one is told before, by the request
        far, near = retold(far, remote_port=51998), retold(near, port=51998)
        await ensured(encrypting, far, near)
    assert seen.lost == 0
    assert (encrypted.wg(near).port, encrypted.wg(far).port) == (51998, 51999)
    assert ":51901 " not in encrypted.far.run("ss", "-Hlun").stdout
    assert ":51900 " not in encrypted.near.run("ss", "-Hlun").stdout


@ALIKE
async def test_who_begins_is_heard_on_its_new_port_before_it_has_anything_to_say(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await up(encrypting, encrypted)
    far, near = retold(far, remote_port=51998), retold(near, port=51998)
    await ensured(encrypting, far)
    assert await encrypted.client.pings("172.16.0.1")  # from the old port: it goes back to that
    assert encrypted.wg(far).peers[0].endpoint == "192.0.2.1:51900"
    await ensured(encrypting, near)
    await until(
        lambda: encrypted.wg(far).peers[0].endpoint == "192.0.2.1:51998",
        "the far end follows to another port",
        bar=0.1,
    )
    assert await encrypted.server.pings("172.16.0.0")


@ALIKE
async def test_keepalive_and_size_are_changed_and_nothing_is_lost(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await up(encrypting, encrypted)
    handshake = encrypted.wg(near).peers[0].handshake
    async with traffic(encrypted.client) as seen:
        for keepalive, mtu in ((7, 1400), (0, 1380), (10, 1440)):
            changed = retold(near, keepalive=keepalive)
            changed = replace(changed, end=replace(changed.end, mtu=mtu))
            (step,) = await ensured(encrypting, changed)
            assert f"persistent-keepalive {keepalive}" in step
            assert f"mtu {mtu}" in step
            assert encrypted.wg(near).peers[0].keepalive == str(keepalive or "off")
    assert seen.lost == 0
    assert encrypted.wg(near).peers[0].handshake == handshake


async def test_both_ends_get_new_keys_under_traffic_and_a_new_session_at_once(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await up(encrypting, encrypted)
    one, other = Key.generate(), Key.generate()
    async with traffic(encrypted.client) as seen:
        halves = retold(far, key=other, peer=one.public), retold(near, key=one, peer=other.public)
        await ensured(encrypting, *halves)
        write("a session by new keys", await encrypting.handshake(halves[1], 10), 1)
    assert seen.lost < 800  # 200 a second: who waits for the old session's end takes 5 s
    for half, key, peer in zip(halves, (other, one), (one, other), strict=True):
        said = encrypted.wg(half)
        assert said.public == key.public
        assert [known.public for known in said.peers] == [peer.public]


@ALIKE
async def test_a_far_end_that_was_made_anew_is_reached_at_once(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await up(encrypting, encrypted)
    encrypted.server.do("link", "del", "nsm-1")
    fresh = Key.generate()
    far = retold(far, key=fresh)
    near = retold(near, peer=fresh.public)
    await ensured(encrypting, far, near)
    write("a session with a new far end", await encrypting.handshake(near, 10), 1)
    assert await encrypted.client.pings("172.16.0.1")
    assert [peer.public for peer in encrypted.wg(near).peers] == [fresh.public]


async def test_what_somebody_broke_is_mended(encrypting: Kernel, encrypted: Nodes) -> None:
    near, far = await up(encrypting, encrypted)
    stranger, public = Key.generate().public, far.tunnel.key.public
    as_it_was = replace_handshakes(encrypted.wg(near))
    for words in (
        ("peer", public, "remove"),
        ("peer", public, "allowed-ips", "10.0.0.0/8"),
        ("peer", stranger, "allowed-ips", "0.0.0.0/0,::/0", "endpoint", "192.0.2.9:1"),
        ("listen-port", "7777"),
        ("peer", public, "persistent-keepalive", "99"),
    ):
        encrypted.tell(near, *words)
        assert await ensured(encrypting, near) != ()
        assert replace_handshakes(encrypted.wg(near)) == as_it_was
        assert await ensured(encrypting, near) == ()
        await encrypting.handshake(near, 10)
        assert await encrypted.client.pings("172.16.0.1")
    for broken in (("set", "nsm-1", "down"), ("set", "nsm-1", "mtu", "1300"), ("del", "nsm-1")):
        encrypted.client.do("link", *broken)
        assert await ensured(encrypting, near) != ()
        await encrypting.handshake(near, 10)
        assert await encrypted.client.pings("172.16.0.1")
    assert encrypted.wg(near).peers[0].public == public


def replace_handshakes(said: Said) -> Said:
    return replace(said, peers=[replace(peer, handshake=0) for peer in said.peers])


def hold(port: int, family: socket.AddressFamily = socket.AF_INET) -> socket.socket:
    held = socket.socket(family, socket.SOCK_DGRAM)
    if family == socket.AF_INET6:
        held.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    held.bind(("", port))
    return held


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(socket.AF_INET, id="ipv4", marks=pytest.mark.long),
        pytest.param(socket.AF_INET6, id="ipv6"),  # it takes both
    ],
)
async def test_a_port_that_is_taken_is_told_with_its_holder_and_another_one_does(
    encrypting: Kernel, encrypted: Nodes, family: socket.AddressFamily
) -> None:
    near, far = await encrypted.wires(encrypting)
    underlay = near.tunnel.underlay
    before = encrypted.near.links(), kernel_state(encrypted.client)
    assert await encrypting.port_free(51900, underlay=underlay)
    with await encrypting.within(underlay, lambda: hold(51900, family)):
        assert not await encrypting.port_free(51900, underlay=underlay)
        async with Undo() as undo:
            with pytest.raises(PortTakenError) as refused:
                await encrypting.ensure(near, undo)
            assert re.search(
                r"UDP port 51900 in near is held by \S+ \(pid \d+\); .*NSM_WIREGUARD_PORT",
                str(refused.value),
            )
            assert (encrypted.near.links(), kernel_state(encrypted.client)) == before
            assert remains() == set()
            await encrypting.ensure(retold(near, port=51950), undo)
        await ensured(encrypting, retold(far, remote_port=51950))
        await encrypting.handshake(retold(near, port=51950), 10)
        assert await encrypted.client.pings("172.16.0.1")


async def test_two_wires_cannot_have_one_port_and_the_first_one_keeps_it(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await up(encrypting, encrypted)
    second, _ = await encrypted.wires(encrypting, name="nsm-2", net=1)
    holder = {"kernel": "a tunnel of the kernel", "userspace": r"wireguard-go \(pid \d+\)"}
    with pytest.raises(
        PortTakenError, match=f"51900 in near is held by {holder[encrypted.engine]}"
    ):
        await ensured(encrypting, retold(second, port=51900))
    assert await encrypted.client.pings("172.16.0.1")
    assert encrypted.client.links() == {"nsm-1"}
    await ensured(encrypting, second)
    before = replace_handshakes(encrypted.wg(second))
    with pytest.raises(PortTakenError):
        await ensured(encrypting, retold(second, port=51900, peer=Key.generate().public))
    assert replace_handshakes(encrypted.wg(second)) == before
    assert ":51910 " in encrypted.near.run("ss", "-Hlun").stdout
    assert await ensured(encrypting, near, second) == ()


async def test_a_later_failure_of_a_refresh_brings_back_the_old_tunnel(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await up(encrypting, encrypted)
    before = replace_handshakes(encrypted.wg(near)), kernel_state(encrypted.client)
    changed = retold(
        near,
        key=Key.generate(),
        peer=Key.generate().public,
        port=51977,
        remote=ip_address(OTHER),
        keepalive=3,
    )
    with pytest.raises(ZeroDivisionError) as failure:  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await encrypting.ensure(changed, undo)
            assert encrypted.wg(near).port == 51977
            raise ZeroDivisionError
    assert not getattr(failure.value, "__notes__", [])
    assert (replace_handshakes(encrypted.wg(near)), kernel_state(encrypted.client)) == before
    assert await ensured(encrypting, near) == ()
    await encrypting.handshake(near, 10)
    assert await encrypted.client.pings("172.16.0.1")


@ALIKE
async def test_a_later_failure_takes_a_new_tunnel_away(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    before = encrypted.near.links(), kernel_state(encrypted.client)
    with pytest.raises(ZeroDivisionError) as failure:  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await encrypting.ensure(near, undo)
            assert encrypted.client.links() == {"nsm-1"}
            raise ZeroDivisionError
    assert not getattr(failure.value, "__notes__", [])
    assert (encrypted.near.links(), kernel_state(encrypted.client)) == before
    assert remains() == set()


@ALIKE
async def test_a_name_that_is_taken_and_a_route_that_cannot_be_leave_nothing(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    encrypted.client.do("link", "add", "nsm-1", "type", "bridge")
    before = encrypted.near.links(), kernel_state(encrypted.client)
    with pytest.raises(NameTakenError, match="there is an interface nsm-1 in client already"):
        await ensured(encrypting, near)
    bad = Hop(near.end.routes[0].to, ip_address("127.0.0.1"))
    with pytest.raises(InvalidError):
        await ensured(encrypting, replace(near, end=replace(near.end, name="x", routes=(bad,))))
    assert (encrypted.near.links(), kernel_state(encrypted.client)) == before
    assert remains() == set()


@ALIKE
async def test_a_wire_becomes_an_encrypted_one_and_another_kind_again(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await encrypted.wires(encrypting)

    def plain(half: RemoteWire, underlay: Namespace) -> RemoteWire:
        tunnel = half.tunnel
        return replace(half, tunnel=VxlanTunnel(42, tunnel.local, tunnel.remote, underlay))

    local = LocalWire(near.connection, near.end, far.end)
    kinds = (
        (near, far),
        tuple(plain(half, half.tunnel.underlay) for half in (near, far)),
        (near, far),
        (local,),
        (near, far),
    )
    for kind in kinds:
        for half in kind:
            async with Undo() as undo:
                await encrypting.ensure(half, undo)
        if kind == (near, far):
            await encrypting.handshake(near, 10)
        else:
            await until(lambda: not remains(), "no process is left of it", bar=0.2)
        assert await encrypted.client.pings("172.16.0.1")
    # the device of before comes back where the attempt fails
    before = kernel_state(encrypted.client)
    with pytest.raises(ZeroDivisionError) as failure:  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await encrypting.ensure(plain(near, near.tunnel.underlay), undo)
            raise ZeroDivisionError
    assert not getattr(failure.value, "__notes__", [])
    assert kernel_state(encrypted.client) == before
    await encrypting.handshake(near, 10)
    assert await encrypted.client.pings("172.16.0.1")

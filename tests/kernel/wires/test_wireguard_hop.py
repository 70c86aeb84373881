"""A workload that may configure devices gets at no key: the stock tools try to."""

import asyncio
import fcntl
import os
import socket
import struct
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from nsm.errors import UnsupportedError
from nsm.kernel import owner, splice
from nsm.kernel.netlink import NameTakenError
from nsm.kernel.node import Kernel
from nsm.kernel.state import RemoteWire
from nsm.kernel.tunnels import StandingWireguard
from nsm.undo import Undo
from tests.kernel.wires.encrypted import INSTANCE, Nodes, ensured, seat
from tests.support.spaces import Space, holders, kernel_state, workload
from tests.support.wait import until

pytestmark = pytest.mark.kernel
HAS_WIREGUARD = pytest.mark.needs_kernel("wireguard")
KERNEL = [pytest.param("kernel", marks=HAS_WIREGUARD)]
BESIDE = pytest.param(  # wireguard-go on a node that has both
    "userspace", marks=[HAS_WIREGUARD, pytest.mark.long]
)
kernels = pytest.mark.parametrize("encrypted", KERNEL, indirect=True)


STREAM = bytes(range(256)) * 8192


def take(listening: socket.socket) -> bytes:
    """All that whoever connects sends."""
    channel, _ = listening.accept()
    with channel:
        return b"".join(iter(partial(channel.recv, 1 << 16), b""))


def give(channel: socket.socket, address: str) -> None:
    with channel:
        channel.connect((address, 7))
        channel.sendall(STREAM)


async def behind(kernel: Kernel, nodes: Nodes) -> tuple[RemoteWire, RemoteWire]:
    """Both halves made, the near one with its tunnel on the node."""
    near, far = await nodes.wires(kernel)
    near = replace(near, hop=True)
    await ensured(kernel, far, near)
    await kernel.handshake(near, 10)
    return near, far


async def kept(kernel: Kernel, wire: RemoteWire) -> StandingWireguard | None:
    """What a refresh of the wire goes on with."""
    return await kernel.standing_wireguard(
        wire.connection, wire.side, seat(wire), hop=wire.hop, underlay=wire.tunnel.underlay
    )


def below(wire: RemoteWire) -> tuple[str, str]:
    return wire.below[1], wire.lead[1]


async def test_packets_pass_as_if_there_were_no_node_between(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await behind(encrypting, encrypted)
    for address in ("172.16.0.1", "2001:db8::1"):
        assert await encrypted.client.pings(address)
    for address in ("172.16.0.0", "2001:db8::"):
        assert await encrypted.server.pings(address)
    full = near.end.mtu - 28
    assert await encrypted.client.pings("172.16.0.1", "-M", "do", "-s", str(full))
    assert not await encrypted.client.pings("172.16.0.1", "-M", "do", "-s", str(full + 1))
    assert await encrypted.client.pings("172.16.0.1", "-t", "1")  # no hop longer
    assert encrypted.near.run("sysctl", "-n", "net.ipv4.ip_forward").stdout == "0\n"
    assert await ensured(encrypting, near, far) == ()
    assert await encrypting.handshake(near, 10) == 0


async def test_what_a_powerful_workload_tries_reaches_no_key(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await behind(encrypting, encrypted)
    client = encrypted.client
    (link,) = client.ip("link", "show", "nsm-1")
    assert link["linkinfo"]["info_kind"] == {"kernel": "veth", "userspace": "tun"}[encrypted.engine]
    assert client.links() == {"nsm-1"}
    for command in (
        "wg show nsm-1 private-key",
        "wg set nsm-1 listen-port 7",
        "wg set nsm-1 fwmark 7",
        "tc filter show dev nsm-1 ingress",
    ):
        done = client.run(*command.split())
        assert done.returncode or not done.stdout, command

    def attach() -> int:
        """As if wireguard-go's device were one's own."""
        tun = os.open("/dev/net/tun", os.O_RDWR)
        try:
            fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"nsm-1", 0x0001))
        except OSError as refused:
            return refused.errno or 0
        finally:
            os.close(tun)
        return 0

    assert await encrypting.within(near.end.namespace, attach) != 0
    assert holders(near.end.namespace.inode) == []
    assert await client.pings("172.16.0.1")


@pytest.mark.parametrize("encrypted", ["userspace"], indirect=True)
async def test_wireguard_gos_device_is_in_the_workload_either_way(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await behind(encrypting, encrypted)
    assert encrypted.near.links() == {"eth0"}
    assert await ensured(encrypting, replace(near, hop=False)) == ()


@kernels
async def test_the_tunnel_is_on_the_node_and_says_whose_it_is(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await behind(encrypting, encrypted)
    tunnel, lead = below(near)
    assert encrypted.near.links() == {"eth0", tunnel, lead}
    for name, kind, mark in (
        (tunnel, "wireguard", owner.Mark(near.connection, "src", hop=True)),
        (lead, "veth", owner.Mark(near.connection, "src", hop=True, lead=True)),
    ):
        (link,) = encrypted.near.ip("link", "show", name)
        assert link["linkinfo"]["info_kind"] == kind
        assert int(link["group"]) == encrypting.group
        found = owner.Mark.parse(link["ifalias"])
        assert found is not None
        assert replace(found, underlay=0, far="") == mark
        assert link["inet6_addr_gen_mode"] == "none"  # the node says nothing on it
    (link,) = encrypted.client.ip("link", "show", "nsm-1")
    assert "NOARP" in link["flags"]
    assert (link["mtu"], link["address"]) == (1440, owner.mac(near.connection, "src"))
    shown = encrypted.near.run("tc", "filter", "show", "dev", tunnel, "ingress").stdout
    assert "direct-action" in shown
    assert await encrypting.remove(near.connection) == 4
    assert encrypted.near.links() == {"eth0"}
    assert encrypted.client.links() == set()


@kernels
async def test_a_stream_of_large_segments_arrives_whole(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await behind(encrypting, encrypted)
    for server, client, address in (
        (far.end.namespace, near.end.namespace, "172.16.0.1"),
        (near.end.namespace, far.end.namespace, "172.16.0.0"),
    ):
        open_ = partial(socket.create_server, (address, 7))
        with await encrypting.within(server, open_) as listening:
            listening.settimeout(60)
            taking = asyncio.create_task(asyncio.to_thread(take, listening))
            await asyncio.to_thread(give, await encrypting.within(client, socket.socket), address)
            assert await taking == STREAM


@kernels
async def test_it_is_mended_and_changed_in_place_and_found_after_a_restart(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, far = await behind(encrypting, encrypted)
    tunnel, lead = below(near)
    client, node = encrypted.client, encrypted.near

    def broken(space: Space, *command: str) -> None:
        done = space.run(*command)
        assert done.returncode == 0, done.stderr

    for space, command in (
        (client, "ip link set nsm-1 arp on"),
        (client, "ip link set nsm-1 address 02:00:00:00:00:77"),
        (client, "ip link set nsm-1 down"),
        (node, f"tc qdisc del dev {tunnel} ingress"),
        (node, f"tc qdisc del dev {lead} ingress"),
        (client, "ip link del nsm-1"),
        (node, f"ip link del {tunnel}"),
    ):
        broken(space, *command.split())
        assert await ensured(encrypting, near) != (), command
        await encrypting.handshake(near, 10)
        assert await client.pings("172.16.0.1"), command
        assert await ensured(encrypting, near) == (), command
    indexes = [client.ip("link", "show", "nsm-1")[0]["ifindex"]]
    smaller = replace(near, end=replace(near.end, mtu=1300))
    await ensured(encrypting, smaller)
    assert [client.ip("link", "show", "nsm-1")[0]["ifindex"]] == indexes
    assert {node.ip("link", "show", name)[0]["mtu"] for name in (tunnel, lead)} == {1300}
    assert await client.pings("172.16.0.1")
    async with Kernel(INSTANCE) as later:
        found = {one.mark.role for one in await later.find() if one.mark and one.mark.side == "src"}
        assert found == {"", "hop", "lead"}
        standing = await kept(later, near)
        assert standing is not None
        assert (standing.key, standing.port) == (near.tunnel.key, near.tunnel.port)
        assert await ensured(later, smaller, far) == ()
        assert await later.remove(near.connection) == 4
    assert node.links() == {"eth0"}


@pytest.mark.parametrize("encrypted", [BESIDE, *KERNEL], indirect=True)
async def test_a_device_the_workload_made_to_look_like_ours_dictates_nothing(
    encrypting: Kernel, encrypted: Nodes, tmp_path: Path
) -> None:
    near, _ = await behind(encrypting, encrypted)
    client, node = encrypted.client, encrypted.near
    (link,) = client.ip("link", "show", "nsm-1")
    key = tmp_path / "key"
    key.write_text(subprocess.run(["wg", "genkey"], capture_output=True, text=True).stdout)
    client.do("link", "del", "nsm-1")
    made = ("link", "add", "nsm-1", "index", str(link["ifindex"]), "group", link["group"])
    client.do(*made, "type", "wireguard")
    client.do("link", "set", "nsm-1", "alias", link["ifalias"])
    client.run("wg", "set", "nsm-1", "private-key", str(key), "listen-port", "53")
    ours = near.tunnel.key, near.tunnel.port
    async with Kernel(INSTANCE) as later:
        await later.find()
        for kernel in (encrypting, later):
            standing = await kept(kernel, near)
            assert standing is None or (standing.key, standing.port) == ours
            assert (standing is not None) == (encrypted.engine == "kernel")
    # Nor what stands apart, where the tunnel is to be in the workload.
    if standing:
        client.do("link", "del", "nsm-1")
        await ensured(encrypting, near)
        assert await kept(encrypting, replace(near, hop=False)) is None
        node.do("link", "del", below(near)[0])
        assert await kept(encrypting, near) is None


@kernels
async def test_it_goes_out_of_a_workload_and_back(encrypting: Kernel, encrypted: Nodes) -> None:
    near, far = await encrypted.wires(encrypting)
    await ensured(encrypting, far)
    for hop, kind in ((False, "wireguard"), (True, "veth"), (False, "wireguard")):
        await ensured(encrypting, replace(near, hop=hop))
        await encrypting.handshake(replace(near, hop=hop), 10)
        (link,) = encrypted.client.ip("link", "show", "nsm-1")
        assert link["linkinfo"]["info_kind"] == kind
        assert encrypted.near.links() == {"eth0", *(below(near) if hop else ())}
        assert await encrypted.client.pings("172.16.0.1")


@kernels
async def test_a_workload_that_dies_leaves_a_tunnel_that_is_found_and_removed(
    encrypting: Kernel, encrypted: Nodes
) -> None:
    near, _ = await encrypted.wires(encrypting)
    with workload() as one:
        there = await encrypting.namespace(pid=one.pid, name="mortal")
        await ensured(encrypting, replace(near, hop=True, end=replace(near.end, namespace=there)))
        one.kill()
        await until(
            lambda: encrypted.near.links() == {"eth0", near.below[1]},
            "the workload's device is gone and its tunnel is not",
            bar=0.5,
        )
    assert await encrypting.remove(near.connection) == 1
    assert encrypted.near.links() == {"eth0"}


@kernels
async def test_what_is_refused_leaves_nothing_and_a_later_failure_takes_it_back(
    encrypting: Kernel, encrypted: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _ = await encrypted.wires(encrypting)
    near = replace(near, hop=True)
    before = encrypted.near.links(), kernel_state(encrypted.client)
    encrypted.client.do("link", "add", "nsm-1", "type", "bridge")
    with pytest.raises(NameTakenError):
        await ensured(encrypting, near)
    encrypted.client.do("link", "del", "nsm-1")
    with monkeypatch.context() as patch:
        patch.setattr(splice, "outward", lambda index: b"\0" * 8)  # nothing a kernel would take
        with pytest.raises(UnsupportedError, match="NSM_WIREGUARD=userspace"):
            await ensured(encrypting, near)
    assert (encrypted.near.links(), kernel_state(encrypted.client)) == before
    with pytest.raises(ZeroDivisionError) as failure:  # noqa: PT012 - the block is the matter
        async with Undo() as undo:
            await encrypting.ensure(near, undo)
            assert len(encrypted.near.links()) == 3
            raise ZeroDivisionError
    assert not getattr(failure.value, "__notes__", [])
    assert (encrypted.near.links(), kernel_state(encrypted.client)) == before

"""The same wire twice: made by `nsm.kernel`, and by hand with `ip`, `wg` and `wireguard-go`.

A `Stage` is what wires need around them: two nodes with a cable between them, and a
workload's namespace on each. A `Plan` is one wire; equal plans on two stages have to make
equal objects, unequal ones stand on one stage beside each other.
"""

import base64
import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any, Final, Literal

from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.node import Kernel
from nsm.kernel.state import (
    EngineName,
    Hop,
    Interface,
    LocalWire,
    Namespace,
    RemoteWire,
    VxlanTunnel,
    WireguardTunnel,
)
from nsm.undo import Undo

Kind = Literal["veth", "vxlan", "wireguard", "wireguard-go"]
KINDS: Final[tuple[Kind, ...]] = ("veth", "vxlan", "wireguard", "wireguard-go")
UNDERLAY: Final = ("192.0.2.1", "192.0.2.2")
MTU: Final = {"veth": 1500, "vxlan": 1446, "wireguard": 1420, "wireguard-go": 1420}
PATIENCE: Final = 5.0  # seconds; what is waited for takes milliseconds
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Stage:
    """Names of namespaces: near and far are the nodes', client and server are on them."""

    near: str
    far: str
    client: str
    server: str


@contextmanager
def stage() -> Iterator[Stage]:
    """A stage for the block."""
    names = [f"bench-{os.getpid()}-{next(_numbers)}" for _ in range(4)]
    made = Stage(*names)
    try:
        for name in names:
            shell(SPACE.format(name=name))
        shell(CABLE.format(near=made.near, far=made.far, a=UNDERLAY[0], b=UNDERLAY[1]))
        yield made
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


# without duplicate address detection, which lasts two seconds and holds the kernel's lock meanwhile
SPACE = """
ip netns add {name}
ip -n {name} link set lo up
ip netns exec {name} sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0
"""
CABLE = """
ip -n {near} link add eth0 address 02:00:00:00:00:01 type veth \
  peer name eth0 address 02:00:00:00:00:02 netns {far}
ip -n {near} addr add {a}/24 dev eth0
ip -n {far} addr add {b}/24 dev eth0
ip -n {near} link set eth0 up
ip -n {far} link set eth0 up
ip netns exec {near} ping -q -c 1 -i 0.2 -w 5 {b}
"""


def shell(commands: str) -> None:
    """Run them, as typed; RuntimeError with what the first one that fails says."""
    done = subprocess.run(["sh", "-ec", commands], check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{commands.strip()}\n{done.stderr.strip()}")


@dataclass(frozen=True, slots=True)
class Plan:
    """One wire: number tells it from others on its stage."""

    kind: Kind
    number: int
    keys: tuple[Key, Key] = field(default_factory=lambda: (Key.generate(), Key.generate()))

    @property
    def name(self) -> str:
        """Of both its devices."""
        return f"wire-{self.number}"

    @property
    def connection(self) -> str:
        """Of our wire, and what both ends' MACs are drawn from."""
        return f"0e2f9f4c-0000-4000-8000-{self.number:012}"

    @property
    def macs(self) -> tuple[str, str]:
        """The client's and the server's."""
        return owner.mac(self.connection, "src"), owner.mac(self.connection, "dst")

    @property
    def addresses(self) -> tuple[str, str]:
        """IPv4, the client's and the server's."""
        high, low = divmod(self.number, 100)
        return f"10.{high}.{low}.1", f"10.{high}.{low}.2"

    @property
    def addresses6(self) -> tuple[str, str]:
        """The same for IPv6."""
        return f"2001:db8:{self.number}::1", f"2001:db8:{self.number}::2"

    @property
    def vni(self) -> int:
        """Of a VXLAN."""
        return 1000 + self.number

    @property
    def port(self) -> int:
        """UDP, of a WireGuard."""
        return 51820 + self.number


# --- ours ------------------------------------------------------------------------------------


class Ours:
    """Makes wires as the forwarder does, and waits as it does until packets can pass."""

    def __init__(self, kernel: Kernel, spaces: dict[str, Namespace]) -> None:
        self._kernel = kernel
        self._spaces = spaces

    @classmethod
    async def on(cls, kernel: Kernel, where: Stage) -> "Ours":
        """On that stage."""
        names = (where.near, where.far, where.client, where.server)
        roles = ("near", "far", "client", "server")
        spaces = {
            role: await kernel.namespace(path=f"/run/netns/{name}", name=role)
            for role, name in zip(roles, names, strict=True)
        }
        return cls(kernel, spaces)

    async def make(self, plan: Plan) -> None:
        """Have it stand, and the far end have answered where there is a handshake."""
        async with Undo() as undo:
            if plan.kind == "veth":
                client, server = (self._end(plan, side) for side in (0, 1))
                await self._kernel.ensure(LocalWire(plan.connection, client, server), undo)
                return
            near, far = (self._half(plan, side) for side in (0, 1))
            await self._kernel.ensure(far, undo)
            await self._kernel.ensure(near, undo)
            if plan.kind != "vxlan":
                await self._kernel.handshake(near, PATIENCE)

    async def remove(self, plan: Plan) -> None:
        """Take it away."""
        await self._kernel.remove(plan.connection)

    def _half(self, plan: Plan, side: int) -> RemoteWire:
        node = self._spaces["far" if side else "near"]
        own, other = (ip_address(UNDERLAY[n]) for n in (side, 1 - side))
        tunnel: VxlanTunnel | WireguardTunnel = VxlanTunnel(plan.vni, own, other, node)
        if plan.kind != "vxlan":
            key, peer = plan.keys[side], plan.keys[1 - side].public
            engine: EngineName = "kernel" if plan.kind == "wireguard" else "userspace"
            port = plan.port
            tunnel = WireguardTunnel(key, peer, own, other, port, node, port, engine)
        return RemoteWire(plan.connection, "dst" if side else "src", self._end(plan, side), tunnel)

    def _end(self, plan: Plan, side: int) -> Interface:
        both = (plan.addresses, plan.addresses6)
        far = [ip_interface(addresses[1 - side]) for addresses in both]
        return Interface(
            self._spaces["server" if side else "client"],
            plan.name,
            mtu=MTU[plan.kind],
            addresses=tuple(ip_interface(addresses[side]) for addresses in both),
            routes=tuple(Hop(one.network) for one in far),
            neighbours=tuple((one.ip, plan.macs[1 - side]) for one in far),
        )


# --- by hand ---------------------------------------------------------------------------------

# What everybody would type, with the MACs and the MTU that ours have. No IPv6 duplicate address
# detection, because nobody else is on a wire.
END = """
ip -n {space} -batch - <<.
addr add {own} dev {name}
addr add {own6} dev {name} nodad
link set {name} up
route add {other} dev {name} scope link
route add {other6} dev {name}
{more}
.
"""
NEIGHBOURS = """
neigh add {other} lladdr {mac} dev {name} nud permanent
neigh add {other6} lladdr {mac} dev {name} nud permanent
"""
VETH = """
ip -n {client} link add {name} mtu {mtu} address {macs[0]} type veth \
  peer name {name} mtu {mtu} address {macs[1]} netns {server}
"""
VXLAN = """
ip -n {node} link add {name} mtu {mtu} address {macs[0]} netns {space} \
  type vxlan id {vni} local {here} remote {there} dstport 4789 nolearning
"""
WIREGUARD = """
ip -n {node} link add {name} mtu {mtu} netns {space} type wireguard
ip netns exec {space} wg set {name} private-key {key} listen-port {port} \
  peer {peer} endpoint {there}:{port} allowed-ips 0.0.0.0/0,::/0
"""
# the kernel's own has no link-local address either
WIREGUARD_GO = """
ip netns exec {node} setsid wireguard-go {tun}
wg set {tun} private-key {key} listen-port {port} \
  peer {peer} endpoint {there}:{port} allowed-ips 0.0.0.0/0,::/0
ip -n {node} link set {tun} mtu {mtu}
ip -n {node} link set {tun} netns {space} name {name}
ip -n {space} link set {name} addrgenmode none
"""
AWAY = "ip -n {space} link del {name}"


class ByHand:
    """Makes the same wires with the stock tools."""

    def __init__(self, where: Stage, folder: Path) -> None:
        """folder is for private keys, which `wg` reads from files."""
        self._stage = where
        self._folder = folder

    def make(self, plan: Plan) -> None:
        """Have it stand; a handshake begins with the first packet."""
        sides = [self._words(plan, side) for side in (1, 0)]
        if plan.kind == "veth":
            shell(VETH.format(**sides[1]))
        for words in sides:
            if plan.kind == "vxlan":
                shell(VXLAN.format(**words))
            elif plan.kind != "veth":
                secret = base64.b64encode(plan.keys[words["side"]].secret)
                Path(words["key"]).write_bytes(secret)
                shell((WIREGUARD if plan.kind == "wireguard" else WIREGUARD_GO).format(**words))
        for words in sides:
            more = NEIGHBOURS if plan.kind in ("veth", "vxlan") else ""
            shell(END.format(**words, more=more.format(**words)))

    def remove(self, plan: Plan) -> None:
        """Take it away."""
        for side in (0,) if plan.kind == "veth" else (0, 1):
            shell(AWAY.format(**self._words(plan, side)))

    def device(self, plan: Plan, side: int) -> str:
        """What a wireguard-go is called: one on the whole machine, wherever its device goes."""
        return f"b{os.getpid() % 100000}-{plan.number}-{side}"

    def _words(self, plan: Plan, side: int) -> dict[str, Any]:
        where = self._stage
        return {
            "side": side,
            "name": plan.name,
            "tun": self.device(plan, side),
            "client": where.client,
            "server": where.server,
            "space": (where.client, where.server)[side],
            "node": (where.near, where.far)[side],
            "here": UNDERLAY[side],
            "there": UNDERLAY[1 - side],
            "own": plan.addresses[side],
            "own6": plan.addresses6[side],
            "other": plan.addresses[1 - side],
            "other6": plan.addresses6[1 - side],
            "mac": plan.macs[1 - side],
            "macs": (plan.macs[side], plan.macs[1 - side]),
            "mtu": MTU[plan.kind],
            "vni": plan.vni,
            "port": plan.port,
            "key": self._folder / f"key-{plan.number}-{side}",
            "peer": plan.keys[1 - side].public,
        }

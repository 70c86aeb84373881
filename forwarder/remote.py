"""The two mechanisms between nodes, both as `route.py` uses them: what is drawn for a tunnel,
what the other node is told of it, and what tunnel the answer means.

Each tunnel has something that only one may have at a time: a VXLAN its network identifier
(VNI), WireGuard its UDP port. It is drawn as free, stays as long as the tunnel stands, and
is drawn anew where the kernel says that somebody was quicker. The kernel's word counts:
two forwarders may share an underlay.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from forwarder.mechanisms import ends, vxlan, wireguard
from forwarder.ports import Ports
from forwarder.recovery import Recovery
from forwarder.tunnels import Tunnels
from nsm import mechanisms
from nsm.errors import ExhaustedError, UnsupportedError
from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.node import Kernel
from nsm.kernel.state import (
    VXLAN_PORT,
    IPAddress,
    Namespace,
    RemoteWire,
    VxlanTunnel,
    Wire,
    WireguardTunnel,
)
from nsm.kernel.tunnels import Engine
from nsm.model import Mechanism
from nsm.undo import Undo

Seat = tuple[Namespace, str]
TRIES = 16  # network identifiers to ask the kernel about; one in 16 million is taken a wire


@dataclass(frozen=True, slots=True)
class Span:
    """A tunnel that is to be: whose, which side of the wire is ours, and from where to where.

    remote is the far node's address as far as it is known before that node has answered.
    mtu is what fits through as seen from here, in bytes.
    """

    connection: str
    side: owner.SideName
    local: IPAddress
    remote: IPAddress
    mtu: int


class Half(Protocol):
    """Our half of one tunnel, while it is being agreed on."""

    def offer(self) -> Mechanism:
        """What we say if we ask."""

    def answer(self, asked: Mechanism) -> Mechanism:
        """What we say if we are asked."""

    def tunnel(self, agreed: Mechanism) -> VxlanTunnel | WireguardTunnel:
        """The tunnel that both sides' words mean; raises on what cannot be."""

    async def redraw(self, agreed: Mechanism) -> None:
        """Draw anew what the kernel says is somebody else's."""


class Remote(Protocol):
    """A mechanism between nodes."""

    type: str
    payload: str

    async def local(self, connection: str, towards: IPAddress) -> tuple[IPAddress, int]:
        """Our address for a tunnel towards that node, and the MTU inside it.

        Raises UnsupportedError, saying what to do, where this node can have no such tunnel.
        """

    def asker(self, asked: Mechanism) -> IPAddress:
        """The address of the node that asks, once all it says of its side is well-formed."""

    async def half(
        self, span: Span, asked: Mechanism | None, seat: Seat, known: Wire | None, undo: Undo
    ) -> Half:
        """Our half: as it stands, be it from before a restart, or drawn afresh.

        asked is None where we ask. seat is where the wire's device is to be; known is the
        wire as we made it earlier, None after a restart.
        """

    def gone(self, connection: str) -> None:
        """The connection has no tunnel any more."""


# --- VXLAN -----------------------------------------------------------------------------------


class Vxlan:
    """For frames: all tunnels of a node share a UDP port, and differ by network identifier."""

    type = mechanisms.VXLAN
    payload = mechanisms.ETHERNET

    def __init__(self, kernel: Kernel, tunnels: Tunnels, recovery: Recovery, port: int) -> None:
        """port 0 is the protocol's own."""
        self.kernel = kernel
        self.port = port or VXLAN_PORT
        self._tunnels = tunnels
        self._recovery = recovery

    async def local(self, _: str, towards: IPAddress) -> tuple[IPAddress, int]:
        return await self._tunnels.local(towards, self.type)

    def asker(self, asked: Mechanism) -> IPAddress:
        return ends.address(asked, mechanisms.SRC_IP)

    async def half(
        self, span: Span, asked: Mechanism | None, _: Seat, known: Wire | None, __: Undo
    ) -> "VxlanHalf":
        # Who answers keeps what is proposed, if it is free there too: so there is nothing to
        # agree on afterwards. What stands since before a restart is proposed again.
        held = self._held(span, known)
        half = VxlanHalf(self, span, (mechanisms.vni(asked) if asked else 0) or held)
        said = half.answer(asked) if asked else half.offer()
        said = said.with_(**{mechanisms.DST_IP: said.get(mechanisms.DST_IP) or str(span.remote)})
        if not half.vni or (half.vni != held and not await half.is_free(said)):
            await half.redraw(said)
        return half

    def gone(self, _: str) -> None:
        """Identifiers are the kernel's alone to know."""

    def _held(self, span: Span, known: Wire | None) -> int:
        """The network identifier this connection has now, be it from before a restart; or 0."""
        if known is None:
            return self._recovery.vni(span.connection)
        tunnel = known.tunnel if isinstance(known, RemoteWire) else None
        same = isinstance(tunnel, VxlanTunnel) and tunnel.remote == span.remote
        return tunnel.vni if same else 0  # type: ignore[union-attr] # same says it


class VxlanHalf:
    """Our half of a VXLAN: what is drawn is its network identifier."""

    def __init__(self, of: Vxlan, span: Span, vni: int) -> None:
        self._of = of
        self._span = span
        self.vni = vni

    def offer(self) -> Mechanism:
        return vxlan.offer(self._span.local, self._of.port, self._span.mtu, self.vni)

    def answer(self, asked: Mechanism) -> Mechanism:
        return vxlan.answer(asked, self._span.local, self._of.port, self._span.mtu, self.vni)

    def tunnel(self, agreed: Mechanism) -> VxlanTunnel:
        return vxlan.tunnel(agreed, self._span.side, self._of.port, self._of.kernel.own)

    async def redraw(self, agreed: Mechanism) -> None:
        for _ in range(TRIES):
            self.vni = mechanisms.draw_vni(agreed, ())
            if await self.is_free(agreed):
                return
        raise ExhaustedError(
            f"{TRIES} network identifiers in a row are taken on UDP port {self._of.port}",
            hint="see `ip -d link show type vxlan` for who holds them",
        )

    async def is_free(self, agreed: Mechanism) -> bool:
        """Whether the kernel could make a tunnel with our identifier now."""
        src, dst = (ends.address(agreed, key) for key in (mechanisms.SRC_IP, mechanisms.DST_IP))
        local, remote = (src, dst) if self._span.side == "src" else (dst, src)
        return await self._of.kernel.vni_free(self.vni, local, remote, port=self._of.port)


# --- WireGuard -------------------------------------------------------------------------------


class Wireguard:
    """For IP packets, encrypted: a key and a UDP port for each tunnel."""

    type = mechanisms.WIREGUARD
    payload = mechanisms.IP

    def __init__(self, kernel: Kernel, tunnels: Tunnels, engine: Engine, port: int) -> None:
        """port is the first of the tunnels' ports, 0 the protocol's own."""
        self.kernel = kernel
        self.ports = Ports(port or mechanisms.DEFAULT_PORTS[self.type], kernel.port_free)
        self._tunnels = tunnels
        self._engine = engine

    async def local(self, connection: str, towards: IPAddress) -> tuple[IPAddress, int]:
        # what stands goes on, even where no new one could be made any more
        if not self._engine.name and not await self.kernel.standing_wireguard(connection):
            raise self._none()
        return await self._tunnels.local(towards, self.type)

    def asker(self, asked: Mechanism) -> IPAddress:
        return wireguard.asker(asked)

    async def half(
        self, span: Span, _: Mechanism | None, seat: Seat, __: Wire | None, undo: Undo
    ) -> "WireguardHalf":
        namespace, name = seat
        stands = await self.kernel.standing_wireguard(span.connection)
        if stands and (stands.nsid, stands.name) == (namespace.nsid, name):
            self.ports.keep(span.connection, stands.port)
            key, port, engine = stands.key, stands.port, stands.engine
        elif self._engine.name:
            # A device made anew gets a new key: under the old one the far end would go on with
            # a session that is gone, and refuse a new one for as long as our clock is behind.
            undo.add("give back the tunnel's UDP port", self._give_back, span.connection)
            port = await self.ports.draw(span.connection)
            key, engine = Key.generate(), self._engine.name
        else:
            raise self._none()
        own = wireguard.Own(span.side, key, span.local, port, engine, self.kernel.own)
        return WireguardHalf(self, span, own)

    def gone(self, connection: str) -> None:
        self.ports.give_back(connection)

    async def _give_back(self, connection: str) -> None:
        self.ports.give_back(connection)

    def _none(self) -> UnsupportedError:
        return UnsupportedError(
            "payload IP goes between nodes over WireGuard, and this node has none:"
            f" {self._engine.why}"
        )


class WireguardHalf:
    """Our half of a WireGuard tunnel: what is drawn is its UDP port."""

    def __init__(self, of: Wireguard, span: Span, own: wireguard.Own) -> None:
        self._of = of
        self._span = span
        self._own = own

    def offer(self) -> Mechanism:
        return wireguard.offer(self._own, self._span.mtu)

    def answer(self, asked: Mechanism) -> Mechanism:
        return wireguard.answer(asked, self._own, self._span.mtu)

    def tunnel(self, agreed: Mechanism) -> WireguardTunnel:
        return wireguard.tunnel(agreed, self._own)

    async def redraw(self, _: Mechanism) -> None:
        taken = self._own.port
        port = await self._of.ports.draw(self._span.connection, above=taken)
        self._own = replace(self._own, port=port)

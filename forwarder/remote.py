"""The two mechanisms between nodes, both as `route.py` uses them: what is drawn for a tunnel,
what the other node is told of it, and what tunnel the answer means.

Each tunnel has something that only one may have at a time: a VXLAN its network identifier
(VNI), WireGuard its UDP port. It is drawn as free, stays as long as the tunnel stands, and
is drawn anew where the kernel says that somebody was quicker. The kernel's word counts:
two forwarders may share an underlay.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import structlog

from forwarder.mechanisms import ends, vxlan, wireguard
from forwarder.ports import Ports
from forwarder.recovery import Recovery
from forwarder.tunnels import Tunnels
from nsm import mechanisms
from nsm.errors import ExhaustedError, TakenError, UnsupportedError
from nsm.kernel import owner
from nsm.kernel.keys import Key
from nsm.kernel.netlink import PortTakenError
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
TRIES = 16  # identifiers or ports to ask the kernel about: one in 16 million is taken a wire
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Span:
    """A tunnel that is to be: whose, which side of the wire is ours, and from where to where.

    remote is the far node's address as far as it is known before that node has answered.
    mtu is what fits through as seen from here, in bytes. hop says that our end of it is to
    stand in the underlay, out of the workload's reach. leg is the wire's, of its connection's.
    """

    connection: str
    side: owner.SideName
    local: IPAddress
    remote: IPAddress
    mtu: int
    hop: bool
    leg: str = ""

    @property
    def wire(self) -> str:
        """Which wire of its connection's it is for."""
        return owner.wire_id(self.connection, self.leg)


class Half(Protocol):
    """Our half of one tunnel, while it is being agreed on."""

    def offer(self) -> Mechanism:
        """What we say if we ask."""

    def answer(self, asked: Mechanism) -> Mechanism:
        """What we say if we are asked."""

    def tunnel(self, agreed: Mechanism) -> VxlanTunnel | WireguardTunnel:
        """The tunnel that both sides' words mean; raises on what cannot be."""

    async def redraw(self, agreed: Mechanism, taken: TakenError) -> None:
        """Draw anew what the kernel says is somebody else's; raises taken if that cannot be."""


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
        self,
        span: Span,
        asked: Mechanism | None,
        seat: Seat,
        known: Wire | None,
        ways: Mapping[Namespace, int],
        undo: Undo,
    ) -> Half:
        """Our half: as it stands, be it from before a restart, or drawn afresh.

        asked is None where we ask. seat is where the wire's device is to be, and ways lead
        in there; known is the wire as we made it earlier, None after a restart.
        """

    def gone(self, wire: str) -> None:
        """The wire (`owner.wire_id`) has no tunnel any more."""


# --- VXLAN -----------------------------------------------------------------------------------


class Vxlan:
    """For frames: a node's tunnels share a UDP port, and differ by network identifier.

    The port is the protocol's own, if no other is set. While a program has that, tunnels take
    another, which both sides then have to use: one kernel device has one for both directions.
    """

    type = mechanisms.VXLAN
    payload = mechanisms.ETHERNET

    def __init__(self, kernel: Kernel, tunnels: Tunnels, recovery: Recovery, port: int) -> None:
        """port 0 is the protocol's own, or another where that is taken."""
        self.kernel = kernel
        self.fixed = port
        self._other = 0
        self._tunnels = tunnels
        self._recovery = recovery

    async def local(self, _: str, towards: IPAddress) -> tuple[IPAddress, int]:
        return await self._tunnels.local(towards, self.type)

    def asker(self, asked: Mechanism) -> IPAddress:
        return ends.address(asked, mechanisms.SRC_IP)

    async def half(
        self,
        span: Span,
        asked: Mechanism | None,
        seat: Seat,
        known: Wire | None,
        _: Mapping[Namespace, int],
        __: Undo,
    ) -> "VxlanHalf":
        if asked and span.remote == span.local:
            raise UnsupportedError(
                f"VXLAN: who asks and who answers is the same node, {span.local}, where a network"
                " identifier can be one device's only",
                hint="ask for a service of one's own domain without @DOMAIN",
            )
        # Who answers keeps what is proposed, if it is free there too: so there is nothing to
        # agree on afterwards. What stands since before a restart is proposed again.
        held = vni, port = self._held(span, known, seat[0])
        if asked:
            vni = mechanisms.vni(asked) or vni
            port = vxlan.port_in(asked, mechanisms.SRC_PORT) or port
        half = VxlanHalf(self, span, vni, self.fixed or port or await self._port())
        said = half.answer(asked) if asked else half.offer()
        said = said.with_(**{mechanisms.DST_IP: said.get(mechanisms.DST_IP) or str(span.remote)})
        if not half.vni or ((half.vni, half.port) != held and not await half.is_free(said)):
            await half.draw_vni(said)
        return half

    def gone(self, _: str) -> None:
        """Identifiers are the kernel's alone to know."""

    def _held(self, span: Span, known: Wire | None, where: Namespace) -> tuple[int, int]:
        """The identifier and port this connection has, be it from before a restart; or zeros.

        Wherever it led: a far node's manager and its tunnels may have different addresses, and
        the latter is not known before that node has answered.
        """
        if known is None:
            return self._recovery.vxlan(span.connection, where, span.hop, span.leg)
        tunnel = known.tunnel if isinstance(known, RemoteWire) else None
        return (tunnel.vni, tunnel.port) if isinstance(tunnel, VxlanTunnel) else (0, 0)

    async def _port(self) -> int:
        """The port for a tunnel that does not stand yet."""
        if self._other and await self.kernel.port_free(VXLAN_PORT):
            self._other = 0  # who had it has left
        return self._other or VXLAN_PORT

    async def another_port(self, taken: int, why: TakenError) -> int:
        """A port instead of the one that is taken, from now on for all tunnels that are made."""
        if self._other in (0, taken):
            self._other = await self._free_port(taken)
            log.warning(
                "VXLAN tunnels take another UDP port, which must pass between nodes",
                port=self._other,
                why=why.message,
            )
        return self._other

    async def _free_port(self, taken: int) -> int:
        for port in range(VXLAN_PORT + 1, VXLAN_PORT + 1 + TRIES):
            if port != taken and await self.kernel.port_free(port):
                return port
        raise ExhaustedError(
            f"UDP ports {VXLAN_PORT} to {VXLAN_PORT + TRIES} are all taken",
            hint="see `ss -lun` for who holds them, or set NSM_VXLAN_PORT, the same on every node",
        )


class VxlanHalf:
    """Our half of a VXLAN: what is drawn is its network identifier, and its port if need be."""

    def __init__(self, of: Vxlan, span: Span, vni: int, port: int) -> None:
        self._of = of
        self._span = span
        self.vni = vni
        self.port = port

    def offer(self) -> Mechanism:
        any_port = not self._of.fixed
        return vxlan.offer(self._span.local, self.port, self._span.mtu, self.vni, any_port=any_port)

    def answer(self, asked: Mechanism) -> Mechanism:
        return vxlan.answer(asked, self._span.local, self.port, self._span.mtu, self.vni)

    def tunnel(self, agreed: Mechanism) -> VxlanTunnel:
        if self._span.side == "src" and not self._of.fixed:
            self.port = vxlan.port_in(agreed, mechanisms.DST_PORT) or self.port
        made = vxlan.tunnel(agreed, self._span.side, self.port, self._of.kernel.own)
        self.vni = made.vni
        return made

    async def redraw(self, agreed: Mechanism, taken: TakenError) -> None:
        if isinstance(taken, PortTakenError):
            # upstream's forwarders listen on their own port whatever we name
            if self._of.fixed or (self._span.side == "dst" and not vxlan.takes_any_port(agreed)):
                raise taken
            self.port = await self._of.another_port(self.port, taken)
            if await self.is_free(agreed):
                return
        await self.draw_vni(agreed)

    async def draw_vni(self, agreed: Mechanism) -> None:
        """Another identifier, one that is free here."""
        for _ in range(TRIES):
            self.vni = mechanisms.draw_vni(agreed, ())
            if await self.is_free(agreed):
                return
        raise ExhaustedError(
            f"{TRIES} network identifiers in a row are taken on UDP port {self.port}",
            hint="see `ip -d link show type vxlan` for who holds them",
        )

    async def is_free(self, agreed: Mechanism) -> bool:
        """Whether the kernel could make a tunnel with our identifier now."""
        key = mechanisms.DST_IP if self._span.side == "src" else mechanisms.SRC_IP
        remote = self._span.remote  # not said by anybody before the far node has answered
        if agreed.get(key) != str(remote):
            remote = ends.address(agreed, key)
        return await self._of.kernel.vni_free(self.vni, self._span.local, remote, port=self.port)


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
        # what stands goes on, even where no new one could be made any more: `half` looks at it
        if not self._engine.name and not self.kernel.knows(connection):
            raise self._none()
        return await self._tunnels.local(towards, self.type)

    def asker(self, asked: Mechanism) -> IPAddress:
        return wireguard.asker(asked)

    async def half(
        self,
        span: Span,
        _: Mechanism | None,
        seat: Seat,
        known: Wire | None,
        ways: Mapping[Namespace, int],
        undo: Undo,
    ) -> "WireguardHalf":
        stands = None
        if known is None or seat in ((end.namespace, end.name) for _, end in known.sides):
            stands = await self.kernel.standing_wireguard(
                span.connection, span.side, seat, leg=span.leg, hop=span.hop, fds=ways
            )
        if stands:
            self.ports.keep(span.wire, stands.port)
            key, port, engine = stands.key, stands.port, stands.engine
        elif self._engine.name:
            # A device made anew gets a new key: under the old one the far end would go on with
            # a session that is gone, and refuse a new one for as long as our clock is behind.
            undo.add("give back the tunnel's UDP port", self._give_back, span.wire)
            port = await self.ports.draw(span.wire)
            key, engine = Key.generate(), self._engine.name
        else:
            raise self._none()
        own = wireguard.Own(span.side, key, span.local, port, engine, self.kernel.own)
        return WireguardHalf(self, span, own)

    def gone(self, wire: str) -> None:
        self.ports.give_back(wire)

    async def _give_back(self, wire: str) -> None:
        self.ports.give_back(wire)

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

    async def redraw(self, _: Mechanism, __: TakenError) -> None:
        port = await self._of.ports.draw(self._span.wire, above=self._own.port)
        self._own = replace(self._own, port=port)

"""Joining a client with an endpoint in the kernel: both here, or half of it over a tunnel.

A wire that stands is changed in this order: in place, as far as the kernel can (`nsm.kernel`
compares and sets only what differs); to another endpoint by make before break, the new wire
whole and proven before the old one loses a packet; else by making it anew under the same number.
"""

import time
from collections.abc import Mapping
from dataclasses import replace

from forwarder import crossconnect
from forwarder.asking import Asking
from forwarder.crossing import Near, Target, Ways, ways
from forwarder.mechanisms import ends
from forwarder.probe import Probe
from forwarder.recovery import Recovery
from forwarder.remote import Half, Remote, Seat, Span
from forwarder.tunnels import Tunnels, node_of
from nsm import mechanisms, path
from nsm.caller import Caller
from nsm.descriptors import INODE_URL, Descriptors
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel.netlink import PortTakenError, VniTakenError
from nsm.kernel.node import Kernel
from nsm.kernel.state import (
    Interface,
    IPAddress,
    LocalWire,
    Namespace,
    RemoteWire,
    Wire,
    WireguardTunnel,
)
from nsm.kernel.swap import beside
from nsm.model import Connection, Context, Mechanism
from nsm.undo import Undo

ROUNDS = 3  # of agreeing on a tunnel whose network identifier or port is free on both nodes
HANDSHAKE = (1.0, 5.0)  # seconds, at least and at most, for the far end to prove its key
TAKEN = (VniTakenError, PortTakenError)


class Joining:
    """Makes wires of what is agreed on, and agrees on tunnels."""

    def __init__(
        self,
        kernel: Kernel,
        asking: Asking,
        tunnels: Tunnels,
        remotes: Mapping[str, Remote],
        recovery: Recovery,
        probe: Probe,
    ) -> None:
        """remotes are the mechanisms between nodes, by type."""
        self._kernel = kernel
        self._asking = asking
        self._tunnels = tunnels
        self._remotes = remotes
        self._carrying = {one.payload: one for one in remotes.values()}
        self._recovery = recovery
        self._probe = probe

    async def namespace(self, url: str, fds: Descriptors, whose: str) -> Namespace:
        """The namespace that a mechanism names, which came as a descriptor."""
        fd = fds.get(url)
        if fd is None:
            raise InvalidError(
                f"{whose} names its network namespace by {url[:100]!r}, which did not come"
                " as a descriptor",
                hint="connect to the manager over its unix socket and send the descriptor",
            )
        return await self._kernel.namespace(fd=fd, name=whose)

    async def here(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        namespace: Namespace,
        caller: Caller,
        fds: Descriptors,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> tuple[Connection, Wire]:
        """Both on this node: a veth pair straight from one namespace to the other."""
        made = await self._asking.ask(target, conn, (_any_interface(),), caller, far_fds, attempt)
        outgoing = _agreed(made, mechanisms.KERNEL, target)
        url = outgoing.get(INODE_URL)
        far = await self.namespace(url, far_fds, f"endpoint {target.endpoint}")
        src_mac, dst_mac = crossconnect.macs(made)
        wire = LocalWire(
            made.id,
            crossconnect.client_side(made, near.mechanism, namespace, dst_mac),
            crossconnect.endpoint_side(made, outgoing, far, src_mac),
            target.leg,
        )
        entries = {far: far_fds.get(url), namespace: fds.get(near.mechanism.get(INODE_URL))}
        kernel = await self._stand(wire, target, entries, attempt)
        made = (await self._probed(wire, target, made, entries, caller))[0]
        kernel += await self._take_place(wire, target, entries, attempt)
        return path.took(made, kernel_ms=kernel), wire

    async def to_far(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        namespace: Namespace,
        caller: Caller,
        fds: Descriptors,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> tuple[Connection, Wire]:
        """The client here, the endpoint on another node: our half of the tunnel."""
        remote = self._carrying.get(target.payload)
        if remote is None:
            raise UnsupportedError(
                f"service {conn.service!r} carries {target.payload[:64]!r}, and endpoint"
                f" {target.endpoint} is on another node: only {' and '.join(self._carrying)} go"
                " between nodes",
                hint=f"register the service with payload {' or '.join(self._carrying)}",
            )
        node = await node_of(target.url)
        local, mtu = await remote.local(conn.id, node)
        door = fds.get(near.mechanism.get(INODE_URL))
        entries = {namespace: door}
        standing = self._standing_hop(conn.id, remote, target, namespace)
        hop = await self._tunnels.hop(namespace, door, standing)
        seat = namespace, near.mechanism.get(mechanisms.NAME)
        span = Span(conn.id, "src", local, node, mtu, hop, target.leg)
        half = await remote.half(span, None, seat, _wire(target), ways(entries), attempt)
        for turn in range(ROUNDS):
            made = await self._asking.ask(target, conn, (half.offer(),), caller, far_fds, attempt)
            agreed = _agreed(made, remote.type, target)
            made = _lowered(made, mechanisms.number(agreed.get(mechanisms.MTU)), mtu)
            less = await self._less(remote, made, agreed, node)
            if less:  # than the far end was told
                conn = _lowered(conn, less)
                told = replace(conn, path=made.path)  # of the same way, or there would be two
                told_already = replace(target, stands=True)
                made = await self._asking.ask(
                    told_already, told, (half.offer(),), caller, far_fds, attempt
                )
                agreed, made = _agreed(made, remote.type, target), _lowered(made, less)
            side = crossconnect.client_side(made, near.mechanism, namespace, "")
            wire = RemoteWire(made.id, "src", side, half.tunnel(agreed), hop, target.leg)
            try:
                kernel = await self._stand(wire, target, entries, attempt)
                break
            except TAKEN as taken:
                # Upstream keeps identifiers apart only at the responder: two of them may
                # give us the same. So we say which one, or which port, is free here.
                if turn == ROUNDS - 1:
                    raise
                await self._asking.close(target.url, made, target.leg)
                await half.redraw(agreed, taken)
                target = replace(target, known=None, stands=False)
        proven = await self._proven(wire, target, entries, caller)
        made, passes = await self._probed(wire, target, made, entries, caller)
        if passes:  # packets of the agreed size do not, and the far end has to know
            made = await self._ask_less(target, made, half, passes, caller, far_fds, attempt)
            agreed = _agreed(made, remote.type, target)
            side = crossconnect.client_side(made, near.mechanism, namespace, "")
            wire = replace(wire, end=side, tunnel=half.tunnel(agreed))
            kernel += await self._stand(wire, target, entries, attempt)
        kernel += await self._take_place(wire, target, entries, attempt)
        return path.took(made, kernel_ms=kernel, **proven), wire

    async def _ask_less(
        self,
        target: Target,
        made: Connection,
        half: Half,
        mtu: int,
        caller: Caller,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> Connection:
        """Tell the far end of a wire that was just agreed on that packets have to be smaller."""
        target = replace(target, stands=True)  # what takes it back is added already
        offer = half.offer().with_(**{mechanisms.MTU: str(mtu)})
        return _lowered(
            await self._asking.ask(target, _lowered(made, mtu), (offer,), caller, far_fds, attempt),
            mtu,
        )

    async def _probed(
        self, wire: Wire, target: Target, made: Connection, entries: Ways, caller: Caller
    ) -> tuple[Connection, int]:
        """The connection with the probe's verdict, and the MTU it needs if that is another.

        Nothing of what stood before is probed, or refreshes would cost what first requests do.
        """
        if target.stands:
            return made, 0
        stands = beside(wire) if target.old else wire
        proof = await self._probe.judge(stands, made, ways(entries), caller)
        if proof is None:
            return made, 0
        return path.noted(made, **{path.PROBE: proof.verdict}), proof.mtu

    async def _less(
        self, remote: Remote, made: Connection, agreed: Mechanism, met: IPAddress
    ) -> int:
        """The MTU towards the far end, if it is lower than the wire's; 0 if not.

        Its tunnels may be elsewhere than who was asked: behind another cluster's proxy.
        """
        far = ends.address(agreed, mechanisms.DST_IP)
        if far == met:
            return 0
        _, mtu = await remote.local(made.id, far)
        return mtu if made.context and mtu < made.context.mtu else 0

    async def from_far(
        self,
        target: Target,
        conn: Connection,
        near: Near,
        caller: Caller,
        far_fds: Descriptors,
        attempt: Undo,
    ) -> tuple[Near, Connection, Wire]:
        """The endpoint here, the client on another node: our half of the tunnel."""
        asked, remote = near.mechanism, self._remotes[near.mechanism.type]
        node = remote.asker(asked)
        local, mtu = await remote.local(conn.id, node)
        ends.same_family(remote.type, local, node)
        lowest = mechanisms.lowest_mtu(mechanisms.number(asked.get(mechanisms.MTU)), mtu)
        made = await self._asking.ask(
            target, _lowered(conn, lowest), (_any_interface(),), caller, far_fds, attempt
        )
        made = _lowered(made, lowest)
        outgoing = _agreed(made, mechanisms.KERNEL, target)
        url = outgoing.get(INODE_URL)
        far = await self.namespace(url, far_fds, f"endpoint {target.endpoint}")
        side = crossconnect.endpoint_side(made, outgoing, far, "")
        door = far_fds.get(url)
        standing = self._standing_hop(conn.id, remote, target, far)
        hop = await self._tunnels.hop(far, door, standing)
        span = Span(conn.id, "dst", local, node, mtu, hop, target.leg)
        seat, entries = (far, side.name), {far: door}
        half = await remote.half(span, asked, seat, _wire(target), ways(entries), attempt)
        for turn in range(ROUNDS):
            agreed = half.answer(asked)
            wire = RemoteWire(made.id, "dst", side, half.tunnel(agreed), hop, target.leg)
            try:
                kernel = await self._stand(wire, target, entries, attempt)
                break
            except TAKEN as taken:
                if turn == ROUNDS - 1:
                    raise
                await half.redraw(agreed, taken)
        return Near(agreed, None), path.took(made, kernel_ms=kernel), wire

    async def _proven(
        self, wire: RemoteWire, target: Target, entries: Ways, caller: Caller
    ) -> dict[str, float]:
        """Wait until the far end has proven its key: who asked begins, and only who asked.

        If both began, each would drop the other's answer (seconds). A VXLAN proves nothing.
        """
        if not isinstance(wire.tunnel, WireguardTunnel):
            return {}
        least, most = HANDSHAKE
        left = caller.left()
        patience = most if left is None else max(least, min(most, left / 4))
        stands = beside(wire) if target.old else wire
        assert isinstance(stands, RemoteWire)
        took = await self._kernel.handshake(stands, patience, fds=ways(entries))
        return {path.HANDSHAKE: took}

    def _standing_hop(
        self, id_: str, remote: Remote, target: Target, where: Namespace
    ) -> bool | None:
        """Whether this connection's tunnel stands apart, be it from before a restart.

        None if it does not stand, or could stand otherwise tomorrow: a wireguard-go's device is
        in the workload either way, and what comes after it may be the kernel's.
        """
        known = target.known
        if target.old:
            return None
        if known is None or known.wire is None:
            return self._recovery.hop(id_, where, encrypted=remote.type == mechanisms.WIREGUARD)
        wire = known.wire
        if not isinstance(wire, RemoteWire) or wire.end.namespace != where:
            return None
        if isinstance(wire.tunnel, WireguardTunnel) and wire.tunnel.engine == "userspace":
            return None
        return wire.hop

    async def _stand(self, wire: Wire, target: Target, entries: Ways, attempt: Undo) -> float:
        """Make the wire stand, beside the one whose place it is to take if there is one; how
        many seconds the kernel and the way to it took."""
        known = target.known.wire if target.known else None
        if known and not _in_place(known, wire):
            await self._kernel.remove(wire.connection)  # it moved: nothing may stay where it was
        began = time.monotonic()
        stands = beside(wire) if target.old else wire
        await self._kernel.ensure(stands, attempt, fds=ways(entries))
        return time.monotonic() - began

    async def _take_place(self, wire: Wire, target: Target, entries: Ways, attempt: Undo) -> float:
        """Have the wire, which is proven, carry the packets from now on; seconds, as above."""
        if target.old is None:
            return 0.0
        began = time.monotonic()
        await self._kernel.replace(target.old.leg, wire, attempt, fds=ways(entries))
        return time.monotonic() - began


def _wire(target: Target) -> Wire | None:
    return target.known.wire if target.known else None


def _any_interface() -> Mechanism:
    """What we can do with an endpoint of this node: it names its interface and namespace."""
    return Mechanism(mechanisms.LOCAL, mechanisms.KERNEL)


def _agreed(made: Connection, type_: str, target: Target) -> Mechanism:
    if made.mechanism is None or made.mechanism.type != type_:
        got = made.mechanism.type if made.mechanism else "none"
        raise UnsupportedError(
            f"endpoint {target.endpoint} at {target.url} answered with mechanism {got}"
            f" when {type_} was asked for"
        )
    return made.mechanism


def _lowered(conn: Connection, *mtus: int) -> Connection:
    context = conn.context or Context()
    return replace(conn, context=replace(context, mtu=mechanisms.lowest_mtu(context.mtu, *mtus)))


def _in_place(old: Wire, new: Wire) -> bool:
    """Whether the kernel gets from old to new by itself, so that the client's device keeps its
    number; else old has devices where nobody would look for them."""
    if _seats(old) == _seats(new):
        return True
    if isinstance(old, RemoteWire) and (old.apart or old.side != "src"):
        return False
    return _seats(old)[0] == _seats(new)[0]


def _seats(wire: Wire) -> list[Seat]:
    def seat(interface: Interface) -> Seat:
        return interface.namespace, interface.name

    return [seat(interface) for _, interface in wire.sides]

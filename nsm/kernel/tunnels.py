"""WireGuard devices by either engine: read, told, made. Blocks: call it in threads.

The kernel makes its own where a wire wants it, from the underlay. wireguard-go makes a TUN
where it runs; told everything there, because a port that is taken is known then, it is moved
to where the wire wants it.
"""

import errno
import uuid
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal

from nsm import holders
from nsm.errors import (
    InternalError,
    InvalidError,
    NsmError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from nsm.kernel import messages, owner, wireguard_netlink
from nsm.kernel.keys import Key
from nsm.kernel.namespaces import in_new
from nsm.kernel.netlink import NameTakenError, PortTakenError, Refusal, Socket, explain
from nsm.kernel.reach import Reach
from nsm.kernel.state import (
    End,
    EngineName,
    Namespace,
    RemoteWire,
    Vxlan,
    Wireguard,
    WireguardTunnel,
    endpoint,
)
from nsm.kernel.wireguard import Change, PeerChange, Settings, difference
from nsm.kernel.wireguard_go import PROGRAM, Processes, find_program

_UNSEEN = "a tunnel of the kernel, or a process that is not seen from here"
KINDS: dict[str, EngineName] = {"wireguard": "kernel", "tun": "userspace"}
"""Engines by what the kernel calls their devices."""

Greeting = Literal["", "once", "anew"]
_KICK = 25  # seconds of keepalive: that one is set is what sends a first packet


@dataclass(frozen=True, slots=True)
class Engine:
    """Who makes WireGuard devices on this node, "" is nobody; and how that was found out."""

    name: EngineName | Literal[""]
    why: str


@dataclass(frozen=True, slots=True)
class StandingWireguard:
    """What a tunnel has that stands, read back from it: a refresh and a restart keep that."""

    key: Key = field(repr=False)
    port: int
    engine: EngineName


class IndexTakenError(Exception):
    """The index we drew for a new device is somebody's: draw again."""


def settings(reach: Reach, end: End, engine: EngineName) -> Settings | None:
    """What a tunnel of ours holds; None if nobody is behind it any more."""
    if engine == "userspace":
        mark = owner.Mark.parse(end.alias)
        assert mark is not None
        return reach.processes.settings(owner.tunnel_name(mark.wire, mark.side))
    index = reach.index_of(end.namespace, end.name)
    try:
        return wireguard_netlink.settings(reach.generic(end.namespace), index)
    except Refusal as refusal:
        raise explain(refusal, f"wg show {end.name}", end.namespace) from refusal


def change(reach: Reach, item: Wireguard, wanted: Change) -> None:
    """Tell a tunnel that; what is the same is not told, and nothing is told nobody."""
    if not wanted:
        return
    try:
        if item.engine == "userspace":
            reach.processes.change(item.called, wanted)
            return
        index = reach.index_of(item.end.namespace, item.end.name)
        wireguard_netlink.change(reach.generic(item.end.namespace), index, wanted)
    except PortTakenError:
        raise port_taken(reach, item) from None
    except Refusal as refusal:
        if refusal.errno == errno.EADDRINUSE:
            raise port_taken(reach, item) from refusal
        command = "; ".join(wanted.commands(item.called))
        raise explain(refusal, command, item.end.namespace) from refusal


def port_taken(reach: Reach, item: Vxlan | Wireguard) -> PortTakenError:
    """Who has the port the tunnel was to have, as far as it can be told."""
    with reach.inside(item.underlay):
        found = holders.of_port("udp", item.port)
    holder = "somebody who just left"
    if found:
        process = found[0].process
        holder = f"{process.name} (pid {process.pid})" if process else _UNSEEN
    hint = "the next one will do; NSM_WIREGUARD_PORT says which is the first of a node's"
    if isinstance(item, Vxlan):
        hint = "stop it, or set NSM_VXLAN_PORT, the same on every node"
    return PortTakenError(
        f"UDP port {item.port} in {item.underlay} is held by {holder}",
        hint=hint,
    )


def run(reach: Reach, item: Wireguard, index: int) -> None:
    """Have wireguard-go make the tunnel, tell it everything, move its device into the workload.

    There it is down, under its name and that index. Raises NsmError; who called tidies up.
    """
    mark = owner.Mark.parse(item.end.alias)
    assert mark is not None
    name = reach.processes.start(mark, reach.inside(item.underlay))
    found = reach.device(item.underlay, name=name)
    if found is None:
        raise InternalError(f"wireguard-go made no device {name} in {item.underlay}")
    seen = found.end(item.underlay)
    marked = replace(seen, mtu=item.end.mtu, group=item.end.group, alias=item.end.alias)
    _do(reach, item.underlay, messages.set_link(found.index, seen, marked), f"ip link set {name}")
    change(reach, item, difference(item))
    reach.processes.settled(name, item.end.mtu)
    where = item.end.namespace
    move = messages.move_link(found.index, reach.fd(where), item.end.name, index)
    command = f"ip link set {name} netns {where} name {item.end.name}"
    _do(reach, item.underlay, move, command)


def _do(reach: Reach, where: Namespace, message: bytearray | None, command: str) -> None:
    if message is None:
        return
    (refusal,) = reach.socket(where).do([message])
    if refusal and refusal.errno == errno.EBUSY:
        raise IndexTakenError
    if refusal and refusal.errno == errno.EEXIST:
        raise NameTakenError(
            f"`{command}`: there is an interface of that name already",
            hint="choose another name in the NSURL, or remove that interface",
        )
    if refusal:
        raise explain(refusal, command, where)


# --- handshakes ------------------------------------------------------------------------------


def greet(reach: Reach, wire: RemoteWire, how: Greeting) -> bool:
    """Whether wire's far end has answered a handshake; if not, begin one that way.

    once has WireGuard send, unless it did within 5 s. anew sets the far end anew, because
    what was sent may be lost, and WireGuard says the next word after 5 s only.
    """
    tunnel, item = _of(wire)
    settings_ = settings(reach, item.end, item.engine)
    if settings_ is None:
        raise UnavailableError(f"{PROGRAM} of wire {wire.connection} has ended")
    peer = settings_.peer(tunnel.peer)
    if peer is None:
        raise PreconditionError(f"wire {wire.connection} has no far end {tunnel.peer} to greet")
    if peer.handshake:
        return True
    kick = tunnel.keepalive or _KICK
    if how == "once":
        silent = PeerChange(tunnel.peer, keepalive=0)
        change(reach, item, Change(peers=(silent, replace(silent, keepalive=kick))))
    elif how == "anew":
        gone = PeerChange(tunnel.peer, remove=True)
        again = PeerChange(tunnel.peer, new=True, endpoint=item.far, keepalive=kick)
        change(reach, item, Change(peers=(gone, again)))
    return False


def quiet(reach: Reach, wire: RemoteWire) -> None:
    """After greetings: as much keepalive as the wire is to have, and no more."""
    tunnel, item = _of(wire)
    if not tunnel.keepalive:
        change(reach, item, Change(peers=(PeerChange(tunnel.peer, keepalive=0),)))


def unanswered(wire: RemoteWire, said: int, patience: float) -> UnavailableError:
    """Whom nobody answered, and what to look at."""
    tunnel, _ = _of(wire)
    return UnavailableError(
        f"wire {wire.connection}: nobody at {tunnel.remote} answered {said} WireGuard handshakes to"
        f" UDP port {tunnel.remote_port} within {patience:.1f} s",
        hint="is that port open between the two nodes, and this node's answers' way back?"
        " `wg show` there says whether it heard of us",
    )


def _of(wire: RemoteWire) -> tuple[WireguardTunnel, Wireguard]:
    tunnel = wire.tunnel
    if not isinstance(tunnel, WireguardTunnel):
        raise InvalidError(f"wire {wire.connection} has no WireGuard tunnel")
    mark = owner.mark(wire.connection, wire.side, leg=wire.leg)
    where, name = wire.below if wire.apart else (wire.end.namespace, wire.end.name)
    end = End(where, name, "", wire.end.mtu, 0, str(mark))
    far = endpoint(tunnel.remote, tunnel.remote_port)
    return tunnel, Wireguard(
        end, tunnel.engine, tunnel.underlay, tunnel.key, tunnel.port, tunnel.peer, far
    )


# --- which engine ----------------------------------------------------------------------------


def find_engine(
    prefer: Literal["auto", "kernel", "userspace"], group: int, processes: Processes
) -> Engine:
    """Who makes WireGuard devices here, found out by having one made where nobody sees it."""
    refused: list[str] = []
    if prefer != "userspace":
        try:
            in_new(lambda: _try_kernel(group))
            wireguard_netlink.load()
            return Engine("kernel", "the kernel made a WireGuard device")
        except NsmError as reason:
            refused.append(str(reason))
    if prefer != "kernel":
        try:
            in_new(lambda: _try_userspace(processes))
            return Engine("userspace", "; ".join([*refused, f"{find_program()} made one"]))
        except NsmError as reason:
            refused.append(str(reason))
    return Engine("", "; ".join(refused))


def _try_kernel(group: int) -> None:
    end = End(Namespace(0, -1), "nsm-trial", "", 1420, group, "")
    with Socket.here() as sock:
        (refusal,) = sock.do([messages.create_wireguard(end, messages.fresh_index())])
        if refusal and refusal.errno == errno.EOPNOTSUPP:
            raise UnsupportedError("the kernel has no WireGuard", hint="modprobe wireguard")
        if refusal:
            raise explain(refusal, "ip link add type wireguard", "a namespace made for it")


def _try_userspace(processes: Processes) -> None:
    mark = owner.Mark(f"trial {uuid.uuid4()}", "src")
    processes.stop(processes.start(mark, nullcontext()))

"""WireGuard between two nodes: what each side says, and what tunnel that means. Pure.

Each side says its address, its UDP port and its public key (`wire.md` §2.2); the responder
lowers the MTU to the smaller of both. Ports may differ: each device has one of its own.
"""

from dataclasses import dataclass

from forwarder.mechanisms import ends
from nsm import mechanisms
from nsm.errors import InvalidError
from nsm.kernel import owner
from nsm.kernel.keys import Key, check_public
from nsm.kernel.state import EngineName, IPAddress, Namespace, WireguardTunnel
from nsm.model import Mechanism

KEEPALIVE = 25
"""Seconds after which a requester that has nothing to send says so: often enough for the
NATs and firewalls on the way, and the session is renewed before anybody has to wait for it."""

_KEYS = {  # by whose side of the wire it is: address, port and public key
    "src": (mechanisms.SRC_IP, mechanisms.SRC_PORT, mechanisms.SRC_PUBLIC_KEY),
    "dst": (mechanisms.DST_IP, mechanisms.DST_PORT, mechanisms.DST_PUBLIC_KEY),
}


@dataclass(frozen=True, slots=True)
class Own:
    """One side of a tunnel: ours, whether we ask (src) or answer (dst)."""

    side: owner.SideName
    key: Key
    local: IPAddress
    port: int
    engine: EngineName
    underlay: Namespace

    def says(self) -> dict[str, str]:
        """What the other node is told of it."""
        values = (str(self.local), str(self.port), self.key.public)
        return dict(zip(_KEYS[self.side], values, strict=True))


def offer(own: Own, mtu: int) -> Mechanism:
    """What a requester says."""
    told = {**own.says(), mechanisms.MTU: str(mtu)}
    return Mechanism(mechanisms.REMOTE, mechanisms.WIREGUARD, told)


def answer(asked: Mechanism, own: Own, mtu: int) -> Mechanism:
    """What a responder says to what was asked."""
    lowest = mechanisms.lowest_mtu(mechanisms.number(asked.get(mechanisms.MTU)), mtu)
    return asked.with_(**own.says(), **{mechanisms.MTU: str(lowest)})


def tunnel(agreed: Mechanism, own: Own) -> WireguardTunnel:
    """Our half of what was agreed. Raises InvalidError or UnsupportedError on what cannot be."""
    remote, remote_port, peer = _far(agreed, "dst" if own.side == "src" else "src")
    ends.same_family(mechanisms.WIREGUARD, own.local, remote)
    if peer == own.key.public:
        raise InvalidError(
            "WIREGUARD: the other node says this node's own public key",
            hint="it should answer with a key of its own; see its forwarder's log",
        )
    return WireguardTunnel(
        key=own.key,
        peer=peer,
        local=own.local,
        remote=remote,
        remote_port=remote_port,
        underlay=own.underlay,
        port=own.port,
        engine=own.engine,
        keepalive=KEEPALIVE if own.side == "src" else 0,
    )


def asker(asked: Mechanism) -> IPAddress:
    """Whose tunnel it is to be, once all that was said of that side is well-formed."""
    return _far(asked, "src")[0]


def _far(mechanism: Mechanism, side: owner.SideName) -> tuple[IPAddress, int, str]:
    """The other side's address, port and public key."""
    ip, port, key = _KEYS[side]
    peer = check_public(mechanism.get(key), f"WIREGUARD: {key}")
    return ends.address(mechanism, ip), ends.port(mechanism, port), peer

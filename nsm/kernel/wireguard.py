"""What a WireGuard device holds, and how it gets from one state to another. Pure.

The same for both engines: the kernel is told by generic netlink (`wireguard_netlink`),
a wireguard-go process over its socket (`wireguard_go`). Only differences are told, because
a far end that is set anew, be it with the same content, loses its session, and packets for
up to 15 s. A new one comes before the old one goes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from nsm.kernel.keys import Key
from nsm.kernel.state import End, EngineName, Namespace, Wireguard

EVERYTHING = ("0.0.0.0/0", "::/0")
"""What a wire's far end may send and be sent: what the wire carries is the workload's matter."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A far end, as a device has it.

    handshake is when the last one succeeded, in seconds since 1970, 0 for never. open says
    that all addresses are its.
    """

    public: str
    endpoint: str
    keepalive: int
    handshake: int
    open: bool


@dataclass(frozen=True, slots=True)
class Settings:
    """What a device has now; key is None and port 0 where nobody gave it one."""

    key: Key | None = field(repr=False)
    port: int
    peers: tuple[Peer, ...]

    def peer(self, public: str) -> Peer | None:
        """The far end of that key."""
        return next((peer for peer in self.peers if peer.public == public), None)


@dataclass(frozen=True, slots=True)
class PeerChange:
    """What happens to one far end: it goes, it comes (with all addresses), or parts of it change.

    An empty endpoint, a keepalive of None: stay as they are.
    """

    public: str
    remove: bool = False
    new: bool = False
    endpoint: str = ""
    keepalive: int | None = None

    def __str__(self) -> str:
        words = [f"peer {self.public}"]
        if self.remove:
            words.append("remove")
        if self.endpoint:
            words.append(f"endpoint {self.endpoint}")
        if self.keepalive is not None:
            words.append(f"persistent-keepalive {self.keepalive}")
        if self.new:
            words.append(f"allowed-ips {','.join(EVERYTHING)}")
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class Change:
    """What a device is told, in this order. None, 0: stays as it is."""

    key: Key | None = field(default=None, repr=False)
    port: int = 0
    peers: tuple[PeerChange, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.key or self.port or self.peers)

    def commands(self, name: str) -> Iterator[str]:
        """What one would type; the key is not shown."""
        words = [
            *(["private-key …"] if self.key else []),
            *([f"listen-port {self.port}"] if self.port else []),
            *(str(peer) for peer in self.peers),
        ]
        if words:
            yield f"wg set {name} {' '.join(words)}"


def difference(new: Wireguard, old: Wireguard | None = None) -> Change:
    """What turns old into new; without old, what a fresh device is told."""
    port = new.port if not old or new.port != old.port else 0
    peers: list[PeerChange] = []
    if old is None or old.peer != new.peer:
        if new.peer:
            peers.append(PeerChange(new.peer, new=True, endpoint=new.far, keepalive=new.keepalive))
        if old and old.peer:
            peers.append(PeerChange(old.peer, remove=True))
    elif new.peer:
        moved = new.far if new.far != old.far else ""
        keepalive = new.keepalive if new.keepalive != old.keepalive else None
        if port and new.keepalive:
            # it is sent at once where there was none: from the new port, so that the far end,
            # which has heard the old one since it was told of this, follows now
            peers.append(PeerChange(new.peer, keepalive=0))
            keepalive = new.keepalive
        if moved or keepalive is not None:
            peers.append(PeerChange(new.peer, endpoint=moved, keepalive=keepalive))
    if old:
        gone = [one for one in old.strangers if one not in (new.peer, *new.strangers)]
        peers += [PeerChange(one, remove=True) for one in gone]
    key = new.key if not old or new.key != old.key else None
    return Change(key, port, tuple(peers))


def found(
    end: End, engine: EngineName, underlay: Namespace, settings: Settings, wanted: str, far: str
) -> Wireguard:
    """The device with these settings, as one looks at it who wants the far end of that key.

    far is where its far end said it is. A far end that lacks addresses or an endpoint counts
    as none, and is then told all of it.
    """
    peer = settings.peer(wanted) or next(iter(settings.peers), None)
    whole = peer is not None and peer.open and peer.endpoint != ""
    known = (peer.public,) if peer and (whole or peer.public == wanted) else ()
    strangers = tuple(one.public for one in settings.peers if one.public not in known)
    if peer is None or not whole:
        return Wireguard(end, engine, underlay, settings.key, settings.port, "", "", 0, strangers)
    return Wireguard(
        end,
        engine,
        underlay,
        settings.key,
        settings.port,
        peer.public,
        far,
        peer.keepalive,
        strangers,
    )

"""VXLAN between two nodes: what each side says, and what tunnel that means (`wire.md` §2.2). Pure.

The requester offers its address, port and what fits through; the responder adds
its own, picks the network identifier (VNI), and lowers the MTU to the smaller of
both. One kernel device has one port for both directions, so both sides must use
the same: a requester that says so takes whatever port the responder names.
"""

from forwarder.mechanisms import ends
from nsm import mechanisms
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel import owner
from nsm.kernel.state import IPAddress, Namespace, VxlanTunnel
from nsm.model import Mechanism

_KEYS = {  # by our side of the wire: our address, theirs, their port
    "src": (mechanisms.SRC_IP, mechanisms.DST_IP, mechanisms.DST_PORT),
    "dst": (mechanisms.DST_IP, mechanisms.SRC_IP, mechanisms.SRC_PORT),
}


def offer(
    local: IPAddress, port: int, mtu: int, vni: int = 0, *, any_port: bool = False
) -> Mechanism:
    """What a requester says; vni 0 leaves the choice to the responder, any_port the port's."""
    asked = Mechanism(
        mechanisms.REMOTE,
        mechanisms.VXLAN,
        {
            mechanisms.SRC_IP: str(local),
            mechanisms.SRC_PORT: str(port),
            mechanisms.MTU: str(mtu),
        },
    )
    if any_port:
        asked = asked.with_(**{mechanisms.ANY_PORT: "true"})
    return asked.with_(**{mechanisms.VNI: str(vni)}) if vni else asked


def answer(asked: Mechanism, local: IPAddress, port: int, mtu: int, vni: int) -> Mechanism:
    """What a responder says to what was asked."""
    lowest = mechanisms.lowest_mtu(mechanisms.number(asked.get(mechanisms.MTU)), mtu)
    return asked.with_(
        **{
            mechanisms.DST_IP: str(local),
            mechanisms.DST_PORT: str(port),
            mechanisms.VNI: str(vni),
            mechanisms.MTU: str(lowest),
        }
    )


def port_in(mechanism: Mechanism, key: str) -> int:
    """The UDP port under key; 0 if there is none."""
    return mechanisms.number(mechanism.get(key), limit=1 << 16)


def takes_any_port(asked: Mechanism) -> bool:
    """Whether who asks said that it will use the port we name."""
    return asked.get(mechanisms.ANY_PORT) == "true"


def tunnel(agreed: Mechanism, side: owner.SideName, port: int, underlay: Namespace) -> VxlanTunnel:
    """The half of what was agreed that is ours: the requester's (src) or the responder's (dst)."""
    own, far, far_port = _KEYS[side]
    theirs = port_in(agreed, far_port)
    if theirs not in (0, port) and not (side == "dst" and takes_any_port(agreed)):
        raise UnsupportedError(
            f"VXLAN: the other node uses UDP port {theirs} and this one {port}",
            hint="set NSM_VXLAN_PORT to the same on both",
        )
    vni = mechanisms.vni(agreed)
    if not vni:
        raise InvalidError(f"VXLAN: no network identifier in {agreed.get(mechanisms.VNI)[:20]!r}")
    local, remote = ends.address(agreed, own), ends.address(agreed, far)
    ends.same_family(mechanisms.VXLAN, local, remote)
    return VxlanTunnel(vni, local, remote, underlay, port)

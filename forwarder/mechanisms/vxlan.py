"""VXLAN between two nodes: what each side says, and what tunnel that means (`wire.md` §2.2). Pure.

The requester offers its address, port and what fits through; the responder adds
its own, picks the network identifier (VNI), and lowers the MTU to the smaller of
both. One kernel device has one port for both directions, so both sides must use
the same.
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


def offer(local: IPAddress, port: int, mtu: int, vni: int = 0) -> Mechanism:
    """What a requester says; vni 0 leaves the choice to the responder."""
    asked = Mechanism(
        mechanisms.REMOTE,
        mechanisms.VXLAN,
        {
            mechanisms.SRC_IP: str(local),
            mechanisms.SRC_PORT: str(port),
            mechanisms.MTU: str(mtu),
        },
    )
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


def tunnel(agreed: Mechanism, side: owner.SideName, port: int, underlay: Namespace) -> VxlanTunnel:
    """The half of what was agreed that is ours: the requester's (src) or the responder's (dst)."""
    own, far, far_port = _KEYS[side]
    theirs = mechanisms.number(agreed.get(far_port), limit=1 << 16)
    if theirs not in (0, port):
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

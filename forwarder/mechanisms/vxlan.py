"""VXLAN between two nodes: what each side says, and what tunnel that means (`wire.md` §2.2). Pure.

The requester offers its address, port and what fits through; the responder adds
its own, picks the network identifier (VNI), and lowers the MTU to the smaller of
both. One kernel device has one port for both directions, so both sides must use
the same.
"""

from ipaddress import ip_address

from nsm import mechanisms
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel.state import IPAddress, Namespace, VxlanTunnel
from nsm.model import Mechanism


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


def requesters_tunnel(agreed: Mechanism, port: int, underlay: Namespace) -> VxlanTunnel:
    """The requester's half of what was agreed."""
    return _tunnel(
        agreed, mechanisms.SRC_IP, mechanisms.DST_IP, mechanisms.DST_PORT, port, underlay
    )


def responders_tunnel(agreed: Mechanism, port: int, underlay: Namespace) -> VxlanTunnel:
    """The responder's half of what was agreed."""
    return _tunnel(
        agreed, mechanisms.DST_IP, mechanisms.SRC_IP, mechanisms.SRC_PORT, port, underlay
    )


def address(mechanism: Mechanism, key: str) -> IPAddress:
    """The tunnel address under key; InvalidError, saying whose it is, if it is none."""
    text = mechanism.get(key)
    try:
        found = ip_address(text)
    except ValueError:
        found = None
    if found is None or found.is_unspecified or found.is_multicast:
        raise InvalidError(
            f"VXLAN: {key} is {text[:64]!r}, which is no address a tunnel can end at",
            hint="the other node's forwarder should have NSM_TUNNEL_IP set to that node's address",
        )
    return found


def _tunnel(
    agreed: Mechanism, own: str, far: str, far_port: str, port: int, underlay: Namespace
) -> VxlanTunnel:
    theirs = mechanisms.number(agreed.get(far_port), limit=1 << 16)
    if theirs not in (0, port):
        raise UnsupportedError(
            f"VXLAN: the other node uses UDP port {theirs} and this one {port}",
            hint="set NSM_VXLAN_PORT to the same on both",
        )
    vni = mechanisms.vni(agreed)
    if not vni:
        raise InvalidError(f"VXLAN: no network identifier in {agreed.get(mechanisms.VNI)[:20]!r}")
    return VxlanTunnel(vni, address(agreed, own), address(agreed, far), underlay, port)

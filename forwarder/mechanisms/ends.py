"""Where a tunnel ends, as the other node says it: read once, refused with a sentence. Pure."""

from ipaddress import IPv4Address, ip_address, ip_network

from nsm import mechanisms
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel.state import IPAddress
from nsm.model import Mechanism

_THIS_NETWORK = ip_network("0.0.0.0/8")


def address(mechanism: Mechanism, key: str) -> IPAddress:
    """The tunnel address under key; InvalidError, saying whose it is, if it is none."""
    text = mechanism.get(key)
    try:
        found = ip_address(text)
    except ValueError:
        found = None
    if found is None or not _ends_a_tunnel(found):
        raise InvalidError(
            f"{mechanism.type}: {key} is {text[:64]!r}, which is no address a tunnel can end at",
            hint="the other node's forwarder should have NSM_TUNNEL_IP set to that node's address",
        )
    return found


def port(mechanism: Mechanism, key: str) -> int:
    """The UDP port under key; InvalidError if it is none."""
    found = mechanisms.number(mechanism.get(key), limit=1 << 16)
    if not found:
        raise InvalidError(
            f"{mechanism.type}: {key} is {mechanism.get(key)[:64]!r}, which is no UDP port",
            hint="the other node's forwarder says here where its tunnel listens: 1 to 65535",
        )
    return found


def same_family(type_: str, own: IPAddress, far: IPAddress) -> None:
    """Raises UnsupportedError unless packets can go from the one to the other."""
    if own.version != far.version:
        raise UnsupportedError(
            f"{type_}: this node's tunnels begin at {own} and the other node's end at {far}",
            hint="set NSM_TUNNEL_IP on both nodes to addresses of one family",
        )


def _ends_a_tunnel(found: IPAddress) -> bool:
    """Whether it can be another node's; what means ourselves or nobody, anywhere, cannot."""
    if found.is_unspecified or found.is_multicast or found.is_loopback or found.is_reserved:
        return False
    if isinstance(found, IPv4Address):
        return found not in _THIS_NETWORK
    # because which link is the node's own affair, and nobody else's address can say it
    return not found.is_link_local and found.scope_id is None

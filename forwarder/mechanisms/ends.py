"""Where a tunnel ends, as the other node says it: read once, refused with a sentence. Pure."""

from ipaddress import ip_address

from nsm import mechanisms
from nsm.errors import InvalidError, UnsupportedError
from nsm.kernel.state import IPAddress
from nsm.model import Mechanism


def address(mechanism: Mechanism, key: str) -> IPAddress:
    """The tunnel address under key; InvalidError, saying whose it is, if it is none."""
    text = mechanism.get(key)
    try:
        found = ip_address(text)
    except ValueError:
        found = None
    if found is None or found.is_unspecified or found.is_multicast or _bound_to_a_link(found):
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


def _bound_to_a_link(found: IPAddress) -> bool:
    # because which link is the node's own affair, and nobody else's address can say it
    return found.version == 6 and (found.is_link_local or found.scope_id is not None)

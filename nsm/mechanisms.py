"""Names and parameters of mechanisms, and choosing among what a neighbour offers.

A mechanism is how two neighbours are joined: LOCAL ones share a node, REMOTE
ones are tunnels (`wire.md` §2). Numbers travel as decimal text, and what does
not read as a number reads as 0, as every peer of the protocol has it.
"""

import ipaddress
import secrets
from collections.abc import Callable, Container, Sequence

from nsm.errors import ExhaustedError, InvalidError, UnsupportedError
from nsm.model import Connection, Mechanism

# Classes.
LOCAL = "LOCAL"
REMOTE = "REMOTE"

# Types.
KERNEL = "KERNEL"
MEMIF = "MEMIF"
VFIO = "VFIO"
NOOP = "NOOP"
VXLAN = "VXLAN"
WIREGUARD = "WIREGUARD"
IPSEC = "IPSEC"
VLAN = "VLAN"
SRV6 = "SRV6"

# Payloads: what a wire carries, frames or packets.
ETHERNET = "ETHERNET"
IP = "IP"

# Keys of the parameters.
INODE_URL = "inodeURL"
NAME = "name"
MTU = "MTU"
SRC_IP = "src_ip"
DST_IP = "dst_ip"
SRC_PORT = "src_port"
DST_PORT = "dst_port"
ORIG_SRC_IP = "orig_src_ip"  # before translation at a domain's border
ORIG_DST_IP = "orig_dst_ip"
ANY_PORT = "any_port"  # ours: who asks takes whatever port the answer names as dst_port
VNI = "vni"
KERNEL_VLAN = "vlan"
SUPPORTS_VLAN = "supportsVlan"
VLAN_ID = "vlan-id"
SRC_PUBLIC_KEY = "src_public_key"
DST_PUBLIC_KEY = "dst_public_key"
ROUTE_LOCAL_NET = "routeLocalNet"
NAT_TEMPLATE = "IPTables4NatTemplate"
PCI_ADDRESS = "pciAddress"
TOKEN_ID = "tokenID"  # noqa: S105 - the name of a device's token, no secret

DEFAULT_PORTS = {VXLAN: 4789, WIREGUARD: 51820, IPSEC: 4500}
JUMBO_MTU = 9000  # where an MTU starts before anybody lowered it
OVERHEAD = {  # bytes a tunnel adds to a packet, over IPv4 and over IPv6 (`wire.md` §10.7)
    VXLAN: {4: 54, 6: 74},
    WIREGUARD: {4: 60, 6: 80},
    IPSEC: {4: 81, 6: 101},
}

LONGEST_NAME = 15  # bytes: the kernel's IFNAMSIZ less its closing zero
KEPT_OF_SERVICE = 10  # bytes of a service's name in a generated interface name
ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
VNI_LIMIT = 1 << 24
VNI_DRAWS = 64


def number(text: str, *, limit: int = 1 << 32) -> int:
    """Read a decimal parameter; 0 for what is no number from 0 to below limit."""
    if not (text.isascii() and text.isdecimal()) or len(text) > len(str(limit)):
        return 0
    value = int(text)
    return value if value < limit else 0


# --- choosing -----------------------------------------------------------------


def acceptable(
    conn: Connection, preferences: Sequence[Mechanism], supported: Container[str]
) -> tuple[Mechanism, ...]:
    """What this side may answer with, best first (`wire.md` §2.3).

    A mechanism already agreed on is kept, else the caller's preferences count in
    their order. Only types are compared: a peer may leave the class empty.
    Raises UnsupportedError if nothing is left; its opening words are upstream's.
    """
    if conn.mechanism is not None and conn.mechanism.type:
        if conn.mechanism.type in supported:
            return (conn.mechanism,)
        raise UnsupportedError(
            f"unsupported mechanism {conn.mechanism.type!r} of connection {conn.id}"
            f" to {conn.service!r}",
            hint=f"ask for {_either(supported)}",
        )
    found = tuple(one for one in preferences if one.type in supported)
    if not found:
        asked = ", ".join(one.type or "(empty)" for one in preferences[:16]) or "none"
        raise UnsupportedError(
            f"cannot support any of the requested mechanism: {asked}, for connection {conn.id}"
            f" to {conn.service!r}",
            hint=f"ask for {_either(supported)}",
        )
    return found


def _either(supported: Container[str]) -> str:
    known = (KERNEL, MEMIF, VFIO, NOOP, VXLAN, WIREGUARD, IPSEC, VLAN, SRV6)
    return " or ".join(name for name in known if name in supported) or "nothing: none is served"


def reachable(url: str, preferences: Sequence[Mechanism]) -> tuple[Mechanism, ...]:
    """Those of preferences that can join us to a next hop at url: LOCAL ones on the same node.

    A socket of this node has the scheme unix or inode; all else is another node.
    """
    scheme = url.partition(":")[0].lower()
    cls = LOCAL if scheme in ("unix", "inode") else REMOTE
    return tuple(one for one in preferences if one.cls == cls)


def prioritised(preferences: Sequence[Mechanism], priority: Sequence[str]) -> tuple[Mechanism, ...]:
    """Preferences with the types of priority moved to the front, in its order, in any case."""
    ranks = {name.strip().upper(): rank for rank, name in reversed(list(enumerate(priority)))}
    return tuple(sorted(preferences, key=lambda one: ranks.get(one.type.upper(), len(priority))))


# --- VXLAN network identifiers ------------------------------------------------


def vni_parity(mechanism: Mechanism) -> int:
    """0 if the mechanism's identifier must be even, 1 if odd (`wire.md` §2.2).

    Even where src <= dst, so that two nodes that tunnel to each other both ways
    never draw the same. An `orig_*` that is present and empty, as a proxy writes
    it, counts as an unreadable address: it sorts before every other.
    """
    src, dst = (
        _sixteen(mechanism.get(orig if orig in mechanism.parameters else plain))
        for orig, plain in ((ORIG_SRC_IP, SRC_IP), (ORIG_DST_IP, DST_IP))
    )
    return 0 if src <= dst else 1


def _sixteen(text: str) -> bytes:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return b""
    if isinstance(address, ipaddress.IPv4Address):
        return b"\0" * 10 + b"\xff\xff" + address.packed
    return b"" if address.scope_id else address.packed


def vni(mechanism: Mechanism) -> int:
    """The mechanism's identifier, 1 to 2**24-1; 0 if it has none."""
    return number(mechanism.get(VNI), limit=VNI_LIMIT)


def draw_vni(
    mechanism: Mechanism,
    taken: Container[int],
    *,
    below: Callable[[int], int] = secrets.randbelow,
) -> int:
    """Draw an identifier of the right parity that is not taken.

    taken is what the kernel and this process know to be in use between the same
    addresses. Raises ExhaustedError after VNI_DRAWS clashes in a row, which
    means that next to all eight million are taken.
    """
    parity = vni_parity(mechanism)
    for _ in range(VNI_DRAWS):
        drawn = 2 * below(VNI_LIMIT // 2) + parity
        if drawn and drawn not in taken:
            return drawn
    raise ExhaustedError(
        f"no free {('even', 'odd')[parity]} VXLAN network identifier from"
        f" {mechanism.get(SRC_IP) or '(no address)'} to {mechanism.get(DST_IP) or '(no address)'}"
        f" after {VNI_DRAWS} draws",
        hint="close wires between these two nodes",
    )


# --- MTU ----------------------------------------------------------------------


def overhead(type_: str, tunnel_ip: str) -> int:
    """Bytes a tunnel of this type adds between nodes that use tunnel_ip's family; 0 for none."""
    by_family = OVERHEAD.get(type_)
    if by_family is None:
        return 0
    try:
        return by_family[ipaddress.ip_address(tunnel_ip).version]
    except ValueError:
        raise InvalidError(
            f"{tunnel_ip!r} is no IP address, so the MTU of a {type_} tunnel cannot be told",
            hint="set NSM_TUNNEL_IP to the node's address",
        ) from None


def tunnel_mtu(type_: str, tunnel_ip: str, device_mtu: int) -> int:
    """What fits through a tunnel whose packets leave by a device of device_mtu (bytes)."""
    mtu = device_mtu - overhead(type_, tunnel_ip)
    if mtu < 68:  # IPv4's least (RFC 791); the kernel refuses less on an interface
        raise InvalidError(
            f"a {type_} tunnel from {tunnel_ip} leaves {mtu} bytes of its device's {device_mtu}",
            hint="raise the MTU of the device that holds this address",
        )
    return mtu


def lowest_mtu(*values: int) -> int:
    """The least of the MTUs that somebody said; 0 (not said) if nobody did."""
    return min((value for value in values if value > 0), default=0)


# --- interface names ----------------------------------------------------------


def check_name(name: str, *, whose: str) -> str:
    """Return name if the kernel takes it for an interface; whose completes "… of <whose>".

    Raises InvalidError. Refused is what the kernel refuses (over 15 bytes, `/`,
    `:`, spaces, `.`, `..`, `all`, `default`), what it would rewrite (`%`), and
    what is not printable ASCII, which no tool shows as it is.
    """
    size = len(name.encode("utf-8", "surrogateescape"))
    if size > LONGEST_NAME:
        problem = f"has {size} bytes, and Linux takes at most {LONGEST_NAME}"
    elif not name:
        problem = "is empty"
    elif name in (".", "..", "all", "default"):
        problem = "means something else to Linux"
    elif bad := next((one for one in name if not "!" <= one <= "~" or one in "/:%"), None):
        problem = f"holds {bad!r}"
    else:
        return name
    shown = name if len(name) <= 64 else name[:64] + "…"
    raise InvalidError(
        f"interface name {shown!r} of {whose} {problem}",
        hint="take up to 15 letters, digits, '-', '_' or '.', or leave the name out to get one",
    )


def generate_name(service: str, *, choose: Callable[[str], str] = secrets.choice) -> str:
    """Make an interface name of 15 bytes: ten of the service's, a dash, random ones.

    Characters no interface name may hold become dashes.
    """
    kept = "".join(c if "!" <= c <= "~" and c not in "/:%" else "-" for c in service)
    kept = kept[:KEPT_OF_SERVICE] + "-"
    return kept + "".join(choose(ALPHABET) for _ in range(LONGEST_NAME - len(kept)))

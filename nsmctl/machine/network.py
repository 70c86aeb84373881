"""How this node's own network is set: what tunnels and workloads will meet."""

import os
import socket
from typing import Final

from nsm.errors import RightsError
from nsm.kernel import firewall, messages
from nsm.kernel.firewall import Chain
from nsm.kernel.messages import Device
from nsm.kernel.netlink import Socket
from nsm.kernel.state import OWN, IPAddress, Namespace
from nsmctl.machine.asking import Answer, not_tried, note, ok

SYSCTL: Final = "/proc/sys/net"
VXLAN_COSTS: Final = {4: 50, 6: 70}  # bytes of a packet that carries an Ethernet frame
SMALLEST_IPV6: Final = 1280
STRICT: Final = 1  # of rp_filter
IPTABLES: Final = {"ip": "iptables", "ip6": "ip6tables"}


def ipv6() -> Answer:
    """Whether there is IPv6, and whether this node's devices may have it."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC).close()
    except OSError:
        return note("the kernel has none: IPv4 wires only", "boot without ipv6.disable=1")
    off = [name for name in ("all", "default") if _value(f"ipv6/conf/{name}/disable_ipv6") == 1]
    if off:
        return note(
            "off on this node: no tunnels over it, and wires of the node itself have none",
            " ".join(["sysctl -w", *(f"net.ipv6.conf.{name}.disable_ipv6=0" for name in off)]),
        )
    return ok("on")


def default_device() -> Answer:
    """The device of the default route, whose address tunnels start from, and its MTU."""
    found = _uplink()
    if found is None:
        return note("no default route with an address", "tell the forwarder one: NSM_TUNNEL_IP")
    device, address = found
    inside = device.mtu - VXLAN_COSTS[address.version]
    told = f"{device.name} {address}, MTU {device.mtu}: {inside} in a VXLAN wire"
    if inside < SMALLEST_IPV6:
        return note(
            f"{told}, too small for IPv6 ({SMALLEST_IPV6})",
            f"ip link set {device.name} mtu 1500, if its network carries that",
        )
    return ok(told)


def _uplink() -> tuple[Device, IPAddress] | None:
    """The best default route's device and its address, of IPv4 before IPv6."""
    with Socket.here() as sock:
        routes = sock.dump(messages.dump_routes())
        for family in (socket.AF_INET, socket.AF_INET6):
            of_family = [entry for entry in routes if entry[1][0] == family]
            for _, index in messages.default_devices(of_family):
                device = messages.device(sock.ask(messages.get_link(index=index)))
                dumped = sock.dump(messages.dump_addresses(index))
                here = Namespace(0, OWN)
                for one in messages.seen_addresses(dumped, here, device.name, index):
                    if one.cidr.version == (4 if family == socket.AF_INET else 6):
                        return device, one.cidr.ip
    return None


def forwarding() -> Answer:
    """Whether this node passes packets on; wires never ask it to."""
    on = {
        family: told
        for family, told, setting in (
            ("ip", "IPv4", "ipv4/ip_forward"), ("ip6", "IPv6", "ipv6/conf/all/forwarding"),
        )
        if _value(setting) == 1
    }  # fmt: skip
    if not on:
        return ok("off: wires need none")
    try:
        dropping = [
            chain
            for chain in firewall.chains()
            if chain.hook == "forward" and chain.drops and chain.family in (*on, "inet")
        ]
        if not dropping:
            return ok(f"on for {' and '.join(on.values())}")
        return note(
            f"on, but {dropping[0]} drops it:"
            " nodes in containers or machines behind this one do not reach each other",
            _let_through(dropping[0]),
        )
    except RightsError:
        return not_tried()


def _let_through(chain: Chain) -> str:
    if chain.family not in IPTABLES or (chain.table, chain.name) != ("filter", "FORWARD"):
        return f"accept their packets in {chain}"  # what another chain accepts, it still drops
    # docker's own place for rules of others: it puts its own before those in FORWARD
    docker = not chain.legacy and firewall.has(chain, "DOCKER-USER")
    command = IPTABLES[chain.family] + ("-legacy" if chain.legacy else "")
    place = "DOCKER-USER" if docker else "FORWARD"
    return f"{command} -I {place} -i BRIDGE -o BRIDGE -j ACCEPT"


def input_policy() -> Answer:
    """Whether a packet filter keeps other nodes out."""
    try:
        chains = [chain for chain in firewall.chains() if chain.hook == "input"]
    except RightsError:
        return not_tried()
    for chain in chains:
        if chain.drops or chain.shuts:
            return note(
                f"{chain} drops what no rule lets in",
                "let in UDP 4789 and from 51820, TCP 5001 and 5002 from the other nodes",
            )
    return ok("none drops all that no rule lets in")


def rp_filter() -> Answer:
    """Whether answers that come back another way are dropped."""
    try:
        names = os.listdir(f"{SYSCTL}/ipv4/conf")
    except OSError as failure:
        return note(
            f"{SYSCTL} cannot be read: {failure.strerror}",
            "in a container, mount /proc with its /proc/sys/net",
        )
    # the larger of the two holds: all=2 loosens every device, and all=1 no loose one
    every = _value("ipv4/conf/all/rp_filter") or 0
    devices = sorted({*names} - {"all", "default", "lo"})
    places = {**{name: name for name in devices}, "default": "devices to come"}
    strict = [
        told
        for name, told in places.items()
        if max(every, _value(f"ipv4/conf/{name}/rp_filter") or 0) == STRICT
    ]
    if not strict:
        return ok("not strict")
    told = ", ".join(strict[:3]) + (f" and {len(strict) - 3} more" if strict[3:] else "")
    return note(
        f"strict on {told if len(strict) < len(places) else 'every device'}:"
        " drops what comes back over another wire",
        "sysctl -w net.ipv4.conf.all.rp_filter=2",
    )


def _value(setting: str) -> int | None:
    """A number below /proc/sys/net; None where there is none."""
    try:
        with open(f"{SYSCTL}/{setting}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None

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
from nsmctl.machine import processes
from nsmctl.machine.asking import Answer, not_tried, note, ok

SYSCTL: Final = "/proc/sys/net"
VXLAN_COSTS: Final = {4: 50, 6: 70}  # bytes of a packet that carries an Ethernet frame
SMALLEST_IPV6: Final = 1280
STRICT: Final = 1  # of rp_filter


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
    on = [
        name
        for name, setting in (("IPv4", "ipv4/ip_forward"), ("IPv6", "ipv6/conf/all/forwarding"))
        if _value(setting) == 1
    ]
    if not on:
        return ok("off: wires need none")
    try:
        dropping = [chain for chain in firewall.chains() if chain.hook == "forward" and chain.drops]
    except RightsError:
        return not_tried()
    if not dropping:
        return ok(f"on for {' and '.join(on)}")
    return note(
        f"on, but {dropping[0]} drops it:"
        " nodes in containers or machines behind this one do not reach each other",
        _let_through(dropping[0]),
    )


def _let_through(chain: Chain) -> str:
    if not chain.legacy and chain.name != "FORWARD":
        return f"accept their packets in {chain}"
    first = "DOCKER-USER" if processes.running("dockerd") else "FORWARD"
    command = "iptables-legacy" if chain.legacy else "iptables"
    return f"{command} -I {first} -i BRIDGE -o BRIDGE -j ACCEPT"


def input_policy() -> Answer:
    """Whether a packet filter keeps other nodes out."""
    try:
        dropping = [chain for chain in firewall.chains() if chain.hook == "input" and chain.drops]
    except RightsError:
        return not_tried()
    if not dropping:
        return ok("none drops what comes in by policy")
    return note(
        f"{dropping[0]} drops what no rule lets in",
        "let in UDP 4789 and from 51820, TCP 5001 and 5002 from the other nodes",
    )


def rp_filter() -> Answer:
    """Whether answers that come back another way are dropped."""
    names = sorted(os.listdir(f"{SYSCTL}/ipv4/conf"))
    if _value("ipv4/conf/all/rp_filter") == STRICT:
        strict, told = ["all"], "every device"
    else:
        # the larger of the two holds, so a loose one for all makes them loose
        every = _value("ipv4/conf/all/rp_filter") or 0
        strict = [n for n in names if max(every, _value(f"ipv4/conf/{n}/rp_filter") or 0) == STRICT]
        told = ", ".join(strict[:3]) + (f" and {len(strict) - 3} more" if strict[3:] else "")
    if not strict:
        return ok("not strict")
    return note(
        f"strict on {told}: drops what comes back over another wire",
        " ".join(["sysctl -w", *(f"net.ipv4.conf.{name}.rp_filter=2" for name in strict[:3])]),
    )


def _value(setting: str) -> int | None:
    """A number below /proc/sys/net; None where there is none."""
    try:
        with open(f"{SYSCTL}/{setting}") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None

"""All questions of `nsmctl doctor`, in the order of their lines."""

from typing import Final

from nsmctl.machine import host, kernel, leftovers, managers, network, ports
from nsmctl.machine.asking import Question

ALL: Final = (
    Question("python", "Python", host.python, needed=True),
    Question("kernel", "kernel", host.kernel, needed=True),
    Question("capabilities", "capabilities", kernel.capabilities, needed=True),
    Question("namespaces", "namespaces", kernel.namespaces, needed=True),
    Question("sysctls", "sysctls", kernel.settings, needed=True),
    Question("veth", "veth", kernel.veth, needed=True),
    Question("bridge", "bridge", kernel.bridge, needed=True),
    Question("vxlan", "VXLAN", kernel.vxlan, needed=True),
    Question("macvlan", "macvlan", kernel.macvlan),
    Question("wireguard", "WireGuard", kernel.wireguard, needed=True),
    Question("wireguard-go", "wireguard-go", kernel.wireguard_go),
    Question("tun", "TUN", kernel.tun),
    Question("hop", "cls_bpf", kernel.hop),
    Question("nft", "nf_tables", kernel.nft),
    Question("netem", "netem", kernel.netem),
    Question("ipv6", "IPv6", network.ipv6),
    Question("default-device", "default device", network.default_device),
    Question("tcp-5001", "TCP 5001", ports.manager),
    Question("tcp-5002", "TCP 5002", ports.registry),
    Question("udp-4789", "UDP 4789", ports.vxlan),
    Question("udp-51820", "UDP 51820", ports.wireguard),
    Question("forwarding", "forwarding", network.forwarding),
    Question("input", "packet filter", network.input_policy),
    Question("rp-filter", "rp_filter", network.rp_filter),
    Question("udev", "udev", managers.udev),
    Question("networkd", "networkd", managers.networkd),
    Question("network-manager", "NetworkManager", managers.network_manager),
    Question("clock", "clock", host.clock, needed=True),
    Question("state-disk", "/var/lib/vwire", host.state_disk, needed=True),
    Question("run-disk", "/run", host.run_disk, needed=True),
    Question("cgroup", "cgroup", host.cgroup),
    Question("user-namespaces", "user namespaces", host.user_namespaces),
    Question("labs", "labs", leftovers.labs),
    Question("wires", "wires", leftovers.wires),
)

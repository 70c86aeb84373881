"""How the node's own network is set, and who holds the mesh's ports: each line's bad case."""

import re
import sys

import pytest

from tests.kernel.doctor.world import AS_NOBODY, FENCE, HERE, NSMCTL, doctor, inside

pytestmark = pytest.mark.long

LEGACY = f"{sys.executable} -P {HERE}/legacy.py"
UPLINK = (
    "ip link add eth0 type veth peer name far; ip addr add 192.0.2.1/24 dev eth0;"
    " ip link set eth0 up; ip link set far up;"
)
HOLDER = f"{sys.executable} -P {HERE}/holder.py"
TUNNELS = (
    "ip link add tunnel0 type vxlan id 9 local 127.0.0.1 remote 127.0.0.2 dstport 4789;"
    " ip link set tunnel0 up"
)


# --- IPv6, the default device ----------------------------------------------------------------


def test_ipv6_that_is_off_by_sysctl_is_a_note_with_the_sysctl():
    told = doctor("echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6")
    assert told.code == 0
    level, found, fix = told.line("ipv6")
    assert level == "note"
    assert found.startswith("off on this node")
    # writing `all` writes every other one too
    assert fix == "sysctl -w net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0"
    assert doctor(f"echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; {fix}").line("ipv6") == (
        "ok", "on", "",
    )  # fmt: skip


def test_a_kernel_without_ipv6_is_a_note():
    told = doctor(rights=f"{FENCE} EAFNOSUPPORT socket 0=10 --")
    assert told.code == 0
    assert told.line("ipv6") == (
        "note", "the kernel has none: IPv4 wires only", "boot without ipv6.disable=1"
    )  # fmt: skip


def test_without_a_default_route_the_forwarder_has_to_be_told():
    assert doctor().line("default-device") == (
        "note", "no default route with an address", "tell the forwarder one: NSM_TUNNEL_IP"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("address", "route", "costs"),
    [
        ("192.0.2.1", "ip route add default via 192.0.2.2", 50),
        ("2001:db8::1", "ip -6 route add default via 2001:db8::2", 70),
    ],
)
def test_the_default_device_is_told_with_what_fits_into_a_wire(address, route, costs):
    both = f"{UPLINK} ip addr add 2001:db8::1/64 dev eth0 nodad; {route}"
    level, found, _ = doctor(both).line("default-device")
    assert (level, found) == ("ok", f"eth0 {address}, MTU 1500: {1500 - costs} in a VXLAN wire")


def test_an_mtu_too_small_for_ipv6_in_a_tunnel_is_a_note():
    told = doctor(f"{UPLINK} ip route add default via 192.0.2.2; ip link set eth0 mtu 1320")
    assert told.line("default-device") == (
        "note",
        "eth0 192.0.2.1, MTU 1320: 1270 in a VXLAN wire, too small for IPv6 (1280)",
        "ip link set eth0 mtu 1500, if its network carries that",
    )


# --- ports -----------------------------------------------------------------------------------


PORTS = {  # level, and the variable to change
    "tcp-5001": ("note", "NSM_LISTEN_ON"),
    "tcp-5002": ("note", "NSM_LISTEN_ON"),
    "udp-4789": ("note", "NSM_VXLAN_PORT"),
    "udp-51820": ("note", "NSM_WIREGUARD_PORT"),
}


@pytest.fixture(scope="module", params=["127.0.0.1", "::"])
def taken(request):
    """What is told where each port is held by a process of its own; those say their pids."""
    holders = [f"{HOLDER} {name} {request.param}" for name in PORTS]
    waits = " & ".join(holders)
    all_there = f"while [ $(cat /run/held-* | wc -l) != {len(PORTS)} ]; do sleep 0.02; done"
    return doctor(f"touch /run/held-0; {waits} & {all_there}; cat /run/held-*")


@pytest.mark.parametrize("name", PORTS)
def test_a_port_that_is_taken_is_told_with_who_has_it_and_what_to_change(taken, name):
    level, variable = PORTS[name]
    pids = dict(line.split() for line in taken.err.splitlines() if line.startswith(("tcp", "udp")))
    said, found, fix = taken.line(name)
    assert said == level
    assert re.match(rf"held by python[\d.]*, pid {pids[name]}\b", found), (found, pids)
    assert variable in fix
    assert ("4790 to 4805, which must pass" in found) == (name == "udp-4789")
    assert taken.code == 0  # the mesh makes do, or is told otherwise


def test_a_port_somebody_only_talks_from_is_free():
    talks = f"{HOLDER} tcp-5001 127.0.0.1 talking & while ! [ -s /run/held-* ]; do sleep 0.02; done"
    told = doctor(talks)
    assert told.line("tcp-5001") == ("ok", "free", "")


def test_tunnel_devices_share_their_port_with_ours():
    assert doctor(TUNNELS).line("udp-4789") == (
        "ok", "held by VXLAN devices, which share it", ""
    )  # fmt: skip


def test_and_so_do_those_that_are_in_other_namespaces():
    """As each of ours is, which is a workload's."""
    moved = (
        f"{TUNNELS}; ip netns add workload; ip link set tunnel0 netns workload;"
        " ip -n workload link set tunnel0 up"  # moving it has put it down, without a socket
    )
    assert doctor(moved).line("udp-4789") == ("ok", "held by VXLAN devices, which share it", "")


def test_a_device_of_another_port_or_of_another_node_has_nothing_to_do_with_it():
    other = TUNNELS.replace("4789", "4788")
    elsewhere = f"ip netns add node-2; ip netns exec node-2 sh -c '{TUNNELS}'"
    held = f"{HOLDER} udp-4789 127.0.0.1 & while ! [ -s /run/held-* ]; do sleep 0.02; done"
    told = seen_from_a_container(f"{other}; {elsewhere}; {held}")
    assert told.line("udp-4789")[1].startswith("held by the kernel, or by somebody who runs")


def seen_from_a_container(script):
    """Asked in a PID namespace of its own, as in a pod with hostNetwork and without hostPID."""
    return inside(f"{{ {script}\n}} >&2; unshare -p -f --mount-proc {NSMCTL} doctor --json")


def test_a_program_that_is_not_seen_is_not_taken_for_a_tunnel_device():
    holders = " & ".join(f"{HOLDER} {name} 127.0.0.1" for name in PORTS)
    wait = f"while [ $(ls /run | grep -c held) != {len(PORTS)} ]; do sleep 0.02; done"
    told = seen_from_a_container(f"{holders} & {wait}")
    for name, (level, variable) in PORTS.items():
        said, found, fix = told.line(name)
        unseen = "held by the kernel, or by somebody who runs outside of this PID namespace"
        assert (said, found.partition(":")[0]) == (level, unseen), name
        assert variable in fix


def test_who_holds_a_port_may_be_hidden_from_an_ordinary_user():
    held = f"{HOLDER} udp-4789 127.0.0.1 & while ! [ -s /run/held-* ]; do sleep 0.02; done"
    told = inside(f"{held}; exec {AS_NOBODY} --json")
    assert told.line("udp-4789") == (
        "note",
        (
            "held by somebody whom only root sees (user 0): wires take one of 4790 to 4805,"
            " which must pass between nodes"
        ),
        "stop it, or set NSM_VXLAN_PORT, the same on every node",
    )


# --- forwarding and filters ------------------------------------------------------------------

FORWARDS = "echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding"
NFT = (
    "nft add table %(family)s %(table)s;"
    " nft 'add chain %(family)s %(table)s %(name)s"
    " { type filter hook %(hook)s priority 0; policy %(policy)s; }'"
)


def nft(family, table, name, hook, policy="drop"):
    return NFT % locals()


def test_a_filter_of_a_family_that_is_not_forwarded_does_no_harm():
    """docker's for IPv6, on a node that forwards IPv4 only."""
    only = "echo 1 >/proc/sys/net/ipv4/ip_forward;"
    docker = nft("ip6", "filter", "FORWARD", "forward")
    assert doctor(f"{only} {docker}").line("forwarding") == ("ok", "on for IPv4", "")
    both = nft("inet", "mine", "passing", "forward")
    assert doctor(f"{only} {both}").line("forwarding")[0] == "note"


def test_forwarding_is_told_and_off_is_no_fault():
    assert doctor().line("forwarding") == ("ok", "off: wires need none", "")
    assert doctor(FORWARDS).line("forwarding") == ("ok", "on for IPv4 and IPv6", "")
    # who drops what is not forwarded anyway does no harm
    assert doctor(nft("ip", "filter", "FORWARD", "forward")).line("forwarding")[0] == "ok"
    accepts = nft("ip", "filter", "FORWARD", "forward", "accept")
    assert doctor(f"{FORWARDS}; {accepts}").line("forwarding")[0] == "ok"


DROPS = "nodes in containers or machines behind this one do not reach each other"


@pytest.mark.parametrize(
    ("rules", "who", "fix"),
    [
        pytest.param(
            nft("ip", "filter", "FORWARD", "forward"), "nft ip filter FORWARD",
            "iptables -I FORWARD -i BRIDGE -o BRIDGE -j ACCEPT", id="as today's iptables writes it",
        ),
        pytest.param(
            f"{nft('ip', 'filter', 'FORWARD', 'forward')}; nft add chain ip filter DOCKER-USER",
            "nft ip filter FORWARD",
            "iptables -I DOCKER-USER -i BRIDGE -o BRIDGE -j ACCEPT", id="docker's",
        ),
        pytest.param(
            f"{nft('ip6', 'filter', 'FORWARD', 'forward')}; nft add table ip filter;"
            " nft add chain ip filter DOCKER-USER", "nft ip6 filter FORWARD",
            "ip6tables -I FORWARD -i BRIDGE -o BRIDGE -j ACCEPT", id="of IPv6",
        ),
        pytest.param(
            nft("inet", "filter", "FORWARD", "forward"), "nft inet filter FORWARD",
            "accept their packets in nft inet filter FORWARD", id="of a table like iptables'",
        ),
        pytest.param(
            f"{LEGACY} 6 FORWARD DROP", "iptables-legacy ip6 filter FORWARD",
            "ip6tables-legacy -I FORWARD -i BRIDGE -o BRIDGE -j ACCEPT", id="ip6tables-legacy",
        ),
        pytest.param(
            nft("inet", "mine", "passing", "forward"), "nft inet mine passing",
            "accept their packets in nft inet mine passing", id="somebody's own table",
        ),
        pytest.param(
            f"{LEGACY} 4 FORWARD DROP", "iptables-legacy ip filter FORWARD",
            "iptables-legacy -I FORWARD -i BRIDGE -o BRIDGE -j ACCEPT", id="iptables-legacy",
        ),
    ],
)  # fmt: skip
def test_a_filter_that_drops_what_is_forwarded_is_told_with_what_lets_it_through(rules, who, fix):
    told = doctor(f"{FORWARDS}; {rules}")
    assert told.code == 0
    assert told.line("forwarding") == ("note", f"on, but {who} drops it: {DROPS}", fix)


OPEN = nft("inet", "fw", "in", "input", "accept")
SSH = "nft add rule inet fw in tcp dport 22 accept"


@pytest.mark.parametrize("rule", ["ct state invalid drop", "tcp dport 23 reject", "accept"])
def test_a_filter_that_drops_some_of_it_keeps_no_node_out(rule):
    told = doctor(f"{OPEN}; nft add rule inet fw in {rule}")
    assert told.line("input") == ("ok", "none drops all that no rule lets in", "")


@pytest.mark.parametrize(
    ("rules", "who"),
    [
        (nft("inet", "filter", "arriving", "input"), "nft inet filter arriving"),
        (f"{OPEN}; {SSH}; nft add rule inet fw in counter reject", "nft inet fw in"),  # firewalld's
        (f"{OPEN}; nft add rule inet fw in log drop", "nft inet fw in"),
        (f"{LEGACY} 6 INPUT DROP", "iptables-legacy ip6 filter INPUT"),
    ],
)
def test_a_filter_that_keeps_nodes_out_is_told_with_what_to_let_in(rules, who):
    told = doctor(rules)
    assert told.code == 0
    assert told.line("input") == (
        "note",
        f"{who} drops what no rule lets in",
        "let in UDP 4789 and from 51820, TCP 5001 and 5002 from the other nodes",
    )


def test_asking_for_the_older_tables_does_not_make_them():
    told = inside(
        f"{sys.executable} -P -m nsmctl doctor --json >/run/told; cat /proc/net/ip_tables_names"
        " /proc/net/ip6_tables_names >&2; cat /run/told"
    )
    assert told.line("input")[0] == "ok"
    assert told.err == ""


# --- reverse path filters --------------------------------------------------------------------

PAIR = (
    "cd /proc/sys/net/ipv4/conf; ip link add left type veth peer name left.5;"
    " set_all() { for name in left left.5 default; do echo $1 >$name/rp_filter; done; };"
)
LOOSEN = "sysctl -w net.ipv4.conf.all.rp_filter=2"


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ("set_all 0; echo 1 >all/rp_filter", "every device"),
        ("set_all 1; echo 0 >all/rp_filter", "every device"),
        ("set_all 0; echo 1 >left/rp_filter", "left"),
        ("set_all 2; echo 1 >all/rp_filter; echo 0 >left.5/rp_filter", r"left\.5"),
        ("set_all 0; echo 1 >default/rp_filter", "devices to come"),
        (
            "set_all 1; echo 2 >left/rp_filter; ip link add b0 type veth peer name b1",
            r"b0, b1, left\.5 and 1 more",
        ),
    ],
)
def test_strict_reverse_path_filters_are_told_and_what_is_told_loosens_them(settings, where):
    told = doctor(f"{PAIR} {settings}")
    assert told.code == 0
    level, found, fix = told.line("rp-filter")
    assert (level, fix) == ("note", LOOSEN)
    assert re.fullmatch(f"strict on {where}: drops what comes back over another wire", found), found
    assert doctor(f"{PAIR} {settings}; {fix}").line("rp-filter") == ("ok", "not strict", "")


def test_the_looser_of_two_reverse_path_filters_holds():
    """The larger number: a strict one for all makes no loose device strict."""
    told = doctor(f"{PAIR} set_all 2; echo 1 >all/rp_filter")
    assert told.line("rp-filter") == ("ok", "not strict", "")


def test_settings_that_are_hidden_are_told():
    assert doctor("mount -t tmpfs none /proc/sys").line("rp-filter") == (
        "note",
        "/proc/sys/net cannot be read: No such file or directory",
        "in a container, mount /proc with its /proc/sys/net",
    )

"""Flat networks over narrow and over new ways: 1280 bytes between clusters, and no IPv4 at all."""

import json

import pytest
import yaml

from tests.e2e.labs.test_labs import names, nsmctl
from tests.support.wait import write

NETWORK = "orders@meet"
EACH = {"from": "app-*", "to": "app-*", "service": NETWORK}


def lab(underlay: dict[str, str], way: int, prefixes: list[str], mtu: int) -> str:
    """Two clusters and a network of a third; the one between them has that MTU."""
    clusters: dict[str, dict[str, object]] = {"east": {}, "west": {}, "meet": {"managers": False}}
    nodes = {f"{name}-1": {"cluster": name} for name in clusters}
    cables = [{"endpoints": [f"{node}:eth0", f"wan:{node}"]} for node in nodes]
    cables[1] |= {"mtu": way}
    clients = {
        f"app-{n}": {"on": node, "connect": [f"kernel://{NETWORK}/nsm-1"]}
        for n, node in enumerate(["east-1", "east-1", "west-1"])
    }
    checks = {
        "full": {"ping": {**EACH, "size": "mtu", "count": 3}, "expect": {"lost": 0}},
        "one more": {"ping": {**EACH, "size": "mtu+1"}, "expect": {"lost": "all"}},
        "by name": {"ping": {**EACH, "to": "{client}.orders"}, "expect": {"lost": 0}},
        "datagrams": {"udp": {**EACH, "size": "mtu"}, "expect": {"lost": 0}},
        "transfer": {
            "tcp": {"from": "app-0", "to": "app-2", "service": NETWORK, "bytes": "3MB"},
            "expect": {"sha256": "same"},
        },
        "no reading": {
            "capture": {"on": "wan:west-1", "during": "transfer"},
            "expect": {"sees": ["wireguard-data"], "never": ["payload", "icmp", "fragments"]},
        },
        "wires": {
            "wire": {"client": "app-*", "service": NETWORK},
            "expect": {"mtu": mtu},
        },
    }
    told = {
        "name": "underlay",
        "topology": {
            "clusters": clusters,
            "federation": [["east", "west", "meet"]],
            "nodes": {**nodes, "wan": {"kind": "switch"}},
            "links": cables,
            "underlay": underlay,
        },
        "services": {
            NETWORK: {
                "vl3": {
                    "prefixes": prefixes,
                    "dns": "{client}.orders",
                    "routers": ["east-1", "west-1"],
                }
            }
        },
        "clients": clients,
        "checks": [{"name": name, **what} for name, what in checks.items()],
    }
    return yaml.safe_dump(told, sort_keys=False)


FOUR, SIX = "172.16.0.0/16", "2001:db8:10::/64"
CASES = {  # what tunnels leave of the way: 60 bytes less over IPv4, 80 over IPv6
    "1280-bytes": lab({"ipv4": "198.18.0.0/24"}, 1280, [FOUR], 1220),
    "ipv6-only": lab({"ipv6": "fd00:18::/64"}, 1500, [SIX], 1420),
}


@pytest.mark.parametrize("case", ["1280-bytes", pytest.param("ipv6-only", marks=pytest.mark.long)])
def test_a_network_over_such_a_way_carries_all_that_its_members_were_told(case, tmp_path):
    file = tmp_path / "lab.yaml"
    file.write_text(CASES[case])
    done = nsmctl("lab", "run", str(file), "--name", names(f"u-{case[:4]}"), "--json")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    write(f"a network over {case}: up", told["up_s"], 8.0)
    assert (told["failed"], told["held"], told["left"]) == (0, 7, [])
    assert {wire["mechanism"] for wire in told["wires"]} <= {"veth", "wireguard"}

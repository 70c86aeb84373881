"""The lab of several clusters, run as a person runs it: who reaches whom, and by how many hops."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from labs import lab as labfile
from tests.e2e.labs.test_labs import COMMAND, names, nsmctl, up
from tests.support.wait import write

PROXIES = ("nsmgr-proxy", "registry-proxy")
DOORS = {f"{node}/{proxy}" for node in ("east-1", "west-1") for proxy in PROXIES}
FORTH = [
    "app-e", "nsmgr-east-1", "forwarder-east-1", "nsmgr-proxy-east",
    "nsmgr-proxy-west", "nsmgr-west-1", "forwarder-west-1",
]  # fmt: skip
BACK = [
    "app-w", "nsmgr-west-1", "forwarder-west-1", "nsmgr-proxy-west",
    "nsmgr-proxy-east", "nsmgr-east-1", "forwarder-east-1",
]  # fmt: skip
WIRES = {  # client and service: kind, nodes, and what is passed
    ("app-e", "packets@west"): ("wireguard", ["east-1", "west-1"], [*FORTH, "safe"]),
    ("app-e", "frames@west"): ("vxlan", ["east-1", "west-1"], [*FORTH, "pong"]),
    ("app-w", "frames"): ("veth", ["west-1", "west-1"], ["app-w", *FORTH[5:], "pong"]),
    ("app-w", "shared@meet"): ("wireguard", ["west-1", "east-1"], [*BACK, "floater@meet"]),
}


def test_the_lab_of_several_clusters_holds_all_its_checks_and_leaves_nothing():
    start = time.monotonic()
    done = nsmctl("lab", "run", "interdomain", "--name", names("inter"), "--json")
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    write("interdomain: the whole run", time.monotonic() - start, 20.0)
    write("interdomain: up", told["up_s"], 5.0)
    write("interdomain: checks", told["checks_s"], 5.0)
    write("interdomain: down", told["down_s"], 1.5)
    assert told["failed"] == 0
    assert told["held"] == len(told["checks"]) == 15
    assert told["left"] == []
    wires = {(w["client"], w["service"]): w for w in told["wires"]}
    shown = {key: (w["mechanism"], w["nodes"], w["hops"]) for key, w in wires.items()}
    assert shown == WIRES
    assert [w["lost"] for w in wires.values()] == [0] * 4
    assert [w["endpoint"] for w in wires.values()] == ["safe", "pong", "pong", "floater"]
    for wire in told["wires"]:
        assert ("proxy" in wire["stages"]) == ("@" in wire["service"]), wire


def test_clusters_that_have_ipv6_only_and_find_each_other_by_dns_reach_each_other_as_well(
    tmp_path: Path,
):
    text = labfile.find("interdomain").read_text()
    for old, new in (
        ("{ipv4: 198.18.0.0/24}", '{ipv6: "fd00:18::/64"}'), ("mtu: 1446", "mtu: 1426"),
        ("mtu: 1440", "mtu: 1420"), ("discovery: static", "discovery: dns"),
    ):  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    file = tmp_path / "six.yaml"
    file.write_text(text)
    told = asked("lab", "run", str(file), "--name", names("six"))
    assert [check["name"] for check in told["checks"] if not check["holds"]] == []
    assert told["left"] == []
    assert [len(wire["hops"]) for wire in told["wires"]] == [8, 8, 4, 8]


@pytest.fixture(scope="module")
def lab():
    with up("interdomain") as name:
        yield name


def asked(*words: str) -> Any:
    done = nsmctl(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_verb_knows_the_doors_between_clusters(lab: str):
    status = asked("lab", "status", lab)
    assert (status["nodes"], status["well"], status["clusters"]) == (3, 3, 3)
    assert [wire["domain"] for wire in status["wires"]] == ["west", "west", "west", "meet"]
    there = status["processes"]
    assert there.keys() > DOORS
    assert all(one["alive"] and one["ready"] for one in there.values())
    assert [name for name in there if "meet-1" in name] == ["meet-1/issuer", "meet-1/registry"]
    logs = asked("lab", "logs", "*/*-proxy", "--lab", lab)
    assert logs.keys() == {name.replace("/", ".") for name in DOORS}
    assert all(any(" ready: " in line for line in lines) for lines in logs.values()), logs


def test_a_floating_domain_has_what_is_registered_there_and_no_wires(lab: str):
    there = asked("endpoints", "--lab", lab, "-n", "meet-1")
    assert [(one["name"], one["services"]) for one in there] == [("floater", ["shared"])]
    assert [one["name"] for one in asked("services", "--lab", lab, "-n", "meet-1")] == ["shared"]
    shown = nsmctl("lab", "exec", "meet-1", "--lab", lab, "--", "printenv", "NSM_CONNECT_TO")
    assert shown.stdout == "tcp://198.18.0.3:5002\n"
    for words in (("connections",), ("path", "x"), ("connect", "kernel://shared@meet")):
        done = nsmctl(*words, "--lab", lab, "-n", "meet-1")
        assert done.returncode == 2, words
        assert done.stderr.startswith("meet is a floating domain: it has no managers, and no wires")


def test_the_hops_of_a_wire_are_those_of_both_clusters(lab: str):
    path = asked("path", "app-e-0", "--lab", lab, "-n", "east-1")["path"]
    assert [hop["name"] for hop in path] == [*FORTH, "safe"]
    domains = [hop["spiffe_id"].split("/")[2] for hop in path]
    assert domains == ["east.test"] * 4 + ["west.test"] * 4


def test_whoever_operates_a_node_sees_what_passes_its_door(lab: str):
    for node, address in (("east-1", "198.18.0.1"), ("west-1", "198.18.0.2")):
        words = ("connections", "--manager", f"tcp://{address}:5004", "--json")
        done = nsmctl("lab", "exec", node, "--lab", lab, "--", *COMMAND, *words)
        assert done.returncode == 0, done.stderr
        assert [wire["id"] for wire in json.loads(done.stdout)] == ["app-e-0", "app-e-1", "app-w-1"]


def test_a_program_of_one_cluster_gets_a_wire_to_another_by_hand(lab: str):
    words = ("connect", "kernel://packets@west/nsm-9", "--lab", lab, "-n", "outsider", "--")
    done = nsmctl(*words, "ping", "-c", "1", "-W", "2", "172.16.2.2")
    assert done.stdout.startswith("nsm-9 172.16.2."), f"{done.stdout}\n{done.stderr}"
    after = nsmctl("lab", "exec", "outsider", "--lab", lab, "--", "ip", "link", "show", "nsm-9")
    assert after.returncode == 1

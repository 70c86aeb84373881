"""The lab of one network over two clusters, as people and stock tools meet it while it is up.

Its checks are run by the test of `make demo`.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labs.alive import started
from labs.paths import Paths
from tests.e2e.labs.test_labs import names, nsmctl
from tests.support import scrapes

NETWORK = "orders-db@meet"
MEMBERS = ("app-e1", "app-e2", "app-w1", "app-w2")
ROUTERS = ("east-1", "east-2", "west-1")
LAB = names("two-clusters")


def asked(*words: str) -> Any:
    done = nsmctl(*words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def inside(place: str, *words: str) -> subprocess.CompletedProcess[str]:
    """By stock `ip netns exec`, which mounts what /etc/netns has for a namespace."""
    command = ["ip", "netns", "exec", f"{LAB}-{place}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in scrapes.SETTINGS.items():
            patch.setenv(name, value)
        done = nsmctl("lab", "up", "two-clusters", "--name", LAB)
    try:
        assert done.returncode == 0, done.stderr
        yield LAB
        routers = [one["pid"] for one in asked("lab", "status", LAB)["on_demand"].values()]
        assert asked("lab", "down", LAB)[LAB]["left"] == []
        assert [pid for pid in routers if started(pid)] == []
        assert (
            LAB
            not in subprocess.run(
                ["ip", "netns"], capture_output=True, text=True, check=True
            ).stdout
        )
        assert not list(Path("/etc/netns").glob(f"{LAB}*"))
        assert not os.path.exists(Paths(LAB).folder)
    finally:
        nsmctl("lab", "down", LAB)


def addresses(place: str) -> set[str]:
    told = json.loads(inside(place, "ip", "-j", "addr", "show", "nsm-1").stdout)[0]["addr_info"]
    return {one["local"] for one in told if one["scope"] == "global"}


def test_every_program_of_a_network_serves_its_figures(lab: str):
    figures = scrapes.of_lab(lab)
    programs = {value for one in figures.values() for name, *more in one for value in more
                if name == "vwire_ready"}  # fmt: skip
    assert programs == {
        "issuer", "registry", "registry-proxy", "nsmgr", "nsmgr-proxy", "forwarder", "ipam",
        "supplier", "vl3", "responder", "client",
    }  # fmt: skip
    for node in ROUTERS:
        assert figures[f"{node}/orders-db-{node}"]["vwire_wires", "kernel"] >= 1, node
    lent = sum(one.get(("vwire_leases", "prefix"), 0) for one in figures.values())
    assert lent == 2 * len(ROUTERS)  # of each family one
    for who, one in figures.items():
        assert one["vwire_open_fds",] > 5, who


def test_a_wire_into_a_network_of_two_clusters_is_well_in_every_line(lab: str):
    done = nsmctl("explain", "app-e1", NETWORK, "--lab", lab)
    assert done.returncode == 0, done.stdout
    _, *lines = done.stdout.splitlines()
    assert [(line[2], line[4:].partition(":")[0]) for line in lines] == [
        *(("\N{CHECK MARK}", name)
          for name in ("registration", "lease", "policy", "link", "address", "route")),
        ("-", "tunnel"), ("-", "handshake"),  # its router is on its node
        *(("\N{CHECK MARK}", name) for name in ("packets", "MTU", "DNS")),
    ]  # fmt: skip


def test_status_knows_the_network_its_members_and_the_routers_that_were_asked_for(lab: str):
    status = asked("lab", "status", lab)
    assert (status["nodes"], status["well"], status["clusters"], status["wires"]) != (0, 0, 0, 0)
    (network,) = status["networks"]
    assert (network["network"], network["dns"]) == (NETWORK, "{client}.orders-db")
    assert tuple(network["members"]) == MEMBERS
    assert network["routers"] == [f"orders-db-{node}" for node in ROUTERS]
    there = status["on_demand"]
    assert there.keys() == {f"{node}/orders-db-{node}" for node in ROUTERS}
    assert all(one["alive"] for one in there.values())
    shown = nsmctl("lab", "status", lab).stdout
    assert re.search(r"^east-1/orders-db-east-1 +\d+ runs, as was asked", shown, re.MULTILINE)
    assert re.search(r"^meet-1/ipam\.orders-db +\d+ done", shown, re.MULTILINE)
    logs = asked("lab", "logs", "orders-db-east-1", "--lab", lab)
    assert any(" ready: " in line for line in logs["east-1.orders-db-east-1"])


def test_stock_tools_resolve_members_to_their_addresses_and_reach_them(lab: str):
    del lab
    for one, other in (("app-e1", "app-w1"), ("app-w2", "app-e2")):
        told = inside(one, "getent", "ahosts", f"{other}.orders-db").stdout
        assert {line.split()[0] for line in told.splitlines()} == addresses(other)
        for family in ("-4", "-6"):
            done = inside(one, "ping", family, "-c", "1", "-W", "2", f"{other}.orders-db")
            assert done.returncode == 0, f"{one} {other} {family}: {done.stdout}{done.stderr}"
        back = inside(one, "dig", "+short", "-x", min(addresses(other))).stdout
        assert back == f"{other}.orders-db.\n"


def test_a_command_of_lab_exec_has_its_places_names_and_others_have_none(lab: str):
    words = ("curl", "-fsS", "--max-time", "5", "http://app-w1.orders-db:8080/")
    page = nsmctl("lab", "exec", "app-e1", "--lab", lab, "--", *words)
    assert "Directory listing for /" in page.stdout, page.stderr
    for stranger in ("outsider", "east-1", "orders-db-east-1"):
        got = nsmctl("lab", "exec", stranger, "--lab", lab, "--", *words)
        assert got.returncode != 0, stranger
    system = Path("/etc/resolv.conf").read_text()
    node = nsmctl("lab", "exec", "east-1", "--lab", lab, "--", "cat", "/etc/resolv.conf")
    assert node.stdout == system


def test_who_made_the_network_sees_what_each_router_was_lent(lab: str):
    shown = asked("vl3", "show", "orders-db", "--lab", lab, "-n", "meet-1")
    assert shown["pool"]["prefixes"] == ["172.16.0.0/16", "2001:db8:10::/64"]
    holders = {one["name"]: len(one["prefixes"]) for one in shown["routers"] if one["prefixes"]}
    assert len(holders) == len(ROUTERS)
    assert set(holders.values()) == {2}

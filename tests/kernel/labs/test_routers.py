"""A lab is up when routers that have members know the way to one another; it says who does not."""

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from labs import engine
from labs.lab import Lab, parse
from labs.paths import Paths
from nsm.errors import DeadlineError
from nsm.kernel import topology
from nsm.kernel.namespaces import create_named, delete_named
from nsm.kernel.topology import Plug

NAME = f"join-{os.getpid() % 10000}"
TEXT = f"""\
name: {NAME}
topology:
  clusters: {{c: {{}}}}
  nodes: {{n1: {{cluster: c}}, n2: {{cluster: c}}, n3: {{cluster: c}}, sw: {{kind: switch}}}}
  links:
    - {{endpoints: ["n1:eth0", "sw:p1"]}}
    - {{endpoints: ["n2:eth0", "sw:p2"]}}
    - {{endpoints: ["n3:eth0", "sw:p3"]}}
  underlay: {{ipv4: 198.18.0.0/24}}
services:
  net: {{vl3: {{prefixes: [172.16.0.0/16, "2001:db8::/64"], routers: [n1, n2, n3]}}}}
clients:
  a: {{on: n1, connect: ["kernel://net/nsm-1"]}}
  b: {{on: n2, connect: ["kernel://net/nsm-1"]}}
"""
OWN = {"net-n1": ("172.16.0.0", "2001:db8::"), "net-n2": ("172.16.1.0", "2001:db8::1:0")}


@pytest.fixture
def lab(tmp_path) -> Iterator[tuple[Lab, Paths]]:
    """Two routers with a member each, joined by a cable, and a third without any."""
    lab, paths = parse(TEXT, "x"), Paths(NAME, str(tmp_path))
    places = [paths.namespace(place) for place in (*lab.routers, *lab.clients)]
    try:
        for place in places:
            create_named(place)
        topology.cable(*(Plug(paths.namespace(one), "wire") for one in OWN), 1400)
        os.makedirs(os.path.dirname(paths.status("a")))
        for router, client in zip(OWN, lab.clients, strict=True):
            for address in OWN[router]:
                length = 128 if ":" in address else 32
                ip(
                    paths,
                    router,
                    "addr",
                    "add",
                    f"{address}/{length}",
                    "dev",
                    "lo",
                    "scope",
                    "global",
                )
            ip(paths, router, "link", "set", "wire", "up")
            told = {"event": "up", "id": client, "service": "net", "endpoint": router,
                    "interface": "nsm-1"}  # fmt: skip
            with open(paths.status(client), "w") as file:
                file.write(json.dumps(told) + "\n")
        yield lab, paths
    finally:
        for place in places:
            delete_named(place)


def ip(paths: Paths, place: str, *words: str) -> None:
    subprocess.run(["ip", "-n", paths.namespace(place), *words], check=True)


def lead(paths: Paths, source: str, target: str, *, families: int = 2) -> None:
    for address in OWN[target][:families]:
        ip(paths, source, "route", "add", address, "dev", "wire")


def test_each_knows_the_way_to_each_other_in_every_family(lab, monkeypatch):
    lab, paths = lab
    monkeypatch.setattr(engine, "JOINING", 0.05)
    with pytest.raises(DeadlineError, match=r"net-n1 has no way to 172.16.1.0, which is net-n2's"):
        engine._await_routers(lab, paths)
    lead(paths, "net-n1", "net-n2")
    with pytest.raises(DeadlineError, match=r"net-n2 has no way to 172.16.0.0, which is net-n1's"):
        engine._await_routers(lab, paths)
    lead(paths, "net-n2", "net-n1", families=1)
    with pytest.raises(DeadlineError, match="net-n2 has no way to 2001:db8::, which is net-n1's"):
        engine._await_routers(lab, paths)
    ip(paths, "net-n2", "route", "add", "2001:db8::", "dev", "wire")
    engine._await_routers(lab, paths)  # whatever becomes of the third, which nobody needs

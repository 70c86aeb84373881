"""What a lab's workloads have of their own, and cables that pass so much a second and no more."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import engine, state
from labs.hands import Hands
from labs.lab import parse
from labs.paths import Paths
from nsm.errors import TakenError, UnsupportedError
from nsm.kernel import topology
from nsm.names.resolvconf import NETNS
from tests.kernel.labs.test_engine import STANDIN

NAME = f"home-{os.getpid() % 10000}"
RATE = 40_000_000
TEXT = f"""\
name: {NAME}
topology:
  clusters: {{c: {{}}}}
  nodes: {{n1: {{cluster: c}}, n2: {{cluster: c}}, sw: {{kind: switch}}}}
  links:
    - {{endpoints: ["n1:eth0", "sw:p1"]}}
    - {{endpoints: ["n2:eth0", "sw:p2"], rate: 40Mbit}}
  underlay: {{ipv4: 198.18.0.0/24}}
services:
  y: {{endpoints: {{resp: {{on: n2, prefixes: [172.16.1.0/24]}}}}}}
clients:
  app:
    on: n1
    connect: ["kernel://y/nsm-1"]
    run: [{{name: web, exec: "{sys.executable} -P -m http.server 80", ready: {{tcp: 80}}}}]
  outsider: {{on: n1, netns-only: true}}
"""
OWN = "nameserver 127.0.0.1\n"
ENTER = (
    "from labs import engine, seats; from labs.paths import Paths; paths = Paths({name!r});"
    " seats.enter(engine.saved(paths), paths, {place!r});"
    " print(open('/etc/resolv.conf').read(), end='')"
)


def up(name: str = NAME) -> Paths:
    found = Paths(name)
    with state.locked(found, create=True):
        engine.up(parse(TEXT, "x", name=name), TEXT, "x", modules=STANDIN)
    return found


def down(name: str = NAME) -> engine.Gone | None:
    with state.locked(Paths(name), create=False) as there:
        return engine.down(Paths(name)) if there else None


@pytest.fixture(scope="module")
def paths() -> Iterator[Paths]:
    try:
        made = up()
        yield made
        down()
        assert not os.path.exists(os.path.dirname(made.resolv_conf("app")))
    finally:
        down()


@pytest.fixture
def hands() -> Iterator[Hands]:
    with Hands() as made:
        yield made


def run(hands: Hands, namespace: str, *argv: str) -> str:
    order = {"do": "exec", "argv": argv, "patience": 10.0}
    return hands.ask({namespace: order})[namespace]["out"]


def test_a_program_works_in_a_folder_of_its_own(paths: Paths, hands: Hands):
    Path(paths.home("app"), "hello").write_text("its own")
    page = run(hands, paths.namespace("app"), "curl", "-fsS", "http://127.0.0.1/")
    assert "hello" in page
    assert "authority" not in page  # as the lab's folder would be
    assert os.listdir(paths.home("resp")) == []


@pytest.mark.parametrize("place", ["app", "outsider"])
def test_a_client_has_a_resolv_conf_that_nobody_else_sees(paths: Paths, hands: Hands, place: str):
    before = Path("/etc/resolv.conf").read_text()
    file = Path(paths.resolv_conf(place))
    assert file.read_text() == ""  # nobody whom the machine asks is reached from there
    file.write_text(OWN)
    try:
        assert run(hands, paths.namespace(place), "cat", "/etc/resolv.conf") == OWN
        entered = subprocess.run(
            [sys.executable, "-c", ENTER.format(name=NAME, place=place)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert entered.stdout == OWN
    finally:
        file.write_text("")
    assert run(hands, paths.namespace("n1"), "cat", "/etc/resolv.conf") == before
    assert Path("/etc/resolv.conf").read_text() == before


def test_whoever_is_in_a_clients_namespace_may_listen_on_any_port(paths: Paths, hands: Hands):
    bind = "import socket; socket.create_server(('127.0.0.1', 53)); print('bound')"
    nobody = ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all"]
    command = [*nobody, "python3", "-c", bind]
    assert run(hands, paths.namespace("outsider"), *command) == "bound\n"
    assert run(hands, paths.namespace("n1"), *command) == ""


def test_no_more_than_its_rate_passes_a_cable_in_either_direction(paths: Paths, hands: Hands):
    for place, interface in (("n2", "eth0"), ("sw", "p2")):
        command = ["tc", "-j", "-n", paths.namespace(place), "qdisc", "show", "dev", interface]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        (found,) = json.loads(done.stdout)
        assert (found["kind"], found["options"]["rate"] * 8) == ("tbf", RATE)
    one, two = (paths.namespace(place) for place in ("n1", "n2"))
    for source, target, address in ((one, two, "198.18.0.2"), (two, one, "198.18.0.1")):
        port = hands.ask({target: {"do": "listen", "address": address}})[target]["port"]
        hands.tell(target, {"do": "receive", "port": port, "patience": 10.0})
        order = {"do": "send", "address": address, "port": port, "octets": 2_000_000,
                 "patience": 10.0, "mark": "x"}  # fmt: skip
        took = hands.ask({source: order})[source]["seconds"]
        hands.hear(target)
        assert RATE / 3 < 2_000_000 * 8 / took < RATE * 1.1


def test_a_kernel_that_cannot_do_that_says_so_with_what_to_leave_out(paths: Paths, monkeypatch):
    monkeypatch.setattr(topology, "_KIND", "no-such")
    with pytest.raises(UnsupportedError, match="cannot hold eth0 to 5 bits a second"):
        topology.slow_down(paths.namespace("n1"), "eth0", 5)


def test_a_resolv_conf_that_is_somebody_elses_is_left_to_him():
    name = f"{NAME}-x"
    theirs = Path(NETNS, Paths(name).namespace("app"), "hosts")
    theirs.parent.mkdir(parents=True)
    theirs.write_text("x")
    try:
        with pytest.raises(TakenError, match=f"{theirs.parent} is there already"):
            up(name)
        assert theirs.read_text() == "x"
    finally:
        theirs.unlink()
        theirs.parent.rmdir()
        if not os.listdir(NETNS):
            os.rmdir(NETNS)

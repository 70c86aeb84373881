"""Faults of a lab: what each breaks, in the kernel's words, and that all of it comes back.

The programs are stand-ins, as in test_engine: labs/parity has what the mesh makes of it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import engine, faults, state
from labs.faults import Faults
from labs.hands import Hands
from labs.lab import parse
from labs.paths import Paths
from labs.processes import Stage
from nsm.errors import InvalidError, NotFoundError, PreconditionError, TakenError
from nsm.kernel import topology
from nsm.kernel.namespaces import list_named

STANDIN = {stage: "tests.support.standin" for stage in Stage if stage != Stage.PROGRAM}
TEXT = """\
name: NAME
topology:
  clusters: {c: {disk: 200kB}}
  nodes: {n1: {cluster: c}, n2: {cluster: c}, n3: {cluster: c}, sw: {kind: switch}}
  links:
    - {endpoints: ["n1:eth0", "sw:p1"]}
    - {endpoints: ["n2:eth0", "sw:p2"], rate: 100Mbit}
    - {endpoints: ["n3:eth0", "sw:p3"]}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  y:
    endpoints:
      resp: {on: n2, prefixes: [172.16.1.0/24]}
      spare: {on: n3, prefixes: [172.16.2.0/24], later: true}
clients:
  app:
    {on: n1, connect: ["kernel://y/nsm-1"], run: [{name: serve, exec: SERVE, ready: {tcp: 8080}}]}
"""
SERVE = f"{sys.executable} -P -m http.server 8080"


@pytest.fixture(scope="module")
def paths() -> Iterator[Paths]:
    paths = Paths(f"f{os.getpid() % 100000}")
    text = TEXT.replace("NAME", paths.lab).replace("SERVE", SERVE)
    with state.locked(paths, create=True):
        engine.up(parse(text, "x.yaml"), text, "x.yaml", modules=STANDIN)
    yield paths
    with state.locked(paths, create=False) as there:
        gone = engine.down(paths) if there else None
    assert gone
    assert not gone.left, gone


@pytest.fixture
def broken(paths: Paths) -> Faults:
    """From the lab's folder alone, as somebody else's process would have it."""
    return Faults(*engine.running(paths.lab))


def reaches(paths: Paths, source: str, *targets: str) -> list[int]:
    """How many of two echoes to each come back."""
    rows = [{"address": address, "size": 64} for address in targets]
    with Hands() as hands:
        order = {"do": "ping", "targets": rows, "count": 2, "patience": 1.2}
        told = hands.ask({paths.namespace(source): order})[paths.namespace(source)]
    return [row["sent"] - row["lost"] for row in told]


def table(paths: Paths, *words: str) -> str:
    return subprocess.run(
        [sys.executable, "-P", "-m", "nsmctl", "lab", *words, paths.lab],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip


def test_names_are_those_of_people_and_of_logs_and_a_wrong_one_names_the_nearest(broken):
    assert {
        "forwarder@n1", "nsmgr@n2", "registry@c", "client:app", "endpoint:resp"
    } <= set(broken.names)  # fmt: skip
    for who in ("app", "n1/app", "client:app"):
        assert broken.process(who) == "n1/app"
    assert broken.process("registry@n1") == broken.process("registry@c") == "n1/registry"
    with pytest.raises(NotFoundError, match='did you mean "forwarder@n1"'):
        broken.pids("forwader@n1")
    with pytest.raises(NotFoundError, match="no node 'sw'; there is n1, n2, n3"):
        broken.link("sw", up=False)


def test_who_is_killed_stays_dead_until_started_by_the_same_order(paths, broken):
    log = Path(paths.log("n1/forwarder"))
    old = broken.kill("forwarder@n1")
    assert not os.path.exists(f"/proc/{old}")
    assert "ended (-9)" in table(paths, "status")
    with pytest.raises(PreconditionError, match=r"n1/forwarder of lab .* does not run"):
        broken.kill("forwarder@n1")
    new = broken.start("forwarder@n1")
    assert new != old
    first, again = (json.loads(line) for line in log.read_text().splitlines() if "environ" in line)
    for what in ("environment", "argv", "ids", "netns", "capabilities", "cwd", "fds"):
        assert again[what] == first[what], what
    assert "ended" not in table(paths, "status")
    with pytest.raises(TakenError, match=f"n1/forwarder runs already, as pid {new}"):
        broken.start("forwarder@n1")
    assert state.born(paths)["n1/forwarder"].mark.pid == new  # where `down` and `logs` look


def test_whoever_is_for_later_starts_when_somebody_starts_it(paths, broken):
    assert "spare" not in table(paths, "status")
    with pytest.raises(PreconditionError, match=r"n3/spare of lab .* does not run"):
        broken.pids("spare")
    pid = broken.start("endpoint:spare")
    assert os.readlink(f"/proc/{pid}/ns/net") == (
        f"net:[{topology.inode_named(paths.namespace('spare'))}]"
    )
    assert f"n3/spare     {pid} ready" in table(paths, "status")
    broken.kill("spare")
    broken.start("spare")


def test_a_full_disk_takes_nothing_until_there_is_room(paths, broken):
    note = Path(paths.disk("c")) / "note"
    note.write_bytes(b"x" * 4096)
    broken.fill("c")
    with pytest.raises(OSError, match="No space left"):
        note.write_bytes(b"x" * 8192)
    assert "the disk of c is full" in table(paths, "status")
    broken.mend()
    note.write_bytes(b"x" * 8192)
    note.unlink()
    with pytest.raises(NotFoundError, match="no cluster 'd' with a disk"):
        broken.fill("d")


def test_a_workloads_interface_goes_down_and_up_by_name_or_with_all_others(paths, broken):
    where = paths.namespace("app")
    subprocess.run(["ip", "-n", where, "link", "add", "nsm-1", "type", "bridge"], check=True)
    for name in ("nsm-1", "*"):
        broken.interface("app", name, up=True)
        assert topology.device(where, "nsm-1").up
        broken.interface("app", name, up=False)
        assert not topology.device(where, "nsm-1").up


def test_a_program_of_the_authors_is_back_when_it_listens(paths, broken):
    old = broken.kill("app.serve", signal.SIGTERM)
    assert broken.start("program:app.serve") != old
    assert reachable(paths, "app", 8080)


def reachable(paths: Paths, place: str, port: int) -> bool:
    listing = subprocess.run(
        ["ip", "netns", "exec", paths.namespace(place), "ss", "-Hltn", f"sport = :{port}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return str(port) in listing.stdout


def test_the_frozen_stand_still_and_can_still_be_asked_to_end(paths, broken):
    pid = broken.freeze("nsmgr@n1")
    assert "State:\tT" in Path(f"/proc/{pid}/status").read_text()
    assert "stands still" in table(paths, "status")
    broken.thaw("nsmgr@n1")
    assert "State:\tT" not in Path(f"/proc/{pid}/status").read_text()
    start = time.monotonic()
    broken.freeze("nsmgr@n1", seconds=0.2)
    assert time.monotonic() - start >= 0.2
    broken.freeze("nsmgr@n1")
    broken.kill("nsmgr@n1", signal.SIGTERM)
    broken.start("nsmgr@n1")


def test_a_workloads_namespace_ends_with_all_in_it_and_is_made_anew(paths, broken):
    name = paths.namespace("app")
    old, client = topology.cookie_named(name), broken.pids("client:app")
    broken.end_namespace("app")
    assert name not in list_named()
    assert not os.path.exists(f"/proc/{client}")
    assert "app has ended" in table(paths, "status")
    with pytest.raises(PreconditionError, match=r"app of lab .* has ended already"):
        broken.end_namespace("app")
    broken.renew("app")
    assert topology.cookie_named(name) not in (0, old)
    assert state.read(paths).namespaces[name] == topology.cookie_named(name)
    assert os.readlink(f"/proc/{broken.pids('app')}/ns/net") == (
        f"net:[{topology.inode_named(name)}]"
    )
    assert os.path.exists(paths.resolv_conf("app"))
    assert reachable(paths, "app", 8080)


def test_an_unplugged_node_loses_its_carrier_and_keeps_its_addresses(paths, broken):
    before = topology.addresses(paths.namespace("n2"), "eth0")
    assert len(before) == 2
    broken.link("n2", up=False)
    assert not topology.carries(paths.namespace("n2"), "eth0")
    assert reaches(paths, "n1", "198.18.0.2") == [0]
    assert "n2 is unplugged" in table(paths, "status")
    broken.link("n2", up=True)
    assert topology.addresses(paths.namespace("n2"), "eth0") == before
    assert reaches(paths, "n1", "198.18.0.2", "fd00:18::2") == [2, 2]


def test_parts_lose_one_another_silently_both_ways_and_find_one_another_again(paths, broken):
    with pytest.raises(InvalidError, match="n1 is in two"):
        broken.partition(["n1"], ["n1", "n2"])
    broken.partition(["n1"], ["n2"])
    assert reaches(paths, "n1", "198.18.0.2", "fd00:18::2", "198.18.0.3") == [0, 0, 2]
    assert reaches(paths, "n2", "198.18.0.1", "fd00:18::1", "198.18.0.3") == [0, 0, 2]
    broken.partition(["n1", "n2"], ["n3"])
    assert reaches(paths, "n1", "198.18.0.2", "198.18.0.3") == [2, 0]
    assert "n1, n2 | n3 are apart" in table(paths, "status")
    broken.mend()
    assert reaches(paths, "n1", "198.18.0.2", "198.18.0.3") == [2, 2]
    assert faults.standing(paths) == faults.Standing()


def test_a_rate_holds_until_it_is_taken_back_to_that_of_the_file(paths, broken):
    def shaped(node: str) -> str:
        name = paths.namespace(node)
        said = subprocess.run(
            ["tc", "-n", name, "qdisc", "show", "dev", "eth0"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return said.stdout

    for node, own in (("n1", ""), ("n2", "rate 100Mbit")):
        broken.rate(node, 1_000_000)
        assert "rate 1Mbit" in shaped(node)
        broken.rate(node, None)
        assert own in shaped(node)
        assert "rate 1Mbit" not in shaped(node)
    assert "tbf" not in shaped("n1")


def test_a_node_goes_with_all_it_has_and_comes_back_with_cables_and_processes(paths, broken):
    old = {who: broken.pids(who) for who in ("nsmgr@n2", "forwarder@n2", "endpoint:resp")}
    broken.partition(["n1"], ["n2"])
    broken.end_node("n2")
    assert {paths.namespace("n2"), paths.namespace("resp")}.isdisjoint(list_named())
    assert not any(os.path.exists(f"/proc/{pid}") for pid in old.values())
    assert topology.device(paths.namespace("sw"), "p2") is None
    assert "n2 has ended" in table(paths, "status")
    broken.start_node("n2")
    assert reaches(paths, "n2", "198.18.0.1", "198.18.0.3") == [0, 2]  # they are apart as before
    broken.mend()
    assert reaches(paths, "n1", "198.18.0.2", "fd00:18::2") == [2, 2]
    assert all(broken.pids(who) != pid for who, pid in old.items())
    assert engine.node_health(*engine.running(paths.lab)) == dict.fromkeys(("n1", "n2", "n3"), True)
    with pytest.raises(PreconditionError, match=r"n2 of lab .* is there: it has not ended"):
        broken.start_node("n2")

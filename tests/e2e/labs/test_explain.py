"""A wire is broken in every place, one after the other, and what says so is read."""

import base64
import json
import os
import re
import shlex
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from labs import engine
from labs.faults import Faults
from nsm.kernel import owner, topology
from tests.e2e.labs.test_labs import COMMAND, names, nsmctl
from tests.support import scrapes
from tests.support.wait import until, write

LAB = names("explained")
PAGE = (Path(__file__).parents[3] / "docs/seeing.md").read_text()
FILE = """
name: explained
topology:
  clusters:
    east: {trust-domain: east.test}
  nodes:
    east-1: {cluster: east}
    east-2: {cluster: east}
    lan: {kind: switch}
  links:
    - {endpoints: ["east-1:eth0", "lan:p1"]}
    - {endpoints: ["east-2:eth0", "lan:p2"]}
  underlay: {ipv4: 198.18.0.0/24}
services:
  db:
    payload: ip
    endpoints:
      server:
        on: east-2
        prefixes: [172.16.1.0/24]
        dns: [{servers: [172.16.1.0], domains: [db.test]}]
clients:
  app: {on: east-1, connect: ["kernel://db/nsm-1"]}
"""
RULES = """
kind: NetworkService
metadata: {name: db}
spec:
  payload: IP
  matches: [{source_selector: {tier: web}, routes: [{destination_selector: {}}]}]
"""
NAMESERVER = """
import socket, sys
own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own.bind(("172.16.1.0", 53))
print("up", flush=True)
while True:
    data, whom = own.recvfrom(512)
    own.sendto(data[:2] + b"\\x81\\x80" + data[4:], whom)
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("lab") / "explained.yaml"
    file.write_text(FILE)
    # by whom a wire is sealed decides by which way a key is changed behind its back
    more = {**scrapes.SETTINGS, "NSM_WIREGUARD": "userspace"}
    done = nsmctl("lab", "up", str(file), "--name", LAB, **more)
    try:
        assert done.returncode == 0, done.stderr
        yield LAB
    finally:
        nsmctl("lab", "down", LAB)


@pytest.fixture
def faults(lab: str) -> Faults:
    return Faults(*engine.running(lab))


def ip(place: str, command: str) -> None:
    words = ["ip", "-n", f"{LAB}-{place}", *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}"


async def test_an_outage_is_written_down_summed_up_and_counted(lab: str) -> None:
    def reported() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(
            nsmctl("heal", "report", "--lab", lab, "--json").stdout
        )
        return found

    assert nsmctl("heal", "report", "--lab", lab).stdout == "no outage\n"
    ip("app", "link set nsm-1 down")
    (one,) = await until(reported, "the outage is over and in the report", bar=4.0)
    assert (one["cause"], one["n"], one["lost"], one["cut"]) == ("data", 1, 0, 1)
    assert 0 < one["noticed_median"] == one["noticed_max"] < one["healed_max"]
    write("a client's interface that is set down: healed", one["healed_max"], 2.0)
    assert one["healed_p99"] is None
    shown = nsmctl("heal", "report", "--lab", lab).stdout
    assert re.search(r"^data +1 +0 +1 +[0-9.]+ s ", shown, re.MULTILINE), shown
    figures = scrapes.of_lab(lab)
    app = figures["east-1/app"]
    assert app["vwire_heals_total", "data"] == 1
    assert app["vwire_outage_seconds_total", "data"] == pytest.approx(one["healed_max"], abs=0.01)


def test_every_process_of_a_mesh_serves_its_figures(lab: str) -> None:
    figures = scrapes.of_lab(lab)
    assert figures.keys() == {
        *(f"east-{n}/{one}" for n in (1, 2) for one in ("nsmgr", "forwarder")),
        "east-1/issuer", "east-1/registry", "east-1/app", "east-2/server",
    }  # fmt: skip
    for who, one in figures.items():
        program = next(value for name, *value in one if name == "vwire_ready")
        assert one["vwire_ready", *program] == 1, who
        assert one["vwire_tasks",] > 1, who
        assert one["vwire_open_fds",] > 5, who
        assert one["vwire_pss_bytes",] > 1 << 20, who
    asked = ("vwire_requests_total", "OK", "networkservice.NetworkService/Request")
    for who in ("east-1/nsmgr", "east-1/forwarder", "east-2/forwarder", "east-2/server"):
        assert figures[who][asked] >= 1, who
        buckets = [v for k, v in figures[who].items() if k[0] == "vwire_request_seconds_bucket"]
        assert max(buckets) >= 1, who
    for who in ("east-1/forwarder", "east-2/forwarder"):
        assert figures[who]["vwire_wires", "wireguard"] == 1
    assert figures["east-1/app"]["vwire_wires", "kernel"] == 1
    assert figures["east-1/registry"]["vwire_registrations", "service"] >= 1


def test_every_command_of_the_page_is_answered_and_its_table_has_every_figure(lab: str) -> None:
    *asked, served = re.findall(r"(?m)^    sudo (.+)$", PAGE)
    assert shlex.split(served)[:2] == [f"{key}={value}" for key, value in scrapes.SETTINGS.items()]
    assert asked.pop(0).startswith("nsmctl lab up ")  # as this lab is, with the settings served
    assert len(asked) == 4
    for line in asked:
        words = line.replace("one-node", lab).replace("icmp-responder", "db").split()
        done = nsmctl(*words[1:])
        assert (done.returncode, done.stderr) == ("explain" in words, ""), line  # nobody's DNS
        assert ("--json" in words) == (done.stdout[0] in "{["), line
    told = set(re.findall(r"`(vwire_\w+)`", PAGE))
    shown = {name for one in scrapes.of_lab(lab).values() for name, *_ in one}
    shown = {re.sub("_(bucket|count|sum|created)$", "", name) for name in shown}
    assert shown <= told, "of leases and probes nobody here tells"
    assert told - shown <= {"vwire_leases", "vwire_probes"}


def explained(*more: str, target: str = "db") -> tuple[int, dict[str, tuple[bool | None, str]]]:
    done = nsmctl("explain", "app", target, "--lab", LAB, "--json", *more)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    (wire,) = json.loads(done.stdout)["wires"]
    lines = {one["name"]: (one["well"], one["found"]) for one in wire["lines"]}
    for one in wire["lines"]:
        assert (one["well"] is False) == bool(one["fix"]), one
    return done.returncode, lines


def broken(line: str, *, target: str = "db") -> str:
    """What is said to be broken, which is that line: all before it are well."""
    code, lines = explained(target=target)
    assert list(lines)[-1] == line, lines
    assert [name for name, (well, _) in lines.items() if well is False] == [line]
    assert code == 1
    return lines[line][1]


@contextmanager
def key_changed() -> Iterator[None]:
    """The client's end has other secrets with the far one than that has."""

    def told(*lines: str) -> str:
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(5)
            asking.connect(path)
            asking.sendall("\n".join((*lines, "", "")).encode())
            said = b""
            while not said.endswith(b"\n\n"):
                said += asking.recv(1 << 16)
        return said.decode()

    device = topology.device(f"{LAB}-app", "nsm-1")
    assert device is not None
    mark = owner.Mark.parse(device.alias)
    assert mark is not None
    path = f"/run/wireguard/{owner.tunnel_name(mark.wire, mark.side)}.sock"
    told_now = dict(line.split("=", 1) for line in told("get=1").split() if "=" in line)
    peer = f"public_key={told_now['public_key']}"
    again = (peer, f"endpoint={told_now['endpoint']}", "allowed_ip=0.0.0.0/0", "allowed_ip=::/0")
    other = base64.b16encode(os.urandom(32)).decode().lower()
    assert "errno=0" in told("set=1", peer, "remove=true", *again, f"preshared_key={other}")
    try:
        yield
    finally:
        assert "errno=0" in told("set=1", peer, "remove=true", *again)


@contextmanager
def done_and_undone(place: str, do: str, *undo: str) -> Iterator[None]:
    ip(place, do)
    try:
        yield
    finally:
        for command in undo:
            ip(place, command)


@contextmanager
def unplugged(faults: Faults) -> Iterator[None]:
    """The far node's cable, however long it takes to ask about it: its forwarder would end what
    comes from a node that is silent for seconds, and the client, which stands still, asks for
    nothing anew."""
    faults.freeze("forwarder@east-2")
    try:
        with done_and_undone("east-2", "link set eth0 down", "link set eth0 up"):
            yield
    finally:
        faults.thaw("forwarder@east-2")


@contextmanager
def lease_gone(path: str) -> Iterator[None]:
    with sqlite3.connect(path, timeout=5) as store:
        rows = store.execute("SELECT * FROM leases").fetchall()
        store.execute("DELETE FROM leases")
    store.close()
    try:
        yield
    finally:
        with sqlite3.connect(path, timeout=5) as store:
            store.executemany(f"INSERT INTO leases VALUES ({','.join('?' * len(rows[0]))})", rows)
        store.close()


@contextmanager
def silent() -> Iterator[None]:
    topology.cut_off(f"{LAB}-server", ["172.16.1.1/32"])
    try:
        yield
    finally:
        topology.cut_off(f"{LAB}-server", [])


@contextmanager
def nameserver() -> Iterator[None]:
    words = ["ip", "netns", "exec", f"{LAB}-server", sys.executable, "-c", NAMESERVER]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout
            assert serving.stdout.readline() == "up\n"
            yield
        finally:
            serving.kill()


def test_on_a_node_its_own_forwarder_and_manager_are_asked(lab: str) -> None:
    store = engine.running(lab)[1].node("east-1", "forwarder.sqlite")
    asked = [*COMMAND, "explain", "app-0", "--store", store]
    done = nsmctl("lab", "exec", "--lab", lab, "east-1", "--", *asked)
    assert done.returncode == 1, done.stdout + done.stderr
    head, *lines, last = done.stdout.splitlines()
    assert head == "app to db  (app-0)"
    assert [line[2] for line in lines] == ["\N{CHECK MARK}"] * 10
    assert "link: nsm-1 in app (tun)" in done.stdout
    assert last.startswith("  \N{BALLOT X} DNS: ")
    done = nsmctl("lab", "exec", "--lab", lab, "east-1", "--", *asked[:-1], "/none.sqlite")
    assert done.returncode == 3
    assert "/none.sqlite cannot be used: unable to open" in done.stderr


async def test_each_thing_that_breaks_a_wire_has_its_line_and_the_first_ends_the_walk(
    lab: str, faults: Faults, tmp_path: Path
) -> None:
    store = engine.running(lab)[1].node("east-1", "forwarder.sqlite")
    faults.freeze("client:app")  # or it heals what is broken before anybody has looked
    assert broken("registration", target="nothing") == "nobody offers 'nothing'"
    device = topology.device(f"{lab}-app", "nsm-1")
    assert device is not None
    mtu = device.mtu
    own = "172.16.1.1/32 dev nsm-1"
    back = "route replace 172.16.1.0/32 dev nsm-1 proto 78"  # goes with the link and the address
    cases: list[tuple[str, str, Callable[[], Any]]] = [
        ("lease", "no forwarder of east-1 holds", lambda: lease_gone(store)),
        ("link", "nsm-1 in app is down", lambda: done_and_undone(
            "app", "link set nsm-1 down", "link set nsm-1 up", back)),
        ("address", "172.16.1.1/32 is missing on nsm-1 in app", lambda: done_and_undone(
            "app", f"addr del {own}", f"addr add {own}", back)),
        ("route", "172.16.1.0/32 does not lead into nsm-1 in app", lambda: done_and_undone(
            "app", "route del 172.16.1.0/32 dev nsm-1", back)),
        ("tunnel", "east-1 (198.18.0.1) does not reach 198.18.0.2", lambda: unplugged(
            faults)),
        ("handshake", "do not agree on keys: there was none", key_changed),
        ("packets", "172.16.1.0 does not answer pings from app", silent),
        ("MTU", f"nsm-1 in app has 1300, agreed are {mtu}", lambda: done_and_undone(
            "app", "link set nsm-1 mtu 1300", f"link set nsm-1 mtu {mtu}")),
    ]  # fmt: skip
    for line, says, break_ in cases:
        with break_():
            assert says in broken(line), line
        if line in ("tunnel", "handshake"):  # what the kernel and wireguard-go mend in their time
            await until(lambda: "DNS" in explained()[1], f"the {line} is well again", bar=6.0)
    assert "172.16.1.0 answers no question" in broken("DNS")
    with nameserver():
        done = nsmctl("explain", "app", "--lab", lab)
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(re.findall(r"^  \N{CHECK MARK} ", done.stdout, re.MULTILINE)) == 11
    faults.freeze("endpoint:server")  # or it registers its service again, without rules
    rules = tmp_path / "rules.yaml"
    rules.write_text(RULES)
    assert nsmctl("define", str(rules), "--lab", lab, "-n", "server").returncode == 0
    assert "to nobody, and not to server" in broken("policy")
    done = nsmctl("explain", "app", "--lab", lab)
    assert re.search(
        r"^  \N{BALLOT X} policy: .*  fix: change the rules", done.stdout, re.MULTILINE
    )
    faults.thaw("endpoint:server")
    faults.thaw("client:app")


def test_who_asks_of_nobody_is_told_who_there_is(lab: str) -> None:
    done = nsmctl("explain", "nobody", "--lab", lab)
    assert done.returncode == 1
    assert "has no client 'nobody'" in done.stderr
    assert "it has app" in done.stderr

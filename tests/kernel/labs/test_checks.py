"""The checks against a wire made by hand: green where it carries, red with its words where not."""

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator

import pytest

from labs import engine, state
from labs.checks import Checks, Result
from labs.hands import Hands
from labs.lab import parse
from labs.paths import Paths
from labs.processes import Stage
from labs.wires import answers, wires
from nsm.kernel import owner, topology
from nsm.kernel.topology import Plug
from tests.kernel.labs.test_engine import STANDIN
from tests.support.wait import write

pytestmark = pytest.mark.long

TEXT = """\
name: NAME
topology:
  clusters: {c: {}}
  nodes: {n1: {cluster: c}, sw: {kind: switch}}
  links: [{endpoints: ["n1:eth0", "sw:p1"]}]
  underlay: {ipv4: 198.18.0.0/24}
services:
  y: {endpoints: {resp: {on: n1, prefixes: [172.16.1.0/24]}}}
clients:
  app: {on: n1, connect: ["kernel://y/nsm-1"]}
  outsider: {on: n1, netns-only: true}
checks:
CHECKS
"""
Ask = Callable[..., Result]


@pytest.fixture
def ask(request: pytest.FixtureRequest) -> Iterator[Ask]:
    """Runs a check, written as in a lab file, on a lab with one hand-made wire app - resp."""
    name = f"c{os.getpid() % 10000}-{abs(hash(request.node.name)) % 1000}"
    paths = Paths(name)
    text = TEXT.replace("NAME", name).replace("checks:\nCHECKS\n", "")
    with state.locked(paths, create=True):
        engine.up(parse(text, "x"), text, "x", modules=STANDIN)
    try:
        topology.cable(Plug(f"{name}-app", "nsm-1"), Plug(f"{name}-resp", "nsm-r"), 1400)
        topology.configure(f"{name}-app", "nsm-1", ["172.16.1.1/24", "2001:db8::1/64"])
        topology.configure(f"{name}-resp", "nsm-r", ["172.16.1.2/24", "2001:db8::2/64"])
        told = {
            "event": "up", "id": "app-0", "service": "y", "endpoint": "resp-abc12",
            "interface": "nsm-1", "src": ["172.16.1.1/24", "2001:db8::1/64"],
            "dst": ["172.16.1.2/24", "2001:db8::2/64"], "ms": 7.5, "stages": {"dial": 2.5},
        }  # fmt: skip
        with open(paths.status("app"), "a") as out:
            out.write(json.dumps(told) + "\n")
        with Hands() as hands:

            def run(*checks: str) -> Result:
                lines = "\n".join(f"  - {c}" for c in checks)
                lab = parse(TEXT.replace("NAME", name).replace("CHECKS", lines), "x")
                asked = Checks(lab, paths, hands)
                return [asked.run(check) for check in lab.checks][-1]

            run.namespace = lambda place: f"{name}-{place}"  # type: ignore[attr-defined]
            run.paths = paths  # type: ignore[attr-defined]
            run.hands = hands  # type: ignore[attr-defined]
            yield run
    finally:
        with state.locked(paths, create=False):
            engine.down(paths)


def ip(ask: Ask, place: str, *words: str) -> None:
    subprocess.run(["ip", "-n", ask.namespace(place), *words], check=True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("{name: a, ping: {from: app, to: resp}}", id="there"),
        pytest.param("{name: a, ping: {from: resp, to: app}}", id="back"),
        pytest.param("{name: a, ping: {from: '*', to: '*', family: both}}", id="all"),
        pytest.param("{name: a, ping: {from: app, to: resp, size: mtu}}", id="full packets"),
        pytest.param(
            "{name: a, ping: {from: app, to: resp, size: mtu+1}, expect: {lost: all}}",
            id="one byte more",
        ),
        pytest.param(
            "{name: a, ping: {from: outsider, to: resp}, expect: {lost: all}}", id="an outsider"
        ),
        pytest.param("{name: a, udp: {from: app, to: resp, family: both}}", id="datagrams"),
        pytest.param("{name: a, udp: {from: resp, to: app, size: mtu}}", id="full datagrams"),
        pytest.param(
            "{name: a, udp: {from: app, to: resp, size: mtu+1}, expect: {lost: all}}",
            id="too large ones",
        ),
        pytest.param(
            "{name: a, udp: {from: outsider, to: resp}, expect: {lost: all}}",
            id="an outsider's datagrams",
        ),
        pytest.param("{name: a, tcp: {from: app, to: resp, bytes: 3MB}}", id="a transfer"),
        pytest.param("{name: a, tcp: {from: resp, to: app, bytes: 1B, family: ipv6}}", id="1 B"),
        pytest.param(
            "{name: a, wire: {client: app}, expect: {mechanism: veth, mtu: 1400}}", id="wire"
        ),
        pytest.param(
            "{name: a, tcp: {from: app, to: resp, bytes: 1B, port: 6666}}", id="to a given port"
        ),
        pytest.param("{name: a, wire: {client: app}, expect: {endpoint: resp}}", id="its far end"),
        pytest.param("{name: a, stop: {process: resp}}", id="an end"),
        pytest.param("{name: a, exec: {in: app, command: ip link show nsm-1}}", id="a command"),
        pytest.param(
            "{name: a, exec: {in: n1, command: 'false'}, expect: {exit: 1}}", id="a status"
        ),
        pytest.param(
            "{name: a, exec: {in: app, command: env},"
            " expect: {output: 'NSM_CONNECT_TO=unix:///run/vwire/labs/c'}}",
            id="who knows the way",
        ),
        pytest.param(
            "{name: a, exec: {in: outsider, command: nsmctl --version}}", id="our own command"
        ),
        pytest.param("{name: a, exec: {in: sw, command: bridge link}}", id="on a switch"),
    ],
)  # fmt: skip
def test_a_check_holds_on_a_wire_that_carries(ask, check):
    result = ask(check)
    assert result.holds, result.says


@pytest.mark.parametrize("place", ["app", "n1", "outsider"])
def test_a_command_is_whom_the_issuer_knows_in_its_place(ask, place):
    with open(ask.paths.cluster("c", "entries.json")) as file:
        known = [e for e in json.load(file) if e["netns"].endswith(f"/{ask.namespace(place)}")]
    gid = known[-1]["gid"]
    assert gid
    check = {"name": "a", "exec": {"in": place, "command": "id"}}
    found = ask(json.dumps({**check, "expect": {"output": f" gid={gid} groups={gid}"}}))
    assert found.holds, found.says


@pytest.mark.parametrize(
    ("fault", "check", "says"),
    [
        pytest.param(
            ("resp", "link", "set", "nsm-r", "down"),
            "{name: a, ping: {from: app, to: resp, family: ipv4, count: 2}}",
            "app -> resp 172.16.1.2: 2 of 2 lost",
            id="the far end is down",
        ),
        pytest.param(
            ("resp", "-6", "addr", "flush", "dev", "nsm-r"),
            "{name: a, ping: {from: app, to: resp, count: 2}}",
            "app -> resp 2001:db8::2: 2 of 2 lost",
            id="one family is gone",
        ),
        pytest.param(
            ("resp", "link", "set", "nsm-r", "mtu", "1300"),
            "{name: a, ping: {from: app, to: resp, size: mtu, family: ipv4, count: 2}}",
            "app -> resp 172.16.1.2: 2 of 2 lost",
            id="full packets do not fit",
        ),
        pytest.param(
            ("app", "addr", "add", "172.16.1.2/32", "dev", "lo"),
            "{name: a, ping: {from: app, to: resp, family: ipv4, count: 2}}",
            "app -> resp: 0 arrived, expected 2, as were answered",
            id="somebody else answers",
        ),
        pytest.param(
            ("resp", "link", "set", "nsm-r", "down"),
            "{name: a, udp: {from: app, to: resp, family: ipv4, count: 1}}",
            "app -> resp 172.16.1.2: 1 of 1 lost",
            id="datagrams to a far end that is down",
        ),
        pytest.param(
            ("app", "link", "show", "lo"),
            "{name: a, udp: {from: app, to: resp, family: ipv4}, expect: {lost: all}}",
            "app -> resp 172.16.1.2: 3 arrived, expected none",
            id="datagrams that arrive and must not",
        ),
        pytest.param(
            ("app", "link", "set", "nsm-1", "mtu", "1401"),
            "{name: a, wire: {client: app}, expect: {mtu: 1400}}",
            "app's nsm-1 has MTU 1401, expected 1400",
            id="another MTU",
        ),
        pytest.param(
            ("app", "link", "set", "nsm-1", "name", "other"),
            "{name: a, wire: {client: app}, expect: {mechanism: veth}}",
            "app has no interface nsm-1",
            id="another name",
        ),
        pytest.param(
            ("app", "link", "set", "nsm-1", "down"),
            "{name: a, tcp: {from: app, to: resp, bytes: 1MB, family: ipv4}}",
            "app -> resp 172.16.1.2: ",
            id="a transfer that cannot begin",
        ),
        pytest.param(
            ("app", "link", "show", "lo"),
            "{name: a, ping: {from: app, to: resp, service: z}}",
            "no wire of z joins app and resp",
            id="no wire of that service",
        ),
        pytest.param(
            ("app", "link", "show", "lo"),
            "{name: a, exec: {in: app, command: ip link show nsm-7}}",
            'ip ended with status 1, expected 0: Device "nsm-7" does not exist.',
            id="a command that fails",
        ),
    ],
)
def test_a_fault_turns_the_check_red_and_the_check_says_which(ask, fault, check, says):
    ip(ask, *fault)
    result = ask(check)
    assert not result.holds
    assert says in result.says


def told_to_lead(ask: Ask, endpoint: str) -> None:
    """Let the client say that its wire leads there now."""
    with open(ask.paths.status("app")) as there:  # type: ignore[attr-defined]
        told = json.loads(there.read().splitlines()[-1])
    with open(ask.paths.status("app"), "a") as out:  # type: ignore[attr-defined]
        out.write(json.dumps({**told, "endpoint": endpoint}) + "\n")


def test_a_wire_may_take_its_time_to_lead_where_it_must(ask):
    told_to_lead(ask, "another")
    check = "{name: a, wire: {client: app, within: WITHIN}, expect: {endpoint: resp}}"
    red = ask(check.replace("WITHIN", "200ms"))
    assert not red.holds
    assert red.says == "app's nsm-1 leads to another, expected resp"
    assert red.seconds >= 0.2
    later = threading.Timer(0.3, told_to_lead, (ask, "resp-abc12"))
    later.start()
    found = ask(check.replace("WITHIN", "10s"))
    later.join()
    assert found.holds, found.says
    assert 0.3 <= found.seconds < 5


def test_who_is_to_end_must_have_run(ask):
    check = "{name: a, stop: {process: resp}}"
    mark = state.born(ask.paths)["n1/resp"].mark
    assert mark.alive
    assert ask(check).says == "n1/resp has ended"
    assert not mark.alive
    red = ask(check)
    assert not red.holds
    assert red.says == "n1/resp does not run"


def test_an_outsider_who_gets_in_turns_its_check_red(ask):
    topology.cable(
        Plug(ask.namespace("outsider"), "back"), Plug(ask.namespace("resp"), "door"), 1500
    )
    topology.configure(ask.namespace("outsider"), "back", ["10.9.0.1/24"])
    topology.configure(ask.namespace("resp"), "door", ["10.9.0.2/24"])
    ip(ask, "outsider", "route", "add", "172.16.1.2", "via", "10.9.0.2")
    check = "{name: a, ping: {from: outsider, to: resp, count: 2}, expect: {lost: all}}"
    result = ask(check)
    assert not result.holds
    assert "outsider -> resp 172.16.1.2: 2 of 2 answered, expected none" in result.says
    assert "outsider -> resp: 2 arrived, expected none" in result.says
    assert result.figures["arrived"] == 2


def test_a_capture_counts_what_passes_a_cable_meanwhile(ask):
    # a tunnel by hand over the lab's cable: the switch sees what is in it
    ip(ask, "n1", "link", "add", "vx", "type", "vxlan", "id", "77", "remote", "198.18.0.9",
       "local", "198.18.0.1", "dstport", "4789", "dev", "eth0")  # fmt: skip
    ip(ask, "n1", "addr", "add", "10.8.0.1/24", "dev", "vx")
    ip(ask, "n1", "link", "set", "vx", "up")
    for device in ("eth0 198.18.0.9", "vx 10.8.0.9"):
        name, address = device.split()
        ip(ask, "n1", "neigh", "replace", address, "lladdr", "02:00:00:00:00:09", "dev", name)
    script = "from labs.probe import ping;ping([dict(address='10.8.0.9',size=64)],4,0.1)"
    during = f'{{name: d, exec: {{in: n1, command: PYTHON -c "{script}"}}}}'
    import sys
    from pathlib import Path

    here = Path(__file__).parents[3]
    during = during.replace("PYTHON", f"env PYTHONPATH={here} {sys.executable}")
    during = during.replace('"', '\\"')
    during = during.replace("command: ", 'command: "').replace("}}", '"}}')
    capture = "{name: c, capture: {on: 'sw:p1', during: d}, expect: {EXPECT}}"
    seen = ask(during, capture.replace("EXPECT", "sees: [vxlan, inner-icmp], never: [icmp, tcp]"))
    assert seen.holds, seen.says
    assert seen.figures["seen"]["inner-icmp"] == 4
    red = ask(during, capture.replace("EXPECT", "never: [inner-icmp]"))
    assert red.says == "4 packets of inner-icmp pass sw:p1, expected none"
    red = ask(during, capture.replace("EXPECT", "sees: [tls]"))
    assert red.says == "no packet of tls passes sw:p1"


def test_a_capture_of_the_coming_up_begins_with_the_clients_and_ends_with_them(ask):
    capture = "{name: NAME, capture: {on: 'PORT', during: up}, expect: {sees: [icmp]}}"
    lines = [f"  - {capture.replace('NAME', n).replace('PORT', n)}" for n in ("sw:p1", "n1:eth0")]
    text = TEXT.replace("NAME", ask.paths.lab).replace("CHECKS", "\n".join(lines))
    lab = parse(text, "x")
    ip(ask, "n1", "neigh", "replace", "198.18.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0")

    def echo(times: int) -> None:
        nobody = {"address": "198.18.0.9", "size": 64}
        order = {"do": "ping", "targets": [nobody], "count": times, "patience": 0.0}
        ask.hands.ask({ask.namespace("n1"): order})

    checks = Checks(lab, ask.paths, ask.hands)
    with checks.watching() as before:
        before(Stage.ENDPOINT)
        echo(2)
        before(Stage.CLIENT)
        echo(3)
    echo(4)
    for check in lab.checks:
        found = checks.run(check)
        assert found.holds, found.says
        assert found.figures["seen"] == {"icmp": 3}


def test_a_tun_is_wireguard_if_its_owner_says_so(ask):
    lab = parse(TEXT.replace("NAME", ask.paths.lab).replace("checks:\nCHECKS\n", ""), "x")

    def mechanism() -> str:
        (wire,) = wires(lab, ask.paths)
        return wire.mechanism

    ip(ask, "app", "link", "del", "nsm-1")
    ip(ask, "app", "tuntap", "add", "nsm-1", "mode", "tun")
    assert mechanism() == "tun"
    mark = owner.mark("app-0", "src", underlay=7, far="198.18.0.2:51820")
    ip(ask, "app", "link", "set", "nsm-1", "alias", str(mark))
    assert mechanism() == "tun", "anybody may say that"
    ip(ask, "app", "link", "set", "nsm-1", "group", str(owner.group("forwarder-1")))
    assert mechanism() == "wireguard"
    ip(ask, "app", "link", "set", "nsm-1", "alias", str(owner.mark("app-0", "src")))
    assert mechanism() == "tun"


def test_every_wire_is_pinged_from_both_ends(ask):
    lab = parse(TEXT.replace("NAME", ask.paths.lab).replace("checks:\nCHECKS\n", ""), "x")
    (wire,) = wires(lab, ask.paths)
    assert (wire.endpoint, wire.mechanism, wire.mtu) == ("resp", "veth", 1400)
    found = answers([wire], ask.paths, ask.hands)["app-0"]
    assert (found.sent, found.lost) == (20, 0)
    for way, took in (("there", found.there_ms), ("back", found.back_ms)):
        assert took > 0
        write(f"an echo from {way}", took / 1000, 0.005)
    ip(ask, "resp", "addr", "flush", "dev", "nsm-r")
    found = answers([wire], ask.paths, ask.hands)["app-0"]
    assert found.lost == found.sent
    assert found.there_ms is None

"""Wires for IP packets between nodes: encrypted, quick to come up, and what `wg` says of them."""

import base64
import contextlib
import ipaddress
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from labs import frames
from nsm.kernel.topology import enter_named
from tests.e2e.wires.capture import capture
from tests.e2e.wires.nodes import ANYWHERE, ROOT, Nodes, Program, addresses, far_end, flow, link
from tests.e2e.wires.sealed import SOCKETS, Sealed, kind, sealed
from tests.support.spaces import Space, kernel_state
from tests.support.wait import until, write

LAB = """
name: wires
topology:
  clusters:
    four: {trust-domain: four.test}
    six: {trust-domain: six.test, underlay: ipv6}
  nodes:
    one: {cluster: four}
    two: {cluster: four}
    six-one: {cluster: six}
    six-two: {cluster: six}
    lan: {kind: switch}
  links:
    - {endpoints: ["one:eth0", "lan:p1"]}
    - {endpoints: ["two:eth0", "lan:p2"]}
    - {endpoints: ["six-one:eth0", "lan:p3"]}
    - {endpoints: ["six-two:eth0", "lan:p4"]}
  underlay: {ipv4: 198.18.0.0/24, ipv6: "fd00:18::/64"}
services:
  v4@four: {payload: ip, endpoints: {pong: {on: two, prefixes: [172.16.1.0/24]}}}
  v6@four: {payload: ip, endpoints: {pong-v6: {on: two, prefixes: ["2001:db8:1::/64"]}}}
  both@four: {payload: ip, endpoints: {pong-both: {on: two, prefixes: [172.16.2.0/24, "2001:db8:2::/64"]}}}
  v4@six: {payload: ip, endpoints: {six-pong: {on: six-two, prefixes: [172.16.3.0/24]}}}
  v6@six: {payload: ip, endpoints: {six-pong-v6: {on: six-two, prefixes: ["2001:db8:3::/64"]}}}
  both@six: {payload: ip, endpoints: {six-pong-both: {on: six-two, prefixes: [172.16.4.0/24, "2001:db8:4::/64"]}}}
clients:
  app: {on: one, connect: ["kernel://v4/nsm-1"]}
  near: {on: two, connect: ["kernel://v4/nsm-1"]}
  six-app: {on: six-one, connect: ["kernel://v4/nsm-1"]}
"""  # noqa: E501 - a line for each
PONGS = {"v4": "pong", "v6": "pong-v6", "both": "pong-both"}
PACE = 5 if "LANE_GUEST" in os.environ else 1  # how much slower a kernel for tests is
SHORT = {"NSM_MAX_TOKEN_LIFETIME": f"{6 * PACE}s", "NSM_REQUEST_TIMEOUT": f"{1500 * PACE}ms"}
QUICK = {"NSM_PATIENCE": "100ms", "NSM_REQUEST_TIMEOUT": f"{8 * PACE}s"}
FIRST_PORT = 51820
STALL = 4.0  # seconds; a handshake that was lost is tried again after 5, by WireGuard itself


@pytest.fixture(scope="module")
def lab_text() -> str:
    return LAB


@pytest.fixture
def places(nodes: Nodes) -> Iterator[tuple[Space, Space]]:
    """The client's and the endpoint's namespace; afterwards all is as before."""
    spaces = [nodes.space(one) for one in ("app", "pong", "one", "two")]
    before = kernel_state(*spaces), [ports(one) for one in spaces]
    yield spaces[0], spaces[1]
    nodes.end_clients()
    assert (kernel_state(*spaces), [ports(one) for one in spaces]) == before


def ports(space: Space) -> set[int]:
    """The UDP ports somebody hears on in there."""
    told = space.run("ss", "-Hlun").stdout.splitlines()
    return {int(line.split()[3].rpartition(":")[2]) for line in told}


def granted(nodes: Nodes, manager: str = "one/nsmgr") -> int:
    wanted = '"method": "networkservice.NetworkService/Request"', '"code": "OK"'
    return sum(all(word in line for word in wanted) for line in nodes.now[manager].log)


async def refreshed(nodes: Nodes, times: int = 1) -> None:
    seen = granted(nodes)
    await until(lambda: granted(nodes) >= seen + times, f"{times} refreshes", bar=2 * times * PACE)


async def said(client: Program) -> dict[str, Any]:
    """What a client told last of its wire: it may say so just after it is ready."""
    await until(lambda: client.told, "what a client tells", bar=0.5, record=False)
    return client.told[-1]


def both(client: Space, endpoint: Space, device: str = "nsm-1") -> tuple[Sealed, Sealed]:
    """The two ends of a wire, as `wg` tells of them."""
    far = far_end(client, device, endpoint)["ifname"]
    return sealed(client, device), sealed(endpoint, far)


@contextlib.contextmanager
def told(nodes: Nodes, name: str, **variables: str) -> Iterator[Program]:
    """A process of the mesh with other settings for the block."""
    nodes.now[name].end()
    try:
        yield nodes.start(name, **variables).ready()
    finally:
        if nodes.now[name].status is None:
            nodes.now[name].end()
        nodes.start(name).ready()


# --- what is inside and outside --------------------------------------------------------------


@pytest.mark.parametrize("inside", ["v4", "v6", "both"])
@pytest.mark.parametrize("outside", ["four", "six"])
async def test_packets_pass_both_ways_whole_and_nothing_of_them_is_on_the_cable(
    nodes: Nodes, outside: str, inside: str
):
    port, prefix, mtu = ("p1", "", 1440) if outside == "four" else ("p3", "six-", 1420)
    client, endpoint = nodes.space(f"{prefix}app"), nodes.space(f"{prefix}{PONGS[inside]}")
    before = kernel_state(client, endpoint)
    app = nodes.client(f"{prefix}app", f"kernel://{inside}/nsm-1")
    near, far = link(client, "nsm-1"), far_end(client, "nsm-1", endpoint)
    assert kind(near) == kind(far) == "wireguard"
    assert near["mtu"] == far["mtu"] == mtu
    src, dst = addresses(client, "nsm-1"), addresses(endpoint, far["ifname"])
    families = {4} if inside == "v4" else {6} if inside == "v6" else {4, 6}
    assert {ipaddress.ip_address(one).version for one in src} == families
    assert len(src) == len(dst) == len(families)
    ours, theirs = both(client, endpoint)
    assert (ours.peer, theirs.peer) == (theirs.public, ours.public)
    assert (ours.keepalive, theirs.keepalive) == ("25", "off")
    with capture(nodes.space("lan"), port) as cable:
        for source, targets in ((client, dst), (endpoint, src)):
            for address in targets:
                whole = mtu - (48 if ":" in address else 28)
                words = ["ping", "-n", "-c1", "-W5", "-M", "do", "-p", "fade"]
                full = source.run(*words, "-s", str(whole), address)
                assert full.returncode == 0, full.stdout + full.stderr
                more = source.run(*words, "-s", str(whole + 1), address)
                assert more.returncode != 0
        seen = cable.frames()
    kinds = [frames.kinds(one, [b"\xfa\xde" * 8]) for one in seen]
    assert sum("wireguard-data" in one for one in kinds) >= 4 * len(families)
    assert not [one for one in kinds if one & {"payload", "icmp", "vxlan", "fragments"}]
    lengths = [len(one) - len(Ether()) for one in seen if "wireguard-data" in frames.kinds(one)]
    assert max(lengths) <= 1500
    layer = IP if outside == "four" else IPv6
    assert all(layer in Ether(one) for one in seen if frames.kinds(one) & {"wireguard"})
    assert app.end() == 0
    assert kernel_state(client, endpoint) == before


async def test_only_who_asked_begins_the_handshake_and_the_wire_is_up_after_it(
    nodes: Nodes, places
):
    client, endpoint = places
    with capture(nodes.space("lan"), "p1") as cable:
        app = nodes.client("app", "kernel://v4/nsm-1")
        assert await client.pings("172.16.1.0"), "the first packet"
        packets = [Ether(one) for one in cable.frames() if "wireguard" in frames.kinds(one)]
    began = [(p[IP].src, bytes(p[UDP].payload)[0]) for p in packets]
    assert began[:2] == [("198.18.0.1", 1), ("198.18.0.2", 2)]
    assert [type_ for _, type_ in began if type_ in (1, 2)] == [1, 2], "one handshake, no more"
    ours, theirs = both(client, endpoint)
    assert ours.handshake > 0
    assert theirs.handshake > 0
    assert "handshake" in (await said(app))["stages"]
    assert app.end() == 0


async def test_on_one_node_a_wire_for_ip_packets_is_a_veth_pair(nodes: Nodes, places):
    near = nodes.client("near", "kernel://v4/nsm-1")
    assert link(nodes.space("near"), "nsm-1")["linkinfo"]["info_kind"] == "veth"
    assert await nodes.space("near").pings("172.16.1.0")
    assert near.end() == 0


async def test_a_workload_that_may_configure_devices_gets_at_no_key(nodes: Nodes, places):
    """Whoever may do that could read it; so the tunnel, or the process behind it, is the node's."""
    client, _ = places
    mighty = nodes.client("app", "kernel://v4/nsm-1", privileged=True)
    assert await client.pings("172.16.1.0")
    assert link(client, "nsm-1")["linkinfo"]["info_kind"] in ("veth", "tun")
    shown = client.run("wg", "show", "nsm-1", "private-key")
    assert (shown.returncode != 0, shown.stdout) == (True, "")
    assert mighty.end() == 0
    with told(nodes, "one/forwarder", NSM_ISOLATION="in-place"):
        trusted = nodes.client("app", "kernel://v4/nsm-1", privileged=True)
        assert kind(link(client, "nsm-1")) == "wireguard"
        assert trusted.end() == 0


# --- over time -------------------------------------------------------------------------------


async def test_keys_and_ports_stay_through_refreshes_and_restarts_and_no_packet_is_lost(
    nodes: Nodes, places
):
    client, endpoint = places
    app = nodes.client("app", "kernel://v4/nsm-1", **SHORT)
    ends = [one.lasting for one in both(client, endpoint)]
    devices = link(client, "nsm-1")["ifindex"], far_end(client, "nsm-1", endpoint)["ifindex"]
    (own,) = addresses(client, "nsm-1")
    with flow(client, "172.16.1.0") as there, flow(endpoint, own) as back:
        await refreshed(nodes, 2)
        for victim in ("one/forwarder", "two/forwarder"):
            for number in (signal.SIGTERM, signal.SIGKILL):
                nodes.now[victim].end(number)
                nodes.start(victim).ready()
                await refreshed(nodes)
        now = [one.lasting for one in both(client, endpoint)]
    assert now == ends
    assert (
        link(client, "nsm-1")["ifindex"],
        far_end(client, "nsm-1", endpoint)["ifindex"],
    ) == devices
    for counts in (there, back):
        assert counts.received == counts.sent > 50, f"lost {counts.sent - counts.received}"
    # Its Close is the first the new life hears of it.
    nodes.now["one/forwarder"].end(signal.SIGKILL)
    nodes.start("one/forwarder").ready()
    assert app.end() == 0
    assert client.links() == endpoint.links() == set()


@pytest.mark.parametrize("which", ["client", "endpoint"])
async def test_an_end_that_is_lost_comes_back_with_a_new_key_and_without_a_stall(
    nodes: Nodes, places, which: str
):
    client, endpoint = places
    app = nodes.client("app", "kernel://v4/nsm-1", **SHORT)
    ours, theirs = both(client, endpoint)
    far = far_end(client, "nsm-1", endpoint)["ifname"]
    space, device = (client, "nsm-1") if which == "client" else (endpoint, far)
    before = link(space, device)["ifindex"]
    space.do("link", "del", device)
    await until(lambda: device in space.links(), f"the {which}'s device again", bar=2 * PACE)
    assert link(space, device)["ifindex"] != before
    began = time.monotonic()
    await until(lambda: client.pings("172.16.1.0"), f"packets after the {which}'s return", bar=0.5)
    assert time.monotonic() - began < STALL
    ours_now, theirs_now = both(client, endpoint)
    assert (ours_now.private == ours.private) == (which == "endpoint")
    assert (theirs_now.private == theirs.private) == (which == "client")
    assert (ours_now.peer, theirs_now.peer) == (theirs_now.public, ours_now.public)
    await refreshed(nodes)
    assert [one.lasting for one in both(client, endpoint)] == [
        ours_now.lasting, theirs_now.lasting,
    ]  # fmt: skip
    assert app.end() == 0


@pytest.mark.parametrize("node", ["one", "two"])
async def test_a_wire_whose_engine_ends_by_itself_is_made_anew_at_once(
    nodes: Nodes, places, node: str
):
    """Killed, for want of memory for example. No refresh is near, and no endpoint at fault."""
    client, endpoint = places
    with told(nodes, f"{node}/forwarder", NSM_WIREGUARD="userspace"):
        app = nodes.client("app", "kernel://v4/nsm-1")
        ours, killed = addresses(client, "nsm-1"), both(client, endpoint)[node == "two"]
        assert killed.process
        began = time.monotonic()
        os.kill(killed.process, signal.SIGKILL)
        await until(lambda: len(app.told) == 3, "the client's word", bar=1.0)
        write(f"a wire whose engine was killed on node {node}", time.monotonic() - began, 1.0)
        assert [one["event"] for one in app.told] == ["up", "down", "up"]
        assert app.told[2]["endpoint"] == app.told[0]["endpoint"]
        assert addresses(client, "nsm-1") == ours
        assert await client.pings("172.16.1.0")
        assert both(client, endpoint)[node == "two"].private != killed.private
        assert app.end() == 0


async def test_a_client_whose_namespace_is_made_anew_gets_a_wire_that_works_at_once(
    nodes: Nodes, places
):
    """As a pod's: the same name in another namespace."""
    _, endpoint = places
    ends: list[Sealed] = []
    for _ in range(2):
        with nodes.alone("app", "reborn", NSM_NETWORK_SERVICES="kernel://v4/nsm-1") as app:
            (far,) = (one.partition("/")[0] for one in (await said(app))["dst"])
            inside = ["nsenter", f"--net=/proc/{app.pid}/ns/net", "ping", "-n", "-c1", "-W5", far]
            began = time.monotonic()
            done = subprocess.run(inside, capture_output=True, text=True, check=False)
            took = time.monotonic() - began
            assert done.returncode == 0, done.stdout + done.stderr
            assert took < STALL
            write("the first packet of a client made anew", took, 0.5)
            (device,) = endpoint.links()
            ends.append(sealed(endpoint, device))
            app.end(signal.SIGKILL)
        await until(lambda: not endpoint.links(), "the end of a dead client's wire", bar=0.5)
    assert ends[0].private != ends[1].private
    assert ends[0].peer != ends[1].peer


async def test_an_endpoint_that_is_made_anew_gets_a_wire_that_works_at_once(nodes: Nodes, places):
    client, _ = places
    serving = {"NSM_SERVICE_NAMES": "mortal", "NSM_PAYLOAD": "IP"}
    first = {**serving, "NSM_CIDR_PREFIX": "172.16.7.0/24"}
    with nodes.alone("pong", "reborn-pong", **first) as doomed:
        app = nodes.client("app", "kernel://mortal/nsm-1")
        assert await client.pings("172.16.7.0")
        second = {**serving, "NSM_NAME": "heir-pong", "NSM_CIDR_PREFIX": "172.16.8.0/24"}
        heir = nodes.bear(nodes.process("pong"), "heir-pong", **second).ready()
        killed = time.monotonic()
        doomed.end(signal.SIGKILL)
        await until(
            lambda: "nsm-1" in client.links() and addresses(client, "nsm-1") == ["172.16.8.1"],
            "a wire to an endpoint made anew",
            bar=1.5,
        )
        began = time.monotonic()
        assert await client.pings("172.16.8.0"), "the first packet"
        assert time.monotonic() - began < STALL
        write("a wire to an endpoint made anew works", time.monotonic() - killed, 1.5)
        assert app.end() == 0
        assert heir.end() == 0


async def test_a_new_session_under_traffic_costs_next_to_nothing(nodes: Nodes, places):
    """What WireGuard does every two minutes, done at once: the far end is set anew by hand."""
    client, endpoint = places
    app = nodes.client("app", "kernel://v4/nsm-1", **SHORT)
    ours, theirs = both(client, endpoint)
    (own,) = addresses(client, "nsm-1")
    with flow(client, "172.16.1.0") as there, flow(endpoint, own) as back:
        for _ in range(3):
            ours.set("peer", theirs.public, "remove")
            ours.set(
                "peer", theirs.public, "endpoint", ours.endpoint,
                "persistent-keepalive", "25", "allowed-ips", "0.0.0.0/0,::/0",
            )  # fmt: skip
            await until(lambda: both(client, endpoint)[0].handshake, "a new session", bar=0.5)
            await refreshed(nodes)
    for counts in (there, back):
        assert counts.sent > 50
        assert counts.sent - counts.received < 10, "three sessions made anew, 50 packets a second"
    now_ours, now_theirs = both(client, endpoint)
    assert (now_ours.lasting, now_theirs.lasting) == (ours.lasting, theirs.lasting)
    assert app.end() == 0


# --- ports -----------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(space: Space, *numbers: int) -> Iterator[None]:
    """Somebody else has these UDP ports."""

    def hold() -> list[socket.socket]:
        enter_named(space.name)
        held = []
        for number in numbers:
            held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            held[-1].bind(("0.0.0.0", number))
        return held

    with ThreadPoolExecutor(1) as thread:
        held = thread.submit(hold).result()
        try:
            yield
        finally:
            for one in held:
                one.close()


async def test_each_wire_has_a_port_of_its_own_past_those_that_are_taken(nodes: Nodes, places):
    client, endpoint = places
    with (
        holding(nodes.space("one"), FIRST_PORT),
        holding(nodes.space("two"), FIRST_PORT, FIRST_PORT + 1, FIRST_PORT + 3),
    ):
        app = nodes.client("app", "kernel://v4/nsm-1", "kernel://v4/nsm-2")
        ends = [both(client, endpoint, name) for name in ("nsm-1", "nsm-2")]
        assert {ours.port for ours, _ in ends} == {FIRST_PORT + 1, FIRST_PORT + 2}
        assert {theirs.port for _, theirs in ends} == {FIRST_PORT + 2, FIRST_PORT + 4}
        for ours, theirs in ends:
            assert ours.endpoint == f"198.18.0.2:{theirs.port}"
            assert theirs.endpoint == f"198.18.0.1:{ours.port}"
        for far in addresses(endpoint, far_end(client, "nsm-1", endpoint)["ifname"]):
            assert await client.pings(far)
        assert app.end() == 0
    again = nodes.client("app", "kernel://v4/nsm-1")
    ours, theirs = both(client, endpoint)
    assert ours.port == theirs.port == FIRST_PORT
    assert again.end() == 0


async def test_the_first_port_is_a_setting(nodes: Nodes, places):
    client, endpoint = places
    with told(nodes, "one/forwarder", NSM_WIREGUARD_PORT="40100"):
        app = nodes.client("app", "kernel://v4/nsm-1")
        ours, theirs = both(client, endpoint)
        assert (ours.port, theirs.port) == (40100, FIRST_PORT)
        assert await client.pings("172.16.1.0")
        assert app.end() == 0


# --- what is left, and what is told ----------------------------------------------------------


async def test_a_close_leaves_no_device_process_socket_or_file(nodes: Nodes, places):
    client, endpoint = places
    app = nodes.client("app", "kernel://v4/nsm-1", "kernel://both/nsm-2")
    ends = [*both(client, endpoint), *both(client, nodes.space("pong-both"), "nsm-2")]
    assert {FIRST_PORT, FIRST_PORT + 1} <= ports(nodes.space("one")) & ports(nodes.space("two"))
    assert app.end() == 0
    assert client.links() == endpoint.links() == nodes.space("pong-both").links() == set()

    def left() -> list[object]:
        files = [f"{SOCKETS}/{end.name}.sock" for end in ends]
        files += [f"/proc/{end.process}" for end in ends if end.process]
        taken = [ports(nodes.space(node)) for node in ("one", "two")]
        return [
            *filter(os.path.exists, files),
            *(port for port in set[int]().union(*taken) if port >= FIRST_PORT),
        ]

    # a process ends after its device
    await until(lambda: not left(), "what closed wires left is taken away", bar=0.2)


async def test_no_private_key_is_in_a_file_a_log_or_a_command_line(nodes: Nodes, places):
    client, endpoint = places
    loud = {"NSM_LOG_LEVEL": "TRACE"}
    with told(nodes, "one/forwarder", **loud), told(nodes, "two/forwarder", **loud):
        app = nodes.client("app", "kernel://v4/nsm-1", **SHORT)
        ends = both(client, endpoint)
        await refreshed(nodes)
        nodes.now["one/forwarder"].end(signal.SIGKILL)
        nodes.start("one/forwarder", **loud).ready()
        await refreshed(nodes)
        raw = [base64.b64decode(end.private) for end in ends]
        assert all(len(one) == 32 for one in raw)
        secret = {form.encode() for one in raw for form in _forms(one)} | set(raw)
        files = [path for path in nodes.directory.rglob("*") if path.is_file()]
        files += [path for path in Path("/tmp").glob("vwire*") if path.is_file()]
        logs = [path for path in files if path.parent.name == "log"]
        ours = (await said(app))["path"][2]["id"].encode()
        assert any(ours in path.read_bytes() for path in logs), "the logs are not of this wire"
        processes = [end.process for end in ends if end.process]
        processes += [program.pid for program in nodes.now.values()]
        for pid in processes:
            files += [Path(f"/proc/{pid}/{what}") for what in ("cmdline", "environ")]
        told_by = [path for path in files for one in secret if one in path.read_bytes()]
        assert not told_by
        assert app.end() == 0


def _forms(raw: bytes) -> Iterator[str]:
    """All the ways a key is written."""
    yield base64.b64encode(raw).decode()
    yield base64.urlsafe_b64encode(raw).decode().rstrip("=")
    yield raw.hex()
    yield raw.hex().upper()
    yield repr(raw)[2:-1]


@contextlib.contextmanager
def without_wireguard(nodes: Nodes, name: str) -> Iterator[Program]:
    """A forwarder on a node that has no /dev/net/tun, and is not to use the kernel's."""
    nodes.now[name].end()
    (process,) = (one for one in nodes.plan.processes if one.name == name)
    hidden = "mount --make-rprivate / && mount --bind /dev/null /dev/net/tun && exec"
    start = f"{hidden} {sys.executable} -P -m forwarder"
    environment = {k: v for k, v in process.environment.items() if k != "NSM_READY_FD"}
    process = replace(
        process, module="", argv=("unshare", "-m", "sh", "-c", start), environment=environment
    )
    program = nodes.now[name] = nodes.bear(
        process, name, NSM_WIREGUARD="userspace", PYTHONPATH=str(ROOT)
    )
    yield program
    assert program.end() == 0, program.words
    nodes.start(name).ready()


def found(forwarder: Program) -> list[dict[str, str]]:
    """What a forwarder says of its WireGuard."""
    lines = [json.loads(line) for line in forwarder.log if line.startswith("{")]
    return [line for line in lines if line["event"] == "WireGuard"]


@pytest.mark.parametrize("bare", ["one/forwarder", "two/forwarder"], ids=["asks", "answers"])
async def test_where_there_is_no_wireguard_the_refusal_says_what_to_do(
    nodes: Nodes, places, bare: str
):
    client, _ = places
    for usual in ("one/forwarder", "two/forwarder"):
        (said,) = found(nodes.now[usual])
        assert said["engine"] in ("kernel", "userspace")
        assert said["why"]
    with without_wireguard(nodes, bare) as forwarder:
        await until(lambda: " ready" in forwarder.words, "the forwarder", bar=2)
        (said,) = found(forwarder)
        assert said["engine"] == "none"
        assert "/dev/net/tun" in said["why"]
        late = nodes.asks("app", "kernel://v4/nsm-1", **QUICK)
        assert late.ended()
        assert re.search(r"WireGuard, and this node has none: .*/dev/net/tun", late.words)
        assert client.links() == set()
        near = nodes.client("near", "kernel://v4/nsm-1")  # on one node none is needed
        assert near.end() == 0


# --- a far node that answers amiss -----------------------------------------------------------


@contextlib.contextmanager
def stranger(nodes: Nodes, **says: str) -> Iterator[list[dict[str, object]]]:
    """A manager on node two that answers so; yields what it heard."""
    heard = nodes.directory / "heard"
    registry = "tcp://198.18.0.1:5002"
    variables = {
        "FAR_URL": "tcp://198.18.0.2:6001", "FAR_NAME": "stranger", "FAR_SERVICE": "strange",
        "FAR_SAYS": json.dumps(says), "FAR_HEARD": str(heard), "FAR_REGISTRY": registry,
    }  # fmt: skip
    process = replace(
        nodes.process("pong"), namespace=nodes.space("two").name, gid=ANYWHERE,
        module="tests.e2e.wires.far",
    )  # fmt: skip
    program = nodes.bear(process, "stranger", **variables).ready()
    lines: list[dict[str, object]] = []
    try:
        yield lines
        lines += [json.loads(line) for line in heard.read_text().splitlines()]
        assert program.end() == 0, program.words
    finally:
        heard.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("says", "words"),
    [
        ({"dst_public_key": "bm90IGEga2V5"}, "dst_public_key"),
        ({"dst_public_key": ""}, "dst_public_key"),
        ({"dst_public_key": "OURS"}, "this node's own public key"),
        ({"dst_port": "0"}, "dst_port"),
        ({"dst_port": "99999"}, "dst_port"),
        ({"dst_ip": "198.18.0.300"}, "dst_ip"),
        ({"dst_ip": "127.0.0.1"}, "dst_ip"),
        ({"dst_ip": "fd00:18::2"}, "NSM_TUNNEL_IP on both nodes"),
        ({"MTU": "12"}, "MTU 12"),
    ],
    ids=[
        "no key",
        "empty key",
        "own key",
        "port 0",
        "no port",
        "no address",
        "loopback",
        "family",
        "mtu",
    ],
)
async def test_an_answer_that_cannot_be_is_refused_and_taken_back(
    nodes: Nodes, places, says: dict[str, str], words: str
):
    client, _ = places
    with stranger(nodes, **says) as heard:
        late = nodes.asks("app", "kernel://strange/nsm-1", **QUICK)
        assert late.ended()
        assert words in late.words
        assert client.links() == set()
        assert FIRST_PORT not in ports(nodes.space("one"))
    asked, closed = ({next(iter(one)) for one in heard[n::2]} for n in (0, 1))
    assert (asked, closed) == ({"asked"}, {"closed"})


async def test_a_far_node_that_proves_no_key_is_left_in_good_time(nodes: Nodes, places):
    client, _ = places
    with stranger(nodes) as heard:
        began = time.monotonic()
        late = nodes.asks("app", "kernel://strange/nsm-1", **QUICK)
        assert late.ended()
        took = time.monotonic() - began
        write("a handshake nobody answers", took, 3.0)
        assert took < 8, "a quarter of the client's time is for the handshake"
        assert "198.18.0.2" in late.words
        assert "51999" in late.words
        assert client.links() == set()
        assert FIRST_PORT not in ports(nodes.space("one"))
    assert [next(iter(one)) for one in heard][-1] == "closed"


# --- many ------------------------------------------------------------------------------------


@pytest.mark.long
async def test_twenty_wires_one_after_the_other_all_come_up_in_about_the_same_time(
    nodes: Nodes, places
):
    client, _ = places
    times = []
    for number in range(20):
        app = nodes.client("app", f"kernel://v4/w-{number}")
        assert await client.pings("172.16.1.0")
        times.append((await said(app))["ms"] / 1000)
        assert app.end() == 0
    median = statistics.median(times)
    write("one of 20 WireGuard wires, one after the other (median)", median, 0.1)
    write("the slowest of 20 WireGuard wires", max(times), 0.3)
    print([round(one * 1000) for one in times])
    assert max(times) < 10 * median

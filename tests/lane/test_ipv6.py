"""A kernel that was booted without IPv6: what is IPv4 works, what is not is told in a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.needs_lane
LAB = """\
name: four
topology:
  clusters: {c: {}}
  nodes: {one: {cluster: c}, two: {cluster: c}, lan: {kind: switch}}
  links: [{endpoints: ["one:eth0", "lan:p1"]}, {endpoints: ["two:eth0", "lan:p2"]}]
  underlay: {ipv4: 198.18.0.0/24}
services:
  frames: {payload: ethernet, endpoints: {pong: {on: two, prefixes: [172.16.1.0/24]}}}
  packets: {payload: ip, endpoints: {wg: {on: two, prefixes: [172.16.2.0/24]}}}
clients:
  near: {on: two, connect: ["kernel://frames/nsm-1"]}
  far: {on: one, connect: ["kernel://frames/nsm-1", "kernel://packets/nsm-2"]}
  outsider: {on: one, netns-only: true}
checks:
  - {name: all answer, ping: {from: "*", to: "*", count: 3}}
"""
SCRIPT = """\
exec 2>&1
! test -e /proc/sys/net/ipv6 || echo IPv6 is there
cd /tmp && printf %s "$LAB" >four.yaml
nsmctl() { "$PYTHON" -P -m nsmctl "$@"; }
nsmctl lab run four.yaml --json 2>/dev/null || exit
nsmctl lab run two-nodes; echo ended with $?
nsmctl lab up four.yaml >/dev/null 2>&1 || exit
NSM_NAME=six NSM_SERVICE_NAMES=six NSM_PAYLOAD=ETHERNET NSM_CIDR_PREFIX=fd00:6::/64 \\
    nsmctl lab exec wg -- "$PYTHON" -P -m endpoints.responder >six.log 2>&1 &
for _ in $(seq 40); do
    nsmctl endpoints --lab four -n two 2>/dev/null | grep -q six && break
    sleep 0.2
done
nsmctl connect kernel://six/nsm-6 --lab four -n outsider -- true; echo refused with $?
nsmctl lab down four
"""


@pytest.mark.long
def test_booted_without_ipv6_what_is_ipv4_works_and_the_rest_is_a_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "tests.lane", "-b", "ipv6.disable=1", "--", "sh", "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "LAB": LAB},
        capture_output=True, text=True, check=False, cwd=ROOT, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert "Traceback" not in done.stdout
    assert "IPv6 is there" not in done.stdout
    told, _ = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{") :])
    assert (told["failed"], told["left"]) == (0, [])
    assert {wire["mechanism"] for wire in told["wires"]} == {"veth", "vxlan", "wireguard"}
    said = done.stdout.splitlines()
    at = said.index("ended with 3")
    assert "lab two-nodes uses IPv6, and this kernel has it switched off" in said[at - 2]
    assert "ipv6.disable=1" in said[at - 1]
    (at,) = (n for n, line in enumerate(said) if line.startswith("refused with "))
    assert "this kernel has no IPv6" in " ".join(said[at - 2 : at])
    assert said[-1].endswith("left over: 0")

"""Tests that break a rule each, run only by test_rules.py, which wants to see them fail."""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
kept: list[object] = []


def sh(command: str) -> None:
    subprocess.run(command.split(), check=True)


def test_keeps_a_file_descriptor() -> None:
    kept.append(socket.socketpair())


def test_keeps_a_thread() -> None:
    thread = threading.Thread(target=threading.Event().wait, name="keeper", daemon=True)
    thread.start()


def test_keeps_a_child() -> None:
    kept.append(subprocess.Popen(["sleep", "20"]))


async def test_keeps_a_task() -> None:
    kept.append(asyncio.create_task(asyncio.Event().wait(), name="keeper of nothing"))


def test_keeps_a_file_of_ours() -> None:
    handle, path = tempfile.mkstemp(prefix="vwire-offender-")
    os.close(handle)
    kept.append(path)


def test_keeps_a_namespace() -> None:
    sh("ip netns add vwire-offender")


def test_keeps_a_link() -> None:
    sh("ip link add vwoff0 type veth peer name vwoff1")


def test_takes_a_link_away() -> None:
    sh("ip link delete vwoff2")


def test_changes_a_sysctl() -> None:
    path = Path("/proc/sys/net/ipv4/ping_group_range")
    low, high = path.read_text().split()
    path.write_text(f"{low} {int(high) - 1 if int(high) > int(low) else int(high) + 1}")


def test_adds_a_route() -> None:
    sh("ip route add blackhole 203.0.113.77/32")


def test_adds_a_rule() -> None:
    sh("ip rule add from 203.0.113.77 table 977")


def test_adds_a_table_of_nftables() -> None:
    sh("nft add table inet vwire_offender")


def test_blocks_the_loop_of_a_process() -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-P", "-m", "tests.support.program", "listdir"],
        env=environ,
        check=True,
        capture_output=True,
    )


LAB = """\
name: NAME
topology:
  clusters: {c: {}}
  nodes: {n: {cluster: c}, sw: {kind: switch}}
  links: [{endpoints: ["n:eth0", "sw:p1"]}]
  underlay: {ipv4: 198.18.0.0/24}
services:
  y: {endpoints: {offers: {on: n, prefixes: [172.16.1.0/24]}}}
"""
BLOCKING_NSMCTL = """\
from labs import processes
program = {processes.Stage.ENDPOINT: "tests.e2e.support.blocker"}
processes.MODULES = {**processes.MODULES, **program}
from nsmctl.__main__ import main
main()
"""


def test_blocks_the_loop_of_a_process_of_a_lab(tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(LAB.replace("NAME", f"blocks-{os.getpid() % 10000}"))
    subprocess.run(
        [sys.executable, "-P", "-c", BLOCKING_NSMCTL, "lab", "run", str(file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd="/",
        check=True,
        capture_output=True,
    )


def test_is_skipped_for_no_good_reason() -> None:
    pytest.skip("felt like it")


def test_is_skipped_for_the_kernel() -> None:
    pytest.skip("kernel lacks wireguard (no such device type)")


def test_keeps_the_rules() -> None:
    pass

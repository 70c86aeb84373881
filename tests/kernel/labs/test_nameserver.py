"""A lab's DNS server on a machine as Debian sets it up: nothing in /run can be executed."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import engine, nameserver, state
from labs.lab import parse
from labs.paths import Paths
from tests.kernel.labs.test_engine import STANDIN

NAME = f"dns-{os.getpid() % 10000}"
TEXT = f"""\
name: {NAME}
topology:
  clusters: {{e: {{}}, w: {{}}}}
  federation: [[e, w]]
  discovery: dns
  nodes: {{e1: {{cluster: e}}, w1: {{cluster: w}}}}
  links: [{{endpoints: ["e1:eth0", "w1:eth0"]}}]
  underlay: {{ipv4: 198.18.0.0/24}}
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[str]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "noexec", "tmpfs", tmp_path], check=True)
    yield str(tmp_path / "labs")
    subprocess.run(["umount", tmp_path], check=True)


def test_it_answers_where_nothing_in_run_can_be_executed(root: str):
    paths = Paths(NAME, root)
    with state.locked(paths, create=True):
        engine.up(parse(TEXT, "x"), TEXT, "x", modules=STANDIN, root=root)
        try:
            asked = ["dig", "+short", "@198.18.0.1", "SRV", "registry.nsm-system.w"]
            done = subprocess.run(
                ["ip", "netns", "exec", f"{NAME}-w1", *asked],
                capture_output=True, text=True, check=True, timeout=20,
            )  # fmt: skip
            assert done.stdout == "0 0 5002 registry.nsm-system.w.\n"
        finally:
            gone = engine.down(paths)
    assert gone.left == ()


def test_a_program_without_a_loader_is_executed_itself():
    assert nameserver.start("/sbin/unbound", b"\x7fELF no more", "/c d") == (
        "exec /sbin/unbound -d -p -c '/c d'\n"
    )

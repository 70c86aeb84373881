"""The lab a stranger runs first, where the kernel has WireGuard."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wait import write

ROOT = Path(__file__).parents[2]
# `ip` shows none of those that a wireguard-go process makes: they are TUN devices
CHECKS = """
  - {name: by the kernel, exec: {in: app, command: ip link show type wireguard}, expect: {output: nsm-1}}
  - {name: by the other's, exec: {in: app-six, command: ip link show type wireguard}, expect: {output: nsm-1}}
"""  # noqa: E501 - as in a file


@pytest.mark.needs_kernel("wireguard")
@pytest.mark.long
def test_two_nodes_has_its_wires_encrypted_by_the_kernel(tmp_path: Path) -> None:
    lab = tmp_path / "two-nodes.yaml"
    lab.write_text((ROOT / "labs" / "two-nodes.yaml").read_text() + CHECKS.lstrip("\n"))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "nsmctl", "lab", "run", str(lab), "--json"],
        # one processor has 20 processes, and five clients ask at once
        env={**os.environ, "NSM_DIAL_TIMEOUT": "5s"},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    told = json.loads(done.stdout)
    assert (told["failed"], told["left"]) == (0, [])
    assert [one["name"] for one in told["checks"]][-2:] == ["by the kernel", "by the other's"]
    write("two-nodes is up", told["up_s"], 10.0)

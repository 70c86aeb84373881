"""The wires of a kernel with WireGuard, measured in the lane where this machine's has none.

Ours and those by hand are both measured in there. What a second of that kernel is worth is
its own matter: its ratios count, its rates do not.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.parts import Found

ROOT = Path(__file__).parents[1]
LIMIT = 1500  # seconds


def add(found: Found, parts: Sequence[str]) -> None:
    """Run this very bench in there, and add what it found."""
    with tempfile.TemporaryDirectory(prefix="vwire-bench-") as share:
        done = subprocess.run(
            [sys.executable, "-m", "tests.lane", "-o", share, "-t", str(LIMIT), "--",
             sys.executable, "-m", "bench", "--kinds", "wireguard", "--only", ",".join(parts),
             "--out", share, "--guest"],
            check=False, cwd=ROOT, stdout=sys.stderr,
        )  # fmt: skip
        told = Path(share, "bench.json")
        if not told.exists():
            found.missing.append(f"wireguard: the lane ended with {done.returncode}; see above")
            return
        results = json.loads(told.read_text())
    for part, kinds in results["samples"].items():
        found.samples.setdefault(part, {}).update(kinds)
    found.missing += results["missing"]

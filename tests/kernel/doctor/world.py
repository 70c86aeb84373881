"""`nsmctl doctor` in a machine of its own: what is broken in there is broken nowhere else."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
FRESH = (  # a machine with an empty /run and nothing installed by others
    "set -e; mount --make-rprivate /; mount -t tmpfs none /run; mount -t tmpfs none /var/lib;"
    " ip link set lo up;"
)
NSMCTL = f"{sys.executable} -P -m nsmctl"
HERE = Path(__file__).parent
AS_NOBODY = f"{sys.executable} -P {HERE}/nobody.py"
ALL_USERS = f"{sys.executable} -P {HERE}/users.py"
FENCE = f"{sys.executable} -P {HERE}/fence.py"


@dataclass(frozen=True)
class Told:
    """What the command said."""

    code: int
    out: str
    err: str

    @property
    def whole(self) -> dict:
        return json.loads(self.out)

    def line(self, name: str) -> tuple[str, str, str]:
        """Level, what was found, what to do."""
        (line,) = (one for one in self.whole["lines"] if one["name"] == name)
        return line["level"], line["found"], line["fix"]


def inside(script: str, *, before: str = "", **variables: str) -> Told:
    """Run a shell script in namespaces of its own: mounts, network, processes.

    before is a command that starts unshare: other rights, another user namespace.
    """
    done = subprocess.run(
        [*before.split(), "unshare", "-m", "-n", "-p", "-f", "--kill-child", "--mount-proc",
         "sh", "-c", FRESH + script],
        capture_output=True, text=True, check=False, timeout=60, cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip
    return Told(done.returncode, done.stdout, done.stderr)


def doctor(broken: str = "", *, rights: str = "", before: str = "", **variables: str) -> Told:
    """Ask the doctor once `broken` was run; rights is put before the command itself."""
    script = f"{{ {broken or ':'}\n}} >&2\nexec {rights} {NSMCTL} doctor --json"
    told = inside(script, before=before, **variables)
    assert told.out.startswith("{"), f"{told.out}{told.err}"
    return told

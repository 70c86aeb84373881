"""What this process may do to the kernel, asked before it promises anybody a wire.

Measured by leaving out one after the other, in a unit of systemd (docs/systemd.md): these
four suffice for everything, whoever the forwarder's user is, and without any of them
something fails later and less plainly, or, worse, nobody notices.
"""

import os
from collections.abc import Mapping
from typing import Final

from nsm.errors import PreconditionError
from nsm.kernel import namespaces

STATUS: Final = "/proc/self/status"
NEEDED: Final[Mapping[str, int]] = {  # by their bits
    "CAP_NET_ADMIN": 12,
    "CAP_NET_BROADCAST": 11,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_PTRACE": 19,
}
WITHOUT: Final[Mapping[str, str]] = {
    "CAP_NET_ADMIN": "no device can be made",
    "CAP_NET_BROADCAST": "nobody hears that a workload is gone",
    "CAP_SYS_ADMIN": "no workload's namespace can be entered",
    "CAP_SYS_PTRACE": "nobody sees who in a workload could misuse a tunnel",
}
UNFOUND: Final = (
    "a workload's namespace is not found again on a kernel before 6.18, to take back there what"
    " failed half-way"
)


def check(whose: str, isolation: str) -> None:
    """Raises PreconditionError with the capabilities that are missing, and what for. Blocks.

    isolation is NSM_ISOLATION: who does not ask who is in a workload need not see it, where
    the kernel has another way back into a namespace than by who is in it.
    """
    with open(STATUS) as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    missing = [name for name, bit in NEEDED.items() if not held >> bit & 1]
    spare = "CAP_SYS_PTRACE" in missing and namespaces.have_handles()
    if spare and isolation != "auto":
        missing.remove("CAP_SYS_PTRACE")
    if not missing:
        return
    without = dict(WITHOUT)
    if isolation != "auto":
        without["CAP_SYS_PTRACE"] = UNFOUND
    lacks = "; ".join(f"without {name} {without[name]}" for name in missing)
    hop = ", or say NSM_ISOLATION=hop" if spare and missing == ["CAP_SYS_PTRACE"] else ""
    raise PreconditionError(
        f"forwarder {whose!r} (user {os.geteuid()}) lacks {' and '.join(missing)}: {lacks}",
        hint=f"start it as root, or give it these capabilities{hop}",
    )

"""What this process may do to the kernel, asked before it promises anybody a wire."""

import os

from nsm.errors import PreconditionError

NEEDED = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}  # make devices; enter namespaces
STATUS = "/proc/self/status"


def check(whose: str) -> None:
    """Raises PreconditionError with the capabilities that are missing. Blocks."""
    with open(STATUS) as file:
        held = next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))
    missing = [name for name, bit in NEEDED.items() if not held >> bit & 1]
    if missing:
        raise PreconditionError(
            f"forwarder {whose!r} (user {os.geteuid()}) lacks {' and '.join(missing)}, without"
            " which no wire can be made on this node",
            hint="start it as root, or give it these capabilities",
        )

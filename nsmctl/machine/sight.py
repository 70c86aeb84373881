"""Whether who is not seen does not run: a container's /proc shows its own processes only."""

import os
from typing import Final

OUTSIDE: Final = "outside of this PID namespace"
_FIRST: Final = 0xEFFF_FFFC  # the inode of a machine's first PID namespace: PROC_PID_INIT_INO


def of_everybody() -> bool:
    """Whether nobody who runs on this machine is hidden: by a PID namespace, or by hidepid=."""
    try:
        with open("/proc/1/cmdline"):
            return os.stat("/proc/self/ns/pid").st_ino == _FIRST
    except OSError:
        return False

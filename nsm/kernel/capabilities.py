"""What a program inherits of the capabilities of the thread that starts it."""

import ctypes
from collections.abc import Collection
from typing import Final

NET_ADMIN: Final = 12
_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _LOWER = 24, 47, 3
_MOST: Final = 64  # capabilities there can be

_libc = ctypes.CDLL(None, use_errno=True)


def hand_on_only(kept: Collection[int]) -> None:
    """What this thread starts from here on gets at most these; what it has itself stays.

    There is no way back, so this is for a thread that ends soon. An ordinary user's programs
    get what is ambient, root's what is not out of bounds: for root this takes CAP_SETPCAP, and
    without it they get all that root has here.
    """
    for capability in range(_MOST):
        if capability not in kept:
            # one that this kernel does not know, or that is not there, need not be lowered
            _libc.prctl(_PR_CAP_AMBIENT, _LOWER, capability, 0, 0)
            _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)

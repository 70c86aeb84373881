"""Disks of a lab's own: small ones, in memory, that can be full while the machine's is not."""

import ctypes
import os
from typing import Final

_MNT_DETACH: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)


def mount(path: str, octets: int) -> None:
    """An empty disk of that size (whole pages) at path, which is made."""
    os.makedirs(path)
    options = f"size={octets},mode=0755".encode()
    if _libc.mount(b"vwire-lab", path.encode(), b"tmpfs", 0, options) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"mount -t tmpfs {path}")


def unmount(folder: str) -> None:
    """Take away all that is mounted below a folder; nothing where nothing is."""
    with open("/proc/self/mountinfo") as file:
        places = [line.split()[4] for line in file]
    for path in sorted((p for p in places if p.startswith(f"{folder}/")), reverse=True):
        _libc.umount2(path.encode(), _MNT_DETACH)

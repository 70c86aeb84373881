"""Frames as they pass: packet sockets opened inside namespaces, read by scapy."""

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Iterator

from scapy.layers.l2 import Ether

from tests.support.spaces import Space

_ALL, _NEWNET = 0x0003, 0x4000_0000
_FORCE, _LARGEST = 33, 1 << 16  # SO_RCVBUFFORCE
_libc = ctypes.CDLL(None, use_errno=True)


class Capture:
    """What one device (or, without a name, a whole namespace) sends and receives."""

    def __init__(self, opened: socket.socket) -> None:
        self._socket = opened

    def send(self, frame: bytes) -> None:
        """Put a frame on the device, as a program with its own stack would."""
        self._socket.send(frame)

    def frames(self) -> list[bytes]:
        """Every frame since the last call."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self._socket.recv(_LARGEST))
        return found

    def packets(self) -> list[Ether]:
        return [Ether(frame) for frame in self.frames()]


@contextlib.contextmanager
def capture(space: Space, device: str = "") -> Iterator[Capture]:
    """Capture for the block."""
    opened: list[socket.socket | OSError] = []
    thread = threading.Thread(target=_open, args=(space.path, device, opened))
    thread.start()
    thread.join()
    found = opened[0]
    if isinstance(found, OSError):
        raise found
    with found:
        yield Capture(found)


def _open(path: str, device: str, opened: list[socket.socket | OSError]) -> None:
    """In a thread of its own, because it stays in the namespace it enters."""
    try:
        door = os.open(path, os.O_RDONLY)
        try:
            if _libc.setns(door, _NEWNET) < 0:
                raise OSError(ctypes.get_errno(), "setns", path)
        finally:
            os.close(door)
        made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL))
        made.setsockopt(socket.SOL_SOCKET, _FORCE, 8 << 20)
        made.setblocking(False)
        if device:
            made.bind((device, _ALL))
        opened.append(made)
    except OSError as error:
        opened.append(error)

"""What `ethtool -k` shows of a namespace's devices, by the same ioctl: not every node has it."""

import array
import fcntl
import os
import socket
import struct
from typing import Any, Final

from nsm.kernel.namespaces import Home

_SIOCETHTOOL: Final = 0x8946
_COUNT, _NAMES, _FEATURES = 0x37, 0x1B, 0x3A  # ETHTOOL_GSSET_INFO, _GSTRINGS, _GFEATURES
_SET: Final = 4  # ETH_SS_FEATURES
_NAME: Final = 32  # octets


def offloads(space: str) -> list[dict[str, Any]]:
    """An object for each device, with each feature that has a name."""
    fd = os.open(f"/run/netns/{space}", os.O_RDONLY)
    try:
        with Home() as home, home.inside(fd), socket.socket(socket.AF_INET) as asking:
            return [
                {"ifname": name, **_features(asking, name)} for _, name in socket.if_nameindex()
            ]
    finally:
        os.close(fd)


def _features(asking: socket.socket, device: str) -> dict[str, str]:
    told = _ask(asking, device, struct.pack("=IIQI", _COUNT, 0, 1 << _SET, 0))
    (count,) = struct.unpack_from("=I", told, 16)
    told = _ask(asking, device, struct.pack("=III", _NAMES, _SET, count) + bytes(count * _NAME))
    names = [
        told[at : at + _NAME].rstrip(b"\0").decode() for at in range(12, 12 + count * _NAME, _NAME)
    ]
    words = -(-count // 32)
    told = _ask(asking, device, struct.pack("=II", _FEATURES, words) + bytes(16 * words))
    found = {}
    for number, name in enumerate(names):
        bit = 1 << number % 32
        able, _, on, never = struct.unpack_from("=IIII", told, 8 + 16 * (number // 32))
        fixed = " [fixed]" if never & bit or not able & bit else ""
        if name:
            found[name] = ("on" if on & bit else "off") + fixed
    return found


def _ask(asking: socket.socket, device: str, question: bytes) -> bytes:
    room = array.array("B", question)
    address, _ = room.buffer_info()
    fcntl.ioctl(asking, _SIOCETHTOOL, struct.pack("16sP16x", device.encode(), address))
    return room.tobytes()

"""Whether packets come back over a device: ICMP echoes from the namespace it is in.

Everything here blocks and opens sockets where the calling thread is: call it by
`nsm.kernel.node.Kernel.within`, and nothing is left open in there when it answers.

An error that comes back from an address that was asked proves as much as an answer: packets
went there, and came from there. One from anybody else says that they cannot.
"""

import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from nsm.kernel.state import IPAddress

SMALL = 56  # bytes of an echo's data
HEADERS = {4: 28, 6: 48}  # bytes of IP and ICMP headers, by family
_AGAIN = 0.1  # seconds until what is not answered is asked once more
_LARGE_WAIT = 0.06  # seconds at least for a large one, once the small one is back
_TURNS = 10  # times the small one's way, for a large one
_ICMP_FILTER, _ICMP6_FILTER, _MTU_DISCOVER, _MTU_DISCOVER6, _DONT_FRAGMENT6 = 1, 1, 10, 23, 62
_SOL_RAW = 255
_PROBE = 3  # IP_PMTUDISC_PROBE: do not fragment, whatever was learnt of the way before
_NO_WAY = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENODEV, errno.ENXIO}
_FORBIDDEN = {4: {9, 10, 13}, 6: {1, 5, 6}}  # codes by which somebody forbids, and does not lack
_UNREACHABLE = {4: 3, 6: 1}
_ECHO, _REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}


@dataclass(slots=True)
class Echo:
    """What became of what was sent to one address."""

    to: IPAddress
    answered: bool = False
    after: float = 0.0
    """Seconds until the first answer."""
    error: str = ""
    """Who says that nothing reaches it, if somebody does."""
    here: bool = False
    """Whether that is this node's own kernel: it has no way there over the device."""
    passed: set[int] = field(default_factory=set)
    """The sizes of packets, headers included, that came back."""


def echoes(
    device: str, to: Iterable[IPAddress], patience: float, sizes: Sequence[int] = ()
) -> list[Echo]:
    """Ask all of them over the device, in packets that nobody may take apart, of these sizes
    too (bytes, headers included). Waits until all is answered, for at most patience seconds."""
    asked = [Echo(one) for one in to]
    run = _Run(device, asked, patience, sizes)
    try:
        run.through()
    finally:
        run.close()
    return asked


def refuses(remote: IPAddress, port: int, patience: float) -> bool:
    """Whether that node says that nobody listens on a UDP port of it."""
    family = socket.AF_INET if remote.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as knock:
        knock.settimeout(patience)
        try:
            knock.connect((str(remote), port))
            knock.send(b"\0")
            knock.recv(1)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


class _Run:
    """One round of echoes, with its sockets."""

    def __init__(
        self, device: str, asked: list[Echo], patience: float, sizes: Sequence[int]
    ) -> None:
        self._device = device
        self._asked = asked
        self._sizes = (0, *sizes)  # their places are the sequence numbers
        self._id = struct.unpack("=H", os.urandom(2))[0]
        self._end = time.monotonic() + patience
        self._sent: dict[IPAddress, float] = {}
        self._sockets: dict[int, socket.socket] = {}

    def through(self) -> None:
        for one in self._asked:
            if one.to.version not in self._sockets:
                self._sockets[one.to.version] = self._opened(one.to.version)
        again, until = 0.0, self._end
        while (now := time.monotonic()) < until and not self._over():
            if now >= again:
                self._ask()
                again = now + _AGAIN / 5 if self._only_large() else now + _AGAIN
            if self._only_large():
                slowest = max(one.after for one in self._asked)
                until = min(until, now + max(_LARGE_WAIT, _TURNS * slowest))
            wait = max(0.0, min(again, until) - time.monotonic())
            for ready in select.select(list(self._sockets.values()), [], [], wait)[0]:
                self._hear(4 if ready.family == socket.AF_INET else 6, ready)

    def close(self) -> None:
        for one in self._sockets.values():
            one.close()

    def _only_large(self) -> bool:
        """Whether large ones are all that is waited for."""
        return all(one.answered or one.error for one in self._asked)

    def _over(self) -> bool:
        large = {size for size in self._sizes if size}
        return all(one.error or (one.answered and large <= one.passed) for one in self._asked)

    def _opened(self, version: int) -> socket.socket:
        family, protocol = (
            (socket.AF_INET, socket.IPPROTO_ICMP)
            if version == 4
            else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
        )
        made = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._device.encode())
            wanted = (_REPLY[version], _UNREACHABLE[version])
            if version == 4:
                made.setsockopt(socket.IPPROTO_IP, _MTU_DISCOVER, _PROBE)
                mask = 0xFFFFFFFF & ~sum(1 << kind for kind in wanted)
                made.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", mask))
            else:
                made.setsockopt(socket.IPPROTO_IPV6, _MTU_DISCOVER6, _PROBE)
                made.setsockopt(socket.IPPROTO_IPV6, _DONT_FRAGMENT6, 1)
                words = [0xFFFFFFFF] * 8
                for kind in wanted:
                    words[kind >> 5] &= ~(1 << (kind & 31))
                made.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *words))
        except BaseException:
            made.close()
            raise
        return made

    def _ask(self) -> None:
        for one in self._asked:
            for number, size in enumerate(self._sizes):
                done = size in one.passed if size else one.answered
                if done or one.error:
                    continue
                try:
                    self._send(one, number, size)
                except OSError as failure:
                    if failure.errno in _NO_WAY:
                        one.error, one.here = os.strerror(failure.errno), True
                    # else: its own firewall, a full queue, larger than the device: no verdict

    def _send(self, one: Echo, number: int, size: int) -> None:
        version = one.to.version
        data = bytes(size - HEADERS[version] if size else SMALL)
        head = struct.pack("!BBHHH", _ECHO[version], 0, 0, self._id, number)
        if version == 4:
            head = struct.pack("!BBHHH", 8, 0, _checksum(head + data), self._id, number)
        self._sent.setdefault(one.to, time.monotonic())
        self._sockets[version].sendto(head + data, (str(one.to), 0))

    def _hear(self, version: int, ready: socket.socket) -> None:
        try:
            data, (address, *_) = ready.recvfrom(1 << 16)
        except OSError:
            return
        who = ip_address(address.partition("%")[0])
        if version == 4:
            data = data[(data[0] & 15) * 4 :]
        if len(data) < 8:
            return
        kind, code, _, id_, number = struct.unpack_from("!BBHHH", data)
        if kind == _REPLY[version]:
            self._answered(who, id_, number)
        elif kind == _UNREACHABLE[version]:
            self._refused(version, who, code, data[8:])

    def _answered(self, who: IPAddress, id_: int, number: int) -> None:
        one = self._of(who, id_, number)
        if one:
            if not one.answered:
                one.answered, one.after = True, time.monotonic() - self._sent[who]
            if self._sizes[number]:
                one.passed.add(self._sizes[number])

    def _refused(self, version: int, who: IPAddress, code: int, inner: bytes) -> None:
        """inner is the packet that did not get there, as far as it is shown."""
        if version == 4:
            if len(inner) < 28:
                return
            to, rest = ip_address(inner[16:20]), inner[(inner[0] & 15) * 4 :]
        else:
            if len(inner) < 48:
                return
            to, rest = ip_address(inner[24:40]), inner[40:]
        if len(rest) < 8:
            return
        _, _, _, id_, number = struct.unpack_from("!BBHHH", rest)
        one = self._of(to, id_, number)
        if one is None or one.answered:
            return
        if who == to:
            one.answered, one.after = True, time.monotonic() - self._sent[to]
        elif code not in _FORBIDDEN[version]:
            one.error = f"{who} says that it is unreachable"

    def _of(self, to: IPAddress, id_: int, number: int) -> Echo | None:
        if id_ != self._id or number >= len(self._sizes):
            return None
        return next((one for one in self._asked if one.to == to), None)


def _checksum(data: bytes) -> int:
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF

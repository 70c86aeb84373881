"""Whether packets come back over a device: ICMP echoes from the namespace it is in.

By sockets that need no right of their own, which every wire's namespace allows
(`ping_group_range`). Everything here blocks, and opens sockets where the calling thread is:
called by `nsm.kernel.node.Kernel.within`, nothing is left open in there when it answers.

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
_MTU_DISCOVER = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}
_RECEIVE_ERRORS = {4: (socket.IPPROTO_IP, 11), 6: (socket.IPPROTO_IPV6, 25)}
_DONT_FRAGMENT6 = 62
_PROBE = 3  # IP_PMTUDISC_PROBE: do not fragment, whatever was learnt of the way before
_NO_WAY = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENODEV, errno.ENXIO}
_FORBIDDEN = {4: {9, 10, 13}, 6: {1, 5, 6}}  # codes by which somebody forbids, and does not lack
_UNREACHABLE = {4: 3, 6: 1}
_ECHO, _REPLY = {4: 8, 6: 128}, {4: 0, 6: 129}
_ERROR = struct.Struct("=IBBBBII")  # sock_extended_err; the address of who says it comes after


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
        made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, protocol)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, self._device.encode())
            made.setsockopt(*_MTU_DISCOVER[version], _PROBE)
            made.setsockopt(*_RECEIVE_ERRORS[version], 1)
            if version == 6:
                made.setsockopt(socket.IPPROTO_IPV6, _DONT_FRAGMENT6, 1)
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
                    # else: its own firewall, a full queue, larger than the device: no verdict
                    if failure.errno in _NO_WAY and not self._errors(one.to.version):
                        one.error, one.here = os.strerror(failure.errno), True

    def _send(self, one: Echo, number: int, size: int) -> None:
        version = one.to.version
        self._errors(version)  # or they would be told of this one
        data = bytes(size - HEADERS[version] if size else SMALL)
        head = struct.pack("!BBHHH", _ECHO[version], 0, 0, 0, number)
        self._sent.setdefault(one.to, time.monotonic())
        self._sockets[version].sendto(head + data, (str(one.to), 0))

    def _hear(self, version: int, ready: socket.socket) -> None:
        self._errors(version)
        try:
            data, (address, *_) = ready.recvfrom(1 << 16)
        except OSError:
            return
        if len(data) >= 8:
            kind, _, _, _, number = struct.unpack_from("!BBHHH", data)
            if kind == _REPLY[version]:
                self._answered(ip_address(address.partition("%")[0]), number)

    def _answered(self, who: IPAddress, number: int) -> None:
        one = self._of(who)
        if one is None or number >= len(self._sizes):
            return
        if not one.answered:
            one.answered, one.after = True, time.monotonic() - self._sent[who]
        if self._sizes[number]:
            one.passed.add(self._sizes[number])

    def _errors(self, version: int) -> int:
        """Take in what others say of packets of ours; how many did."""
        sock, count = self._sockets[version], 0
        while True:
            try:
                _, notes, _, about = sock.recvmsg(128, 512, socket.MSG_ERRQUEUE)
            except OSError:
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # the same, once more
                return count
            count += 1
            for level, kind, data in notes:
                if (level, kind) == _RECEIVE_ERRORS[version] and about:
                    to = ip_address(str(about[0]).partition("%")[0])
                    self._refused(version, to, data)

    def _refused(self, version: int, to: IPAddress, data: bytes) -> None:
        if len(data) < _ERROR.size:
            return
        _, _, kind, code, _, _, _ = _ERROR.unpack_from(data)
        one, who = self._of(to), _offender(version, data[_ERROR.size :])
        if one is None or one.answered or who is None or kind != _UNREACHABLE[version]:
            return
        if who == to:
            one.answered, one.after = True, time.monotonic() - self._sent[to]
        elif code not in _FORBIDDEN[version]:
            one.error = f"{who} says that it is unreachable"

    def _of(self, to: IPAddress) -> Echo | None:
        return next((one for one in self._asked if one.to == to), None)


def _offender(version: int, address: bytes) -> IPAddress | None:
    """Who says so, from a sockaddr; None if nobody did."""
    part = address[4:8] if version == 4 else address[8:24]
    return ip_address(part) if len(part) in (4, 16) and any(part) else None

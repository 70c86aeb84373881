"""Sends numbered datagrams in a namespace, and notes the numbers that arrive there.

    python -P -m labs.courier NAMESPACE

One order a line (JSON) on standard input, one answer a line on standard output, each
at once. A flow's socket is bound to an address and to no device, also while nobody has
that address: it lives through an interface that goes away and comes back. What is due
while this process is stalled leaves late, but it leaves; a number that the kernel does
not take (no route, no such address) is not tried again, because a program's datagram
would not be either, and is told with the kernel's reason. Closing its input ends it.
"""

import contextlib
import errno
import json
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from labs import become
from labs.sequences import Heard, Ranges
from nsm.kernel.topology import enter_named

HEAD: Final = struct.Struct("!8sIQ")  # whose flow it is, whose number, the number
HASTE: Final = 4  # times the rate at which what is late is made up for
_ROOM: Final = 4 << 20  # bytes that wait for a courier that is stalled: 20 s and more
_AHEAD: Final = 32  # sockets of each family with that much room
_MANY: Final = 256  # datagrams read before others have their turn
_LARGEST: Final = 1 << 16
_SO_RCVBUFFORCE, _SO_MEMINFO, _MEMINFO_DROPS = 33, 55, 8
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78
_SO_TIMESTAMPNS: Final = 35
_TIMESPEC: Final = struct.Struct("=qq")


@dataclass(slots=True)
class Flow:
    """One socket: what it sends, and what it has heard, by sender."""

    mark: bytes
    sock: socket.socket
    sender: int
    to: tuple[str, int] | None = None
    interval: float = 0.0  # seconds between two numbers; 0: it does not send
    size: int = 0  # bytes of a datagram
    began: float = 0.0
    latest: float = 0.0
    sent: int = 0
    refused: dict[str, Ranges] = field(default_factory=dict)
    heard: dict[int, Heard] = field(default_factory=dict)

    @property
    def due(self) -> float:
        """When the next number is to leave; what is late does not leave all at once."""
        if not self.interval:
            return float("inf")
        return max(self.began + self.sent * self.interval, self.latest + self.interval / HASTE)

    def send(self) -> None:
        """The next number."""
        assert self.to is not None
        data = HEAD.pack(self.mark, self.sender, self.sent).ljust(self.size, b"\0")
        try:
            self.sock.sendto(data, self.to)
        except OSError as refusal:
            name = errno.errorcode.get(refusal.errno or 0, str(refusal.errno))
            self.refused.setdefault(name, Ranges()).add(self.sent)
        self.sent += 1
        self.latest = time.monotonic()

    def read(self) -> None:
        """Note what has arrived."""
        for _ in range(_MANY):
            try:
                data, about, _, _ = self.sock.recvmsg(_LARGEST, 128)
            except BlockingIOError:
                return
            if len(data) < HEAD.size:
                continue
            mark, sender, number = HEAD.unpack_from(data)
            if mark != self.mark:  # of somebody who had this address and port before
                continue
            self.heard.setdefault(sender, Heard()).take(number, _stamp(about))


def _stamp(about: list[tuple[int, int, bytes]]) -> float:
    """When the kernel had it, so that being read late makes no silence longer."""
    for level, kind, data in about:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, nanoseconds = _TIMESPEC.unpack(data[: _TIMESPEC.size])
            return float(seconds + nanoseconds / 1e9)
    return time.time()


def _with_room(family: int) -> list[socket.socket]:
    """Sockets with more room than anybody may have who has no rights, for flows to come."""
    made: list[socket.socket] = []
    with contextlib.suppress(OSError):  # a family that this kernel does not have
        for _ in range(_AHEAD):
            made.append(_socket(family))
            made[-1].setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
    return made


def _socket(family: int) -> socket.socket:
    """What flows beyond those have: as much room as this machine gives anybody."""
    made = socket.socket(family, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
    return made


class Courier:
    """The flows of one namespace."""

    def __init__(self, roomy: Mapping[int, list[socket.socket]]) -> None:
        self._roomy = roomy
        self._flows: dict[str, Flow] = {}
        self._by_fd: dict[int, Flow] = {}
        self._poll = select.poll()
        self._poll.register(0, select.POLLIN)
        self._orders = b""
        self._does: dict[str, Callable[..., Any]] = {
            "open": self.open,
            "start": self.start,
            "tell": self.tell,
            "close": self.close,
        }

    # -- orders -----------------------------------------------------------------------------

    def open(self, flow: str, sender: int, address: str, port: int) -> dict[str, Any]:
        """A socket on an address, which somebody may have later; port 0: any that is free."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = self._roomy[family].pop() if self._roomy[family] else _socket(family)
        try:
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            sock.bind((address, port))
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
        made = Flow(flow.encode(), sock, sender)
        self._flows[flow] = self._by_fd[sock.fileno()] = made
        self._poll.register(sock, select.POLLIN)
        return {"port": int(sock.getsockname()[1])}

    def start(self, flow: str, address: str, port: int, rate: float, size: int) -> dict[str, Any]:
        """Begin to send, rate a second."""
        one = self._flows[flow]
        one.to, one.interval, one.size = (address, port), 1 / rate, max(size, HEAD.size)
        one.began = time.monotonic()
        return {}

    def tell(self, flow: str) -> dict[str, Any] | None:
        """What was sent and heard until now; None of a flow of the one who was here before."""
        one = self._flows.get(flow)
        if one is None:
            return None
        one.read()
        drops = one.sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 36)
        return {
            "sent": one.sent,
            "refused": {name: ranges.pairs() for name, ranges in one.refused.items()},
            "overrun": struct.unpack("=9I", drops)[_MEMINFO_DROPS],
            "heard": {
                str(sender): {
                    "numbers": heard.numbers.pairs(),
                    "duplicates": heard.duplicates,
                    "reordered": heard.reordered,
                    "silences": [asdict(silence) for silence in heard.silences],
                }
                for sender, heard in one.heard.items()
            },
        }

    def close(self, flow: str) -> dict[str, Any]:
        """Forget a flow."""
        one = self._flows.pop(flow, None)
        if one is None:
            return {}
        self._poll.unregister(one.sock)
        del self._by_fd[one.sock.fileno()]
        one.sock.close()
        return {}

    # -- its life ---------------------------------------------------------------------------

    def run(self) -> None:
        """Until standard input is closed."""
        while True:
            due = min((flow.due for flow in self._flows.values()), default=float("inf"))
            patience = None
            if due != float("inf"):
                patience = max(0.0, (due - time.monotonic()) * 1000)
            for fd, _ in self._poll.poll(patience):
                if fd in self._by_fd:
                    self._by_fd[fd].read()
                elif fd == 0 and not self._obey():
                    return
            now = time.monotonic()
            for flow in self._flows.values():
                if flow.due <= now:
                    flow.send()

    def _obey(self) -> bool:
        data = os.read(0, 1 << 16)
        if not data:
            return False
        *lines, self._orders = (self._orders + data).split(b"\n")
        for line in lines:
            order = json.loads(line)
            try:
                answer = {"answer": self._does[order.pop("do")](**order)}
            except OSError as failure:
                answer = {"failure": str(failure.strerror or failure)}
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
        return True


def main() -> int:
    """Enter the namespace, then carry until the input is closed."""
    namespace = sys.argv[1]
    enter_named(namespace)
    become.titled("labs.courier", f"{namespace}/courier")
    roomy: dict[int, list[socket.socket]] = {
        family: _with_room(family) for family in (socket.AF_INET, socket.AF_INET6)
    }
    become.powerless()  # or this workload would count as one that could misuse a tunnel
    Courier(roomy).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

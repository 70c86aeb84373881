"""A pair of hands in a namespace: sends, receives and listens there for the checks.

    python -P -m labs.probe NAMESPACE

One order a line (JSON) on standard input, one answer a line on standard output. It
asks the network itself, with sockets of its own: what the mesh says of a wire is no
proof that packets flow. Closing its input ends it.
"""

import contextlib
import errno
import hashlib
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from labs import become, frames
from labs.processes import PATH
from nsm.kernel.topology import enter_named

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _IPV6_DONTFRAG, _PMTUDISC_PROBE = 10, 23, 62, 3
_ICMP_FILTER: Final = 1
_ICMP6_FILTER: Final = 1
_SOL_RAW: Final = 255
_ECHO4, _REPLY4, _ECHO6, _REPLY6 = 8, 0, 128, 129
_HEADER: Final = {4: 28, 6: 48}  # IP and ICMP headers
_PAUSE: Final = 0.01  # seconds between echoes to one address
_CHUNK: Final = 1 << 18
_ETH_ALL: Final = 3
_SO_RCVBUFFORCE: Final = 33
_SO_MEMINFO, _MEMINFO_DROPS = 55, 8
_LONGEST_OUTPUT: Final = 1 << 16  # characters of each of a command's outputs


@dataclass(slots=True)
class Target:
    """One address that is pinged."""

    address: str
    size: int
    sent: int = 0
    refused: str = ""
    times: list[float] | None = None  # round trips in seconds

    @property
    def version(self) -> int:
        """4 or 6."""
        return 6 if ":" in self.address else 4


def ping(
    targets: list[dict[str, Any]], count: int, patience: float, ident: int = 0
) -> list[dict[str, Any]]:
    """Echo each target count times, none fragmented; wait patience seconds for the last ones.

    ident tells ours from others', at both ends; 0 draws one.
    """
    todo = [Target(t["address"], t["size"], times=[]) for t in targets]
    ident = ident or random.randrange(1, 1 << 16)  # noqa: S311 - it is no secret
    with contextlib.ExitStack() as stack:
        socks = {}
        for version in {t.version for t in todo}:
            socks[version] = stack.enter_context(_icmp(version, _REPLY4, _REPLY6))
        pending: dict[int, tuple[Target, float]] = {}
        for turn in range(count):
            for place, target in enumerate(todo):
                number = turn * len(todo) + place & 0xFFFF
                _echo(socks[target.version], target, ident, number, pending)
            _replies(socks, ident, pending, time.monotonic() + _PAUSE, all_of_it=turn == count - 1)
        _replies(socks, ident, pending, time.monotonic() + patience, all_of_it=True)
    return [
        {
            "address": t.address,
            "sent": count,
            "lost": count - len(t.times or ()),
            "ms": round(min(t.times) * 1000, 3) if t.times else None,
            "refused": t.refused,
        }
        for t in todo
    ]


def _icmp(version: int, kind4: int, kind6: int) -> socket.socket:
    """A socket that hears ICMP of one kind only."""
    if version == 4:
        sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
        # a bit that is 0 lets its type pass
        sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << kind4) & 0xFFFFFFFF))
    else:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1)
        only = bytearray(b"\xff" * 32)  # a bit that is 0 lets its type pass
        only[kind6 // 8] &= ~(1 << kind6 % 8)
        # the kernel counts the bits in 32-bit words of its own byte order
        words = struct.unpack("<8I", bytes(only))
        sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *words))
    # a wave of answers fits in, if others keep us from reading: what is dropped here is not lost
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
    sock.setblocking(False)
    return sock


def _echo(
    sock: socket.socket,
    target: Target,
    ident: int,
    number: int,
    pending: dict[int, tuple[Target, float]],
) -> None:
    filler = bytes(max(0, target.size - _HEADER[target.version]))
    kind = _ECHO4 if target.version == 4 else _ECHO6
    packet = struct.pack("!BBHHH", kind, 0, 0, ident, number) + filler
    if target.version == 4:  # for ICMPv6 the kernel does it
        packet = struct.pack("!BBHHH", kind, 0, frames.checksum(packet), ident, number) + filler
    pending[number] = (target, time.monotonic())
    try:
        sock.sendto(packet, (target.address, 0))
        target.sent += 1
    except OSError as refusal:
        del pending[number]
        target.refused = os.strerror(refusal.errno or errno.EIO)


def _replies(
    socks: dict[int, socket.socket],
    ident: int,
    pending: dict[int, tuple[Target, float]],
    end: float,
    *,
    all_of_it: bool,
) -> None:
    """Take replies until the end; sooner if all have come and nothing is to be sent."""
    while (rest := end - time.monotonic()) > 0 and (pending or not all_of_it):
        for sock in select.select(list(socks.values()), [], [], rest)[0]:
            data = sock.recv(1 << 16)
            if sock.family == socket.AF_INET:
                data = data[(data[0] & 15) * 4 :]
            kind, _, _, theirs, number = struct.unpack_from("!BBHHH", data)
            expected = _REPLY4 if sock.family == socket.AF_INET else _REPLY6
            if kind == expected and theirs == ident and number in pending:
                target, sent = pending.pop(number)
                assert target.times is not None
                target.times.append(time.monotonic() - sent)


class Ears:
    """Counts the echo requests that come to this namespace: what a sender says proves it not."""

    def __init__(self) -> None:
        self._socks: list[socket.socket] = []

    def open(self) -> dict[str, Any]:
        """Begin; whatever comes from now on counts."""
        self._close()
        self._socks = [_icmp(version, _ECHO4, _ECHO6) for version in (4, 6) if _speaks(version)]
        for sock in self._socks:  # requests wait in the socket until `heard` reads them
            sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 << 20)
        return {}

    def heard(self) -> dict[str, Any]:
        """How many came, by their sender's ident, and how many were not heard."""
        counts: dict[int, int] = {}
        missed = 0
        for sock in self._socks:
            with contextlib.suppress(BlockingIOError):
                while True:
                    data = sock.recv(128)
                    if sock.family == socket.AF_INET:
                        data = data[(data[0] & 15) * 4 :]
                    ident = struct.unpack_from("!H", data, 4)[0]
                    counts[ident] = counts.get(ident, 0) + 1
            facts = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, 4 * (_MEMINFO_DROPS + 1))
            missed += struct.unpack_from("=I", facts, 4 * _MEMINFO_DROPS)[0]
        self._close()
        return {"idents": counts, "missed": missed}

    def _close(self) -> None:
        for sock in self._socks:
            sock.close()
        self._socks = []


def _speaks(version: int) -> bool:
    """Whether there is such a family: IPv6 may be left out of a kernel."""
    return version == 4 or os.path.exists("/proc/net/if_inet6")


# --- names -----------------------------------------------------------------------------------


def resolve(names: list[str], families: list[str]) -> dict[str, dict[str, Any]]:
    """The addresses of each name, of those families, as every program here finds them: by libc."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        addresses: list[str] = []
        failure = ""
        for family in families:
            kind = socket.AF_INET6 if family == "ipv6" else socket.AF_INET
            try:
                told = socket.getaddrinfo(name, None, kind, socket.SOCK_RAW)
                addresses += [str(one[4][0]) for one in told]
            except socket.gaierror as why:
                failure = f"unknown: {why.strerror}"
        found[name] = {"addresses": sorted(set(addresses)), "failure": failure}
    return found


# --- transfers -------------------------------------------------------------------------------


class Transfers:
    """Listening sockets, kept between the order to listen and the order to receive."""

    def __init__(self) -> None:
        self._listening: dict[int, socket.socket] = {}

    def listen(self, address: str, port: int = 0) -> dict[str, Any]:
        """A TCP port on an address of this namespace; 0: any that is free."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.create_server((address, port), family=family)
        sock.settimeout(10)
        port = int(sock.getsockname()[1])
        self._listening[port] = sock
        return {"port": port}

    def receive(self, port: int, patience: float) -> dict[str, Any]:
        """What one connection to the port brings, as a digest."""
        digest, size = hashlib.sha256(), 0
        with self._listening.pop(port) as listening:
            connection, _ = listening.accept()
            with connection:
                connection.settimeout(patience)
                while data := connection.recv(_CHUNK):
                    digest.update(data)
                    size += len(data)
                connection.sendall(digest.digest())
        return {"octets": size, "sha256": digest.hexdigest()}


def send(address: str, port: int, octets: int, patience: float, mark: str) -> dict[str, Any]:
    """Send that many bytes, the mark in each block of them; the digest of what was sent."""
    digest, left = hashlib.sha256(), octets
    # repeated marks make the bytes findable in a capture, random ones make them unlike
    block = (mark.encode() + os.urandom(1000)) * (_CHUNK // (1000 + len(mark)) + 1)
    start = time.monotonic()
    with socket.create_connection((address, port), timeout=patience) as sock:
        while left > 0:
            part = block[: min(left, _CHUNK)]
            sock.sendall(part)
            digest.update(part)
            left -= len(part)
        sock.shutdown(socket.SHUT_WR)
        echoed = b""
        while more := sock.recv(64):
            echoed += more
    seconds = time.monotonic() - start
    return {"sha256": digest.hexdigest(), "echo": echoed.hex(), "seconds": round(seconds, 4)}


# --- datagrams -------------------------------------------------------------------------------


class Datagrams:
    """Sockets that send back what comes, kept between the order to open and the order to echo."""

    def __init__(self) -> None:
        self._open: dict[int, socket.socket] = {}

    def open(self, address: str) -> dict[str, Any]:
        """A UDP port on an address of this namespace."""
        sock = _udp(address)
        sock.bind((address, 0))
        port = int(sock.getsockname()[1])
        self._open[port] = sock
        return {"port": port}

    def echo(self, port: int, count: int, patience: float) -> dict[str, Any]:
        """Send back count datagrams that come to the port; fewer if none comes for so long."""
        arrived = 0
        with self._open.pop(port) as sock:
            while arrived < count and select.select([sock], [], [], patience)[0]:
                data, sender = sock.recvfrom(1 << 16)
                arrived += 1
                with contextlib.suppress(OSError):  # then it is the sender who misses it
                    sock.sendto(data, sender)
        return {"arrived": arrived}


def throw(
    address: str, port: int, count: int, size: int, patience: float, mark: str
) -> dict[str, Any]:
    """Send count packets of that size, each when the one before is back or lost."""
    back, refused = 0, ""
    room = size - _HEADER[6 if ":" in address else 4]
    with _udp(address) as sock:
        for number in range(count):
            data = struct.pack("!I", number) + mark.encode()
            data = data[: max(room, 4)].ljust(room, b"\0")
            try:
                sock.sendto(data, (address, port))
                end = time.monotonic() + patience
                while select.select([sock], [], [], max(0.0, end - time.monotonic()))[0]:
                    if sock.recv(1 << 16) == data:
                        back += 1
                        break
            except OSError as refusal:
                refused = os.strerror(refusal.errno or errno.EIO)
    return {"sent": count, "lost": count - back, "refused": refused}


def _udp(address: str) -> socket.socket:
    """A UDP socket whose packets are not fragmented."""
    if ":" in address:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_PROBE)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_DONTFRAG, 1)
    else:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_PROBE)
    return sock


# --- capture ---------------------------------------------------------------------------------


class Sniffer:
    """Counts the kinds of frames on interfaces, each from its start to its stop."""

    def __init__(self) -> None:
        self._on: dict[str, tuple[socket.socket, tuple[bytes, ...]]] = {}

    def start(self, interface: str, marks: list[str]) -> dict[str, Any]:
        """Begin; whatever passes from now on counts."""
        # frames wait in the socket until `stop` reads them: a transfer must fit in
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_ALL))
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 256 << 20)
        sock.bind((interface, _ETH_ALL))
        sock.setblocking(False)
        self._on[interface] = sock, tuple(mark.encode() for mark in marks)
        return {}

    def stop(self, interface: str) -> dict[str, Any]:
        """What passed, by kind."""
        counts: dict[str, int] = {}
        packets = dropped = 0
        sock, marks = self._on.pop(interface)
        reader = frames.Reader(marks)
        with sock:
            while True:
                try:
                    frame = sock.recv(1 << 16)
                except BlockingIOError:
                    break
                packets += 1
                for kind in reader.kinds(frame):
                    counts[kind] = counts.get(kind, 0) + 1
            # SOL_PACKET, PACKET_STATISTICS: received, dropped
            dropped = struct.unpack("=II", sock.getsockopt(263, 6, 8))[1]
        return {"packets": packets, "dropped": dropped, "kinds": counts}


# --- commands --------------------------------------------------------------------------------


def execute(
    argv: list[str], patience: float, gid: int = 0, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run a command here, for at most patience seconds, as somebody of that group."""
    # nsmctl and whatever else is installed beside us is found first
    path = f"{os.path.dirname(sys.executable)}:{PATH}"
    try:
        done = subprocess.run(
            argv, capture_output=True, stdin=subprocess.DEVNULL, timeout=patience,
            env={"PATH": path, "LANG": "C.UTF-8", **(variables or {})}, check=False,
            start_new_session=True, group=gid, extra_groups=(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TimeoutError(errno.ETIMEDOUT, f"{argv[0]} did not end in {patience:g} s") from None
    except OSError as failure:
        raise OSError(failure.errno, f"{argv[0]}: {failure.strerror}") from None
    return {
        "status": done.returncode,
        "out": done.stdout.decode(errors="replace")[-_LONGEST_OUTPUT:],
        "err": done.stderr.decode(errors="replace")[-_LONGEST_OUTPUT:],
    }


def main() -> int:
    """Enter the namespace, then answer orders until the input is closed."""
    namespace = sys.argv[1]
    enter_named(namespace)
    become.at_home(namespace)
    become.titled("labs.probe", f"{namespace}/probe")
    transfers, datagrams = Transfers(), Datagrams()
    sniffer, ears = Sniffer(), Ears()
    does: dict[str, Callable[..., Any]] = {
        "ping": ping,
        "listen-echoes": ears.open,
        "heard-echoes": ears.heard,
        "resolve": resolve,
        "listen": transfers.listen,
        "receive": transfers.receive,
        "send": send,
        "open-udp": datagrams.open,
        "echo-udp": datagrams.echo,
        "throw-udp": throw,
        "capture": sniffer.start,
        "captured": sniffer.stop,
        "exec": execute,
    }
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = {"answer": does[order.pop("do")](**order)}
        except OSError as failure:
            answer = {"failure": str(failure.strerror or failure)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

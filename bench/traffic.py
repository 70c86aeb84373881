"""Sends over a wire and receives at its other end: what data paths are measured with.

    python -m bench.traffic CLIENT SERVER       (names of network namespaces)

One thread has sockets in both namespaces and does both ends' work. So a transfer waits for the
wire and not for the scheduler, and figures differ little on a machine that is busy besides;
the rate is about half of what two processes on two processors reach. An echo is ICMP, answered
by the server's kernel. Times are taken in many short turns, of which the median counts.

Orders come as lines of JSON on standard input, answers go out the same way.
"""

import json
import os
import select
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

from nsm.kernel.topology import enter_named

CHUNK: Final = 1 << 17  # bytes of one call to the kernel
PATIENCE: Final = 10  # seconds for anything at all to happen
_SOL_RAW, _ICMP_FILTER, _ECHO, _REPLY = 255, 1, 8, 0


class Traffic:
    """Such a process, as whoever gives it orders sees it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def first(self, address: str) -> float:
        """Seconds until an echo is answered: a device may drop what comes as it comes up."""
        return float(self._ask(do="first", address=address))

    def call(self, address: str) -> None:
        """Join both ends by TCP, over the wire that has this address at the server's."""
        self._ask(do="call", address=address)

    def hang_up(self) -> None:
        """Close all there is between them."""
        self._ask(do="hang up")

    def send(self, address: str, octets: int) -> float:
        """Seconds until so many bytes have been sent and received."""
        return float(self._ask(do="send", address=address, octets=octets))

    def echo(self, address: str, count: int) -> float:
        """The median of so many round trips, one after the other, in seconds."""
        return float(self._ask(do="echo", address=address, count=count))

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline() or '{"refused": "traffic ended"}')
        if "refused" in told:
            raise RuntimeError(f"{order}: {told['refused']}")
        return told["answer"]


@contextmanager
def traffic(client: str, server: str) -> Iterator[Traffic]:
    """Such a process between two namespaces, for the block."""
    command = [sys.executable, "-m", "bench.traffic", client, server]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            started = Traffic(process)
            started.hang_up()  # from here on it answers at once
            yield started
        finally:
            assert process.stdin is not None
            process.stdin.close()


class Ends:
    """The two ends of each wire there is traffic on. Stays in the client's namespace."""

    def __init__(self, client: str, server: str) -> None:
        self._buffer = memoryview(bytearray(CHUNK))
        self._joined: dict[str, tuple[socket.socket, socket.socket]] = {}
        enter_named(server)
        self._listener = socket.create_server(("", 0))
        enter_named(client)

    def obey(self, order: dict[str, Any]) -> Any:
        """Do one thing."""
        address = order.get("address", "")
        match order["do"]:
            case "call":
                self._call(address)
            case "hang up":
                self._hang_up()
            case "send":
                return self._send(*self._joined[address], order["octets"])
            case "first":
                return first(address)
            case "echo":
                return echo(address, order["count"])
        return None

    def _call(self, address: str) -> None:
        port = self._listener.getsockname()[1]
        here = socket.create_connection((address, port), timeout=PATIENCE)
        there, _ = self._listener.accept()
        here.setblocking(False)
        there.setblocking(False)
        self._joined[address] = here, there

    def _hang_up(self) -> None:
        for ends in self._joined.values():
            for end in ends:
                end.close()
        self._joined.clear()

    def _send(self, here: socket.socket, there: socket.socket, octets: int) -> float:
        sent = got = 0
        start = time.perf_counter()
        while got < octets:
            before = sent + got
            with suppress(BlockingIOError):
                if sent < octets:
                    sent += here.send(self._buffer[: octets - sent])
            with suppress(BlockingIOError):
                got += there.recv_into(self._buffer)
            if sent + got == before:
                wanted = [here] if sent < octets else []
                if not any(select.select([there], wanted, [], PATIENCE)):
                    raise TimeoutError(f"{octets - got} bytes are not there after {PATIENCE} s")
        return time.perf_counter() - start


def echo(address: str, count: int) -> float:
    """The median round trip of echoes to that address, in seconds."""
    times = []
    with _icmp(address, PATIENCE) as sock:
        for number in range(count):
            packet = _echo(number & 0xFFFF)
            start = time.perf_counter()
            sock.send(packet)
            while sock.recv(128)[24:28] != packet[4:8]:  # behind the IP header; an older one's
                pass
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def first(address: str) -> float:
    """Seconds until one of the echoes to that address, one every 2 ms, is answered."""
    start = time.perf_counter()
    with _icmp(address, 0.002) as sock:
        while True:
            with suppress(BlockingIOError):
                sock.send(_echo(0))
                sock.recv(128)
                return time.perf_counter() - start
            if time.perf_counter() > start + PATIENCE:
                raise TimeoutError(f"{address} does not answer")


def _icmp(address: str, patience: float) -> socket.socket:
    """A socket for echoes, and for echo replies alone, which waits so many seconds for one."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << _REPLY) & 0xFFFFFFFF))
    # the kernel's own patience, because Python's would make two calls of each
    seconds, rest = divmod(round(patience * 1e6), 1_000_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", seconds, rest))
    sock.connect((address, 0))
    return sock


def _echo(number: int) -> bytes:
    """64 bytes of ICMP echo request."""
    words = [_ECHO << 8, 0, os.getpid() & 0xFFFF, number]
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!4H", words[0], ~total & 0xFFFF, *words[2:]) + bytes(56)


def main(client: str, server: str) -> None:
    """Until standard input ends."""
    ends = Ends(client, server)
    for line in sys.stdin:
        try:
            told = {"answer": ends.obey(json.loads(line))}
        except OSError as refusal:
            told = {"refused": str(refusal)}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""What a process counted since it started, and what it holds now, for Prometheus.

Counting is adding to numbers, whether somebody looks or not; prometheus-client is imported in
a process that is told to serve (PROMETHEUS=true) and writes the text. Numbers are taken on the
event loop, which nothing else changes them on; all that waits or takes time is in a thread.
No label holds what others choose: methods are ours, codes are gRPC's, mechanisms and causes
are known beforehand.
"""

import asyncio
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import TYPE_CHECKING, Final

import structlog

from nsm import mechanisms
from nsm.errors import PreconditionError
from nsm.heal import Cause
from nsm.model import Connection

if TYPE_CHECKING:
    from prometheus_client import Metric

LARGEST: Final = 8192  # bytes of a scrape's request
PATIENCE: Final = 5.0  # seconds a scrape may take, as upstream has it
MOST: Final = 8  # scrapes at once
WAITING: Final = 64  # connections at once; more are cut, so that descriptors stay for the mesh
METHODS: Final = 64  # that are told apart; a program has fewer
OTHER: Final = "other"
BOUNDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
GAUGES: Final = {  # what is looked at: its help, and its label
    "wires": ("Wires that are up here, by what carries them", "mechanism"),
    "probes": ("Wires that were tried when they were made, by what came out", "verdict"),
    "leases": ("What is lent here and has an end", "kind"),
    "registrations": ("What is registered here", "kind"),
}
_CARRIERS: Final = (mechanisms.VXLAN, mechanisms.WIREGUARD, mechanisms.KERNEL)

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Durations:
    """How long something took, in buckets."""

    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self.buckets[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class Figures:
    """A process's numbers."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()
        self.durations: dict[str, Durations] = {}
        self.heals: Counter[str] = Counter()
        self.outages: dict[str, float] = {}
        self._looks: dict[str, Callable[[], Mapping[str, int]]] = {}

    def called(self, method: str, code: str, seconds: float) -> None:
        """A call was answered."""
        if method not in self.durations and len(self.durations) >= METHODS:
            method = OTHER
        self.calls[method, code] += 1
        self.durations.setdefault(method, Durations()).add(seconds)

    def healed(self, cause: Cause, seconds: float) -> None:
        """A wire of ours is up again, so many seconds after it was not."""
        self.heals[cause] += 1
        self.outages[cause] = self.outages.get(cause, 0.0) + seconds

    def shows(self, gauge: str, look: Callable[[], Mapping[str, int]]) -> None:
        """Whoever scrapes is told what look finds, by the gauge's label; one of GAUGES."""
        assert gauge in GAUGES
        self._looks[gauge] = look

    def looked(self) -> dict[str, Mapping[str, int]]:
        """What the gauges show now."""
        return {name: look() for name, look in self._looks.items()}


figures = Figures()
"""This process's own."""


def carried(made: Iterable[Connection | None], onward: Iterable[str] = ()) -> Mapping[str, int]:
    """How many wires each mechanism carries; onward are the types on their other sides."""
    found: Counter[str] = Counter()
    for conn, other in zip(made, chain(onward, repeat("")), strict=False):
        both = {conn.mechanism.type if conn and conn.mechanism else "", other}
        found[next((type_.lower() for type_ in _CARRIERS if type_ in both), OTHER)] += 1
    return found


@asynccontextmanager
async def served(host: str, port: int, kind: str, ready: Callable[[], bool]) -> AsyncIterator[str]:
    """Serve the figures over HTTP for the block; yields the URL. Port 0: a free one.

    Raises PreconditionError where the address cannot be had.
    """
    await asyncio.to_thread(_import)
    answering = asyncio.Semaphore(MOST)

    here: set[asyncio.StreamWriter] = set()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(here) >= WAITING:
            writer.transport.abort()
            return
        here.add(writer)
        try:
            with suppress(OSError, TimeoutError, EOFError, asyncio.LimitOverrunError):
                async with asyncio.timeout(PATIENCE):
                    request = await reader.readuntil(b"\r\n\r\n")  # who says nothing has no place
                    async with answering:
                        writer.write(await _answer(request, kind, ready()))
                    await writer.drain()
        finally:
            here.discard(writer)
            writer.close()

    try:
        server = await asyncio.start_server(answer, host or None, port, limit=LARGEST)
    except OSError as error:
        raise PreconditionError(
            f"metrics cannot be served on {host}:{port}: {error.strerror}",
            hint="give each process of a host a port of its own: NSM_PROMETHEUS_LISTEN_ON",
        ) from error
    async with server:
        name = server.sockets[0].getsockname()
        own = f"[{name[0]}]" if ":" in name[0] else name[0]
        yield f"http://{own}:{name[1]}/metrics"


async def _answer(request: bytes, kind: str, is_ready: bool) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.split(b" ", 1)[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        return _response("405 Method Not Allowed", b"GET is answered\n")
    if path not in (b"/", b"/metrics"):
        return _response("404 Not Found", b"/metrics is here\n")
    found = _families(figures, kind, is_ready, len(asyncio.all_tasks()))
    text = await asyncio.to_thread(_written, found)
    return _response("200 OK", b"" if method == b"HEAD" else text, len(text))


def _response(status: str, body: bytes, length: int | None = None) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


def _import() -> None:
    import prometheus_client  # noqa: F401 - reads files


def _families(from_: Figures, kind: str, is_ready: bool, tasks: int) -> "list[Metric]":
    from prometheus_client import core

    ready = core.GaugeMetricFamily(
        "vwire_ready", "1 where the process does all of its work", labels=["program"]
    )
    ready.add_metric([kind], int(is_ready))
    calls = core.CounterMetricFamily(
        "vwire_requests", "Calls that were answered", labels=["method", "code"]
    )
    for labels, number in from_.calls.items():
        calls.add_metric(labels, number)
    took = core.HistogramMetricFamily(
        "vwire_request_seconds", "How long answering took", labels=["method"]
    )
    for method, one in from_.durations.items():
        took.add_metric([method], _buckets(one), one.seconds)
    heals = core.CounterMetricFamily(
        "vwire_heals", "Wires that were lost and came back", labels=["cause"]
    )
    outages = core.CounterMetricFamily(
        "vwire_outage_seconds", "How long those wires were away", labels=["cause"]
    )
    for cause in Cause if from_.heals else ():
        heals.add_metric([cause], from_.heals[cause])
        outages.add_metric([cause], from_.outages.get(cause, 0.0))
    gauges = []
    for name, seen in from_.looked().items():
        help_, label = GAUGES[name]
        gauge = core.GaugeMetricFamily(f"vwire_{name}", help_, labels=[label])
        for value, number in seen.items():
            gauge.add_metric([value], number)
        gauges.append(gauge)
    running = core.GaugeMetricFamily("vwire_tasks", "Tasks of the event loop", value=tasks)
    return [ready, calls, took, heals, outages, *gauges, running]


def _buckets(one: Durations) -> list[tuple[str, float]]:
    total, found = 0, []
    for bound, number in zip((*map(str, BOUNDS), "+Inf"), one.buckets, strict=True):
        total += number
        found.append((bound, float(total)))
    return found


def _written(found: "list[Metric]") -> bytes:
    """The text, with what has to be read from files. Blocks."""
    from prometheus_client import CollectorRegistry, core, generate_latest

    fds = len(os.listdir("/proc/self/fd")) - 1  # but for the one that lists
    found.append(core.GaugeMetricFamily("vwire_open_fds", "Open file descriptors", value=fds))
    memory = "Memory, with its share of what others use as well"
    if size := _pss():
        found.append(core.GaugeMetricFamily("vwire_pss_bytes", memory, value=size))

    class Once:
        def collect(self) -> "list[Metric]":
            return found

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Once())
    return generate_latest(registry)


def _pss() -> int:
    """Bytes; 0 where the kernel does not say."""
    with suppress(OSError), open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0

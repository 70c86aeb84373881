"""Whether packets flow through a wire that was just made; an answer to a request then means it.

Only who has the client's end can tell, and only once all of the wire is there: the client's own
forwarder, on the way back, when a wire is made or goes over to another endpoint, never when one
is refreshed. It asks each address of the endpoint from the client's namespace, and concludes

    proven         each answered, or something at its address refused, which takes the same way
    not provable   there is no address, or no answer: many endpoints answer no ICMP
    broken         something says that nothing gets there: the client's own kernel, a router on
                   the way, or the far node, where no tunnel listens

A healthy wire costs one round trip; one whose endpoint answers no echo costs all the time there
is for it. What goes between nodes is also asked in packets as large as was agreed, which nobody
may take apart: where those do not come back, and smaller ones do, the wire gets their size.

Only so many are asked at once, in threads that nothing else needs: endpoints that answer nothing
hold up other probes at most, and those for no longer than they would wait for an answer.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_interface

import structlog

from nsm.caller import Caller
from nsm.errors import NsmError, UnavailableError
from nsm.kernel import echo, swap
from nsm.kernel.echo import Echo
from nsm.kernel.node import WITHIN, Kernel
from nsm.kernel.state import IPAddress, Namespace, RemoteWire, VxlanTunnel, Wire
from nsm.model import Connection

MOST = 1.0  # seconds; and of what the caller has left, at most a quarter
KNOCK = 0.1  # seconds for a node to say that nothing listens there
BRIEFLY = 0.1  # seconds at least to ask in, however long the wait for a thread was
ADDRESSES = 16  # of an endpoint are asked at most
LEAST = {4: 576, 6: 1280}  # bytes every IPv4 or IPv6 way takes: no wire gets smaller than that
STEPS = 8  # sizes that are tried at once; three times, so that it is known to a few bytes
ROUNDS = 3
log = structlog.get_logger(__name__)


class Verdict(StrEnum):
    """What the probe concludes; see the module."""

    PROVEN = "proven"
    NOT_PROVABLE = "not provable"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Proof:
    """A verdict, and the MTU that packets of this wire need; 0: as it is."""

    verdict: Verdict
    why: str = ""
    mtu: int = 0


class Probe:
    """Probes wires, and counts what came out."""

    def __init__(self, kernel: Kernel, *, on: bool = True) -> None:
        self._kernel = kernel
        self._on = on
        self._threads = asyncio.Semaphore(WITHIN)
        self.counts: Counter[str] = Counter()

    async def judge(
        self, wire: Wire, made: Connection, fds: Mapping[Namespace, int], caller: Caller
    ) -> Proof | None:
        """The verdict on a wire that stands, made as agreed; None where nobody probes.

        Raises UnavailableError for one that is broken, naming the segment of the path where.
        """
        if not self._on:
            return None
        proof, where = await self._proof(wire, made, fds, caller)
        self.counts[proof.verdict] += 1
        if proof.verdict is Verdict.BROKEN:
            raise UnavailableError(
                f"connection {made.id} to endpoint {made.endpoint} was agreed on, and carries"
                f" nothing: {proof.why} (segment {where} of the path,"
                f" {made.segments[where].name})",
                hint="see that one's log, and its node's firewall",
            )
        if proof.verdict is Verdict.NOT_PROVABLE:
            log.info("whether packets flow is not provable", endpoint=made.endpoint, why=proof.why)
        if proof.mtu:
            log.warning("packets of the agreed size do not get through", mtu=proof.mtu)
        return proof

    async def _proof(
        self, wire: Wire, made: Connection, fds: Mapping[Namespace, int], caller: Caller
    ) -> tuple[Proof, int]:
        """And which segment of the path it is about."""
        end = swap.client(wire)
        to = _addresses(made)
        if not to:
            return Proof(Verdict.NOT_PROVABLE, "the endpoint has no address"), made.index
        left = caller.left()
        patience = MOST if left is None else min(MOST, left / 4)
        full = end.mtu if isinstance(wire, RemoteWire) else 0
        sizes = (full,) if full else ()
        try:
            asked = await self._echoes(end.namespace, end.name, to, patience, sizes, fds)
        except (NsmError, OSError) as cannot:
            return Proof(Verdict.NOT_PROVABLE, f"nobody can be asked: {cannot}"), made.index
        for one in asked:
            if one.error:
                where = made.index if one.here else len(made.segments) - 1
                return Proof(Verdict.BROKEN, f"{one.to}: {one.error}"), where
        if not any(one.answered for one in asked):
            if why := await self._no_tunnel(wire):
                return Proof(Verdict.BROKEN, why), min(made.index + 2, len(made.segments) - 1)
            return Proof(Verdict.NOT_PROVABLE, "no answer to ICMP echoes"), made.index
        mtu = 0
        if full and (large := [one for one in asked if one.answered and full not in one.passed]):
            tried = [one.to for one in large]
            mtu = await self._passing(end.namespace, end.name, tried, full, fds)
        silent = [str(one.to) for one in asked if not one.answered]
        if silent:
            why = f"no answer from {', '.join(silent)}"
            return Proof(Verdict.NOT_PROVABLE, why, mtu), made.index
        return Proof(Verdict.PROVEN, mtu=mtu), made.index

    async def _passing(
        self,
        namespace: Namespace,
        device: str,
        to: list[IPAddress],
        full: int,
        fds: Mapping[Namespace, int],
    ) -> int:
        """The largest packets that come back, of those that are smaller; 0 if none does.

        Then it is not the size: some answer small echoes only, and that is theirs to decide.
        """
        passes, fails = 0, full
        least = max(LEAST[one.version] for one in to)
        for _ in range(ROUNDS):
            sizes = ladder(passes or least - 1, fails)
            if not sizes:
                break
            try:
                asked = await self._echoes(namespace, device, to, MOST / 4, sizes, fds)
            except (NsmError, OSError):
                break
            through = set.intersection(*(one.passed for one in asked))
            if not through:
                break
            passes = max(passes, *through)
            fails = min([size for size in sizes if size > passes] + [fails])
        return passes

    async def _echoes(
        self,
        namespace: Namespace,
        device: str,
        to: list[IPAddress],
        patience: float,
        sizes: "list[int] | tuple[int, ...]",
        fds: Mapping[Namespace, int],
    ) -> list[Echo]:
        async with self._thread(patience) as left:
            return await self._kernel.within(
                namespace, lambda: echo.echoes(device, to, left, sizes), fd=fds.get(namespace)
            )

    @asynccontextmanager
    async def _thread(self, patience: float) -> AsyncIterator[float]:
        """A thread to ask in, and the seconds that are left for it. Raises UnavailableError."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(patience):
                await self._threads.acquire()
        except TimeoutError:
            raise UnavailableError(
                f"{WITHIN} other wires are probed, whose endpoints do not answer"
            ) from None
        try:
            yield max(BRIEFLY, patience - (time.monotonic() - began))
        finally:
            self._threads.release()

    async def _no_tunnel(self, wire: Wire) -> str:
        """Why a tunnel carries nothing, where the far node says so. An encrypted one is proven
        by its handshake."""
        tunnel = wire.tunnel if isinstance(wire, RemoteWire) else None
        if not isinstance(tunnel, VxlanTunnel):
            return ""
        try:
            async with self._thread(KNOCK):
                refused = await self._kernel.within(
                    tunnel.underlay, lambda: echo.refuses(tunnel.remote, tunnel.port, KNOCK)
                )
        except UnavailableError:
            return ""
        if not refused:
            return ""
        return f"node {tunnel.remote} says that no tunnel listens on its UDP port {tunnel.port}"


def ladder(passes: int, fails: int) -> list[int]:
    """Sizes between one that passes and one that does not, the least of them first."""
    step = max(1, (fails - passes) // STEPS)
    return list(range(passes + 1, fails, step))


def _addresses(made: Connection) -> list[IPAddress]:
    found = []
    for text in made.ip.dst_ip_addrs:
        try:
            found.append(ip_interface(text).ip)
        except ValueError:
            continue
    own = {ip_interface(text).version for text in made.ip.src_ip_addrs}
    return [one for one in found if one.version in own][:ADDRESSES]

"""Whether packets still flow through wires: pings from their own ends, for as long as they are up.

One task for all wires of a client, one socket for each address of ours, closed with the wire.
They are unprivileged ICMP sockets in the namespace this process is in, which whoever made the
wire has allowed there (`net.ipv4.ping_group_range`). `wire.md` §8.2 has upstream's way.

Only what answered before can be called silent, and only by a loop that ran: before a ping counts
as unanswered all that came is read, and where a look came too late the count starts anew. What a
socket refuses to send counts as unanswered, and sooner. That packets were received counts for
nothing: whose they are is not known, and pings suffice.
"""

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import structlog

log = structlog.get_logger(__name__)

MOST_PAIRS = 8  # of addresses of one wire that are watched: members may have many
LATE = 0.1  # seconds after its time at which a look tells nothing of what was not answered
LEAST = 3  # pings that must be unanswered
HASTE = 0.3  # seconds without an answer that are enough once the mesh says that a wire is down,
HASTY = 5.0  # for that many seconds: what took a process may be about to take its namespace
NO_WAY = 0.3  # seconds, where the kernel here refuses to send; swapping a device takes less
RARELY = 16  # intervals between pings to who never answered
SHY = 15  # pings until that
MOST_READ = 256  # answers read from one socket at once
Address = ipaddress.IPv4Interface | ipaddress.IPv6Interface
_OURS = frozenset((errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN, errno.EPERM, errno.EACCES))


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How often is asked, and within how long of an end it is to be known; seconds.

    It is, if interval is not more than a fifth of timeout; else an interval later at most.
    """

    interval: float = 0.2
    timeout: float = 1.0

    @property
    def step(self) -> float:
        """Between two looks."""
        return min(self.interval, self.timeout / 5)

    @property
    def quick(self) -> float:
        """Between two looks, and two pings, where there is doubt."""
        return self.step / 4

    @property
    def patience(self) -> float:
        """How long the first of those pings may be unanswered that none answers."""
        return self.timeout - self.step - self.quick


class Pair:
    """One address of ours and one of theirs: what was asked and heard. Pure."""

    def __init__(self, rhythm: Rhythm) -> None:
        self.heard = 0.0  # when an answer came last; 0.0: never
        self._rhythm = rhythm
        self._asked = 0.0  # when the first ping after that was sent; 0.0: none was
        self._count = 0  # pings since then
        self._refused = 0  # of them, in a row, that could not be sent
        self._due = 0.0
        self._sent: dict[int, float] = {}
        self._round = 0.0  # seconds an answer takes

    def due(self, now: float) -> bool:
        """Whether it is time for a ping, or nearly: so that many wires are looked at at once."""
        return now >= self._due - self._rhythm.quick or self.doubted(now)

    def sent(self, now: float, number: int, *, refused: bool = False) -> None:
        """A ping was sent; refused: the kernel here would not."""
        self._asked = self._asked or now
        self._count += 1
        self._refused = self._refused + 1 if refused else 0
        self._sent[number] = now
        if len(self._sent) > MOST_READ:
            self._sent.pop(next(iter(self._sent)))
        shy = not self.heard and self._count > SHY
        self._due = now + self._rhythm.interval * (RARELY if shy else 1)

    @property
    def waits(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._asked)

    def unsent(self, now: float) -> None:
        """A ping could not be sent, and that says nothing of the far end."""
        self._due = now + self._rhythm.interval

    def answered(self, now: float, number: int) -> None:
        """An answer came."""
        if number in self._sent:
            self._round = now - self._sent[number]
            self._sent = {key: at for key, at in self._sent.items() if at > self._sent[number]}
        self.heard = now
        self.anew()

    def anew(self) -> None:
        """What was not answered counts no longer."""
        self._asked, self._count, self._refused = 0.0, 0, 0

    def pause(self, now: float) -> float:
        """Seconds until there may be something to read or to send."""
        if self.heard and self._asked:
            return self._rhythm.quick
        return max(0.001, self._due - now)

    def doubted(self, now: float) -> bool:
        """Whether an answer is missing."""
        late = now - self._asked >= self._rhythm.step
        return bool(self.heard and self._asked) and (late or bool(self._refused))

    def silent(self, now: float, *, hasty: bool = False) -> bool:
        """Whether the far end is called dead."""
        if not self.heard or not self._asked or self._count < LEAST:
            return False
        # What is asked in doubt is answered that much later.
        patience = self._rhythm.patience + max(0.0, self._round - self._rhythm.step)
        if hasty:
            patience = min(patience, max(HASTE, 4 * self._round))
        if self._refused >= LEAST:
            patience = min(patience, NO_WAY)
        return now - self._asked >= patience


class Pulse:
    """One wire's: its pairs and sockets. Closed with the wire."""

    def __init__(
        self,
        own: Sequence[Address],
        others: Sequence[Address],
        rhythm: Rhythm,
        on_silent: Callable[[], None],
        hurry: Callable[[], None] = lambda: None,
    ) -> None:
        self.silent = False
        """Whether the far end answered before and does so no more."""
        self.addresses = (tuple(own), tuple(others))
        self._hasty_until = 0.0
        self._on_silent = on_silent
        self._hurry = hurry
        self._rhythm = rhythm
        self._sockets: dict[str, socket.socket] = {}
        self._pairs = {pair: Pair(rhythm) for pair in pairs(own, others)}
        self._number = 0
        self._looked = asyncio.Event()

    @property
    def answered(self) -> bool:
        """Whether the far end ever answered."""
        return any(one.heard for one in self._pairs.values())

    @property
    def heard(self) -> float:
        """The last moment at which all that ever answered did; 0.0: never."""
        return min((one.heard for one in self._pairs.values() if one.heard), default=0.0)

    def close(self) -> None:
        """Watch no more."""
        for one in self._sockets.values():
            one.close()
        self._sockets.clear()
        self._pairs.clear()
        self._look_over()

    def anew(self) -> None:
        """What was not answered counts no longer."""
        self.silent = False
        for one in self._pairs.values():
            one.anew()

    def known(self, now: float) -> None:
        """It is known from elsewhere that the far end answers: its silence means something."""
        for one in self._pairs.values():
            one.heard = one.heard or now

    async def answers(self, within: float) -> bool:
        """Whether the far end answers at all, in so many seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not self.answered:
                    self._looked.clear()
                    await self._looked.wait()
        return self.answered

    def settle(self) -> None:
        """The wire was asked for, and is there: all begins anew, without haste."""
        self._hasty_until = 0.0
        self.anew()

    async def flows(self) -> bool | None:
        """Whether packets flow now, in a third of a second or so; None where nobody can tell.

        For some seconds more as little silence is enough. A loop that comes late to every look
        can tell nothing for as long: whoever asks waits no longer than that.
        """
        if not self.answered:
            return None
        began = time.monotonic()
        if not self.silent:
            self.anew()
        self._hasty_until = began + HASTY
        self._hurry()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HASTY):
                while self._pairs and not self.silent:
                    if self.heard > began:
                        return True
                    self._looked.clear()
                    await self._looked.wait()
        return False if self.silent and self._pairs else None

    def _hasty(self, now: float) -> bool:
        return now < self._hasty_until and not self.silent

    # --- what the task does -----------------------------------------------------------------

    def read(self, now: float) -> None:
        """Take all answers that came."""
        if not any(one.waits for one in self._pairs.values()):
            return
        for own, one in self._sockets.items():
            for _ in range(MOST_READ):
                try:
                    data, sender = one.recvfrom(64)
                except BlockingIOError:
                    break
                except OSError:
                    continue  # what the way there says is no answer
                pair = self._pairs.get((own, sender[0].partition("%")[0]))
                if pair and len(data) >= 8:
                    pair.answered(now, struct.unpack_from("!H", data, 6)[0])

    def ask(self, now: float) -> None:
        """Send the pings whose time it is."""
        for (own, other), pair in self._pairs.items():
            if self._hasty(now) or pair.due(now):
                self._number = (self._number + 1) % 65536
                try:
                    self._send(own, other, self._number)
                except OSError as error:
                    if error.errno in _OURS:
                        pair.unsent(now)
                    else:
                        pair.sent(now, self._number, refused=True)
                else:
                    pair.sent(now, self._number)

    def judge(self, now: float) -> None:
        """Call the far end silent, or take that back."""
        hasty = now < self._hasty_until
        silent = any(one.silent(now, hasty=hasty) for one in self._pairs.values())
        if silent and not self.silent:
            self.silent = True
            self._on_silent()
        elif self.silent and not any(one.doubted(now) for one in self._pairs.values()):
            self.silent = False
        self._look_over()

    def pause(self, now: float) -> float:
        """Seconds until the next look."""
        if self.silent:
            return self._rhythm.interval
        if self._hasty(now):
            return self._rhythm.quick
        return min((one.pause(now) for one in self._pairs.values()), default=self._rhythm.interval)

    def _look_over(self) -> None:
        self._looked.set()

    def _send(self, own: str, other: str, number: int) -> None:
        echo = struct.pack("!BBHHH", 128 if ":" in own else 8, 0, 0, 0, number)
        if own not in self._sockets:
            self._sockets[own] = _opened(own)
        self._sockets[own].sendto(echo, (other, 0))


class Liveness:
    """Watches wires, for as long as `run` runs."""

    def __init__(self, rhythm: Rhythm) -> None:
        self.rhythm = rhythm
        self._pulses: set[Pulse] = set()
        self._some = asyncio.Event()
        self._refused = False

    def watch(
        self, own: Sequence[Address], others: Sequence[Address], on_silent: Callable[[], None]
    ) -> Pulse | None:
        """Watch from now on until `forget`; on_silent is called when the far end falls silent.

        None where there are no two addresses of one family, or we may not ping.
        """
        if not pairs(own, others):
            return None
        if why := forbidden():
            if not self._refused:
                log.info("wires are not watched: no pings may be sent here", why=why)
            self._refused = True
            return None
        pulse = Pulse(own, others, self.rhythm, on_silent, self._some.set)
        self._pulses.add(pulse)
        self._some.set()
        return pulse

    def forget(self, pulse: Pulse) -> None:
        """Watch it no more, and close its sockets."""
        self._pulses.discard(pulse)
        pulse.close()

    async def run(self) -> None:
        """Look at all of them again and again, until cancelled."""
        try:
            while True:
                self._some.clear()
                if not self._pulses:
                    await self._some.wait()
                at = time.monotonic()
                pause = min((one.pause(at) for one in self._pulses), default=0.0)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._some.wait()
                self.look(late=time.monotonic() - at - pause > LATE)
        finally:
            for pulse in list(self._pulses):
                self.forget(pulse)

    def look(self, *, late: bool) -> None:
        """One look; late: we did not run when we should have, and so know nothing of then."""
        now = time.monotonic()
        for pulse in list(self._pulses):
            pulse.read(now)
            if late and not pulse.silent:
                pulse.anew()
            pulse.judge(now)
            pulse.ask(now)


def pairs(own: Sequence[Address], others: Sequence[Address]) -> list[tuple[str, str]]:
    """Which addresses of ours ask which of theirs: those of one family, of each some."""
    by_family = [
        [
            (str(one.ip), str(other.ip))
            for one in own
            for other in others
            if one.version == other.version == version
        ]
        for version in (4, 6)
    ]
    mixed = (one for one in chain(*zip_longest(*by_family)) if one is not None)
    return list(dict.fromkeys(mixed))[:MOST_PAIRS]


def _opened(own: str) -> socket.socket:
    v6 = ":" in own
    one = socket.socket(
        socket.AF_INET6 if v6 else socket.AF_INET,
        socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
        socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP,
    )
    try:
        one.bind((own, 0))
    except OSError:
        one.close()
        raise
    return one


def forbidden() -> str:
    """Why nobody without rights may ping from this network namespace; empty if all may."""
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""

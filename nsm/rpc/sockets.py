"""Finding dead peers by the kernel's own means.

HTTP/2 pings would do, but Go servers answer frequent ones with GOAWAY, so TCP
probes a silent connection and gives up on one whose bytes are not acknowledged.
"""

import socket
import struct

# What the other side gave up while nothing passed is told by its answer to a probe, and a call that
# waits for one that was lost with it ends then, and not at its deadline.
IDLE = 2  # seconds of silence before the kernel probes
INTERVAL = 2  # seconds between probes
UNACKNOWLEDGED = 20_000  # milliseconds that sent bytes or probes may stay unanswered
LOOK = 0.25  # seconds between looks whether machines acknowledge what they are sent
_LEAST_PAUSE = 0.2  # seconds until TCP says again what is not acknowledged, at least
_DELAYED = 0.1  # seconds an acknowledgement may be held back


def watch_for_death(sock: socket.socket) -> None:
    """Let a TCP connection end within about half a minute when its peer is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED)


class Silence:
    """How long a peer's machine acknowledges nothing of what it was sent. One for a connection.

    A process that hangs is another matter: its kernel acknowledges all the same.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._since = self._looked = 0.0
        self.bearable = 0.0
        """For how many seconds it may last, as of the last look: until what was sent four times
        could be acknowledged. On a line that loses and is long that is longer."""

    def lasts(self, now: float) -> float:
        """For how many seconds, as far as was looked; 0.0 if nothing is unacknowledged.

        Whoever did not look for a while, because nobody waits for this peer or because we did not
        run, knows nothing of then: it counts from now on.
        """
        if now - self._looked > 2 * LOOK:
            self._since = 0.0
        self._looked = now
        try:
            facts = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 76)
        except OSError:
            return 0.0  # it ended
        (unacknowledged,) = struct.unpack_from("=I", facts, 24)
        (heard_before,) = struct.unpack_from("=I", facts, 56)  # milliseconds
        there_and_back, deviation = (us / 1e6 for us in struct.unpack_from("=II", facts, 68))
        # as the kernel counts it; the pauses double: 1 + 2 + 4 of the first
        first_pause = there_and_back + max(4 * deviation, _LEAST_PAUSE)
        self.bearable = 7 * first_pause + there_and_back + _DELAYED
        if not unacknowledged:
            self._since = 0.0
            return 0.0
        self._since = max(self._since or now, now - heard_before / 1000)
        return now - self._since

"""Finding dead peers by the kernel's own means.

HTTP/2 pings would do, but Go servers answer frequent ones with GOAWAY, so TCP
probes a silent connection and gives up on one whose bytes are not acknowledged.
"""

import socket

IDLE = 10  # seconds of silence before the kernel probes
INTERVAL = 5  # seconds between probes
UNACKNOWLEDGED = 20_000  # milliseconds that sent bytes or probes may stay unanswered


def watch_for_death(sock: socket.socket) -> None:
    """Let a TCP connection end within about half a minute when its peer is gone."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED)

"""Whether a UDP port is free in the namespace the calling thread is in. Blocks."""

import errno
import socket

_NO_FAMILY = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


def free(port: int) -> bool:
    """Whether a socket could have it now, on all addresses of IPv4 and of IPv6."""
    return all(_binds(family, port) for family in (socket.AF_INET, socket.AF_INET6))


def _binds(family: socket.AddressFamily, port: int) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            if family == socket.AF_INET6:  # IPv4 is asked about by itself
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(("", port))
    except OSError as failure:
        if failure.errno == errno.EADDRINUSE:
            return False
        if failure.errno not in _NO_FAMILY:  # a kernel without IPv6 has no port of it to take
            raise
    return True

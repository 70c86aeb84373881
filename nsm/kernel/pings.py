"""Leave to ask other nodes for an echo, without the right to send whatever one likes."""

import socket

_RANGE = "/proc/sys/net/ipv4/ping_group_range"  # of the namespace whoever opens it is in
_EVERYBODY = "0 2147483647"


def allow() -> str:
    """Let everybody in this network namespace ask for echoes, unless that is so; why not, if not.

    Most distributions begin with it. Blocks.
    """
    if not (refused := _refused()):
        return ""
    try:
        with open(_RANGE, "w") as file:
            file.write(_EVERYBODY)
    except OSError as failure:
        return f"{refused}; net.ipv4.ping_group_range cannot be set: {failure.strerror}"
    return _refused()


def _refused() -> str:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP).close()
    except OSError as failure:
        return failure.strerror or str(failure)
    return ""

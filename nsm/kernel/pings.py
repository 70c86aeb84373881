"""Leave to ask other nodes for an echo, without the right to send whatever one likes."""

from nsm.liveness import forbidden

_RANGE = "/proc/sys/net/ipv4/ping_group_range"  # of the namespace whoever opens it is in
_EVERYBODY = "0 2147483647"


def allow() -> str:
    """Let everybody in this network namespace ask for echoes, unless that is so; why not, if not.

    Most distributions begin with it. Blocks.
    """
    if not (why := forbidden()):
        return ""
    try:
        with open(_RANGE, "w") as file:
            file.write(_EVERYBODY)
    except OSError as failure:
        return f"{why}; net.ipv4.ping_group_range cannot be set: {failure.strerror}"
    return forbidden()

"""Where a process is reached: the URLs of upstream's variables (`wire.md` §11.1)."""

import ipaddress
import re
from dataclasses import dataclass

from nsm.errors import InvalidError

MAX_PATH = 107  # bytes: what the kernel takes as a unix socket's path
_FORM = "unix:///path, tcp://host:port or host:port"
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]{0,252})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Unix:
    """A unix socket's path."""

    path: str


@dataclass(frozen=True, slots=True)
class Tcp:
    """A host (name or address, empty: any) and a port."""

    host: str
    port: int


def parse(url: str) -> Unix | Tcp:
    """What url says; raises InvalidError.

    `tcp://h:p`, and with the same meaning `dns:///h:p` and a bare `h:p`, which a
    URL parser takes for a scheme (`registry:5002`). IPv6 addresses in brackets.
    """
    if url.startswith("unix:"):
        path = url.removeprefix("unix:")
        path = path.removeprefix("//")
        if not path.startswith("/") or "\0" in path:
            raise InvalidError(f"{url[:200]!r} names no unix socket", hint="unix:///path")
        if len(path.encode()) > MAX_PATH:
            raise InvalidError(
                f"the path of {url[:200]!r} has {len(path.encode())} bytes; "
                f"the kernel takes at most {MAX_PATH}"
            )
        return Unix(path)
    rest = url
    for scheme in ("tcp://", "dns:///"):
        rest = rest.removeprefix(scheme)
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidError(f"{url[:200]!r} is no address of a process", hint=_FORM)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError as wrong:
            raise InvalidError(f"{url[:200]!r} has no IPv6 address in brackets") from wrong
    elif host and not _HOST.fullmatch(host):
        raise InvalidError(f"{url[:200]!r} is no address of a process", hint=_FORM)
    return Tcp(host, int(port))


def tcp_url(host: str, port: int) -> str:
    """`tcp://host:port`, with brackets where IPv6 needs them."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"

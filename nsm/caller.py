"""Who is calling: what a hop may know about the other end of a call.

A call's facts come from its connection (the TLS handshake, the kernel's word
about the process, the file descriptors that travel beside the bytes) and from
its metadata (the token). They are values here, so that everything above the
transport decides on them without knowing any gRPC library.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from nsm.errors import InvalidError
from nsm.identity.source import Handshake
from nsm.identity.spiffe import SpiffeId

TOKEN = "nsm-client-token"  # noqa: S105 - the key's name, not a token
TOKEN_EXPIRES = "nsm-client-token-expires"  # noqa: S105

_INODE_URL = re.compile(r"inode://([0-9]{1,20})/([0-9]{1,20})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The process at the other end of a unix socket when it connected, as the kernel says."""

    pid: int
    uid: int
    gid: int
    pidfd: int | None = field(default=None, compare=False)  # closed with the connection


def ended(who: Credentials) -> bool:
    """Whether the process has ended, so that its number may be another's by now. Blocks.

    To be asked after something was opened in /proc/<pid>: what was opened before the
    answer was False is that process's. Without a handle on it nothing is believed.
    """
    try:
        with open(f"/proc/self/fdinfo/{who.pidfd}", "rb") as file:
            said = file.read(4096)
    except OSError:
        return True  # the connection has ended, and its handle with it
    # the number itself and not -1; nor another file's, whose descriptor got the handle's place
    return f"\nPid:\t{who.pid}\n".encode() not in said


class Fds(Protocol):
    """The file descriptors that travel with one call (`wire.md` §5)."""

    async def claim(self, url: str, patience: float = 2.0) -> int:
        """The descriptor of the file that url (`inode://dev/ino`) names.

        It belongs to the claimer from now on: close it. Mostly O_PATH, so re-open
        `/proc/self/fd/N` before use. It may come after the call's own bytes, hence
        patience, in seconds. Raises InvalidError for another kind of URL and
        UnavailableError, naming url, if the peer never sends it.
        """
        ...

    def send(self, fd: int) -> str:
        """Send a duplicate of fd beside the next bytes; returns its `inode://dev/ino`."""
        ...


@dataclass(frozen=True, slots=True)
class Caller:
    """One call's other end."""

    handshake: Handshake
    token: str = field(default="", repr=False)  # empty: none came, or not exactly one
    token_expires: int | None = None  # ns since 1970
    unix: bool = False
    process: Credentials | None = None  # unix sockets only
    fds: Fds | None = None  # unix sockets only
    deadline: float | None = None  # time of the event loop
    metadata: Mapping[str, str] = field(default_factory=dict, repr=False)  # carries tokens

    @property
    def id(self) -> SpiffeId:
        """The SPIFFE id proven by the TLS handshake."""
        return self.handshake.peer_id

    def left(self) -> float | None:
        """Seconds until the caller's deadline, at least 0; None if it has none."""
        if self.deadline is None:
            return None
        return max(0.0, self.deadline - asyncio.get_running_loop().time())


def inode_url(dev: int, ino: int) -> str:
    """The URL by which a file is named beside its descriptor (`wire.md` §5.4)."""
    return f"inode://{dev}/{ino}"


def parse_inode_url(url: str) -> tuple[int, int]:
    """Device and inode number of an `inode://dev/ino`. Raises InvalidError."""
    found = _INODE_URL.fullmatch(url)
    if found is None:
        raise InvalidError(
            f"{url[:100]!r} names no passed file descriptor",
            hint="it has the form inode://<st_dev>/<st_ino>, both decimal",
        )
    return int(found[1]), int(found[2])

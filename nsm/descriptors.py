"""File descriptors on their way through a hop, owned by one block and closed with it.

A network namespace lives as long as anybody holds a descriptor of it, so none
may outlive the request that brought it: not on the error path either.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable
from functools import partial
from types import TracebackType
from typing import ParamSpec, Protocol, Self

from nsm.errors import InvalidError, UnavailableError
from nsm.model import Mechanism

P = ParamSpec("P")
INODE_URL = "inodeURL"  # the mechanism parameter that names a shared file (`wire.md` §2.1)


class Channel(Protocol):
    """Something descriptors travel over: a unix connection to a peer (`wire.md` §5)."""

    async def claim(self, url: str, patience: float) -> int:
        """The descriptor announced as `inode://dev/ino`; the caller owns it."""

    def send(self, fd: int) -> str:
        """Queue a duplicate of fd; return the `inode://dev/ino` it will be known by."""


class Descriptors:
    """Owned descriptors by their `inode://dev/ino`; closed when the block ends."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()

    def adopt(self, url: str, fd: int) -> None:
        """Own fd from now on."""
        if (old := self._fds.pop(url, None)) is not None and old != fd:
            os.close(old)
        self._fds[url] = fd

    async def claim(self, channel: Channel | None, url: str, patience: float) -> None:
        """Take the descriptor called url from channel, unless it is here already."""
        if channel is not None and url.startswith("inode://") and url not in self._fds:
            self.adopt(url, await channel.claim(url, patience))

    async def claim_rest(self, channel: Channel | None, url: str, patience: float) -> None:
        """As claim; one that came although it is here already is closed.

        Nobody else would ask for it, and until it is old it pins what it refers to.
        """
        if url in self._fds:
            await drop(channel, (url,))
        else:
            await self.claim(channel, url, patience)

    async def claim_all(
        self, channel: Channel | None, mechanisms: tuple[Mechanism, ...], patience: float
    ) -> None:
        """Take every descriptor mechanisms name."""
        for mechanism in mechanisms:
            await self.claim(channel, mechanism.get(INODE_URL), patience)

    def send_all(self, channel: Channel | None, mechanisms: tuple[Mechanism, ...]) -> None:
        """Send on what mechanisms name and we own."""
        if channel is None:
            return
        for url in {mechanism.get(INODE_URL) for mechanism in mechanisms}:
            if (fd := self._fds.get(url)) is not None:
                channel.send(fd)

    def get(self, url: str) -> int | None:
        """The descriptor called url, still ours; None if it never came."""
        return self._fds.get(url)

    def __len__(self) -> int:
        return len(self._fds)


async def opened(open_: Callable[P, int], *args: P.args, **kwargs: P.kwargs) -> int:
    """Run open_ in a thread and return its descriptor, which the caller owns.

    A caller that is cancelled meanwhile owns nothing: then it is closed here.
    """

    def close(done: "asyncio.Future[int]") -> None:
        if not done.cancelled() and done.exception() is None:
            os.close(done.result())

    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(None, partial(open_, *args, **kwargs))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(close)
        raise


async def drop(channel: Channel | None, urls: Iterable[str]) -> None:
    """Close the descriptors that came under these URLs and that nobody wants, if any came."""
    for url in {one for one in urls if channel is not None and one.startswith("inode://")}:
        with contextlib.suppress(UnavailableError, InvalidError):
            os.close(await channel.claim(url, 0.0))  # type: ignore[union-attr] # asked above

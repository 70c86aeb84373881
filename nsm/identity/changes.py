"""Noticing that files on disk are others than before.

By looking at them now and then: the file may be replaced by renaming, through a
chain of links (as Kubernetes does with its volumes) or on a file system that
reports nothing. What is read is bounded.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from nsm.errors import PreconditionError

LOOK_EVERY = 1.0  # seconds

Seen = tuple[tuple[str, int, int, int], ...]


def seen(paths: Sequence[Path]) -> Seen:
    """What tells one content of paths from another; absent files are left out. Blocks."""
    found = []
    for path in paths:
        try:
            status = path.stat()
        except OSError:
            continue
        found.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


async def changes(
    paths: Callable[[], Sequence[Path]], before: Seen, *, every: float = LOOK_EVERY
) -> AsyncIterator[Seen]:
    """Whenever paths() look different from before: how they look now. Never ends."""
    while True:
        await asyncio.sleep(every)
        now = await asyncio.to_thread(lambda: seen(paths()))
        if now != before:
            before = now
            yield now


def read(path: Path, most: int, what: str) -> bytes:
    """The content of path, a regular file of at most `most` bytes. Blocks.

    Raises PreconditionError; what completes "cannot read …".
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO would wait
        with os.fdopen(fd, "rb") as file:
            content = file.read(most + 1)
    except OSError as why:
        raise PreconditionError(
            f"cannot read {what} {path}: {why.strerror}", hint="check the path and its permissions"
        ) from why
    if content is None or len(content) > most:
        raise PreconditionError(f"{what} {path} is over {most} bytes, or no regular file")
    return content

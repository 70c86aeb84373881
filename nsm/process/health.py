"""Whether a process can serve: a set of named parts, each ready or with a reason why not.

Who watches it from outside and cannot ask over mutual TLS, as a kubelet, looks at a
file (NSM_HEALTH_FILE): what it says is whether the process serves, how old it is, whether it
hangs. To look at it needs no certificate, so that no process is ended because the one
who gives certificates is away.
"""

import asyncio
import os
from collections.abc import Mapping
from contextlib import suppress

import structlog

from nsm.errors import PreconditionError

BEAT = 2.0  # seconds: how old the file gets while the event loop turns
SERVING = "serving"

log = structlog.get_logger(__name__)


class Health:
    """Readiness by part; the process serves when every part does.

    Parts are named when they are known to matter, with why they are not ready yet:

        health = Health(listen="not listening yet", registry="not connected yet")
        health.ready("listen")
    """

    def __init__(self, **waiting: str) -> None:
        self._missing: dict[str, str] = dict(waiting)
        self._changed = asyncio.Event()

    @property
    def serving(self) -> bool:
        """Whether nothing is missing."""
        return not self._missing

    @property
    def missing(self) -> Mapping[str, str]:
        """What is missing: part and reason."""
        return dict(self._missing)

    def ready(self, part: str) -> None:
        """The part does its work."""
        if self._missing.pop(part, None) is not None:
            self._announce()

    def lost(self, part: str, why: str) -> None:
        """The part does not do its work; why is for people."""
        if self._missing.get(part) != why:
            self._missing[part] = why
            self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def changed(self) -> None:
        """Wait for the next change."""
        await self._changed.wait()


async def publish(health: Health, path: str, beat: float = BEAT) -> None:
    """Keep the file path saying `serving`, or a line for each part that is missing.

    Written anew at each change, and every beat seconds by a thread that the event loop
    starts, until cancelled; then it is removed. Raises PreconditionError if it cannot be
    written at first; later that is logged, and the file's age tells it.
    """
    loop = asyncio.get_running_loop()
    written, writing = False, None
    try:
        while True:
            said = _said(health)
            writing = loop.run_in_executor(None, _write, path, said)
            try:
                await asyncio.shield(writing)
                written = True
            except OSError as error:
                if not written:
                    raise PreconditionError(
                        f"NSM_HEALTH_FILE is {path!r}, which cannot be written: {error.strerror}",
                        hint="it names a file in a directory that this user may write",
                    ) from error
                log.warning("the health file is not written", path=path, why=error.strerror)
            if said == _said(health):  # else it changed while it was written
                with suppress(TimeoutError):
                    async with asyncio.timeout(beat):
                        await health.changed()
    finally:
        if writing:  # a thread does not end with its task, and would write it once more
            await asyncio.wait({writing})
        with suppress(OSError):
            os.unlink(path)


def _said(health: Health) -> str:
    missing = health.missing
    return "".join(f"{part}: {why}\n" for part, why in missing.items()) or f"{SERVING}\n"


def _write(path: str, text: str) -> None:
    with open(f"{path}~", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(f"{path}~", path)  # nobody reads half of it

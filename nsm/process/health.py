"""Whether a process can serve: a set of named parts, each ready or with a reason why not."""

import asyncio
from collections.abc import Mapping


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

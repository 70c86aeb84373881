"""A file that somebody else writes, and may change at any time: what it says now.

Whoever knows it (a cluster's add-on, an operator) writes YAML; we look at it every
few seconds. A broken one is logged, and the last good one kept.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Generic, TypeVar

import structlog
import yaml

from nsm.errors import InvalidError

T = TypeVar("T")
log = structlog.get_logger(__name__)
LARGEST = 1 << 20  # bytes of a file


class Followed(Generic[T]):
    """value is the file's as of its last good reading; nothing while it does not exist.

    parse raises ValueError or yaml.YAMLError for what it cannot use; what is the
    file's content, as it is called in the log.
    """

    def __init__(self, path: str, parse: Callable[[str], T], nothing: T, what: str) -> None:
        self.path = path
        self.value = nothing
        self._parse = parse
        self._nothing = nothing
        self._what = what
        self._seen: tuple[int, int] | int | None = None

    async def follow(self, period: float = 2.0) -> None:
        """Read the file now and whenever it changes, until cancelled; period in seconds."""
        while True:
            await asyncio.to_thread(self.read)
            await asyncio.sleep(period)

    def first(self) -> None:
        """Read the file at the start. Blocks. Raises InvalidError if it is broken."""
        try:
            self._read()
        except (OSError, ValueError, yaml.YAMLError) as wrong:
            raise InvalidError(f"{self.path}, {self._what}, cannot be used: {wrong}") from wrong

    def read(self) -> None:
        """Read the file if it changed. Blocks."""
        try:
            self._read()
        except (OSError, ValueError, yaml.YAMLError) as wrong:
            log.warning(
                "file not read, what it said last stays",
                of=self._what,
                path=self.path,
                error=str(wrong),
            )

    def _read(self) -> None:
        seen: tuple[int, int] | int | None
        try:
            facts = os.stat(self.path)
            seen = (facts.st_mtime_ns, facts.st_size)
        except (FileNotFoundError, NotADirectoryError):
            self._seen, self.value = None, self._nothing
            return
        except OSError as wrong:  # it may well be there: what it said last stays
            seen = wrong.errno
        if seen == self._seen:
            return
        self._seen = seen
        with open(self.path, encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        self.value = self._parse(text)
        log.info("file read", of=self._what, path=self.path, says=self.value)

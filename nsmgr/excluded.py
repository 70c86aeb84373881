"""Prefixes no wire may use: those of the node's own networks (`wire.md` §3.5).

Whoever knows them (a cluster's add-on, an operator) writes them to a YAML file
`prefixes: [10.0.0.0/8, …]`, and may change it at any time.
"""

import asyncio
import os
from ipaddress import ip_network

import structlog
import yaml

log = structlog.get_logger(__name__)
LARGEST = 1 << 20  # bytes of the file


class ExcludedPrefixes:
    """The file's prefixes, as of its last good reading; none while it does not exist."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self.prefixes: tuple[str, ...] = ()

    async def follow(self, period: float = 2.0) -> None:
        """Read the file now and whenever it changes, until cancelled; period in seconds."""
        while True:
            await asyncio.to_thread(self.read)
            await asyncio.sleep(period)

    def read(self) -> None:
        """Read the file if it changed. A broken one is logged and the last good one kept."""
        try:
            facts = os.stat(self._path)
        except OSError:
            self._seen, self.prefixes = None, ()
            return
        seen = (facts.st_mtime_ns, facts.st_size)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            with open(self._path, encoding="utf-8") as file:
                self.prefixes = parse(file.read(LARGEST))
            log.info("excluded prefixes read", path=self._path, prefixes=self.prefixes)
        except (OSError, ValueError, yaml.YAMLError) as wrong:
            log.warning("excluded prefixes not read, the last ones stay", error=str(wrong))


def parse(text: str) -> tuple[str, ...]:
    """The prefixes of a file's text; ValueError says what is wrong with it."""
    read = yaml.safe_load(text) or {}
    if not isinstance(read, dict):
        raise ValueError(  # noqa: TRY004 - the file's value is wrong, not our types
            f"a mapping with the key prefixes is expected, not {type(read).__name__}"
        )
    for key, value in read.items():
        if str(key).lower() == "prefixes":
            return tuple(str(ip_network(str(one), strict=False)) for one in value or ())
    return ()

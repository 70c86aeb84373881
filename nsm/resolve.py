"""Where other domains are: a file of those known beforehand, then DNS (`wire.md` §9.2).

async with open_domains("/etc/vwire/domains.yaml") as domains:
    for url in await domains.registry("cluster2"):
        ...
"""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog

from nsm import domains
from nsm.domains import MANAGER_PROXY, REGISTRY, Place
from nsm.errors import InvalidError, NotFoundError
from nsm.rpc import addresses

LARGEST = 1 << 20  # bytes of the file
log = structlog.get_logger(__name__)


class Domains:
    """Finds domains; made by `open_domains`."""

    def __init__(self, path: str, servers: Sequence[str]) -> None:
        self._path = path
        self._servers = tuple(servers)
        self._seen: tuple[int, int] | None = None
        self._known: Mapping[str, Place] = {}

    async def registry(self, domain: str) -> tuple[str, ...]:
        """URLs of domain's registry, at least one, to be tried in turn.

        Raises NotFoundError if file or DNS say that there is none, UnavailableError if
        nobody could say, InvalidError if domain is no domain.
        """
        return await self._urls(REGISTRY, domain)

    async def manager_proxy(self, domain: str) -> tuple[str, ...]:
        """URLs of domain's nsmgr-proxy, at least one, to be tried in turn.

        Raises as `registry` does. NotFoundError: domain has a registry alone
        (a floating domain, or a direct address), so an endpoint's own URL holds.
        """
        return await self._urls(MANAGER_PROXY, domain)

    async def _urls(self, role: str, domain: str) -> tuple[str, ...]:
        if url := domains.direct(domain):
            if role == REGISTRY:
                return (url,)
            raise NotFoundError(f"domain {domain!r} is a registry's address, and nothing more")
        if self._path:
            await asyncio.to_thread(self._read_again)
        if place := self._known.get(domains.canonical(domain)):
            if urls := place.registry if role == REGISTRY else place.manager_proxy:
                return urls
            raise NotFoundError(f"domain {domain!r} has no {role.split('.')[0]} in {self._path}")
        raise NotFoundError(
            f"domain {domain!r} is not in {self._path or 'a file (NSM_DOMAINS_PATH is not set)'}"
        )

    def read(self) -> None:
        """Read the file if it changed; raises InvalidError. For a thread."""
        try:
            with open(self._path, encoding="utf-8") as file:
                facts = os.fstat(file.fileno())
                seen = (facts.st_mtime_ns, facts.st_size)
                if seen == self._seen:
                    return
                text = file.read(LARGEST + 1)
        except (OSError, ValueError) as wrong:
            why = wrong.strerror if isinstance(wrong, OSError) else str(wrong)
            raise InvalidError(f"NSM_DOMAINS_PATH {self._path} cannot be read: {why}") from wrong
        if len(text) > LARGEST:
            raise InvalidError(f"{self._path} has more than {LARGEST} bytes")
        self._known = domains.parse_map(text, self._path, addresses.parse)
        self._seen = seen

    def _read_again(self) -> None:
        try:
            self.read()
        except InvalidError as wrong:
            log.warning("domains not read again, the last good ones stay", error=str(wrong))


@asynccontextmanager
async def open_domains(path: str = "", servers: Sequence[str] = ()) -> AsyncIterator[Domains]:
    """Domains by the file path ("": none), then DNS; servers "": those of the system.

    Raises InvalidError with file and line for a file that cannot be used.
    """
    found = Domains(path, servers)
    if path:
        await asyncio.to_thread(found.read)
    yield found

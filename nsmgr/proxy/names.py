"""Where endpoints of other domains are met: what was registered here, and what was found.

Nothing here is for ever. What was registered ends with its registration; what was
found ends after a minute, is replaced by whatever is found next, and is forgotten
when nobody answers there.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from nsm.domains import same_name
from nsm.errors import ExhaustedError
from nsm.model import SECOND

FOUND = 60 * SECOND  # how long a URL holds that was found, without being found again
MOST = 10_000  # URLs that were found, beyond them the oldest go; and that were registered
YOUNG = 120.0  # seconds after a start in which what was registered earlier may not be here yet


@dataclass(frozen=True, slots=True)
class _Known:
    url: str
    until: int
    name: str = ""


class Names:
    """URLs by full names, `endpoint@domain`; clock gives ns since 1970."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._registered: dict[str, _Known] = {}
        self._found: dict[str, _Known] = {}
        self._change = asyncio.Event()
        self._began = time.monotonic()

    @property
    def young(self) -> bool:
        """Whether there may be endpoints that registered before a restart, and not yet again."""
        return time.monotonic() - self._began < YOUNG

    def register(self, name: str, url: str, until: int) -> None:
        """An endpoint of our own domain is called name in another; its manager is at url.

        Raises ExhaustedError if there are too many.
        """
        now, called, name = self._clock(), name, same_name(name)
        if name not in self._registered and len(self._registered) >= MOST:
            self._registered = {n: k for n, k in self._registered.items() if k.until > now}
            if len(self._registered) >= MOST:
                raise ExhaustedError(
                    f"{MOST} endpoints are registered in other domains from here, which is the most"
                )
        self._registered[name] = _Known(url, until, called)
        self._change.set()
        self._change = asyncio.Event()

    def unregister(self, name: str) -> None:
        """It is called so no more."""
        self._registered.pop(same_name(name), None)

    def find(self, name: str, url: str, expires: int | None = None) -> None:
        """An endpoint of another domain is met at url now."""
        name = same_name(name)
        self._found.pop(name, None)
        if len(self._found) >= MOST:
            del self._found[next(iter(self._found))]
        until = self._clock() + FOUND
        self._found[name] = _Known(url, min(until, expires or until))

    def lose(self, name: str, url: str = "") -> None:
        """It is not met there: at url, or wherever it was thought to be."""
        name = same_name(name)
        known = self._found.get(name)
        if known and url in ("", known.url):
            del self._found[name]

    def registered(self, name: str) -> str:
        """The URL of the manager whose endpoint registered name here; "" if none did."""
        return self._alive(self._registered.get(same_name(name)))

    def called(self, name: str) -> str:
        """How it is written where it registered: domains are one in any case, names are not."""
        known = self._registered.get(same_name(name))
        return known.name if known else name

    def found(self, name: str) -> str:
        """Where name was found lately; "" if it was not."""
        return self._alive(self._found.get(same_name(name)))

    async def comes(self, name: str, patience: float) -> str:
        """As registered, but wait for it, at most patience seconds."""
        try:
            async with asyncio.timeout(patience):
                while not self.registered(name):
                    await self._change.wait()
        except TimeoutError:
            return ""
        return self.registered(name)

    def _alive(self, known: _Known | None) -> str:
        return known.url if known and known.until > self._clock() else ""

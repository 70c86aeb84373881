"""Holding a prefix of each family, from one address plan or several, for as long as we run."""

import asyncio
import ipaddress
from collections.abc import Callable, Sequence
from functools import partial

import structlog

from nsm.errors import NsmError
from nsm.process.tasks import Tasks
from nsm.rpc.peers import Peers
from nsm.rpc.prefixes import keep_prefix

BOTH = (4, 6)
log = structlog.get_logger(__name__)


class Lending:
    """Asks every address plan for every family; the first that lends one lends it for good.

    Where both were asked for because nobody said which, a family that no plan has is left out.
    on_lent gets who lent it, a prefix, and every prefix of its pool; on_absent a family that
    there is none of.
    """

    def __init__(
        self,
        urls: Sequence[str],
        pool: str,
        families: Sequence[int],
        *,
        on_lent: Callable[[str, str, Sequence[str]], None],
        on_absent: Callable[[int], None],
    ) -> None:
        self._urls = tuple(urls)
        self._pool = pool
        self._families = tuple(families) or BOTH
        self._all_needed = bool(families)
        self._on_lent = on_lent
        self._on_absent = on_absent
        self._asking: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._has: dict[str, set[int]] = {}  # which families a plan has, once it said anything
        self._why: dict[tuple[str, int], str] = {}

    def start(self, peers: Peers, tasks: Tasks) -> None:
        """Begin to ask."""
        for url in self._urls:
            for family in self._families:
                self._asking[url, family] = tasks.spawn(
                    keep_prefix(
                        peers,
                        url,
                        pool=self._pool,
                        family=family,
                        on_lent=partial(self._lent, url, family),
                        on_failure=partial(self._failed, url, family),
                    ),
                    f"an IPv{family} prefix of {url}",
                )

    def _lent(self, url: str, family: int, prefix: str, domain: Sequence[str]) -> None:
        self._why.pop((url, family), None)
        version = ipaddress.ip_network(prefix).version
        told = {ipaddress.ip_network(one).version for one in domain}
        self._has.setdefault(url, set()).update(told or {version})
        if version == family:
            log.info("prefix lent", prefix=prefix, domain=", ".join(domain) or "not told", by=url)
            for other in self._urls:
                if other != url:
                    self._stop(other, family)
            self._on_lent(url, prefix, domain)
        else:  # upstream's plans do not know what a family is
            self._stop(url, family)
        self._leave_out()

    def _leave_out(self) -> None:
        """Families that all plans lack, as soon as all have said what they have."""
        if self._all_needed or len(self._has) < len(self._urls):
            return
        for family in self._families:
            if not any(family in has for has in self._has.values()):
                self._families = tuple(one for one in self._families if one != family)
                for url in self._urls:
                    self._stop(url, family)
                log.info("the domain has no such addresses", family=family)
                self._on_absent(family)

    def _stop(self, url: str, family: int) -> None:
        if task := self._asking.pop((url, family), None):
            task.cancel()

    def _failed(self, url: str, family: int, why: NsmError) -> None:
        if self._why.get((url, family)) != str(why):  # not again with every try
            self._why[url, family] = str(why)
            log.warning("no prefix from the address plan", by=url, family=family, why=str(why))

"""What the address plan knows of our members, and says of addresses of our prefixes.

So members keep their addresses when their router dies: it has said whose they are, another
one asks whether they are, and it is told what is elsewhere before it serves anybody again. With
an address plan that knows of prefixes only, as upstream's, members get other addresses.
"""

import ipaddress
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import structlog

from endpoints.vl3.addresses import RouterAddresses, Taken
from nsm.errors import NsmError
from nsm.process.tasks import Tasks
from nsm.rpc.holdings import HoldingsClient, MemberAddress
from nsm.rpc.peers import Peers

log = structlog.get_logger(__name__)


class Served(Protocol):
    """The router, as this needs it."""

    addresses: RouterAddresses

    def lend(self, prefix: str, domain: Sequence[str]) -> None:
        """A prefix is ours, of which all is known."""

    def moved(self, address: str, lost: Iterable[str], same: bool) -> None:
        """An address is elsewhere, which these connections had; same: it is the same member."""

    def returned(self, connections: Iterable[str]) -> None:
        """These may have an address again that was elsewhere."""

    def ways_changed(self) -> None:
        """Other routers are to be told of other addresses."""


class Holdings:
    """Between a router, by its name, and its address plans, of which each lent it a prefix of some
    family."""

    def __init__(self, router: Served, urls: Sequence[str], pool: str, name: str = "") -> None:
        self._router = router
        self._urls = tuple(urls)
        self._pool = pool
        self._name = name
        self._clients: Mapping[str, HoldingsClient] = {}
        self._prefixes: dict[int, tuple[str, str]] = {}  # by family: the prefix, and whose
        self._unknown: dict[str, Sequence[str]] = {}  # prefixes not known yet, and their domain
        self._whys: dict[str, str] = {}

    def start(self, peers: Peers, tasks: Tasks) -> None:
        """Begin to listen, before a prefix is lent."""
        self._clients = {
            url: HoldingsClient(
                peers,
                url,
                self._pool,
                name=self._name,
                holdings=self._mine(url),
                on_news=self._news,
                on_known=self._known,
                on_failure=self._failed(url),
            )
            for url in self._urls
        }
        for url, client in self._clients.items():
            tasks.spawn(client.run(), f"members' addresses at {url}", forever=True)

    def lent(self, url: str, prefix: str, domain: Sequence[str]) -> None:
        """A prefix is ours; the router is told once it is known what of it is elsewhere."""
        version = ipaddress.ip_network(prefix).version
        before = self._prefixes.get(version)
        self._prefixes[version] = (prefix, url)
        if before == (prefix, url) and prefix not in self._unknown:
            self._router.lend(prefix, domain)
            return
        if before:
            self._clients[before[1]].no_more(before[0])
            self._unknown.pop(before[0], None)
        self._unknown[prefix] = domain
        self._clients[url].ask_about(prefix)

    async def claim(self, address: str, holder: str) -> bool:
        """Whether another router's address is holder's, and may be given here."""
        client = self._of(address)
        return client is not None and await client.claim(address, holder)

    def say(self, changes: Iterable[Taken]) -> None:
        """What became of members' addresses."""
        for one in changes:
            if client := self._of(one.address):
                client.say(MemberAddress(one.address, one.holder, left=one.left))

    def _of(self, address: str) -> HoldingsClient | None:
        lent = self._prefixes.get(ipaddress.ip_address(address).version)
        return self._clients[lent[1]] if lent else None

    def _mine(self, url: str) -> Callable[[], Iterable[MemberAddress]]:
        return lambda: [
            MemberAddress(one.address, one.holder)
            for one in self._router.addresses.holdings
            if self._of(one.address) is self._clients[url]
        ]

    def _known(self, prefix: str, told: bool) -> None:
        domain = self._unknown.pop(prefix, None)
        if domain is None:
            return
        if not told:
            log.warning(
                "the address plan does not know of members: whose router dies gets another address",
                prefix=prefix,
            )
        self._router.lend(prefix, domain)

    def _news(self, news: MemberAddress) -> None:
        addresses = self._router.addresses
        if news.elsewhere:
            same = addresses.holder_of(news.address) == news.holder
            lost = addresses.leave_out(news.address)
            log.info("a member's address is at another router", address=news.address)
            self._router.moved(news.address, lost, same)
        elif news.left:
            self._router.returned(addresses.return_(news.address, news.holder))
            self.say(addresses.drain())
        elif self._unknown:  # of an earlier life of ours, which members come back to
            addresses.keep(news.address, news.holder)
        elif addresses.holder_of(news.address) != news.holder:  # while the stream was away
            self.say([Taken(news.address, news.holder, left=True)])
            return
        self._router.ways_changed()

    def _failed(self, url: str) -> Callable[[NsmError], None]:
        def failed(why: NsmError) -> None:
            if self._whys.get(url) != str(why):  # not again with every try
                self._whys[url] = str(why)
                log.warning("the address plan is not told of members now", by=url, why=str(why))

        return failed


def holder(identity: str, connection: str) -> str:
    """Whose an address is: who began the connection, and which of theirs it is. Empty where
    nobody can say."""
    return f"{identity} {connection}" if identity and connection else ""

"""The names of a vL3 as one of its routers answers for them (`wire.md` §10.4).

    names = RouterNames(templates, apexes=["orders-db"])
    async with names.serving([("172.16.0.1", 53)], Sockets(routing.inside)):
        context = names.join(conn, ["172.16.0.5/32"])   # for the member's answer
        names.meet(id_, ["172.16.64.1"])                # another router
        names.leave(conn.id)

A name that none of our members has is asked of the domain's other routers. They tell no
further: a question that a router sent, known by its mark or by whose address it comes from,
is answered of our own knowledge.
"""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from nsm import domains
from nsm.errors import UnavailableError
from nsm.model import Connection, DNSConfig, DNSContext
from nsm.names import asking, server, templates
from nsm.names.server import Server, Sockets
from nsm.names.templates import Template
from nsm.names.zones import NEGATIVE, Answer, Network, Record, Standing, Zone, merged

PATIENCE = 2.0  # seconds for other routers to say what they know
WAIT = 1.0  # seconds for somebody expected who may have the name
GRACE = 0.05  # seconds more for the others where one knew the name
_MARK = 65_301  # an EDNS option for local use (RFC 6891 §9): asked by a router


class RouterNames:
    """What members and routers are called, and the answers about that."""

    def __init__(
        self, patterns: Sequence[Template], *, apexes: Iterable[str] = (), port: int = 53
    ) -> None:
        """apexes: the domains that are ours also while nobody is in them; port: other routers'."""
        self._templates = tuple(patterns)
        self._zone = Zone(apexes)
        self._port = port
        self._own: tuple[str, ...] = ()
        self._prefixes: tuple[Network, ...] = ()
        self._peers: dict[str, tuple[Server, ...]] = {}
        self._news = asyncio.Event()  # somebody said who they are
        self.expected: Callable[[bool], bool] = lambda _: False
        """Whether a member may have a name and did not say so yet, or, if True is given, another
        router may be there that is not met yet: as after a start."""
        self._sockets = Sockets()

    # -- who there is -----------------------------------------------------------------------

    @property
    def met(self) -> int:
        """How many other routers there are."""
        return len(self._peers)

    @property
    def answering(self) -> bool:
        """Whether members can be told whom to ask."""
        return bool(self._own)

    def cover(self, prefixes: Iterable[str]) -> None:
        """The domain's prefixes: of their addresses the names are asked here."""
        self._prefixes = tuple(map(ipaddress.ip_network, prefixes))
        self._zone.cover(map(str, self._prefixes))

    def own(self, names: Iterable[str], addresses: Iterable[str]) -> None:
        """What this router itself is called, and its addresses."""
        self._zone.put("", names, addresses)

    def join(self, conn: Connection, addresses: Iterable[str]) -> DNSContext:
        """The member's connection with its addresses, known from now on; what to tell it.

        A refresh is another join. What it carries of a router that it was at before is left out.
        Raises UnavailableError before `serving`, InvalidError for labels of which no name
        can be made.
        """
        told = self.check()
        names = templates.called(self._templates, conn)
        self._zone.put(conn.id, names, addresses)
        self._told_anew()
        config = DNSConfig(told, templates.search_domains(names))
        asked = _asked(conn)
        others = tuple(
            one
            for one in asked.configs
            if not set(one.servers) & set(told) and not any(map(self._of_domain, one.servers))
        )
        return DNSContext((*others, config), asked.unknown)

    def greet(self, conn: Connection) -> DNSContext:
        """Another router asks us for this connection: known from now on; what to tell it.

        Raises UnavailableError before `serving`.
        """
        told = self.check()
        asked = _asked(conn)
        self.hear(conn.id, asked.configs)
        others = tuple(one for one in asked.configs if not set(one.servers) & set(told))
        return DNSContext((*others, DNSConfig(told)), asked.unknown)

    def leave(self, id_: str) -> None:
        """The member's connection is gone; nothing for an unknown one."""
        self._zone.drop(id_)

    def ask(self) -> DNSContext:
        """What a request to another router says: whom to ask for ours. Raises UnavailableError."""
        return DNSContext((DNSConfig(self.check()),))

    def hear(self, id_: str, configs: Iterable[DNSConfig]) -> None:
        """What another router says at connection id_: those of its servers that the domain has."""
        said = (one for config in configs for one in config.servers)
        self.meet(id_, filter(self._of_domain, said))

    def meet(self, id_: str, servers: Iterable[str]) -> None:
        """The other router at connection id_ answers at these addresses (its own, never ours)."""
        others = (one for one in dict.fromkeys(servers) if one not in self._own)
        self._peers[id_] = tuple((one, self._port) for one in others)
        self._told_anew()

    def part(self, id_: str) -> None:
        """That router is gone; nothing for an unknown one."""
        self._peers.pop(id_, None)

    def _of_domain(self, server: str) -> bool:
        try:
            address = ipaddress.ip_address(server)
        except ValueError:
            return False
        return any(address in prefix for prefix in self._prefixes)

    def check(self) -> tuple[str, ...]:
        """Whom members are told to ask. Raises UnavailableError before `serving`."""
        if not self._own:
            raise UnavailableError(
                "DNS address is initializing: this router has no address yet to answer at",
                hint="ask again; it has one as soon as the address plan lends it a prefix",
            )
        return self._own

    # -- answers ----------------------------------------------------------------------------

    @asynccontextmanager
    async def serving(self, addresses: Sequence[Server], sockets: Sockets) -> AsyncIterator[None]:
        """Answer at these addresses, and ask other routers from them, while the block lasts.

        Raises TakenError, RightsError.
        """
        async with server.serving(self.answer, addresses, sockets):
            self._sockets = sockets
            self._own = tuple(host for host, _ in addresses)
            try:
                yield
            finally:
                self._own = ()

    async def answer(self, query: dns.message.QueryMessage, whose: str) -> dns.message.Message:
        """The answer to a question from the address whose."""
        question = query.question[0]
        name = domains.canonical(question.name.to_text())
        kind = dns.rdatatype.to_text(question.rdtype)
        known = await self._known(name, question.rdtype, by_router=self._by_router(query, whose))
        if known is None:
            return server.refused(query)
        if known.standing == Standing.FAILED:
            why = "a member or another router of this network, which may have the name, is silent"
            return server.failed(query, why)
        response = server.reply(query)
        response.flags |= dns.flags.AA
        if known.standing == Standing.RECORDS:
            response.answer = _sets(known, question.name)
        elif name == known.zone and kind in ("SOA", "ANY"):
            response.answer = [_soa(known.zone)]
        else:
            response.authority = [_soa(known.zone)]
        if known.standing == Standing.NXDOMAIN:
            response.set_rcode(dns.rcode.NXDOMAIN)
        return response

    async def _known(
        self, name: str, kind: dns.rdatatype.RdataType, *, by_router: bool
    ) -> Answer | None:
        """What we know, and, unless a router asks, what the others do; None: it is not ours.

        While somebody is expected who may have the name, nobody can say that there is none.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT
        while True:
            news = self._news
            known = self._zone.answer(name, dns.rdatatype.to_text(kind))
            if known is None or known.standing != Standing.NXDOMAIN:
                return known
            if not by_router:
                known = merged(known, await self._elsewhere(name, kind, known.zone))
            if known.standing != Standing.NXDOMAIN or not self.expected(not by_router):
                return known
            try:
                async with asyncio.timeout_at(deadline):
                    await news.wait()
            except TimeoutError:
                return Answer(Standing.FAILED, zone=known.zone)

    def _told_anew(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _by_router(self, query: dns.message.QueryMessage, whose: str) -> bool:
        marked = any(one.otype == _MARK for one in query.options)
        return marked or any(whose == host for many in self._peers.values() for host, _ in many)

    async def _elsewhere(self, name: str, kind: dns.rdatatype.RdataType, zone: str) -> Answer:
        """What the other routers know together."""
        mark = dns.edns.GenericOption(dns.edns.OptionType.make(_MARK), b"")
        query = asking.question(f"{name}.", kind, flags=0, options=[mark])
        found = Answer(Standing.NXDOMAIN, zone=zone)
        for version in (4, 6):
            ours = [one for one in self._own if (":" in one) == (version == 6)]
            peers = self._reached(version)
            if not ours or not peers:
                continue
            deadline = asyncio.get_running_loop().time() + PATIENCE
            try:
                async with (
                    asyncio.timeout_at(deadline) as patience,
                    aclosing(
                        asking.hear(query, peers, PATIENCE, self._sockets, source=ours[0])
                    ) as all_said,
                ):
                    async for said in all_said:
                        found = merged(found, _understood(said, name, kind, zone))
                        if found.standing == Standing.RECORDS:
                            soon = asyncio.get_running_loop().time() + GRACE
                            patience.reschedule(min(soon, patience.when() or soon))
            except TimeoutError:
                found = merged(found, Answer(Standing.FAILED, zone=zone))
            if found.standing >= Standing.NODATA:
                break
        return found

    def _reached(self, version: int) -> list[Server]:
        """Each router once, at an address of that family; of IPv6 only where it has no other."""
        found: dict[Server, None] = {}
        for many in self._peers.values():
            families: Mapping[int, list[Server]] = {
                4: [one for one in many if ":" not in one[0]],
                6: [one for one in many if ":" in one[0]],
            }
            reached = 4 if families[4] and self._has(4) else 6
            if version == reached and families[version]:
                found[families[version][0]] = None
        return list(found)

    def _has(self, version: int) -> bool:
        return any((":" in one) == (version == 6) for one in self._own)


def _asked(conn: Connection) -> DNSContext:
    return conn.context.dns if conn.context and conn.context.dns else DNSContext()


def _understood(said: asking.Said, name: str, kind: dns.rdatatype.RdataType, zone: str) -> Answer:
    """What another router's message comes to: of that name and kind, whatever else it says."""
    if said.refused:  # it has nobody in that domain
        return Answer(Standing.NXDOMAIN, zone=zone)
    if said.message is None or not said.answered:
        return Answer(Standing.FAILED, zone=zone)
    if said.message.rcode() == dns.rcode.NXDOMAIN:
        return Answer(Standing.NXDOMAIN, zone=zone)
    wanted = {dns.rdatatype.A, dns.rdatatype.AAAA, dns.rdatatype.PTR}
    if kind != dns.rdatatype.ANY:
        wanted &= {kind}
    found = [
        (Record(name, dns.rdatatype.to_text(one.rdtype), data.to_text()), one.ttl)
        for one in said.message.answer
        if one.rdtype in wanted and domains.canonical(one.name.to_text()) == name
        for data in one
    ]
    if not found:
        return Answer(Standing.NODATA, zone=zone)
    records = tuple(sorted(record for record, _ in found))
    return Answer(Standing.RECORDS, records, zone, min(ttl for _, ttl in found))


def _sets(answer: Answer, name: dns.name.Name) -> list[dns.rrset.RRset]:
    kinds: dict[str, list[str]] = {}
    for record in answer.records:
        kinds.setdefault(record.kind, []).append(record.data)
    return [
        dns.rrset.from_text_list(name, answer.ttl, "IN", kind, data) for kind, data in kinds.items()
    ]


def _soa(zone: str) -> dns.rrset.RRset:
    text = f"ns.{zone}. hostmaster.{zone}. 1 3600 600 86400 {NEGATIVE}"
    return dns.rrset.from_text(f"{zone}.", NEGATIVE, "IN", "SOA", text)

"""A workload's resolver: each name is asked of whom it belongs to.

    async with local_names() as names:
        names.tell(wire.id, wire.made.context)

Names below a connection's search domains go to that connection's servers, all others to
those of before, as they would without us. A connection's search domain may be as wide as
`example`, of which its servers know a part: only a server that answers as the authority of
the name's domain can say that there is none; else the servers of before are asked too, so
that no name that resolved before stops to.
"""

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import dns.edns
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

from nsm import domains
from nsm.model import Context
from nsm.names import asking, resolvconf, server
from nsm.names.asking import Said
from nsm.names.resolvconf import PATH, Before
from nsm.names.server import PAYLOAD, Server, Sockets
from nsm.names.zones import Network, pointed

ADDRESS = ("127.0.0.1", 53)
PATIENCE = 3.0  # seconds for servers to answer; a stub resolver asks again after 5
SEARCHED = 1.0  # seconds for a name that is not there as it is to be found in a search domain
STAGGER = 1.0  # seconds after which the next of the servers of before is asked too
LONGEST = 3600  # seconds an answer is believed, whatever its TTL
FRESH = 5  # seconds one of a connection's servers is: whoever has the name may move meanwhile
STALE = 3600  # seconds for which an old answer is better than that nobody answers (RFC 8767)
LONGEST_NONE = 300  # seconds that there is none is believed
MOST_HELD = 2048  # answers; the oldest go first
LARGEST_HELD = 4096  # bytes of one: who says more is asked again
MOST_CONFIGS, MOST_SERVERS, MOST_DOMAINS = 64, 8, 64  # of a connection: the far end says them
_ADDRESSES = (dns.rdatatype.A, dns.rdatatype.AAAA)
_Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Way:
    """Servers, and what they are to be asked about."""

    servers: tuple[Server, ...]
    domains: tuple[str, ...] = ()
    prefixes: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """An answer: sections of a message; without a message, why there is none.

    refused: all who were asked say that it is not theirs.
    """

    message: dns.message.QueryMessage | None = None
    why: str = ""
    refused: bool = False

    @property
    def positive(self) -> bool:
        """Whether it has what was asked for, or a way there."""
        message = self.message
        return bool(message and message.rcode() == dns.rcode.NOERROR and message.answer)

    @property
    def silent(self) -> bool:
        """Whether nobody said anything."""
        return self.message is None and not self.refused

    def final(self) -> bool:
        """Whether it says, as the name's authority, that there is none."""
        message = self.message
        if message is None or not message.flags & dns.flags.AA:
            return False
        name = message.question[0].name
        return any(
            one.rdtype == dns.rdatatype.SOA and name.is_subdomain(one.name)
            for one in message.authority
        )


@dataclass(slots=True)
class _Held:
    found: Found
    came: float
    ends: float


class Resolver:
    """Answers questions of a workload; made by `local_names`."""

    def __init__(self, before: Before, sockets: Sockets, port: int = 53) -> None:
        """port: that of all servers but ours."""
        self._before = tuple((one, port) for one in before.servers)
        self._ndots = before.ndots
        self._searched_before = {domains.canonical(one) for one in before.search}
        self._sockets = sockets
        self._port = port
        self._told: dict[str, tuple[Way, ...]] = {}
        self._cache: OrderedDict[_Key, _Held] = OrderedDict()
        self._generation = 0

    # -- whom to ask ------------------------------------------------------------------------

    def tell(self, id_: str, context: Context | None) -> None:
        """What connection id_ says of names, from now on."""
        ways = ways_of(context, self._port) if context else ()
        if ways != self._told.get(id_, ()):
            self._told[id_] = ways
            self._anew()

    def forget(self, id_: str) -> None:
        """The connection is gone; nothing for an unknown one."""
        if self._told.pop(id_, ()):
            self._anew()

    def _anew(self) -> None:
        self._generation += 1  # what is being asked still, is asked of others by now
        self._cache.clear()

    def _ways(self) -> Iterable[Way]:
        return (way for ways in self._told.values() for way in ways)

    def asked(self, name: str) -> tuple[Server, ...]:
        """The connections' servers for a name; none: those of before are its only ones."""
        name = domains.canonical(name)
        if (network := pointed(name)) is not None:
            found = [way for way in self._ways() if _within(network, way.prefixes)]
            return _servers(found)
        best = max((len(one) for way in self._ways() for one in _above(name, way)), default=0)
        return _servers(
            [way for way in self._ways() if any(len(one) == best for one in _above(name, way))]
        )

    def search(self) -> tuple[str, ...]:
        """The connections' search domains that a stub resolver does not try itself."""
        found = dict.fromkeys(one for way in self._ways() for one in way.domains)
        return tuple(one for one in found if one not in self._searched_before)[:MOST_DOMAINS]

    # -- answers ----------------------------------------------------------------------------

    async def answer(self, query: dns.message.QueryMessage, _: str) -> dns.message.Message:
        """The answer to a program's question."""
        question = query.question[0]
        name = domains.canonical(question.name.to_text())
        bits = int(query.flags) & int(dns.flags.RD | dns.flags.CD | dns.flags.AD)
        key = (name, int(question.rdtype), bits | (int(query.ednsflags) & int(dns.flags.DO)))
        now = asyncio.get_running_loop().time()
        held = self._cache.get(key)
        if held and held.ends > now:
            return _reply(query, held.found, int(now - held.came))
        generation = self._generation
        found = await self._resolve(query, name)
        if generation == self._generation:
            if held and held.found.positive and found.silent and now < held.came + STALE:
                held.ends = now + FRESH  # then they are asked again
                return _reply(query, held.found, LONGEST)
            self._hold(key, found)
        return _reply(query, found, 0)

    def _hold(self, key: _Key, found: Found) -> None:
        self._cache.pop(key, None)
        if (ttl := _ttl(found)) and _size(found) <= LARGEST_HELD:
            now = asyncio.get_running_loop().time()
            self._cache[key] = _Held(found, now, now + ttl)
        while len(self._cache) > MOST_HELD:
            self._cache.popitem(last=False)

    async def _resolve(self, query: dns.message.QueryMessage, name: str) -> Found:
        """As a stub resolver: the name as it is, then in each search domain."""
        search = self.search() if query.question[0].rdtype in _ADDRESSES else ()
        if not search or not name or pointed(name) is not None or _below(name, search):
            return await self._as_is(query)
        if name.count(".") >= self._ndots:
            as_is = await self._as_is(query)
            searched = await self._searched(query, search) if _none(as_is) else as_is
            return searched if searched.positive else as_is
        async with asyncio.TaskGroup() as tasks:  # such a name is hardly ever there as it is
            first = tasks.create_task(self._as_is(query))
            second = tasks.create_task(self._searched(query, search))
        as_is, searched = first.result(), second.result()
        # a search domain that nobody answers for may have it
        return searched if not as_is.positive and (searched.positive or searched.silent) else as_is

    async def _searched(self, query: dns.message.QueryMessage, search: Sequence[str]) -> Found:
        """The first search domain that has it; else who did not say, or that none has it."""
        question = query.question[0]

        async def one(domain: str) -> tuple[dns.name.Name, Found] | None:
            try:
                longer = question.name.relativize(dns.name.root) + dns.name.from_text(domain)
            except dns.exception.DNSException:  # too long to be a name
                return None
            asked = _copy(query, longer)
            return longer, await self._by_wires(asked, SEARCHED)

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(domain)) for domain in search]
        results = [found for task in running if (found := task.result())]
        for longer, there in results:
            if there.positive:
                assert there.message
                alias = dns.rrset.from_text(
                    question.name,
                    min(there.message.answer[0].ttl, LONGEST),
                    "IN",
                    "CNAME",
                    longer.to_text(),
                )
                message = _copy(query, question.name)
                message.flags |= dns.flags.QR
                message.answer = [alias, *there.message.answer]
                return Found(message)
        silent = [there for _, there in results if there.silent]
        return silent[0] if silent else Found(why="no search domain has it", refused=True)

    async def _as_is(self, query: dns.message.QueryMessage) -> Found:
        question = query.question[0]
        if not self.asked(question.name.to_text()):
            return await self._by_before(query)
        wires = await self._by_wires(query, PATIENCE)
        if wires.positive or wires.final():
            return wires
        before = await self._by_before(query)
        if before.positive:
            return before
        if wires.silent:  # who would know did not say: that is no "there is none"
            return wires
        return before if before.message is not None else wires

    async def _by_wires(self, query: dns.message.QueryMessage, patience: float) -> Found:
        """All at once; the first that has it, else the best of the others."""
        servers = self.asked(query.question[0].name.to_text())
        best = Found()
        reasons: list[str] = []
        refused: list[str] = []
        asked = _outgoing(query)
        async with aclosing(asking.hear(asked, servers, patience, self._sockets)) as all_said:
            async for said in all_said:
                found = _found(said)
                if found.positive:
                    assert found.message
                    found.message.answer = [_aged(one, 0, FRESH) for one in found.message.answer]
                    return found
                if found.message is None:
                    refused.append(found.why) if said.refused else reasons.append(found.why)
                elif best.message is None or (found.final() and not best.final()):
                    best = found
        if best.message is not None and (best.final() or not reasons):
            return best
        return Found(why="; ".join((*reasons, *refused)), refused=not reasons)

    async def _by_before(self, query: dns.message.QueryMessage) -> Found:
        """One after the other, as stub resolvers do; the first that answers."""
        if not self._before:
            return Found(why="no DNS server was there before")
        reasons = []
        asked = _outgoing(query)
        async with aclosing(
            asking.hear(asked, self._before, PATIENCE, self._sockets, stagger=STAGGER)
        ) as all_said:
            async for said in all_said:
                found = _found(said)
                if found.message is not None:
                    return found
                reasons.append(found.why)
        return Found(why="; ".join(reasons))


def ways_of(context: Context, port: int) -> tuple[Way, ...]:
    """What a connection's context says of names. It was said by others: bounded, and checked."""
    if context.dns is None:
        return ()
    routes = context.ip.src_routes if context.ip else ()
    prefixes = tuple(net for one in routes[:MOST_DOMAINS] if (net := _network(one.prefix)))
    found = []
    for config in context.dns.configs[:MOST_CONFIGS]:
        servers = tuple((one, port) for one in config.servers[:MOST_SERVERS] if _is_elsewhere(one))
        names = tuple(
            domains.canonical(one)
            for one in config.search_domains[:MOST_DOMAINS]
            if one.strip(".") and domains.is_name(one)
        )
        if servers:
            found.append(Way(servers, names, prefixes))
    return tuple(found)


def _network(text: str) -> Network | None:
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None
    return network if network.prefixlen else None  # all addresses there are, are not its own


def _is_elsewhere(text: str) -> bool:
    try:
        address = resolvconf.arrival(text)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_multicast)


def _within(network: Network, prefixes: Iterable[Network]) -> bool:
    return any(
        one.version == network.version
        and int(one.network_address) <= int(network.network_address)
        and int(network.broadcast_address) <= int(one.broadcast_address)
        for one in prefixes
    )


def _above(name: str, way: Way) -> list[str]:
    return [one for one in way.domains if _below(name, (one,))]


def _below(name: str, among: Iterable[str]) -> bool:
    return any(name == one or name.endswith(f".{one}") for one in among)


def _servers(ways: Iterable[Way]) -> tuple[Server, ...]:
    return tuple(dict.fromkeys(one for way in ways for one in way.servers))


def _none(found: Found) -> bool:
    """Whether it is a no, and not only nothing."""
    return found.message is not None and not found.positive


def _found(said: Said) -> Found:
    return Found(said.message) if said.answered else Found(why=said.why)


def _copy(query: dns.message.QueryMessage, name: dns.name.Name) -> dns.message.QueryMessage:
    """The same question about another name, with an id of its own."""
    return asking.question(
        name.to_text(),
        query.question[0].rdtype,
        flags=int(query.flags) & int(dns.flags.RD | dns.flags.CD | dns.flags.AD),
        dnssec=bool(query.ednsflags & dns.flags.DO),
    )


def _outgoing(query: dns.message.QueryMessage) -> dns.message.QueryMessage:
    return _copy(query, query.question[0].name)


def _size(found: Found) -> int:
    """How many bytes it has to say."""
    message = found.message
    sections = (*message.answer, *message.authority) if message else ()
    return sum(len(data.to_wire() or b"") + 12 for records in sections for data in records)


def _ttl(found: Found) -> int:
    """For how long it may be believed."""
    message = found.message
    if message is None:
        return 0
    if message.answer:
        return min(LONGEST, *(one.ttl for one in message.answer))
    # without an SOA nobody said for how long there is none (RFC 2308 §5)
    said = [
        min(one.ttl, one[0].minimum) for one in message.authority if one.rdtype == dns.rdatatype.SOA
    ]
    return min(LONGEST_NONE, *said) if said else 0


def _reply(query: dns.message.QueryMessage, found: Found, age: int) -> dns.message.Message:
    if found.message is None:
        return server.failed(query, found.why)
    response = server.reply(query)
    response.set_rcode(found.message.rcode())
    if found.message.flags & dns.flags.AD and (
        query.flags & dns.flags.AD or query.ednsflags & dns.flags.DO
    ):
        response.flags |= dns.flags.AD
    if query.ednsflags & dns.flags.DO:
        response.use_edns(0, ednsflags=int(dns.flags.DO), payload=PAYLOAD)
    response.answer = [_aged(one, age) for one in found.message.answer]
    response.authority = [_aged(one, age) for one in found.message.authority]
    return response


def _aged(records: dns.rrset.RRset, age: int, most: int = LONGEST) -> dns.rrset.RRset:
    ttl = min(most, max(0, records.ttl - age))
    return dns.rrset.from_rdata_list(records.name, ttl, list(records))


@asynccontextmanager
async def local_names(
    path: str = PATH,
    address: Server = ADDRESS,
    sockets: Sockets | None = None,
    port: int = 53,
) -> AsyncIterator[Resolver]:
    """Answer at address, and lead the resolv.conf at path there, for as long as the block lasts.

    "": no file is touched. Raises TakenError, RightsError, PreconditionError.
    """
    sockets = sockets or Sockets()
    late = _Late()
    # first somebody answers, then programs are led there; and the other way round
    async with (
        server.serving(late.answer, [address], sockets),
        resolvconf.leading(path, address[0]) as before,
    ):
        late.resolver = made = Resolver(before, sockets, port)
        yield made


class _Late:
    """Answers once there is a resolver: between the two, questions wait for the next try."""

    def __init__(self) -> None:
        self.resolver: Resolver | None = None

    async def answer(self, query: dns.message.QueryMessage, whose: str) -> dns.message.Message:
        if self.resolver is None:
            return server.failed(query, "the resolver is starting")
        return await self.resolver.answer(query, whose)

"""Where other domains are: a file of those known beforehand, then DNS (`wire.md` §9.2).

    async with open_domains("/etc/vwire/domains.yaml") as domains:
        for url in await domains.registry("cluster2"):
            ...

Upstream asks anew each time; here an answer holds for as long as DNS says, and
not longer. That a name does not exist is an answer too. That nobody could say is
none: it is told to those who wait for it, and asked again by the next.
"""

import asyncio
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import dns.asyncbackend
import dns.asyncquery
import dns.exception
import dns.inet
import dns.message
import dns.name
import dns.rcode
import dns.rdata
import dns.rdatatype
import dns.resolver
import structlog

from nsm import domains
from nsm.domains import MANAGER_PROXY, REGISTRY, SOON, Answer, Door
from nsm.errors import InvalidError, NotFoundError, UnavailableError
from nsm.places import Place, parse_map
from nsm.race import both
from nsm.rpc import addresses

LARGEST = 1 << 20  # bytes of the file
RESOLV_CONF = "/etc/resolv.conf"
TRIES = (1.0, 2.0)  # seconds a server may take; all are asked, then all again
PATIENCE = 5.0  # seconds for one question altogether
ALL = 10.0  # seconds for all questions that a domain's one door takes
LONGEST = 3600.0  # seconds an answer is believed, whatever its TTL
LONGEST_NONE = 300.0  # seconds that there is none is believed: who just made it, waits for it
MOST_HELD = 10_000  # answers; the oldest go first
AT_ONCE = 64  # domains being asked for: names come from outside
PAYLOAD = 1232  # bytes of a datagram that no path cuts to pieces
log = structlog.get_logger(__name__)

Server = tuple[str, int]


class Domains:
    """Finds domains; made by `open_domains`."""

    def __init__(self, file: "File | None", servers: "Servers") -> None:
        self._file = file
        self._servers = servers
        self._held: OrderedDict[tuple[str, str], _Held] = OrderedDict()
        self._asking: dict[tuple[str, str], _Turn] = {}
        self._room = asyncio.Semaphore(AT_ONCE)

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

    def doubt(self, domain: str) -> None:
        """Nobody answers where domain is said to be: ask again, however long that was to hold."""
        for role in (REGISTRY, MANAGER_PROXY):
            self._held.pop((role, domains.canonical(domain)), None)

    async def _urls(self, role: str, domain: str) -> tuple[str, ...]:
        if url := domains.direct(domain):
            if role == REGISTRY:
                return (url,)
            raise NotFoundError(f"domain {domain!r} is a registry's address, and nothing more")
        name = domains.canonical(domain)
        if self._file is not None:
            await asyncio.to_thread(self._file.read_again)
            if place := self._file.known.get(name):
                if found := place.registry if role == REGISTRY else place.manager_proxy:
                    return found
                raise NotFoundError(
                    f"domain {domain!r} has no {_called(role)} in {self._file.path}",
                    hint="add it there; a domain in that file is not looked for in DNS",
                )
        return (await self._answer(role, name)).urls_or_error()

    async def _answer(self, role: str, domain: str) -> "_Held":
        """What DNS says, held or new. Who comes while it is asked, shares the answer."""
        loop = asyncio.get_running_loop()
        key, came = (role, domain), loop.time()
        if (held := self._held.get(key)) and held.ends > came:
            return held
        turn = self._asking.setdefault(key, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock:
                if turn.last is None or turn.last.came < came:
                    async with self._room:
                        turn.last = await self._look(role, domain)
                    self._hold(key, turn.last)
                return turn.last
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._asking[key]

    def _hold(self, key: tuple[str, str], answer: "_Held") -> None:
        self._held.pop(key, None)
        if answer.ends > answer.came:
            self._held[key] = answer
        while len(self._held) > MOST_HELD:
            self._held.popitem(last=False)

    async def _look(self, role: str, domain: str) -> "_Held":
        """What DNS says now. Whoever answers slowly keeps others waiting no longer than ALL."""
        try:
            async with asyncio.timeout(ALL):
                return await self._asked(role, domain)
        except TimeoutError:
            why = f"no answer to all questions within {ALL:g} s"
            return self._none(role, domain, Answer(why=why, failed=True))

    async def _asked(self, role: str, domain: str) -> "_Held":
        name = domains.question(role, domain)
        doors, own = await both(self._servers.doors(name), self._addresses(name))
        ttl = doors.ttl
        if not doors.records:
            return self._none(role, domain, doors)
        ranked = domains.in_turn(doors.records)
        if not ranked:
            why = f"its SRV record {name} says that it is not offered"
            return self._none(role, domain, Answer(ttl=ttl, why=why))
        if own.records:  # as upstream: the target does not matter, and of the ports the first
            return _held(domains.urls(own.records, ranked[0].port), min(ttl, own.ttl))
        if own.failed:
            return self._none(role, domain, own)
        found: tuple[str, ...] = ()
        missing = own
        ttl = min(ttl, own.ttl)
        silent = 0
        for door in ranked:
            if door.target == name:
                continue
            there = await self._addresses(door.target)
            found += domains.urls(there.records, door.port)
            ttl = min(ttl, SOON if there.failed else there.ttl)
            silent += there.failed
            if found and silent:  # somebody can be met, and to ask on may take long
                break
            if not there.records and not missing.failed:
                missing = there
        if found:
            return _held(tuple(dict.fromkeys(found))[: domains.MOST_URLS], ttl)
        return self._none(role, domain, replace(missing, ttl=min(ttl, missing.ttl)))

    async def _addresses(self, name: str) -> Answer[str]:
        return domains.merged(
            *await both(self._servers.addresses(name, "A"), self._servers.addresses(name, "AAAA"))
        )

    def _none(self, role: str, domain: str, said: Answer[Any]) -> "_Held":
        hint = "A domain can also be listed in a file: NSM_DOMAINS_PATH"
        what = _called(role)
        if said.failed:
            why = f"nobody says where domain {domain!r} has its {what}: {said.why}"
            return _Held(why=why, hint=f"is the DNS server running? {hint}")
        where = f"is not in {self._file.path}, and " if self._file else ""
        held = _held((), min(said.ttl, LONGEST_NONE))
        held.kind = NotFoundError
        held.why = f"domain {domain!r} {where}has no {what} in DNS: {said.why}"
        held.hint = f"is the name right? {hint}"
        return held


@dataclass(slots=True)
class _Held:
    """URLs, or why there are none; from came to ends, in the loop's time."""

    urls: tuple[str, ...] = ()
    kind: type[NotFoundError] | type[UnavailableError] = UnavailableError
    why: str = ""
    hint: str = ""
    came: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    ends: float = 0.0

    def urls_or_error(self) -> tuple[str, ...]:
        if not self.urls:
            raise self.kind(self.why, hint=self.hint)
        return self.urls


@dataclass(slots=True)
class _Turn:
    """Those who wait for one domain's answer, and the answer that came last."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0
    last: _Held | None = None


class File:
    """The domains of a file, as of its last good reading."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.known: Mapping[str, Place] = {}
        self._seen: tuple[int, int, int] | None = None
        self._refused: object = None
        self._lock = threading.Lock()

    def read(self) -> None:
        """Read it; raises InvalidError with file and line. For a thread."""
        with self._lock:
            self._seen, self.known = _read(self.path)

    def read_again(self) -> None:
        """Read it if it changed; what is wrong with it is logged once. For a thread."""
        with self._lock:
            try:
                facts = os.stat(self.path)
                version: object = _version(facts)
            except OSError as gone:
                version = gone.strerror
            if version in (self._seen, self._refused):
                return
            try:
                self._seen, self.known = _read(self.path)
                self._refused = None
                log.info("domains read again", path=self.path, domains=len(self.known))
            except InvalidError as wrong:
                self._refused = version
                log.warning("domains not read, the last good ones stay", error=str(wrong))


def _read(path: str) -> tuple[tuple[int, int, int], Mapping[str, Place]]:
    try:
        with open(path, encoding="utf-8") as file:
            version = _version(os.fstat(file.fileno()))
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as wrong:
        why = wrong.strerror if isinstance(wrong, OSError) else "it is no UTF-8 text"
        raise InvalidError(
            f"the file of domains {path} cannot be read: {why}", hint="set NSM_DOMAINS_PATH"
        ) from wrong
    if len(text) > LARGEST:
        raise InvalidError(f"the file of domains {path} has more than {LARGEST} bytes")
    return version, parse_map(text, path, addresses.parse)


def _version(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


class Servers:
    """DNS servers, and single questions to them."""

    def __init__(self, given: Sequence[Server] = (), resolv_conf: str = RESOLV_CONF) -> None:
        self._given = tuple(given)
        self._resolv_conf = resolv_conf
        self._version: tuple[int, int, int] | None = None
        self._read: tuple[Server, ...] = ()

    async def doors(self, name: str) -> Answer[Door]:
        """The SRV records of name."""
        answer = await self._ask(name, "SRV")
        records = tuple(
            Door(one.priority, one.weight, one.port, one.target.to_text().lower())
            for one in answer.records
        )
        return Answer(records, answer.ttl, answer.why, answer.failed)

    async def addresses(self, name: str, kind: str) -> Answer[str]:
        """The addresses of name; kind is A or AAAA."""
        answer = await self._ask(name, kind)
        records = tuple(one.address for one in answer.records if domains.is_host(one.address))
        why = answer.why
        if answer.records and not records:
            why = f"the {kind} records of {name} are no host's"
        return Answer(records, answer.ttl, why, answer.failed)

    async def _ask(self, name: str, kind: str) -> Answer[Any]:
        """The first answer of any server that is one."""
        servers = self._given or await asyncio.to_thread(self._system)
        if not servers:
            why = f"{self._resolv_conf} names no DNS server, and NSM_DNS_SERVERS is not set"
            return Answer(why=why, failed=True)
        tried: dict[Server, str] = {}
        try:
            async with asyncio.timeout(PATIENCE):
                for patience in TRIES:
                    for server in servers:
                        answer = await _one(name, kind, server, patience)
                        if not answer.failed:
                            return answer
                        tried[server] = answer.why
        except TimeoutError:
            late = {one: f"{domains.show_server(one)} was not asked in time" for one in servers}
            tried = late | tried
        return Answer(why=f"{kind} of {name}: {'; '.join(tried.values())}", failed=True)

    def _system(self) -> tuple[Server, ...]:
        """What resolv.conf says, read again when it changed. For a thread."""
        try:
            version = _version(os.stat(self._resolv_conf))
            if version != self._version:
                reader = dns.resolver.Resolver(configure=False)
                reader.read_resolv_conf(self._resolv_conf)
                self._read = tuple((str(one), 53) for one in reader.nameservers)
                self._version = version
        except (OSError, ValueError, dns.exception.DNSException):
            self._read, self._version = (), None
        return self._read


async def _one(name: str, kind: str, server: Server, patience: float) -> Answer[Any]:
    """What one server answers to one question."""
    who = domains.show_server(server)
    query = dns.message.make_query(name, kind, use_edns=0, payload=PAYLOAD)
    family = dns.inet.af_for_address(server[0])
    backend = dns.asyncbackend.get_backend("asyncio")
    try:
        # Connected, so that the kernel takes answers from there alone, and tells of a refusal.
        async with await backend.make_socket(  # type: ignore[no-untyped-call]
            family, socket.SOCK_DGRAM, destination=server, timeout=patience
        ) as datagrams:
            response, _ = await dns.asyncquery.udp_with_fallback(
                query, server[0], patience, server[1], udp_sock=datagrams, ignore_errors=True
            )
        code = response.rcode()
        if code not in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
            return Answer(why=f"{who} answered {dns.rcode.to_text(code)}", failed=True)
        if not isinstance(response, dns.message.QueryMessage):
            return Answer(why=f"{who} answered what is no answer", failed=True)
        chain = response.resolve_chaining()
    except dns.exception.Timeout:
        return Answer(why=f"{who} did not answer within {patience:g} s", failed=True)
    except dns.exception.DNSException as wrong:
        return Answer(why=f"{who} answered what is no answer: {type(wrong).__name__}", failed=True)
    except (OSError, EOFError) as wrong:
        why = os.strerror(wrong.errno) if isinstance(wrong, OSError) and wrong.errno else str(wrong)
        return Answer(why=f"{who}: {why}", failed=True)
    if chain.answer is not None:
        return Answer(tuple(chain.answer), float(min(chain.minimum_ttl, LONGEST)))
    # Without an SOA nobody said for how long there is none (RFC 2308 §5).
    said = any(one.rdtype == dns.rdatatype.SOA for one in response.authority)
    ttl = float(min(chain.minimum_ttl, LONGEST_NONE)) if said else 0.0
    if code == dns.rcode.NXDOMAIN:
        return Answer(ttl=ttl, why=f"{who} knows no name {name} (asked for {kind}: NXDOMAIN)")
    return Answer(ttl=ttl, why=f"{who} knows no {kind} record of {name}")


def _held(urls: tuple[str, ...], ttl: float) -> _Held:
    held = _Held(urls)
    held.ends = held.came + ttl
    return held


def _called(role: str) -> str:
    return role.partition(".")[0]


@asynccontextmanager
async def open_domains(path: str = "", servers: Sequence[Server] = ()) -> AsyncIterator[Domains]:
    """Domains by the file path ("": none), then DNS at servers; none given: those of the system.

    Raises InvalidError with file and line for a file that cannot be used.
    """
    file = File(path) if path else None
    await asyncio.to_thread(_prepare, file)
    yield Domains(file, Servers(servers))


def _prepare(file: File | None) -> None:
    if file is not None:
        file.read()
    # else each kind of record is a module that is imported when it first comes
    dns.rdata.load_all_types()  # type: ignore[no-untyped-call]
    dns.asyncbackend.get_backend("asyncio")

"""The address plan's gRPC: prefixes for routers, pools for operators (`wire.md` §10.2).

Upstream's routers and ours hold a stream for as long as they hold a prefix. There is no token:
who asks is who the TLS handshake proves. Beside the message, metadata say which pool and which
family is meant; upstream's routers say neither, and get of the default pool what comes first.
The answer's metadata tell all of the pool: what the domain has, which upstream's routers guess.
"""

import asyncio
import ipaddress
import itertools
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from grpclib.server import Stream

from nsm.errors import InvalidError, NsmError, UnavailableError
from nsm.identity.spiffe import SpiffeId
from nsm.proto import ipam_pb2 as pb
from nsm.proto import pools_pb2 as own
from nsm.proto.ipam_grpc import IPAMBase, IPAMStub
from nsm.proto.pools_grpc import AddressPoolsBase, AddressPoolsStub
from nsm.rpc.peers import Peers
from nsm.rpc.server import current_caller

POOL, FAMILY = "vwire-pool", "vwire-family"  # metadata; the family is 4 or 6
DOMAIN = "vwire-domain"  # metadata of the answer: every prefix of the pool, separated by commas
HEALTHY = ("ipam.IPAM", "vwire.AddressPools")
MOST_TOLD = 256  # prefixes of a pool
MOST_HELD = 64  # prefixes over one stream
LONGEST = 64  # characters of a prefix
CALL_TIMEOUT = 15.0  # seconds
ANSWER = 5.0  # seconds an answer to ALLOCATE may take
FIRST_PAUSE, LONGEST_PAUSE, GROWTH = 0.2, 5.0, 1.6  # seconds between tries
_streams = itertools.count(1)


@dataclass(frozen=True, slots=True)
class LentPrefix:
    """A prefix, who holds it, and until when (ns since 1970; None while its stream lasts)."""

    prefix: str
    owner: str
    ends: int | None = None


@dataclass(frozen=True, slots=True)
class AddressPool:
    """A pool as operators see it; lengths of what is lent, 0: chosen by the address plan."""

    name: str
    prefixes: tuple[str, ...]
    ipv4_length: int = 0
    ipv6_length: int = 0
    leases: tuple[LentPrefix, ...] = ()


class Lender(Protocol):
    """Who knows what is lent. All raise NsmError; holder is a number of the stream's own."""

    async def allocate(
        self, pool: str, owner: str, holder: int, wanted: str, excluded: Sequence[str], family: int
    ) -> str:
        """A prefix for owner; family is 4, 6 or 0 for any."""

    async def release(self, pool: str, owner: str, holder: int, prefix: str) -> None:
        """Take it back now, if it is lent so."""

    async def leave(self, pool: str, owner: str, holder: int, prefixes: Sequence[str]) -> None:
        """The stream ended: they stay lent for a while."""

    async def domain(self, pool: str) -> Sequence[str]:
        """Every prefix of a pool; none where there is no such pool."""

    async def create(self, pool: AddressPool, by: SpiffeId) -> AddressPool:
        """Have a pool, and what it is then."""

    async def delete(self, name: str, force: bool, by: SpiffeId) -> None:
        """Forget it; OK if it is not there."""

    async def pools(self, by: SpiffeId) -> list[AddressPool]:
        """All of them, with what is lent."""


class Prefixes(IPAMBase):
    """ManagePrefixes: what a stream was lent stays its own while it lasts."""

    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    async def ManagePrefixes(  # noqa: N802 - gRPC's name
        self, stream: "Stream[pb.PrefixRequest, pb.PrefixResponse]"
    ) -> None:
        """ALLOCATE is answered, DELETE is not; the stream's end leaves what it holds."""
        caller = current_caller(stream)
        pool, family = caller.metadata.get(POOL, ""), caller.metadata.get(FAMILY, "0")
        if family not in ("0", "4", "6"):
            raise InvalidError(f"{caller.id} asks for family {family[:16]!r}; it is 4 or 6")
        owner, holder = str(caller.id), next(_streams)
        held: list[str] = []
        domain = ",".join(await self._lender.domain(pool))
        await stream.send_initial_metadata(metadata={DOMAIN: domain} if domain else {})
        try:
            async for asked in stream:
                if len(asked.prefix) > LONGEST:
                    raise InvalidError(f"{owner}: a prefix of {len(asked.prefix)} characters")
                if asked.type == pb.ALLOCATE:
                    if len(held) >= MOST_HELD:
                        raise InvalidError(
                            f"{owner} has {MOST_HELD} prefixes over one stream, which is the most"
                        )
                    lent = await self._lender.allocate(
                        pool, owner, holder, asked.prefix, asked.exclude_prefixes, int(family)
                    )
                    held.append(lent)
                    await stream.send_message(
                        pb.PrefixResponse(prefix=lent, exclude_prefixes=asked.exclude_prefixes)
                    )
                elif asked.type == pb.DELETE:
                    if (prefix := _shortest(asked.prefix)) in held:
                        held.remove(prefix)
                        await self._lender.release(pool, owner, holder, prefix)
                else:
                    raise InvalidError(
                        f"{owner} asks the address plan for an operation of type {int(asked.type)}",
                        hint="1 is ALLOCATE, 2 is DELETE",
                    )
        finally:
            if held:
                await asyncio.shield(self._lender.leave(pool, owner, holder, held))


class AddressPools(AddressPoolsBase):
    """Pools, for those who may manage them."""

    def __init__(self, lender: Lender) -> None:
        self._lender = lender

    async def Create(self, stream: "Stream[own.Pool, own.Pool]") -> None:  # noqa: N802
        """Have a pool."""
        asked = await _message(stream, "pool")
        made = await self._lender.create(_pool(asked), current_caller(stream).id)
        await stream.send_message(_pool_pb(made))

    async def Delete(self, stream: "Stream[own.PoolDeletion, Empty]") -> None:  # noqa: N802
        """Forget a pool."""
        asked = await _message(stream, "pool")
        await self._lender.delete(asked.name, asked.force, current_caller(stream).id)
        await stream.send_message(Empty())

    async def List(self, stream: "Stream[Empty, own.Pools]") -> None:  # noqa: N802
        """All pools, and what of each is lent."""
        await _message(stream, "question")
        found = await self._lender.pools(current_caller(stream).id)
        await stream.send_message(own.Pools(pools=map(_pool_pb, found)))


class PoolsClient:
    """An operator's side, at url."""

    def __init__(self, peers: Peers, url: str) -> None:
        self._peers = peers
        self.url = url

    async def create(self, pool: AddressPool) -> AddressPool:
        """Have a pool; the same again changes nothing. Raises TakenError and others."""
        async with self._stub() as stub:
            return _pool(await stub.Create(_pool_pb(pool), timeout=CALL_TIMEOUT))

    async def delete(self, name: str, *, force: bool = False) -> None:
        """Forget it; OK if it is not there."""
        async with self._stub() as stub:
            await stub.Delete(own.PoolDeletion(name=name, force=force), timeout=CALL_TIMEOUT)

    async def pools(self) -> list[AddressPool]:
        """All of them."""
        async with self._stub() as stub:
            return [_pool(one) for one in (await stub.List(Empty(), timeout=CALL_TIMEOUT)).pools]

    @asynccontextmanager
    async def _stub(self) -> AsyncIterator[AddressPoolsStub]:
        async with self._peers.link(self.url, whose="the address plan") as link:
            with link.errors():
                yield AddressPoolsStub(link.channel)


async def keep_prefix(
    peers: Peers,
    url: str,
    *,
    pool: str = "",
    family: int = 0,
    excluded: Sequence[str] = (),
    before: str = "",
    on_lent: Callable[[str, Sequence[str]], None],
    on_failure: Callable[[NsmError], None] = lambda _: None,
) -> NoReturn:
    """Hold a prefix of the address plan at url for as long as this runs, for a task.

    on_lent is told it each time a stream begins: the same again but where it went to somebody
    else meanwhile; and every prefix of the pool, where the address plan tells. on_failure is
    told why there is none now; another try follows.
    """
    pause = FIRST_PAUSE
    while True:
        try:
            async with peers.link(url, whose="the address plan") as link:
                with link.errors():
                    said = {POOL: pool, FAMILY: str(family) if family else ""}
                    metadata = {key: value for key, value in said.items() if value}
                    opened = IPAMStub(link.channel).ManagePrefixes.open(metadata=metadata)
                    async with opened as stream:
                        await stream.send_message(
                            pb.PrefixRequest(
                                type=pb.ALLOCATE, prefix=before, exclude_prefixes=excluded
                            )
                        )
                        async with asyncio.timeout(ANSWER):
                            await stream.recv_initial_metadata()
                            answer = await stream.recv_message()
                        if answer is not None:
                            domain = _domain(stream.initial_metadata)
                            before = _lent(answer.prefix, domain, url)
                            pause = FIRST_PAUSE
                            on_lent(before, domain)
                            await stream.recv_message()  # until the stream ends
                        raise UnavailableError(f"the address plan at {url} ended the stream")
        except TimeoutError:
            on_failure(
                UnavailableError(f"the address plan at {url} did not answer within {ANSWER:g} s")
            )
        except NsmError as failure:
            on_failure(failure)
        await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
        pause = min(pause * GROWTH, LONGEST_PAUSE)


def _shortest(prefix: str) -> str:
    """The prefix as we write it: IPv6 has many forms. What is none stays as it is."""
    try:
        return str(ipaddress.ip_network(prefix))
    except ValueError:
        return prefix


def _lent(text: str, domain: Sequence[str], url: str) -> str:
    """The prefix that an address plan says it lends, if it may be one: we shall route by it."""
    try:
        prefix = ipaddress.ip_network(text)
    except ValueError:
        prefix = None
    pool = [ipaddress.ip_network(one) for one in domain]
    if (
        prefix is None
        or not prefix.prefixlen
        or (
            pool
            and not any(
                one.version == prefix.version and prefix.subnet_of(one)  # type: ignore[arg-type]
                for one in pool
            )
        )
    ):
        raise UnavailableError(
            f"the address plan at {url} lends {text[:LONGEST]!r}, which is no prefix"
            + (f" of {', '.join(domain)[:256]}" if domain else "")
        )
    return str(prefix)


def _domain(metadata: Any) -> tuple[str, ...]:
    """The prefixes an answer's metadata tell; what is none is nobody's to route by."""
    told = [one for one in str((metadata or {}).get(DOMAIN, "")).split(",") if one]
    try:
        return tuple(str(ipaddress.ip_network(one)) for one in told[:MOST_TOLD])
    except ValueError:
        return ()


async def _message(stream: "Stream[Any, Any]", what: str) -> Any:
    message = await stream.recv_message()
    if message is None:
        raise InvalidError(f"the call carries no {what}")
    return message


def _pool(message: own.Pool) -> AddressPool:
    leases = tuple(
        LentPrefix(
            one.prefix, one.owner, one.ends.ToNanoseconds() if one.HasField("ends") else None
        )
        for one in message.leases
    )
    prefixes = tuple(message.prefixes)
    return AddressPool(message.name, prefixes, message.ipv4_length, message.ipv6_length, leases)


def _pool_pb(pool: AddressPool) -> own.Pool:
    message = own.Pool(
        name=pool.name,
        prefixes=pool.prefixes,
        ipv4_length=pool.ipv4_length,
        ipv6_length=pool.ipv6_length,
    )
    for lease in pool.leases:
        ends = Timestamp()
        if lease.ends is not None:
            ends.FromNanoseconds(lease.ends)
        made = message.leases.add(prefix=lease.prefix, owner=lease.owner)
        if lease.ends is not None:
            made.ends.CopyFrom(ends)
    return message

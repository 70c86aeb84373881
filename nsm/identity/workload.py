"""Our identity from a SPIFFE agent, over the Workload API (`wire.md` §4.1).

One stream stays open: the agent writes a whole new identity to it whenever a
certificate or a bundle changes. Losing the agent loses nothing we have: the last
good identity stays while we come back with growing pauses.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import structlog
from cryptography import x509
from google.protobuf.message import DecodeError
from grpclib.client import Channel
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from h2.exceptions import H2Error

from nsm.errors import DeniedError, ExhaustedError, InvalidError, NsmError, UnavailableError
from nsm.identity import material
from nsm.identity.background import beside
from nsm.identity.source import HeldIdentity, Identity, Source
from nsm.identity.spiffe import SpiffeId
from nsm.identity.verify import MAX_CHAIN
from nsm.proto.workload_grpc import SpiffeWorkloadAPIStub
from nsm.proto.workload_pb2 import X509SVIDRequest, X509SVIDResponse

if TYPE_CHECKING:
    from grpclib.client import Stream

VARIABLE = "SPIFFE_ENDPOINT_SOCKET"
HEADER = ("workload.spiffe.io", "true")  # against requests that a workload was tricked into
MAX_ANSWER = 16 * 1024 * 1024  # bytes
MAX_DOMAINS = 1024  # federated bundles
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 30.0  # seconds
ANSWER_WITHIN = 30.0  # seconds for a stream's first answer

_MAX_PATH = 107  # bytes of a unix socket's address

log = structlog.get_logger(__name__)


@asynccontextmanager
async def workload_source(url: str, *, patience: float) -> AsyncIterator[Source]:
    """The identity that the agent behind url (`unix:///path`) gives us, and each new one.

    Waits at most patience seconds for the first. Raises InvalidError for a bad
    url, DeniedError if the agent knows nobody like us, UnavailableError if it did
    not answer.
    """
    path = socket_path(url)
    agent = _Agent(url, path)
    async with beside(agent.follow(), f"follower of {url}"):
        try:
            async with asyncio.timeout(patience):
                held = await asyncio.shield(agent.first)
        except TimeoutError:
            raise agent.refusal(patience) from None
        yield held


def socket_path(url: str) -> str:
    """The file of a Workload API's url. Raises InvalidError."""
    parts = urlsplit(url)
    path = unquote(parts.path)
    if (
        parts.scheme != "unix"
        or parts.netloc
        or parts.query
        or parts.fragment
        or not path.startswith("/")
        or "\0" in path
    ):
        raise InvalidError(
            f"{url!r} is no socket of a Workload API",
            hint=f"{VARIABLE} has the form unix:///run/spire/sockets/agent.sock",
        )
    if len(path.encode()) > _MAX_PATH:
        raise InvalidError(f"the path in {url!r} is longer than a unix socket's may be")
    return path


class _Agent:
    """Follows one agent for ever; `first` is done with the first good identity."""

    def __init__(self, url: str, path: str) -> None:
        self._url = url
        self._path = path
        self._why: BaseException | None = None
        self.first: asyncio.Future[HeldIdentity] = asyncio.get_running_loop().create_future()

    async def follow(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async for identity in self._answers():
                    self._take(identity)
                    pause = FIRST_PAUSE
                self._lost(UnavailableError("it ended the stream"))
            except _FAILURES as why:
                self._lost(why)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _answers(self) -> AsyncIterator[Identity]:
        channel = Channel(path=self._path)
        try:
            stub = SpiffeWorkloadAPIStub(channel)
            async with stub.FetchX509SVID.open(metadata=[HEADER]) as stream:
                async with asyncio.timeout(ANSWER_WITHIN):
                    await stream.send_message(X509SVIDRequest(), end=True)
                    _bound(stream)
                    answer = await stream.recv_message()
                while answer is not None:
                    yield await asyncio.to_thread(_identity, answer, self._url)
                    answer = await stream.recv_message()
        finally:
            channel.close()

    def _take(self, identity: Identity) -> None:
        if self._why is not None and self.first.done():
            log.info("the Workload API is back", url=self._url)
        self._why = None
        if not self.first.done():
            self.first.set_result(HeldIdentity(identity))
        elif self.first.result().replace(identity):
            log.info("identity renewed", id=str(identity.svid.id), source=self._url)

    def _lost(self, why: BaseException) -> None:
        if self.first.done() and self._why is None:
            log.warning(
                "the Workload API is lost; the last identity stays",
                url=self._url,
                why=_said(why),
            )
        self._why = why

    def refusal(self, patience: float) -> NsmError:
        """Why there is no identity after patience seconds, and what to do."""
        denied = isinstance(self._why, GRPCError) and self._why.status is Status.PERMISSION_DENIED
        kind = DeniedError if denied else UnavailableError
        return kind(
            f"no identity from the Workload API at {self._url} within {patience:g} s: "
            + _said(self._why),
            hint="register this process with that agent or issuer (user, network namespace)"
            if denied
            else f"start a SPIFFE agent or nsm.process.issuer there, or let {VARIABLE} name "
            "its socket",
        )


def _said(why: BaseException | None) -> str:
    match why:
        case None:
            return "it did not answer"
        case TimeoutError():
            return f"it did not answer within {ANSWER_WITHIN:g} s"
        case GRPCError():
            return f"it answered {why.status.name}: {(why.message or '')[:1000]}"
        case OSError():
            return why.strerror or repr(why)
        case NsmError():
            return str(why)
        case _:
            return f"{type(why).__name__}: {str(why)[:200]}"


# What grpclib, h2 and protobuf raise for an agent that is away or talks nonsense:
# AssertionError is grpclib's for a message cut short, NotImplementedError for a compressed one.
_FAILURES = (
    GRPCError,
    StreamTerminatedError,
    H2Error,
    DecodeError,
    OSError,
    NsmError,
    AssertionError,
    NotImplementedError,
)


def _bound(stream: "Stream[X509SVIDRequest, X509SVIDResponse]") -> None:
    """Let stream refuse an answer over MAX_ANSWER before it is read.

    grpclib has no such limit: it reads the length a message claims, then as much.
    """
    inner = stream._stream  # noqa: SLF001 - the only way to that length
    read = inner.recv_data

    async def recv_data(size: int) -> bytes:
        if size > MAX_ANSWER:
            raise ExhaustedError(f"its answer has {size} bytes; at most {MAX_ANSWER} are read")
        return await read(size)

    inner.recv_data = recv_data  # type: ignore[method-assign]


def _identity(answer: X509SVIDResponse, whose: str) -> Identity:
    if not answer.svids:
        raise InvalidError("its answer has no SVID")
    if len(answer.federated_bundles) > MAX_DOMAINS:
        raise InvalidError(f"its answer has {len(answer.federated_bundles)} federated bundles")
    default = answer.svids[0]
    own = material.svid(
        material.certificates(default.x509_svid, whose, most=MAX_CHAIN),
        material.key_der(default.x509_svid_key, whose),
        whose,
        hint=default.hint[:1024],
    )
    if str(own.id) != default.spiffe_id:
        raise InvalidError(
            f"its answer says {default.spiffe_id[:2048]!r} and its certificate says {own.id}"
        )
    bundles = {own.id.trust_domain: _bundle(default.bundle, own.id.trust_domain)}
    for name, der in answer.federated_bundles.items():
        domain = SpiffeId.parse(name)
        if not domain.path and domain.trust_domain not in bundles:
            bundles[domain.trust_domain] = _bundle(der, domain.trust_domain)
    return Identity(own, bundles)


def _bundle(der: bytes, domain: str) -> tuple[x509.Certificate, ...]:
    whose = f"the bundle of {domain!r}"
    return material.authorities(material.certificates(der, whose, most=material.MAX_BUNDLE), whose)

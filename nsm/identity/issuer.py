"""The built-in SPIFFE agent: gives the processes of this machine their identities.

It speaks the Workload API on a unix socket. Who asks is told by the kernel and by
/proc (`attest`), which identity that is by the registration entries (`entries`),
and a trust domain's `Authority` signs. A stream stays open and gets a new answer
before its certificate is old, and whenever entries or bundles change or the clock is set.
"""

import asyncio
import errno
import os
import random
import resource
import socket
import stat
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpclib.config import Configuration
from grpclib.const import Status
from grpclib.exceptions import GRPCError, StreamTerminatedError
from grpclib.server import Server, Stream
from h2.exceptions import H2Error

from nsm.errors import DeniedError, InvalidError, NsmError, TakenError
from nsm.identity import clock, files
from nsm.identity.attest import Connected, Process, attest, connected
from nsm.identity.authority import SVID_LIFE, Authority, write_atomically
from nsm.identity.background import beside
from nsm.identity.changes import LOOK_EVERY, seen
from nsm.identity.entries import Entry, load
from nsm.identity.source import Bundles, Svid
from nsm.identity.spiffe import SpiffeId, check_trust_domain
from nsm.identity.workload import HEADER, MAX_DOMAINS, socket_path
from nsm.model import SECOND
from nsm.proto.workload_grpc import SpiffeWorkloadAPIBase
from nsm.proto.workload_pb2 import (
    X509SVID,
    X509BundlesRequest,
    X509BundlesResponse,
    X509SVIDRequest,
    X509SVIDResponse,
)

MAX_CONNECTIONS = 4096  # fewer where the process may not have as many files
PER_USER = 4  # a user gets one part of so many, so that one cannot shut out the others
BACKLOG = 1024  # a unix socket that is full refuses at once
MAX_STREAMS_PER_PROCESS = 64
MAX_IDENTITIES = 64  # of one process
_WINDOW = 64 * 1024  # bytes that wait unread for a connection: requests are empty
_EARLIER = 0.1  # renewals are spread over this part of the time before they are due

log = structlog.get_logger(__name__)


@asynccontextmanager
async def serve(
    url: str,
    authority: Authority,
    *,
    entries: Path,
    federation: Path | None = None,
    bundle: Path | None = None,
    ttl: int = SVID_LIFE,
    look_every: float = LOOK_EVERY,
) -> AsyncIterator["Issuer"]:
    """Serve the Workload API at url (`unix:///path`) until the block ends.

    entries is the registration file, federation a directory of `<trust domain>.pem`,
    bundle where our own is written for others; ttl (ns) is a certificate's life. Both
    files and directory are looked at every look_every seconds; a bad one is refused at
    the start and, later, leaves what was good in force.
    Raises InvalidError, PreconditionError, or TakenError if another serves at url.
    """
    path = Path(socket_path(url))
    read = _Files(entries, federation, authority.trust_domain)
    known = await asyncio.to_thread(read.first)
    if bundle is not None:
        await asyncio.to_thread(write_atomically, bundle, authority.bundle_pem(), mode=0o644)
    issuer = Issuer(url, authority, known, entries=entries, ttl=ttl)
    server = Server(
        [issuer],
        config=Configuration(
            http2_connection_window_size=_WINDOW, http2_stream_window_size=_WINDOW
        ),
    )
    listener = await asyncio.to_thread(_listen, path)
    try:
        await server.start(sock=listener, backlog=BACKLOG)
        async with (
            beside(read.follow(issuer, look_every), f"follower of {entries}"),
            beside(_mind_the_clock(issuer), "who notices that the clock is set"),
        ):
            try:
                yield issuer
            finally:
                await issuer.stop()
                server.close()
                await server.wait_closed()
    finally:
        listener.close()
        await asyncio.to_thread(_unlink, path, listener.inode)


@dataclass(frozen=True)
class Known:
    """What the files said at one moment."""

    entries: tuple[Entry, ...] = ()
    federated: Bundles = field(default_factory=dict)


class Issuer(SpiffeWorkloadAPIBase):
    """The Workload API. `url` is where it is served, `issued` how many certificates it gave."""

    def __init__(
        self, url: str, authority: Authority, known: Known, *, entries: Path, ttl: int
    ) -> None:
        self.url = url
        self.issued = 0
        self._authority = authority
        self._known = known
        self._file = entries
        self._ttl = ttl
        self._changed = asyncio.Event()
        self._stopping = False
        self._streams: Counter[int] = Counter()  # pid -> open streams
        self._idle = asyncio.Event()
        self._idle.set()

    def learn(self, known: Known) -> None:
        """From now on these entries and bundles hold; every open stream gets a new answer."""
        self._known = known
        self._wake()

    def renew(self) -> None:
        """Every open stream gets new certificates, dated by the clock as it is now."""
        self._wake()

    async def stop(self) -> None:
        """End every stream with UNAVAILABLE, and wait until they are told."""
        self._stopping = True
        self._wake()
        try:
            async with asyncio.timeout(1.0):
                await self._idle.wait()
        except TimeoutError:
            log.warning("callers that do not read are left", streams=self._streams.total())

    async def FetchX509SVID(  # noqa: N802 - the protocol's name
        self, stream: Stream[X509SVIDRequest, X509SVIDResponse]
    ) -> None:
        """All identities of the caller, again whenever one of them or a bundle changes."""
        with self._caller(stream) as who, _as_status():
            process, seen_for = await self._attested(who, None)
            while True:
                changed, known = self._changed, self._known
                if known is not seen_for:  # an entry may want a digest now
                    process, seen_for = await self._attested(who, process)
                fitting = await asyncio.to_thread(_fitting, known.entries, process)
                if not fitting:
                    raise DeniedError(
                        f"no registration entry in {self._file} fits this caller: {process}",
                        hint=f"add one to {self._file}; it is read again at once",
                    )
                issued = [(entry, self._issue(entry)) for entry in fitting]
                await stream.send_message(self._answer(issued, known.federated))
                log.info("issued", id=str(fitting[0].id), count=len(issued), caller=str(process))
                await self._wait(changed, min(self._renewal(entry) for entry in fitting))

    async def FetchX509Bundles(  # noqa: N802 - the protocol's name
        self, stream: Stream[X509BundlesRequest, X509BundlesResponse]
    ) -> None:
        """Our own bundle and all federated ones, again whenever one changes.

        For every process of this machine: bundles are public.
        """
        with self._caller(stream), _as_status():
            while True:
                changed, known = self._changed, self._known
                bundles = {**known.federated, self._authority.trust_domain: self._own_bundle}
                await stream.send_message(X509BundlesResponse(bundles=_ders(bundles)))
                await self._wait(changed, None)

    async def FetchJWTSVID(self, stream: Stream[Any, Any]) -> None:  # noqa: N802 - as above
        """Not offered."""
        _no_jwt()

    async def FetchJWTBundles(self, stream: Stream[Any, Any]) -> None:  # noqa: N802 - as above
        """Not offered."""
        _no_jwt()

    async def ValidateJWTSVID(self, stream: Stream[Any, Any]) -> None:  # noqa: N802 - as above
        """Not offered."""
        _no_jwt()

    @contextmanager
    def _caller(self, stream: Stream[Any, Any]) -> Iterator[Connected]:
        """Who asks, with a place among the open streams. The request is empty and never read,
        so that nobody can make us hold a large one."""
        if stream.metadata is None or stream.metadata.get(HEADER[0]) != HEADER[1]:
            raise GRPCError(
                Status.INVALID_ARGUMENT,
                f"the request has no metadata {HEADER[0]}: {HEADER[1]}, which the Workload API "
                "demands of every call",
            )
        self._deny_if_stopping()
        who = _connected(stream)
        if self._streams[who.pid] >= MAX_STREAMS_PER_PROCESS:
            raise GRPCError(
                Status.RESOURCE_EXHAUSTED,
                f"process {who.pid} has {MAX_STREAMS_PER_PROCESS} streams open; close one",
            )
        self._streams[who.pid] += 1
        self._idle.clear()
        try:
            yield who
        finally:
            self._streams[who.pid] -= 1
            if not self._streams[who.pid]:
                del self._streams[who.pid]
            if not self._streams:
                self._idle.set()

    async def _attested(self, who: Connected, before: Process | None) -> tuple[Process, Known]:
        """What who is, with its program's digest only if some entry that else fits asks."""
        known = self._known
        process = before
        if process is None:
            process = await asyncio.to_thread(attest, who, digest=False)
        if process.digest is None and not process.why_no_digest:
            wanted = await asyncio.to_thread(_wants_digest, known.entries, process)
            if wanted:
                process = await asyncio.to_thread(attest, who, digest=True)
        return process, known

    def _issue(self, entry: Entry) -> Svid:
        self.issued += 1
        return self._authority.issue(entry.id, dns=entry.dns, ttl=entry.ttl or self._ttl)

    def _renewal(self, entry: Entry) -> float:
        """Seconds until entry's certificate is to be renewed, a little different each time."""
        due = entry.renew or (entry.ttl or self._ttl) // 2
        return due / SECOND * random.uniform(1 - _EARLIER, 1.0)  # noqa: S311 - spreads load

    def _answer(self, issued: Sequence[tuple[Entry, Svid]], federated: Bundles) -> X509SVIDResponse:
        own = _der(self._own_bundle)
        return X509SVIDResponse(
            svids=[
                X509SVID(
                    spiffe_id=str(svid.id),
                    x509_svid=_der(svid.chain),
                    x509_svid_key=svid.key.private_bytes(
                        serialization.Encoding.DER,
                        serialization.PrivateFormat.PKCS8,
                        serialization.NoEncryption(),
                    ),
                    bundle=own,
                )
                for _, svid in issued
            ],
            federated_bundles=_ders(federated),
        )

    @property
    def _own_bundle(self) -> tuple[x509.Certificate, ...]:
        return self._authority.certificates

    async def _wait(self, changed: asyncio.Event, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await changed.wait()
        except TimeoutError:
            return  # due for renewal
        self._deny_if_stopping()

    def _deny_if_stopping(self) -> None:
        if self._stopping:
            raise GRPCError(Status.UNAVAILABLE, f"the issuer at {self.url} is stopping")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _mind_the_clock(issuer: Issuer) -> None:
    """Issue all certificates anew whenever the clock is set, for ever: by an hour is their life."""
    try:
        async for by in clock.steps():
            log.warning("the clock was set; all certificates are issued anew", seconds=round(by, 1))
            issuer.renew()
    except OSError as why:
        log.warning(
            "nobody tells when the clock is set: certificates are renewed in their time only",
            why=why.strerror,
        )


class _Files:
    """Reads entries and federated bundles, and what changed of them."""

    def __init__(self, entries: Path, federation: Path | None, trust_domain: str) -> None:
        self._entries = entries
        self._federation = federation
        self._trust_domain = trust_domain
        self._looked = seen([])
        self._known = Known()

    def first(self) -> Known:
        """What they say now. Blocks. Raises NsmError for the first bad one."""
        self._looked = seen(self._paths())
        self._known = Known(
            load(self._entries, self._trust_domain),
            {domain: files.bundle(path) for domain, path in self._domains().items()},
        )
        return self._known

    async def follow(self, issuer: Issuer, every: float) -> None:
        """Tell issuer whatever changes, for ever."""
        while True:
            await asyncio.sleep(every)
            known = await asyncio.to_thread(self._again)
            if known is not None:
                log.info(
                    "read again", entries=len(known.entries), federated=sorted(known.federated)
                )
                issuer.learn(known)

    def _again(self) -> Known | None:
        """What they say now if that is something new; a bad file leaves what it last said."""
        now = seen(self._paths())
        if now == self._looked:
            return None
        self._looked = now
        entries, federated = self._known.entries, {}
        try:
            entries = load(self._entries, self._trust_domain)
        except NsmError as why:
            log.warning("registration entries are wrong; the last good ones stay", why=str(why))
        for domain, path in self._domains().items():
            try:
                federated[domain] = files.bundle(path)
            except NsmError as why:
                log.warning("a bundle is wrong; the last good one stays", why=str(why))
                if domain in self._known.federated:
                    federated[domain] = self._known.federated[domain]
        known = Known(entries, federated)
        if known == self._known:
            return None
        self._known = known
        return known

    def _paths(self) -> list[Path]:
        return [self._entries, *self._domains().values()]

    def _domains(self) -> Mapping[str, Path]:
        """Trust domain -> its bundle's file, for every file that is named like one."""
        if self._federation is None:
            return {}
        try:
            names = sorted(os.listdir(self._federation))
        except FileNotFoundError:
            return {}
        found = {}
        for name in names:
            domain = name.removesuffix(".pem")
            if name == domain or name.startswith(".") or domain == self._trust_domain:
                continue
            try:
                found[check_trust_domain(domain)] = self._federation / name
            except InvalidError:
                continue
        return dict(list(found.items())[:MAX_DOMAINS])


class _Listener(socket.socket):
    """A listening unix socket that asks the kernel who connected, at the moment of accepting.

    The answer travels as the peer's address, the one thing about a connection that
    gRPC hands through: a unix client has none of its own.
    """

    def __init__(self) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self.inode = (0, 0)
        self._users: Counter[int] = Counter()  # uid -> open connections
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = min(MAX_CONNECTIONS, max((files - 128) // 2, PER_USER))  # socket and pidfd

    def accept(self) -> tuple["_Accepted", Connected]:
        raw, _ = super().accept()
        sock = _Accepted(raw.family, raw.type, raw.proto, fileno=raw.detach())
        who = sock.admit(self._users)
        if self._users.total() > self._most or self._users[who.uid] > self._most // PER_USER:
            sock.close()
            log.warning("connection refused: too many", uid=who.uid)
            raise ConnectionAbortedError(errno.ECONNABORTED, "too many connections")
        return sock, who


class _Accepted(socket.socket):
    """A connection; gives back its place among its user's, and the handle, when it closes."""

    _who: Connected | None = None
    _users: Counter[int]

    def admit(self, users: Counter[int]) -> Connected:
        self._who, self._users = connected(self), users
        users[self._who.uid] += 1
        return self._who

    def close(self) -> None:
        who, self._who = self._who, None
        if who is not None:
            self._users[who.uid] -= 1
            if not self._users[who.uid]:
                del self._users[who.uid]
            if who.pidfd >= 0:
                os.close(who.pidfd)
        super().close()


def _connected(stream: Stream[Any, Any]) -> Connected:
    who: Any = stream.peer.addr()
    assert isinstance(who, Connected)
    return who


def _listen(path: Path) -> _Listener:
    """Listen at path for everybody on this machine; who may have what is decided per caller."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    listener = _Listener()
    try:
        _clear(path)
        try:
            listener.bind(str(path))
        except OSError as why:
            if why.errno == errno.EADDRINUSE:
                raise _taken(path) from why
            raise InvalidError(
                f"cannot listen on unix://{path}: {why.strerror}",
                hint="the directory must be there and writable",
            ) from why
        path.chmod(0o777)
        status = path.stat()
        listener.inode = (status.st_dev, status.st_ino)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: Path) -> None:
    """Take away a socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise _taken(path)
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as why:
            raise _taken(path) from why
    raise _taken(path)


def _taken(path: Path) -> TakenError:
    return TakenError(
        f"somebody else has {path}",
        hint="stop that issuer or agent, or choose another NSM_LISTEN_ON",
    )


def _unlink(path: Path, inode: tuple[int, int]) -> None:
    """Take away our socket, if it is still ours."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if (status.st_dev, status.st_ino) == inode:
        path.unlink(missing_ok=True)


def _fitting(entries: Sequence[Entry], process: Process) -> list[Entry]:
    return [entry for entry in entries if entry.fits(process)][:MAX_IDENTITIES]


def _wants_digest(entries: Sequence[Entry], process: Process) -> bool:
    return any(e.exe_sha256 is not None and e.fits_but_for_digest(process) for e in entries)


@contextmanager
def _as_status() -> Iterator[None]:
    """Our errors as gRPC statuses; a caller that went away is none."""
    try:
        yield
    except NsmError as error:
        if isinstance(error, DeniedError):
            log.info("denied", why=error.message)
        raise GRPCError(Status(int(error.code)), str(error)) from error
    except (StreamTerminatedError, H2Error, ConnectionError):
        return


def _no_jwt() -> NoReturn:
    raise GRPCError(
        Status.UNIMPLEMENTED,
        "this issuer makes X.509-SVIDs only; the mesh signs its tokens with their keys itself",
    )


def _ders(bundles: Bundles) -> dict[str, bytes]:
    return {str(SpiffeId(domain)): _der(bundle) for domain, bundle in bundles.items()}


def _der(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(c.public_bytes(serialization.Encoding.DER) for c in certificates)

"""What this node's workloads see of the registry (`wire.md` §6.8).

An endpoint registers at its node's manager with a socket nobody else can reach;
the domain learns the manager's own URL instead. Asked by a workload of this
node, the manager tells the socket itself; for anybody else it stands in front.
What the domain still believes to be here, but is not, is hidden.
"""

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import NoReturn
from urllib.parse import urlsplit

import structlog

from nsm.caller import Caller
from nsm.errors import (
    DeadlineError,
    InvalidError,
    NsmError,
    PreconditionError,
    UnavailableError,
)
from nsm.model import SECOND, Endpoint, Found, Service
from nsm.registration import Registration, RegistrationPath
from nsm.rpc.registry_services import Store, claim_socket, send_socket
from nsm.watches import Spawn
from nsmgr.store import Registered
from nsmgr.store import Store as Kept

PERIOD = 60 * SECOND  # a registration lives this long at most, and is renewed before
FD_PATIENCE = 2.0  # seconds a registered socket may come after the call that names it
SPARE = 2  # seconds of its tokens at most that an endpoint leaves us to unregister it
LOOK_EVERY = 1.0  # seconds between looks at whether endpoints listen
AT_ONCE = 64  # endpoints looked at before others have their turn
DESERTED = 3  # looks in a row at which one does not, until it is taken for gone
AGAIN = 5  # seconds between tries to unregister one that ended
log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Local:
    """An endpoint of this node: url is where we reach it, fd its socket if it came as one.

    owner is who registered it; confirmed, that the domain's registry took it, and is not away.
    """

    endpoint: Endpoint
    url: str
    fd: int | None
    owner: str = ""
    confirmed: bool = True
    timer: asyncio.TimerHandle | None = None
    then: Callable[[], None] = lambda: None


class Locals:
    """The endpoints registered through this manager, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, Local] = {}
        self._changed = asyncio.Event()
        self._coming: set[asyncio.Event] = set()

    @contextmanager
    def coming(self) -> Iterator[None]:
        """One is being registered, for the block: the domain may tell of it before we know it."""
        self._coming.add(done := asyncio.Event())
        try:
            yield
        finally:
            self._coming.discard(done)
            done.set()

    async def settled(self) -> None:
        """Wait until what is coming now is here, or failed."""
        for done in list(self._coming):
            await done.wait()

    def put(
        self,
        endpoint: Endpoint,
        url: str,
        fd: int | None,
        *,
        until: int | None = None,
        then: Callable[[], None] = lambda: None,
        owner: str = "",
        confirmed: bool = True,
    ) -> None:
        """Know endpoint until it expires, instead of an earlier one of its name; owns fd.

        until, in ns since 1970, is another end than its own. When it has come, and
        nobody put or dropped the name meanwhile, then is called. A socket that is
        the same file as before keeps its descriptor and so its URL: whoever talks
        over it need not notice that it was renewed.
        """
        known = self._by_name.get(endpoint.name)
        if known and fd is not None and _same_file(known.fd, fd):
            os.close(fd)
            url, fd, known.fd = known.url, known.fd, None
            self._forget(known)
        else:
            self.drop(endpoint.name)
        local = self._by_name[endpoint.name] = Local(endpoint, url, fd, owner, confirmed)
        delay = ((until or endpoint.expires or 0) - time.time_ns()) / SECOND
        loop = asyncio.get_running_loop()
        local.then = then
        local.timer = loop.call_later(max(0.0, delay), self.end, endpoint.name)
        self._changed.set()
        self._changed = asyncio.Event()

    def drop(self, name: str) -> None:
        """Forget the endpoint called name, and let go of its socket."""
        if local := self._by_name.pop(name, None):
            self._forget(local)
            if local.fd is not None:
                os.close(local.fd)

    def end(self, name: str) -> None:
        """Its time is over, or nobody is there any more: forget it, and do what was to be done."""
        if local := self._by_name.get(name):
            self.drop(name)
            local.then()

    async def deserted(self, besides: str) -> set[str]:
        """Whose sockets nobody listens at; of those that serve another service than that."""
        found = set()
        for turn, (name, local) in enumerate(list(self._by_name.items()), 1):
            if turn % AT_ONCE == 0:  # some 20 us each
                await asyncio.sleep(0)
            here = self._by_name.get(name) is local and besides not in local.endpoint.services
            if here and local.fd is not None and _refuses(local.fd):
                found.add(name)
        return found

    def _forget(self, local: Local) -> None:
        if local.timer:
            local.timer.cancel()

    def get(self, name: str) -> Local | None:
        """The endpoint called name, if it is here."""
        return self._by_name.get(name)

    def of(self, service: str) -> list[Local]:
        """The endpoints of this node that serve service, in the order they came."""
        return [one for one in self._by_name.values() if service in one.endpoint.services]

    async def change(self) -> None:
        """Wait until one is put."""
        await self._changed.wait()

    def close(self) -> None:
        """Let go of every socket."""
        for name in list(self._by_name):
            self.drop(name)


class NodeRegistry(Store):
    """The registry as this node's manager offers it.

    public_url is told to the domain instead of an endpoint's own, and is set
    once it is known; labels are added to each service's, never overwriting
    (`wire.md` §6.7). kept is for the next life of this process; None: there is none.
    """

    def __init__(
        self,
        upstream: Store,
        locals_: Locals,
        labels: Mapping[str, str],
        *,
        spawn: Spawn,
        kept: Kept | None = None,
    ) -> None:
        self.public_url = ""
        self._spawn = spawn
        self._upstream = upstream
        self._locals = locals_
        self._labels = labels
        self._kept = kept
        self._away: dict[str, Registration] = {}
        self._before: dict[str, Registered] = {}

    def expect(self, left: Iterable[Registered], own: Caller) -> None:
        """Who was registered in an earlier life comes back, or is gone. own: we, who then ask."""
        for one in left:
            self._before[one.endpoint.name] = one
            self._away[one.endpoint.name] = Registration(own, one.path, one.ids, one.expires)

    async def follow(
        self, forwarder_service: str, joined: Callable[[], Collection[str]] = frozenset
    ) -> NoReturn:
        """Take from the domain whose process is gone and does not come back, until cancelled.

        But a forwarder: it carries wires that stand, and nobody else can. Nor those that are
        joined: their wires stand, in a namespace that lives, and wait for their next life.
        """
        silent: Counter[str] = Counter()
        while True:
            await asyncio.sleep(LOOK_EVERY)
            deserted = await self._locals.deserted(forwarder_service)
            deserted |= self._dead(forwarder_service)
            silent = Counter({name: silent[name] + 1 for name in deserted})
            standing = joined()
            for name, looks in silent.items():
                if looks == DESERTED and name in standing:
                    log.info("an endpoint's process is gone, and its wires stand", name=name)
                if looks >= DESERTED and name not in standing:
                    log.info("an endpoint is gone", name=name)
                    self._locals.end(name)
                    self._give_up(name)

    def _dead(self, besides: str) -> set[str]:
        """Of an earlier life's endpoints those that died meanwhile; of other services than that.

        Who is back is none of them any more. Who is not, and whose end nobody can see, is given
        up when its registration ends that nobody refreshes.
        """
        found = set()
        for name, one in list(self._before.items()):
            if self._locals.get(name):
                del self._before[name], self._away[name]
            elif not self.public_url:
                continue  # nobody could come back yet
            elif one.until <= time.time_ns():
                self._give_up(name)
            elif besides not in one.endpoint.services and one.pid and _has_ended(one.pid):
                found.add(name)
        return found

    def _give_up(self, name: str) -> None:
        if one := self._before.pop(name, None):
            self._ended(one.endpoint, self._away.pop(name))

    async def register_endpoint(
        self, asked: Endpoint, by: Registration
    ) -> tuple[Endpoint, RegistrationPath]:
        """Register it under our URL; keep its own for those of this node."""
        if not asked.url:
            raise InvalidError(
                f"endpoint {asked.name!r} of {by.owner} registers without a URL",
                hint="say where it listens: unix:///path with the socket's descriptor, or tcp://…",
            )
        fd = await claim_socket(by.caller, asked.url, FD_PATIENCE)
        url = asked.url if fd is None else f"unix:///proc/self/fd/{fd}"
        told = replace(
            asked,
            url=self.public_url,
            labels=with_labels(asked.labels, self._labels),
            expires=min(by.expires, time.time_ns() + PERIOD, asked.expires or by.expires),
        )
        with self._locals.coming():
            try:
                registered, path = await self._upstream.register_endpoint(told, by)
            except (UnavailableError, DeadlineError):
                self._outlast(told, url, fd, by)
                raise
            except BaseException as why:
                if fd is not None:
                    os.close(fd)
                known = self._locals.get(asked.name)
                if known and not known.confirmed and isinstance(why, NsmError):
                    self._locals.drop(asked.name)  # the registry is back, and says no
                raise
            until = _until(registered.expires or told.expires, by)
            # Nothing of the call is held but the path: the connection may be long gone.
            pid = by.caller.process.pid if by.caller.process else 0
            by = replace(by, caller=Caller(by.caller.handshake))
            self._locals.put(
                registered,
                url,
                fd,
                until=until,
                then=lambda: self._ended(registered, by),
                owner=by.owner,
            )
            if self._kept:
                self._kept.registers(
                    Registered(registered, by.path, by.ids, by.expires, until, pid)
                )
        return replace(registered, url=asked.url), path

    def _outlast(self, told: Endpoint, url: str, fd: int | None, by: Registration) -> None:
        """Know an endpoint whose registry is away for as long as it comes back to say so.

        What it serves stands, and is refreshed by its name: wires of this node must not end
        because of the registry. Nobody else hears of it; whose name it is, is as it was.
        """
        known = self._locals.get(told.name)
        if known and known.owner != by.owner:
            if fd is not None:
                os.close(fd)
            return
        by = replace(by, caller=Caller(by.caller.handshake))
        self._locals.put(
            told,
            url,
            fd,
            until=_until(told.expires, by),
            then=lambda: self._ended(told, by),
            owner=by.owner,
            confirmed=False,
        )

    async def unregister_endpoint(self, asked: Endpoint, by: Registration) -> None:
        """Take it from the domain, if it came through us; else it is nothing of ours."""
        if self._locals.get(asked.name):
            await self._upstream.unregister_endpoint(replace(asked, url=self.public_url), by)
            self._locals.drop(asked.name)
            self._forget(asked.name)

    def _forget(self, name: str) -> None:
        """The next life is not to wait for it, unless it is here again."""
        if self._kept and self._locals.get(name) is None:
            self._kept.unregistered(name)

    def _ended(self, endpoint: Endpoint, by: Registration) -> None:
        self._spawn(self._end(endpoint, by), f"end of endpoint {endpoint.name}")

    async def _end(self, endpoint: Endpoint, by: Registration) -> None:
        await self._withdraw(endpoint, by)
        self._forget(endpoint.name)

    async def _withdraw(self, endpoint: Endpoint, by: Registration) -> None:
        """Take from the domain what nobody refreshed, while the tokens it came with are good.

        Upstream's registries keep a name for its owner until it is unregistered: that it
        has expired frees it for nobody (`wire.md` §6.2).
        """
        while True:
            try:
                if await self._is_ours(endpoint.name, by.caller):
                    told = replace(endpoint, url=self.public_url)
                    await self._upstream.unregister_endpoint(told, by)
            except NsmError as trouble:
                if time.time_ns() + AGAIN * SECOND >= by.expires:
                    log.warning(
                        "an endpoint that ended is not unregistered",
                        name=endpoint.name,
                        owner=by.owner,
                        error=str(trouble),
                    )
                    return
            else:
                return
            await asyncio.sleep(AGAIN)

    async def _is_ours(self, name: str, caller: Caller) -> bool:
        """Whether name is nobody else's by now, and has not come here again."""
        async with aclosing(
            self._upstream.find_endpoints(Endpoint(name=name), False, caller)
        ) as found:
            async for one in found:
                if one.item.url != self.public_url:
                    return False
        await self._locals.settled()
        return self._locals.get(name) is None

    async def find_endpoints(
        self, query: Endpoint, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Endpoint], None]:
        """What the domain knows, with the sockets of this node's endpoints for its workloads.

        One that is asked for by its name alone, and is here, is told while the registry is away:
        whose wire is refreshed knows whom it leads to.
        """
        try:
            async with aclosing(self._upstream.find_endpoints(query, watch, caller)) as known:
                async for found in known:
                    if told := await self._as_here(found, caller):
                        yield told
        except (UnavailableError, DeadlineError):
            local = self._locals.get(query.name)
            if watch or not local or not caller.unix or query != Endpoint(name=query.name):
                raise
            yield Found(self._with_socket(local.endpoint, local, caller))

    async def _as_here(self, found: Found[Endpoint], caller: Caller) -> Found[Endpoint] | None:
        """What the domain tells, as this node knows it; None for what is not here though the
        domain believes so."""
        ours = found.item.url == self.public_url
        local = self._locals.get(found.item.name)
        if not local and not found.deleted and ours:
            await self._locals.settled()  # watchers hear before the registrant's answer
            local = self._locals.get(found.item.name)
        if local and not local.confirmed and not found.deleted and not ours:
            local = None  # the name is somebody's elsewhere, and the registry has not said so yet
        if local and caller.unix:
            if found.deleted:
                return replace(found, item=replace(found.item, url=local.url))
            return replace(found, item=self._with_socket(found.item, local, caller))
        return found if local or found.deleted or not ours else None

    def _with_socket(self, told: Endpoint, local: Local, caller: Caller) -> Endpoint:
        url = local.url if local.fd is None else send_socket(caller, local.fd)
        return replace(told, url=url)

    async def register_service(
        self, asked: Service, by: Registration
    ) -> tuple[Service, RegistrationPath]:
        """Services belong to the domain: passed on as they are."""
        return await self._upstream.register_service(asked, by)

    async def unregister_service(self, asked: Service, by: Registration) -> None:
        """Services belong to the domain: passed on as they are."""
        await self._upstream.unregister_service(asked, by)

    async def find_services(
        self, query: Service, watch: bool, caller: Caller
    ) -> AsyncGenerator[Found[Service], None]:
        """Services belong to the domain: passed on as they are."""
        async for found in self._upstream.find_services(query, watch, caller):
            yield found


def _until(expires: int | None, by: Registration) -> int:
    """When an endpoint ends that nobody refreshes: in time to say so over the path by came."""
    left = max(0, by.expires - time.time_ns())
    spare = min(SPARE * SECOND, left // 4)
    return min(by.expires - spare, expires or by.expires)


def _has_ended(pid: int) -> bool:
    """Whether no process has that number; who has it may be another by now.

    Asked of the kernel, because /proc may show a manager no processes of others.
    """
    try:
        os.close(os.pidfd_open(pid))
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _refuses(fd: int) -> bool:
    """Whether nobody listens at that socket; False where it cannot be told. Nobody there hears of
    it, and nobody waits: where there is a listener the kernel says that we are of another type,
    and else that we are refused.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
            probe.connect(f"/proc/self/fd/{fd}")
    except ConnectionRefusedError:
        return True
    except OSError:
        pass
    return False


def _same_file(one: int | None, other: int) -> bool:
    if one is None:
        return False
    a, b = os.fstat(one), os.fstat(other)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)


def with_labels(
    labels: Mapping[str, Mapping[str, str]], more: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """more added to each service's labels; what is there stays."""
    return {service: {**more, **own} for service, own in labels.items()}


async def public_url(listen_on: Iterable[str], registry_url: str) -> str:
    """What other nodes are told: the first tcp:// URL, else the first of any kind (`wire.md` §6.8).

    A tcp:// URL without a host means every address of ours; told is the one from
    which the registry is reached, because others are on the same network.
    """
    listed = list(listen_on)
    url = next((one for one in listed if one.startswith("tcp://")), listed[0] if listed else "")
    parts = urlsplit(url)
    if parts.scheme != "tcp" or parts.hostname not in (None, "", "0.0.0.0", "::"):  # noqa: S104
        return url
    own = await _address_towards(urlsplit(registry_url).hostname or "")
    host = f"[{own}]" if ":" in own else own
    return f"tcp://{host}:{parts.port}"


async def _address_towards(host: str) -> str:
    """Our address on the way to host; no packet is sent."""
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host or "192.0.2.1", 9, type=socket.SOCK_DGRAM)
        family, _, _, _, address = found[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as failure:
        raise PreconditionError(
            f"no address of this node leads to {host or 'anywhere'}: {failure}",
            hint="name one: NSM_LISTEN_ON=unix:///…,tcp://<this node's address>:5001",
        ) from failure

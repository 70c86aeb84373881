"""Who offers what: services and endpoints, indexed, with their owners and their end.

What a registry decides, without its clock, its files and its wire: whether a
name is free for its caller, until when a registration holds, which of a
hundred thousand answer a query, and who is to be told of a change. Finding by
name or by service looks at no other name's or service's records.
"""

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from nsm.errors import REFUSED, DeniedError, ExhaustedError, InvalidError
from nsm.model import SECOND, Endpoint, Found, Service

T = TypeVar("T", Endpoint, Service)
Sink = Callable[[Found[T]], None]

PAYLOAD = "IP"  # of a service that says none


@dataclass(frozen=True, slots=True)
class Limits:
    """How much anybody may offer: far above what networks need, far below what harms."""

    name: int = 512
    """Characters of a name; Kubernetes' have 253."""
    text: int = 4096
    """Characters of a URL, a label's key or its value."""
    services: int = 256
    """Services one endpoint offers."""
    labels: int = 256
    """Labels one endpoint has for one service, or one selector has."""
    matches: int = 1024
    """Matches of one service, and routes of one match."""
    per_owner: int = 10_000
    """Names one SPIFFE id may hold."""
    total: int = 1_000_000
    """Names held altogether."""
    watchers: int = 100_000
    """Watch streams open at once."""
    watchers_per_id: int = 10_000
    """Watch streams of one SPIFFE id; a manager has one for each of its node's endpoints."""


@dataclass(frozen=True, slots=True, eq=False)
class Watcher(Generic[T]):
    """Somebody to be told of changes: what they asked for, and where to put it."""

    query: T
    tell: Sink[T]


class Shelf(Generic[T]):
    """Records of one kind by name, grouped for finding, with those who watch them.

    matches tells whether a record answers a query; groups names the groups a
    record or a query belongs to.
    """

    def __init__(
        self,
        matches: Callable[[T, T], bool],
        groups: Callable[[T], Collection[str]],
    ) -> None:
        self.matches: Callable[[T, T], bool] = matches
        self.examined = 0  # records looked at by finds: what an index is there to keep small
        self._groups: Callable[[T], Collection[str]] = groups
        self._records: dict[str, T] = {}
        self._grouped: dict[str, dict[str, T]] = {}
        self._watchers: dict[tuple[str, str], dict[Watcher[T], None]] = {}
        self._watching = 0

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[T]:
        return iter(self._records.values())

    def get(self, name: str) -> T | None:
        """The record of name."""
        return self._records.get(name)

    @property
    def watching(self) -> int:
        """How many watch."""
        return self._watching

    def candidates(self, query: T) -> Sequence[T]:
        """Records that may answer query, as they are now; `matches` decides on each."""
        if query.name:
            one = self._records.get(query.name)
            found: Sequence[T] = () if one is None else (one,)
        elif groups := self._groups(query):
            smallest = min((self._grouped.get(g, {}) for g in groups), key=len)
            found = tuple(smallest.values())
        else:
            found = tuple(self._records.values())
        self.examined += len(found)
        return found

    def find(self, query: T) -> list[T]:
        """All records that answer query."""
        return [one for one in self.candidates(query) if self.matches(query, one)]

    def put(self, record: T) -> T | None:
        """Hold record, tell those who watch it, and return what was held under its name."""
        before = self._take(record.name)
        self._records[record.name] = record
        for group in self._groups(record):
            self._grouped.setdefault(group, {})[record.name] = record
        self._tell(before, record)
        return before

    def remove(self, name: str) -> T | None:
        """Forget name, tell those who watched it, and return what it was."""
        before = self._take(name)
        if before is not None:
            self._tell(before, None)
        return before

    def watch(self, query: T, tell: Sink[T]) -> Watcher[T]:
        """Call tell with every later change of what answers query, until `unwatch`.

        What ceases to answer query is told as deleted.
        """
        watcher = Watcher(query, tell)
        self._watchers.setdefault(self._watched_by(query), {})[watcher] = None
        self._watching += 1
        return watcher

    def unwatch(self, watcher: Watcher[T]) -> None:
        """Tell watcher nothing more; harmless if it is not there."""
        key = self._watched_by(watcher.query)
        watchers = self._watchers.get(key, {})
        if watcher in watchers:
            del watchers[watcher]
            self._watching -= 1
            if not watchers:
                del self._watchers[key]

    def _take(self, name: str) -> T | None:
        record = self._records.pop(name, None)
        if record is None:
            return None
        for group in self._groups(record):
            members = self._grouped.get(group, {})
            members.pop(name, None)
            if not members:
                self._grouped.pop(group, None)
        return record

    def _watched_by(self, query: T) -> tuple[str, str]:
        if query.name:
            return "name", query.name
        return next((("group", group) for group in self._groups(query)), ("", ""))

    def _tell(self, before: T | None, after: T | None) -> None:
        keys: dict[tuple[str, str], None] = {("", ""): None}
        for record in (before, after):
            if record is not None:
                keys["name", record.name] = None
                keys.update((("group", group), None) for group in self._groups(record))
        for key in keys:
            for watcher in tuple(self._watchers.get(key, ())):
                if after is not None and self.matches(watcher.query, after):
                    watcher.tell(Found(after))
                elif before is not None and self.matches(watcher.query, before):
                    watcher.tell(Found(before, deleted=True))


def endpoint_matches(query: Endpoint, stored: Endpoint) -> bool:
    """Whether stored answers query (`wire.md` §6.3): what the query leaves empty matches any."""
    if query.name and query.name != stored.name:
        return False
    if query.url and query.url not in stored.url:
        return False
    if any(service not in stored.services for service in query.services):
        return False
    for service, wanted in query.labels.items():
        labels = stored.labels.get(service)
        if labels is None or any(labels.get(key) != value for key, value in wanted.items()):
            return False
    if query.expires is None:
        return True
    return stored.expires is not None and query.expires // SECOND == stored.expires // SECOND


def service_matches(query: Service, stored: Service) -> bool:
    """Whether stored answers query (`wire.md` §6.3)."""
    return (
        query.name in ("", stored.name)
        and query.payload in ("", stored.payload)
        and query.matches in ((), stored.matches)
    )


class Offers:
    """All that is registered. Instants are ns since 1970 and come from the caller."""

    def __init__(self, limits: Limits = Limits()) -> None:
        self.limits = limits
        self.endpoints: Shelf[Endpoint] = Shelf(endpoint_matches, lambda e: e.services)
        self.services: Shelf[Service] = Shelf(service_matches, lambda _: ())
        self._held: dict[str, int] = {}  # names by owner
        self._ends: list[tuple[int, str]] = []  # a heap; stale entries are skipped

    def load(
        self, endpoints: Iterable[Endpoint], services: Iterable[Service], *, grace_until: int
    ) -> None:
        """Take over what an earlier life held; all of it ends at grace_until.

        While we were down nobody could refresh; and forwarders leave out what
        says it has ended, so what is served says the new end. What the earlier
        life said counts for nothing: its clock may have been wrong.
        """
        for endpoint in endpoints:
            self._put_endpoint(replace(endpoint, expires=grace_until))
        for service in services:
            self._put_service(service)

    # -- endpoints

    def register_endpoint(
        self, asked: Endpoint, *, now: int, latest: int, owned: bool = True
    ) -> Endpoint:
        """Hold asked for its owner, `path_ids[0]`, until latest or sooner if it says so.

        Raises DeniedError if another holds the name (owned=False: takes it),
        InvalidError and ExhaustedError for what may not be offered at all.
        """
        self._check_endpoint(asked)
        held = self.endpoints.get(asked.name)
        if held is not None and owned:
            self._admit("endpoint", held, asked, _ends_in(held, now))
        self._room(held, asked)
        expires = latest if asked.expires is None else min(latest, asked.expires)
        if expires <= now:
            raise InvalidError(
                f"endpoint {asked.name!r} would have ended {(now - expires) / SECOND:.1f} s ago",
                hint="leave expiration_time empty, and compare the clocks of both nodes",
            )
        registered = held.registered if held is not None and _owner(held) == _owner(asked) else now
        stored = replace(asked, expires=expires, registered=registered)
        self._put_endpoint(stored)
        return stored

    def unregister_endpoint(self, asked: Endpoint, *, owned: bool = True) -> Endpoint | None:
        """Forget the endpoint; None if it is not there. Raises DeniedError if another holds it."""
        _named("NetworkServiceEndpoint", asked.name)
        held = self.endpoints.get(asked.name)
        if held is None:
            return None
        if owned:
            self._admit("endpoint", held, asked, "")
        return self.forget_endpoint(asked.name)

    def forget_endpoint(self, name: str) -> Endpoint | None:
        """Forget the endpoint, whoever holds it."""
        held = self.endpoints.remove(name)
        if held is not None:
            self._count(_owner(held), -1)
        return held

    def put_back_endpoint(self, name: str, now: Endpoint | None, before: Endpoint | None) -> None:
        """Undo a change from before to now that could not be kept, unless another followed it."""
        if self.endpoints.get(name) is not now:
            return
        if before is None:
            self.forget_endpoint(name)
        else:
            self._put_endpoint(before)

    def expire(self, now: int) -> list[Endpoint]:
        """Forget every endpoint whose end has come, with its owner's claim to the name."""
        gone: list[Endpoint] = []
        while (end := self.next_end()) is not None and end <= now:
            _, name = heapq.heappop(self._ends)
            held = self.forget_endpoint(name)
            assert held is not None  # next_end skips what is not there
            gone.append(held)
        return gone

    def end_by(self, latest: int) -> None:
        """Have nothing end later than latest; those who watch hear of the earlier end."""
        for endpoint in tuple(self.endpoints):
            if endpoint.expires is not None and endpoint.expires > latest:
                self._put_endpoint(replace(endpoint, expires=latest))

    def next_end(self) -> int | None:
        """When the next endpoint ends; None if there is none."""
        while self._ends:
            end, name = self._ends[0]
            held = self.endpoints.get(name)
            if held is not None and held.expires == end:
                return end
            heapq.heappop(self._ends)
        return None

    # -- services

    def register_service(self, asked: Service, *, owned: bool = True) -> tuple[Service, bool]:
        """Hold asked for its owner, `path_ids[0]`; the answer, and whether anything is new here.

        The same content from another identity is answered and changes nothing:
        every endpoint of a service registers it. Other content needs the owner.
        """
        asked = replace(asked, payload=asked.payload or PAYLOAD)
        self._check_service(asked)
        held = self.services.get(asked.name)
        if held is not None and owned and _owner(held) != _owner(asked):
            if _content(held) == _content(asked):
                return asked, False
            self._admit("network service", held, asked, f" with {_difference(held, asked)}")
        self._room(held, asked)
        self._put_service(asked)
        return asked, True

    def unregister_service(self, asked: Service, *, owned: bool = True) -> Service | None:
        """Forget the service; None if it is not there. Raises DeniedError if another holds it."""
        _named("NetworkService", asked.name)
        held = self.services.get(asked.name)
        if held is None:
            return None
        if owned:
            self._admit("network service", held, asked, "")
        return self._forget_service(asked.name)

    def put_back_service(self, name: str, now: Service | None, before: Service | None) -> None:
        """Undo a change from before to now that could not be kept, unless another followed it."""
        if self.services.get(name) is not now:
            return
        if before is None:
            self._forget_service(name)
        else:
            self._put_service(before)

    # -- what both share

    def held_by(self, owner: str) -> int:
        """How many names a SPIFFE id holds."""
        return self._held.get(owner, 0)

    def _put_endpoint(self, endpoint: Endpoint) -> None:
        before = self.endpoints.put(endpoint)
        if before is not None:
            self._count(_owner(before), -1)
        self._count(_owner(endpoint), 1)
        assert endpoint.expires is not None
        heapq.heappush(self._ends, (endpoint.expires, endpoint.name))
        if len(self._ends) > 4 * len(self.endpoints) + 1024:  # refreshes leave stale ends behind
            self._ends = [(e.expires or 0, e.name) for e in self.endpoints]
            heapq.heapify(self._ends)

    def _put_service(self, service: Service) -> None:
        before = self.services.put(service)
        if before is not None:
            self._count(_owner(before), -1)
        self._count(_owner(service), 1)

    def _forget_service(self, name: str) -> Service | None:
        held = self.services.remove(name)
        if held is not None:
            self._count(_owner(held), -1)
        return held

    def _count(self, owner: str, more: int) -> None:
        count = self._held.get(owner, 0) + more
        if count:
            self._held[owner] = count
        else:
            self._held.pop(owner, None)

    def _admit(
        self, kind: str, held: Endpoint | Service, asked: Endpoint | Service, why: str
    ) -> None:
        if _owner(held) != _owner(asked):
            raise DeniedError(
                f"{kind} {asked.name!r} belongs to {_owner(held)[:256]}{why}, and"
                f" {_owner(asked)[:256] or 'nobody'} asks;"
                f" take another name or the owner's certificate: {REFUSED}"
            )

    def _room(self, held: Endpoint | Service | None, asked: Endpoint | Service) -> None:
        if held is not None and _owner(held) == _owner(asked):
            return
        owner = _owner(asked)
        if self.held_by(owner) >= self.limits.per_owner:
            raise ExhaustedError(
                f"{owner[:256]} holds {self.held_by(owner)} names here, which is the most one"
                f" identity may; {asked.name!r} is one more",
                hint="unregister some, or raise NSM_MAX_PER_OWNER of the registry",
            )
        if held is None and len(self.endpoints) + len(self.services) >= self.limits.total:
            raise ExhaustedError(
                f"the registry holds {self.limits.total} names, which is its most;"
                f" {asked.name!r} is one more",
                hint="raise NSM_MAX_NAMES of the registry",
            )

    def _check_endpoint(self, asked: Endpoint) -> None:
        limits, what = self.limits, f"endpoint {asked.name[:64]!r}"
        _named("NetworkServiceEndpoint", asked.name)
        _at_most(what, "characters in its name", len(asked.name), limits.name)
        _at_most(what, "characters in its url", len(asked.url), limits.text)
        _at_most(what, "services", len(asked.services), limits.services)
        _at_most(what, "services with labels", len(asked.labels), limits.services)
        for service in (*asked.services, *asked.labels):
            _at_most(what, "characters in a service's name", len(service), limits.name)
        for labels in asked.labels.values():
            self._check_labels(what, labels)

    def _check_service(self, asked: Service) -> None:
        limits, what = self.limits, f"network service {asked.name[:64]!r}"
        _named("NetworkService", asked.name)
        _at_most(what, "characters in its name", len(asked.name), limits.name)
        _at_most(what, "characters in its payload", len(asked.payload), limits.name)
        _at_most(what, "matches", len(asked.matches), limits.matches)
        for match in asked.matches:
            _at_most(what, "routes in a match", len(match.routes), limits.matches)
            self._check_labels(what, match.source_selector)
            self._check_labels(what, match.metadata or {})
            for route in match.routes:
                self._check_labels(what, route.selector)

    def _check_labels(self, what: str, labels: Mapping[str, str]) -> None:
        _at_most(what, "labels in one place", len(labels), self.limits.labels)
        for key, value in labels.items():
            _at_most(what, "characters in a label", max(len(key), len(value)), self.limits.text)


def _owner(record: Endpoint | Service) -> str:
    return record.path_ids[0] if record.path_ids else ""


def _content(service: Service) -> object:
    return service.payload, service.matches, service.unknown


def _difference(held: Service, asked: Service) -> str:
    if held.payload != asked.payload:
        return f"payload {held.payload[:64]!r} where {asked.payload[:64]!r} is asked for"
    return f"other matches ({len(held.matches)} held, {len(asked.matches)} asked for)"


def _ends_in(held: Endpoint, now: int) -> str:
    seconds = ((held.expires or now) - now) / SECOND
    return f" for another {max(0.0, seconds):.0f} s unless refreshed"


def _named(kind: str, name: str) -> None:
    if not name:
        raise InvalidError(f"{kind}.Name can not be zero valued")


def _at_most(what: str, of_what: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidError(f"{what} has {count} {of_what}; at most {most} are taken")

"""The routers of a domain, as the registry tells of them. Pure.

Of two routers the later one asks the earlier for a wire, so that each pair has exactly one. Who
is a router is known by who registered one: what somebody says of routes behind it counts
only then.
"""

from collections.abc import Iterable

from nsm.model import Endpoint
from nsm.ondemand import supplies


class Fellows:
    """The endpoints of a service; name is our own there, which may be in another domain."""

    def __init__(self, name: str, service: str) -> None:
        _, at, domain = service.partition("@")
        self._mine = {name, f"{name}@{domain}" if at and "@" not in name else name}
        self._service = service
        self._all: dict[str, Endpoint] = {}
        self._missing: set[str] = set()

    def begin(self, found: Iterable[Endpoint]) -> bool:
        """What there is now. Whether somebody is missing who was not missing last time.

        Who is missing twice is gone: a registry that has just started does not have all yet.
        """
        there = {one.name: one for one in found if not supplies(one, self._service)}
        missing = self._all.keys() - there.keys()
        for name in missing & self._missing:
            del self._all[name]
        self._missing = missing - self._missing
        self._all |= there
        return bool(self._missing)

    def see(self, one: Endpoint, *, deleted: bool) -> None:
        """What changed."""
        if deleted:
            self._all.pop(one.name, None)
        elif not supplies(one, self._service):
            self._all[one.name] = one

    def earlier(self) -> frozenset[str]:
        """The names of those that we ask for a wire; none before we are registered ourselves."""
        mine = [one for name, one in self._all.items() if name in self._mine]
        if not mine:
            return frozenset()
        own = _when(mine[0])
        return frozenset(
            name for name, one in self._all.items() if name not in self._mine and _when(one) < own
        )

    @property
    def others(self) -> int | None:
        """How many other routers there are; None while not even we ourselves are seen."""
        others = len(self._all.keys() - self._mine)
        return others if others < len(self._all) else None

    def are(self, identity: str) -> bool:
        """Whether a router that is not we ourselves was registered by that SPIFFE id."""
        return identity != "" and any(
            one.path_ids[:1] == (identity,)
            for name, one in self._all.items()
            if name not in self._mine
        )


def _when(one: Endpoint) -> tuple[int, str]:
    return one.registered or 0, one.name

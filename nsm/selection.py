"""Who could serve a request, and whose turn it is.

A network service's matches send requests to endpoints by labels (`wire.md`
§7.1-7.3). A selector's value may refer to the request's own labels, as in
`nodeName: "{{.nodeName}}"`: that little of Go's templates is what services in
the field use, and all that is understood here. Any other template is compared
as it is written, as upstream does with one it cannot read.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nsm.model import Endpoint, Match, Service
from nsm.ondemand import routes_at

P2P = {"p2p": "true"}  # what a forwarder must be where a service does not say
MISSING = "<no value>"  # how Go prints a key that is not there

_NAME = r"[^\W\d]\w*"
_ACTION = re.compile(
    r"\{\{(?P<trim_left>-\s)?\s*(?:"
    rf"\$?\.(?P<field>{_NAME})"
    r'|index\s+[.$]\s+(?:"(?P<quoted>[^"\\\n]*)"|`(?P<raw>[^`]*)`)'
    r"|(?P<comment>/\*.*?\*/)"
    r")\s*(?P<trim_right>(?<=\s)-)?\}\}",
    re.DOTALL,
)


def render(template: str, labels: Mapping[str, str]) -> str | None:
    """Fill in labels, or None if this is no template that is understood here.

    `{{.x}}` for a missing x gives `<no value>`, `{{index . "x"}}` an empty string.
    """
    if "{{" not in template:
        return template
    parsed = _parse(template)
    if parsed is None:
        return None
    return "".join(
        part if isinstance(part, str) else labels.get(part[0], part[1]) for part in parsed
    )


@lru_cache(maxsize=1024)
def _parse(template: str) -> tuple[str | tuple[str, str], ...] | None:
    """Plain text, and (key, what stands for a missing one), in their order."""
    parts: list[str | tuple[str, str]] = []
    end, trim = 0, False
    for action in _ACTION.finditer(template):
        plain = template[end : action.start()]
        plain = plain.lstrip() if trim else plain
        parts.append(plain.rstrip() if action["trim_left"] else plain)
        if action["field"] is not None:
            parts.append((action["field"], MISSING))
        elif action["comment"] is None:
            key = action["quoted"] if action["quoted"] is not None else action["raw"]
            parts.append((key, ""))
        end, trim = action.end(), action["trim_right"] is not None
    plain = template[end:]
    parts.append(plain.lstrip() if trim else plain)
    if any(isinstance(part, str) and "{{" in part for part in parts):
        return None
    return tuple(parts)


def subset(
    labels: Mapping[str, str], selector: Mapping[str, str], request: Mapping[str, str]
) -> bool:
    """Whether labels hold every pair of selector, whose values may refer to the request's labels.

    A key that labels lack reads as an empty value.
    """
    if len(labels) < len(selector):
        return False
    for key, wanted in selector.items():
        value = labels.get(key, "")
        if value != wanted and value != render(wanted, request):
            return False
    return True


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that may serve a request, and its share among the others."""

    endpoint: Endpoint
    weight: int = 1


def match_endpoints(
    service: Service, request: Mapping[str, str], endpoints: Sequence[Endpoint]
) -> tuple[Candidate, ...]:
    """The endpoints that service sends a request with these labels to (`wire.md` §7.2).

    A route's weight is the share of the route, divided among its endpoints: ten
    to one stays ten to one whichever side has more of them. Where no route of a
    match has a weight, all endpoints count alike. One that several routes name
    gets what each gives it. A service without matches is served by all alike; of a flat
    network's routers by those on the client's node, where there are any.
    """
    if not service.matches:
        near = [one for one in endpoints if routes_at(one, service.name, request)]
        return tuple(Candidate(one) for one in near or endpoints)
    for match in service.matches:
        if not subset(request, match.source_selector, request):
            continue
        found = _by_route(service.name, match, request, endpoints)
        if not any(found) and match.fallthrough:
            continue
        if not match.routes and match.metadata is not None:
            return tuple(Candidate(one) for one in endpoints)
        return _weighed(match, found)
    return ()


def _by_route(
    service: str, match: Match, request: Mapping[str, str], endpoints: Sequence[Endpoint]
) -> list[list[Endpoint]]:
    return [
        [one for one in endpoints if subset(one.labels.get(service, {}), route.selector, request)]
        for route in match.routes
    ]


def _weighed(match: Match, found: Sequence[Sequence[Endpoint]]) -> tuple[Candidate, ...]:
    said = any(route.weight for route in match.routes)
    whole = math.lcm(*(len(group) for group in found if group)) if said else 1
    weights: dict[str, int] = {}
    endpoints: dict[str, Endpoint] = {}
    for route, group in zip(match.routes, found, strict=True):
        for one in group:
            each = (route.weight or 1) * (whole // len(group)) if said else 1
            endpoints[one.name] = one
            weights[one.name] = weights.get(one.name, 0) + each
    return tuple(Candidate(one, weights[name]) for name, one in endpoints.items())


def match_forwarders(
    service: Service,
    request: Mapping[str, str],
    forwarders: Sequence[Endpoint],
    *,
    forwarder_service: str = "forwarder",
    prefer: str = "",
) -> tuple[Endpoint, ...]:
    """The forwarders that may carry a request to service, the one named prefer first (§7.3).

    A match says by its metadata which labels a forwarder must have, and where it
    says none, `p2p: "true"`.
    """
    found = tuple(_fit(service, request, forwarders, forwarder_service))
    return tuple(sorted(found, key=lambda one: one.name != prefer)) if prefer else found


def _fit(
    service: Service,
    request: Mapping[str, str],
    forwarders: Sequence[Endpoint],
    forwarder_service: str,
) -> Sequence[Endpoint]:
    if not service.matches:
        return forwarders
    for match in service.matches:
        if not subset(request, match.source_selector, request):
            continue
        needed = match.metadata or P2P  # on the wire empty labels cannot be told from none
        found = [
            one
            for one in forwarders
            if subset(one.labels.get(forwarder_service, {}), needed, request)
        ]
        if found or not match.fallthrough:
            return found
    return ()


class Turns:
    """Takes turns among candidates: smooth weighted round robin, one round per service.

    Three to one comes out as a a b a, not a a a b. What is remembered is one
    number per candidate of the services asked for last.
    """

    def __init__(self, services: int = 4096) -> None:
        self._bound = services
        self._standing: OrderedDict[str, dict[str, int]] = OrderedDict()

    def order(self, service: str, candidates: Sequence[Candidate]) -> tuple[Endpoint, ...]:
        """The candidates, the one whose turn it is first, the next to try behind it."""
        if not candidates:
            return ()
        before = self._standing.pop(service, {})
        now = {
            one.endpoint.name: before.get(one.endpoint.name, 0) + one.weight for one in candidates
        }
        ordered = sorted(candidates, key=lambda one: -now[one.endpoint.name])
        now[ordered[0].endpoint.name] -= sum(one.weight for one in candidates)
        self._standing[service] = now
        if len(self._standing) > self._bound:
            self._standing.popitem(last=False)
        return tuple(one.endpoint for one in ordered)

"""Endpoints on demand: which are started when somebody asks, and who starts them. Pure.

A service sends its clients to an endpoint on their own node; where none is, to that node's
supplier, which starts one and refuses with ABORTED: look again (`wire.md` §7.5).
"""

from collections.abc import Mapping

from nsm.domains import split
from nsm.model import Destination, Endpoint, Match, Service

ROLE = "vwire-role"
NODE, CLUSTER = "nodeName", "clusterName"
ROUTER, SUPPLIER = "router", "supplier"
CREATED = "cannot provide required networkservice: endpoint created as"  # upstream's words


def matches(service: str) -> tuple[Match, ...]:
    """Of a service whose routers run on demand: one on the client's node, else its supplier.

    Two clusters may have nodes of one name, so what several share goes by the cluster as well.
    """
    where = {"nodeName": "{{.nodeName}}"}
    if split(service)[1]:
        where["clusterName"] = "{{.clusterName}}"
    return (
        Match({}, (Destination({ROLE: ROUTER, **where}),), fallthrough=True),
        Match({}, (Destination({ROLE: SUPPLIER, **where}),)),
    )


def is_on_demand(service: Service) -> bool:
    """Whether a service's clients are sent to suppliers."""
    return any(
        route.selector.get(ROLE) == SUPPLIER for match in service.matches for route in match.routes
    )


def routes_at(endpoint: Endpoint, service: str, labels: Mapping[str, str]) -> bool:
    """Whether an endpoint is a router of service on the node where these labels are from."""
    own: Mapping[str, str] = endpoint.labels.get(service, {})
    if own.get(ROLE) != ROUTER or not labels.get(NODE):
        return False
    return all(own.get(key, "") == labels.get(key, "") for key in (NODE, CLUSTER))


def supplies(endpoint: Endpoint, service: str) -> bool:
    """Whether an endpoint is a supplier of service: no router of it, and no member's peer."""
    labels: Mapping[str, str] = endpoint.labels.get(service, {})
    return labels.get(ROLE) == SUPPLIER

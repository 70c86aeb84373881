"""The only translator between what travels (protobuf) and what we think in (`nsm.model`).

Fields we do not know are kept as bytes in a value's `unknown` and written back,
so that a hop of ours between two newer peers loses nothing. Messages that are no
value of their own here are kept by the value they are in: Timestamp and IpFamily
in its `unknown`, as long as it has the instant or the family at all, and
NetworkServiceLabels in `labels_unknown`. Queries and answers of a Find are no
values: what a newer peer adds there, beside the resource, is for its neighbour.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from nsm.model import (
    SECOND,
    Connection,
    Context,
    Destination,
    DNSConfig,
    DNSContext,
    Endpoint,
    EthernetContext,
    Event,
    EventType,
    ExtraPrefixRequest,
    Found,
    IPContext,
    Match,
    Mechanism,
    Neighbour,
    Path,
    PolicyRoute,
    Request,
    Route,
    Segment,
    Selector,
    Service,
    State,
)
from nsm.proto import connection_pb2, connectioncontext_pb2, networkservice_pb2, registry_pb2

P = TypeVar("P", bound=Message)
_WORDS, _LETTERS = 2048, 100  # so many words are kept, each so long at most
_FROM = "from"  # a field name, and a Python keyword


# ---- reading -------------------------------------------------------------------------

_known: dict[str, str] = {}


def _word(said: str) -> str:
    """said, as the same object each time: most words of a message are those of the one before,
    and whoever keeps a thousand messages would keep a thousand copies.

    Not `sys.intern`, because a Python may keep those for ever, and peers say what they like.
    """
    if (known := _known.get(said)) is not None:
        return known
    if len(said) <= _LETTERS:
        if len(_known) >= _WORDS:
            _known.clear()
        _known[said] = said
    return said


def _keyed(said: Mapping[str, str]) -> dict[str, str]:
    return {_word(key): value for key, value in said.items()}


def _labels(said: Mapping[str, str]) -> dict[str, str]:
    return {_word(key): _word(value) for key, value in said.items()}


def mechanism(m: connection_pb2.Mechanism) -> Mechanism:
    """Read a Mechanism."""
    return Mechanism(_word(m.cls), _word(m.type), _keyed(m.parameters), _unknown(m))


def segment(m: connection_pb2.PathSegment) -> Segment:
    """Read a PathSegment."""
    return Segment(
        _word(m.name),
        m.id,
        m.token,
        _instant(m, "expires"),
        _keyed(m.metrics),
        _unknown_in(m, "expires"),
    )


def connection(m: connection_pb2.Connection) -> Connection:
    """Read a Connection."""
    return Connection(
        id=m.id,
        service=_word(m.network_service),
        mechanism=mechanism(m.mechanism) if m.HasField("mechanism") else None,
        context=_context(m.context) if m.HasField("context") else None,
        labels=_labels(m.labels),
        path=(
            Path(tuple(map(segment, m.path.path_segments)), m.path.index, _unknown(m.path))
            if m.HasField("path")
            else None
        ),
        endpoint=_word(m.network_service_endpoint_name),
        payload=_word(m.payload),
        state=_enum(State, m.state),
        unknown=_unknown(m),
    )


def request(m: networkservice_pb2.NetworkServiceRequest) -> Request:
    """Read a NetworkServiceRequest."""
    return Request(
        connection(m.connection), tuple(map(mechanism, m.mechanism_preferences)), _unknown(m)
    )


def event(m: connection_pb2.ConnectionEvent) -> Event:
    """Read a ConnectionEvent."""
    held = {id_: connection(conn) for id_, conn in m.connections.items()}
    return Event(_enum(EventType, m.type), held, _unknown(m))


def selector(m: connection_pb2.MonitorScopeSelector) -> Selector:
    """Read a MonitorScopeSelector."""
    return Selector(tuple(map(segment, m.path_segments)), tuple(m.network_services), _unknown(m))


def service(m: registry_pb2.NetworkService) -> Service:
    """Read a NetworkService."""
    return Service(m.name, m.payload, tuple(map(_match, m.matches)), tuple(m.path_ids), _unknown(m))


def endpoint(m: registry_pb2.NetworkServiceEndpoint) -> Endpoint:
    """Read a NetworkServiceEndpoint."""
    return Endpoint(
        name=m.name,
        services=tuple(m.network_service_names),
        labels={name: dict(of.labels) for name, of in m.network_service_labels.items()},
        url=m.url,
        expires=_instant(m, "expiration_time"),
        registered=_instant(m, "initial_registration_time"),
        path_ids=tuple(m.path_ids),
        labels_unknown={
            name: rest for name, of in m.network_service_labels.items() if (rest := _unknown(of))
        },
        unknown=_unknown_in(m, "expiration_time", "initial_registration_time"),
    )


def found_service(m: registry_pb2.NetworkServiceResponse) -> Found[Service]:
    """Read a NetworkServiceResponse."""
    return Found(service(m.network_service), m.deleted)


def found_endpoint(m: registry_pb2.NetworkServiceEndpointResponse) -> Found[Endpoint]:
    """Read a NetworkServiceEndpointResponse."""
    return Found(endpoint(m.network_service_endpoint), m.deleted)


def _context(m: connectioncontext_pb2.ConnectionContext) -> Context:
    return Context(
        ip=_ip(m.ip_context) if m.HasField("ip_context") else None,
        dns=(
            DNSContext(tuple(map(_dns, m.dns_context.configs)), _unknown(m.dns_context))
            if m.HasField("dns_context")
            else None
        ),
        ethernet=_ethernet(m.ethernet_context) if m.HasField("ethernet_context") else None,
        extra=_keyed(m.extra_context),
        mtu=m.MTU,
        unknown=_unknown(m),
    )


def _ip(m: connectioncontext_pb2.IPContext) -> IPContext:
    return IPContext(
        src_ip_addrs=tuple(m.src_ip_addrs),
        dst_ip_addrs=tuple(m.dst_ip_addrs),
        src_ip_required=m.src_ip_required,
        dst_ip_required=m.dst_ip_required,
        src_routes=tuple(map(_route, m.src_routes)),
        dst_routes=tuple(map(_route, m.dst_routes)),
        excluded_prefixes=tuple(map(_word, m.excluded_prefixes)),
        neighbours=tuple(Neighbour(n.ip, n.hardware_address, _unknown(n)) for n in m.ip_neighbors),
        extra_prefix_requests=tuple(map(_extra, m.extra_prefix_request)),
        extra_prefixes=tuple(m.extra_prefixes),
        policies=tuple(map(_policy, m.policies)),
        unknown=_unknown(m),
    )


def _route(m: connectioncontext_pb2.Route) -> Route:
    return Route(m.prefix, m.nextHop, _unknown(m))


def _extra(m: connectioncontext_pb2.ExtraPrefixRequest) -> ExtraPrefixRequest:
    family = m.addr_family.family if m.HasField("addr_family") else None
    return ExtraPrefixRequest(
        family,
        m.prefix_len,
        m.required_number,
        m.requested_number,
        _unknown_in(m, "addr_family"),
    )


def _policy(m: connectioncontext_pb2.PolicyRoute) -> PolicyRoute:
    routes = tuple(map(_route, m.routes))
    return PolicyRoute(getattr(m, _FROM), m.proto, m.dst_port, m.src_port, routes, _unknown(m))


def _dns(m: connectioncontext_pb2.DNSConfig) -> DNSConfig:
    return DNSConfig(tuple(m.dns_server_ips), tuple(m.search_domains), _unknown(m))


def _ethernet(m: connectioncontext_pb2.EthernetContext) -> EthernetContext:
    return EthernetContext(m.src_mac, m.dst_mac, m.vlan_tag, _unknown(m))


def _match(m: registry_pb2.Match) -> Match:
    named = m.HasField("metadata")
    return Match(
        source_selector=dict(m.source_selector),
        routes=tuple(
            Destination(dict(d.destination_selector), d.weight, _unknown(d)) for d in m.routes
        ),
        fallthrough=m.fallthrough,
        metadata=dict(m.metadata.labels) if named else None,
        metadata_unknown=_unknown(m.metadata) if named else b"",
        unknown=_unknown(m),
    )


def _instant(m: Any, field: str) -> int | None:
    stamp: Timestamp = getattr(m, field)
    instant = stamp.seconds * SECOND + stamp.nanos
    return instant if instant or m.HasField(field) else None


def _enum(kind: Any, number: int) -> Any:
    try:
        return kind(number)
    except ValueError:
        return number  # of a newer protocol


def _unknown(m: Message) -> bytes:
    return _without_known(m) if len(UnknownFieldSet(m)) else b""


def _unknown_in(m: Message, *leaves: str) -> bytes:
    """What is unknown in m and in its leaves, which have no value of their own to keep it."""
    for leaf in leaves:
        if len(UnknownFieldSet(getattr(m, leaf))):
            return _without_known(m, leaves)
    return _unknown(m)


def _without_known(m: Message, leaves: Sequence[str] = ()) -> bytes:
    rest = type(m)()
    rest.CopyFrom(m)
    for field, value in rest.ListFields():
        if field.name in leaves and len(UnknownFieldSet(value)):
            for known, _ in value.ListFields():
                value.ClearField(known.name)
        else:
            rest.ClearField(field.name)
    return rest.SerializeToString()


# ---- writing -------------------------------------------------------------------------


@singledispatch
def to_pb(value: object) -> Any:
    """Write a value of nsm.model as its protobuf message."""
    raise TypeError(f"{type(value).__name__} does not travel")


@to_pb.register
def _(v: Mechanism) -> connection_pb2.Mechanism:
    m = connection_pb2.Mechanism(cls=v.cls, type=v.type, parameters=v.parameters)
    return _with(m, v.unknown)


@to_pb.register
def _(v: Segment) -> connection_pb2.PathSegment:
    m = connection_pb2.PathSegment(name=v.name, id=v.id, token=v.token, metrics=v.metrics)
    _stamp(m, "expires", v.expires)
    return _with(m, v.unknown, "expires")


@to_pb.register
def _(v: Path) -> connection_pb2.Path:
    m = connection_pb2.Path(index=v.index, path_segments=map(to_pb, v.segments))
    return _with(m, v.unknown)


@to_pb.register
def _(v: Connection) -> connection_pb2.Connection:
    m = connection_pb2.Connection(
        id=v.id,
        network_service=v.service,
        mechanism=_maybe(v.mechanism),
        context=_maybe(v.context),
        labels=v.labels,
        path=_maybe(v.path),
        network_service_endpoint_name=v.endpoint,
        payload=v.payload,
        state=int(v.state),  # type: ignore[arg-type] # an open enum: newer states pass through
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Request) -> networkservice_pb2.NetworkServiceRequest:
    m = networkservice_pb2.NetworkServiceRequest(
        connection=to_pb(v.connection), mechanism_preferences=map(to_pb, v.preferences)
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Event) -> connection_pb2.ConnectionEvent:
    m = connection_pb2.ConnectionEvent(
        type=int(v.type),  # type: ignore[arg-type] # an open enum
        connections={id_: to_pb(conn) for id_, conn in v.connections.items()},
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Selector) -> connection_pb2.MonitorScopeSelector:
    m = connection_pb2.MonitorScopeSelector(
        path_segments=map(to_pb, v.segments), network_services=v.services
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Context) -> connectioncontext_pb2.ConnectionContext:
    m = connectioncontext_pb2.ConnectionContext(
        ip_context=_maybe(v.ip),
        dns_context=_maybe(v.dns),
        ethernet_context=_maybe(v.ethernet),
        extra_context=v.extra,
        MTU=v.mtu,
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: IPContext) -> connectioncontext_pb2.IPContext:
    m = connectioncontext_pb2.IPContext(
        src_ip_addrs=v.src_ip_addrs,
        dst_ip_addrs=v.dst_ip_addrs,
        src_ip_required=v.src_ip_required,
        dst_ip_required=v.dst_ip_required,
        src_routes=map(to_pb, v.src_routes),
        dst_routes=map(to_pb, v.dst_routes),
        excluded_prefixes=v.excluded_prefixes,
        ip_neighbors=map(to_pb, v.neighbours),
        extra_prefix_request=map(to_pb, v.extra_prefix_requests),
        extra_prefixes=v.extra_prefixes,
        policies=map(to_pb, v.policies),
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Neighbour) -> connectioncontext_pb2.IpNeighbor:
    return _with(connectioncontext_pb2.IpNeighbor(ip=v.ip, hardware_address=v.mac), v.unknown)


@to_pb.register
def _(v: Route) -> connectioncontext_pb2.Route:
    return _with(connectioncontext_pb2.Route(prefix=v.prefix, nextHop=v.next_hop), v.unknown)


@to_pb.register
def _(v: ExtraPrefixRequest) -> connectioncontext_pb2.ExtraPrefixRequest:
    m = connectioncontext_pb2.ExtraPrefixRequest(
        prefix_len=v.prefix_len,
        required_number=v.required_number,
        requested_number=v.requested_number,
    )
    if v.family is not None:
        m.addr_family.SetInParent()
        m.addr_family.family = v.family  # type: ignore[assignment] # an open enum
    return _with(m, v.unknown, "addr_family")


@to_pb.register
def _(v: PolicyRoute) -> connectioncontext_pb2.PolicyRoute:
    m = connectioncontext_pb2.PolicyRoute(
        proto=v.proto, dst_port=v.dst_port, src_port=v.src_port, routes=map(to_pb, v.routes)
    )
    setattr(m, _FROM, v.from_)
    return _with(m, v.unknown)


@to_pb.register
def _(v: DNSContext) -> connectioncontext_pb2.DNSContext:
    return _with(connectioncontext_pb2.DNSContext(configs=map(to_pb, v.configs)), v.unknown)


@to_pb.register
def _(v: DNSConfig) -> connectioncontext_pb2.DNSConfig:
    m = connectioncontext_pb2.DNSConfig(dns_server_ips=v.servers, search_domains=v.search_domains)
    return _with(m, v.unknown)


@to_pb.register
def _(v: EthernetContext) -> connectioncontext_pb2.EthernetContext:
    m = connectioncontext_pb2.EthernetContext(
        src_mac=v.src_mac, dst_mac=v.dst_mac, vlan_tag=v.vlan_tag
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Service) -> registry_pb2.NetworkService:
    m = registry_pb2.NetworkService(
        name=v.name, payload=v.payload, matches=map(to_pb, v.matches), path_ids=v.path_ids
    )
    return _with(m, v.unknown)


@to_pb.register
def _(v: Match) -> registry_pb2.Match:
    m = registry_pb2.Match(
        source_selector=v.source_selector,
        routes=map(to_pb, v.routes),
        fallthrough=v.fallthrough,
    )
    if v.metadata is not None:
        m.metadata.SetInParent()
        m.metadata.labels.update(v.metadata)
        _with(m.metadata, v.metadata_unknown)
    return _with(m, v.unknown)


@to_pb.register
def _(v: Destination) -> registry_pb2.Destination:
    m = registry_pb2.Destination(destination_selector=v.selector, weight=v.weight)
    return _with(m, v.unknown)


@to_pb.register
def _(v: Endpoint) -> registry_pb2.NetworkServiceEndpoint:
    m = registry_pb2.NetworkServiceEndpoint(
        name=v.name,
        network_service_names=v.services,
        network_service_labels={
            name: registry_pb2.NetworkServiceLabels(labels=of) for name, of in v.labels.items()
        },
        url=v.url,
        path_ids=v.path_ids,
    )
    _stamp(m, "expiration_time", v.expires)
    _stamp(m, "initial_registration_time", v.registered)
    for name, rest in v.labels_unknown.items():
        if name in v.labels:
            _with(m.network_service_labels[name], rest)
    return _with(m, v.unknown, "expiration_time", "initial_registration_time")


def _maybe(value: object | None) -> Any:
    return None if value is None else to_pb(value)


def _stamp(m: Any, field: str, instant: int | None) -> None:
    if instant is not None:
        stamp = getattr(m, field)
        stamp.SetInParent()
        stamp.seconds, stamp.nanos = divmod(instant, SECOND)


def _with(m: P, unknown: bytes, *leaves: str) -> P:
    """m with unknown, but for what was in leaves that are not there any more."""
    if unknown:
        gone = [leaf for leaf in leaves if not m.HasField(leaf)]
        m.MergeFromString(unknown)
        for leaf in gone:
            m.ClearField(leaf)
    return m


# ---- either way ----------------------------------------------------------------------

_READERS: Mapping[str, Any] = {
    "connection.Mechanism": mechanism,
    "connection.PathSegment": segment,
    "connection.Connection": connection,
    "networkservice.NetworkServiceRequest": request,
    "connection.ConnectionEvent": event,
    "connection.MonitorScopeSelector": selector,
    "registry.NetworkService": service,
    "registry.NetworkServiceEndpoint": endpoint,
    "registry.NetworkServiceResponse": found_service,
    "registry.NetworkServiceEndpointResponse": found_endpoint,
}


def from_pb(message: Message) -> Any:
    """Read any message that has a value in nsm.model."""
    return _READERS[message.DESCRIPTOR.full_name](message)

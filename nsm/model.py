"""What travels through the mesh, as frozen values (`wire.md` §1).

src is the client's side and dst the endpoint's, everywhere. Instants are
nanoseconds since 1970 UTC, and None where the wire had none. `unknown` holds
the protobuf fields a newer peer sent and we do not know: `nsm.rpc.wire` writes
them back, so that passing through us loses nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Generic, TypeVar

T = TypeVar("T")
SECOND = 1_000_000_000  # nanoseconds


class State(IntEnum):
    """A connection's state as its monitor stream tells it (`wire.md` §8.3)."""

    UP = 0
    DOWN = 1
    REFRESH_REQUESTED = 2
    RESELECT_REQUESTED = 3


class EventType(IntEnum):
    """What an event of a monitor stream says (`wire.md` §8.1)."""

    INITIAL_STATE_TRANSFER = 0
    UPDATE = 1
    DELETE = 2


@dataclass(frozen=True, slots=True)
class Mechanism:
    """How two neighbours are joined: a type and its parameters (`wire.md` §2)."""

    cls: str = ""
    type: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    unknown: bytes = b""

    def get(self, key: str) -> str:
        """The parameter, or an empty string, as on the wire an absent one reads."""
        return self.parameters.get(key, "")

    def with_(self, **parameters: str) -> "Mechanism":
        """The same with these parameters set."""
        return replace(self, parameters={**self.parameters, **parameters})

    def without(self, *keys: str) -> "Mechanism":
        """The same with these parameters absent."""
        return replace(self, parameters={k: v for k, v in self.parameters.items() if k not in keys})


@dataclass(frozen=True, slots=True)
class Segment:
    """One hop of a path: who it is, what it calls the connection, until when it vouches."""

    name: str
    id: str
    token: str = field(default="", repr=False)  # never in a log
    expires: int | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Path:
    """The hops a connection crosses, and which of them is speaking."""

    segments: tuple[Segment, ...] = ()
    index: int = 0
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An address whose link-layer address is known beforehand."""

    ip: str
    mac: str
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Route:
    """A prefix, and the next hop towards it; `""` is on-link or the far end (`wire.md` §10.6)."""

    prefix: str
    next_hop: str = ""
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class ExtraPrefixRequest:
    """A wish for whole prefixes; `family` is 0 for IPv4, 1 for IPv6, None if absent."""

    family: int | None = None
    prefix_len: int = 0
    required_number: int = 0
    requested_number: int = 0
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class PolicyRoute:
    """Routes for some traffic only: by source, protocol number and ports (`wire.md` §10.5)."""

    from_: str = ""
    proto: str = ""
    dst_port: str = ""
    src_port: str = ""
    routes: tuple[Route, ...] = ()
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class IPContext:
    """Addresses (`a/len`), routes and neighbours of both ends of a connection."""

    src_ip_addrs: tuple[str, ...] = ()
    dst_ip_addrs: tuple[str, ...] = ()
    src_ip_required: bool = False
    dst_ip_required: bool = False
    src_routes: tuple[Route, ...] = ()
    dst_routes: tuple[Route, ...] = ()
    excluded_prefixes: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    extra_prefix_requests: tuple[ExtraPrefixRequest, ...] = ()
    extra_prefixes: tuple[str, ...] = ()
    policies: tuple[PolicyRoute, ...] = ()
    unknown: bytes = b""

    def without(self, old: "IPContext") -> "IPContext":
        """What of this another endpoint has not said."""
        return replace(
            self,
            src_ip_addrs=tuple(one for one in self.src_ip_addrs if one not in old.src_ip_addrs),
            dst_ip_addrs=tuple(one for one in self.dst_ip_addrs if one not in old.dst_ip_addrs),
            src_routes=tuple(one for one in self.src_routes if one not in old.src_routes),
            dst_routes=tuple(one for one in self.dst_routes if one not in old.dst_routes),
            policies=tuple(one for one in self.policies if one not in old.policies),
        )


@dataclass(frozen=True, slots=True)
class DNSConfig:
    """Servers, and the domains they are to be asked for."""

    servers: tuple[str, ...] = ()
    search_domains: tuple[str, ...] = ()
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class DNSContext:
    """What the far end says about names."""

    configs: tuple[DNSConfig, ...] = ()
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class EthernetContext:
    """MAC addresses of both ends, and a VLAN tag."""

    src_mac: str = ""
    dst_mac: str = ""
    vlan_tag: int = 0
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Context:
    """What the two ends agreed on: addresses, names, MTU (0: not said)."""

    ip: IPContext | None = None
    dns: DNSContext | None = None
    ethernet: EthernetContext | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    mtu: int = 0
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Connection:
    """A client's use of a network service, as far as this hop knows it."""

    id: str = ""
    service: str = ""
    mechanism: Mechanism | None = None
    context: Context | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    path: Path | None = None
    endpoint: str = ""
    payload: str = ""
    state: State | int = State.UP  # a plain int: a state of a newer protocol
    unknown: bytes = b""

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The path's segments; none where the wire had no path."""
        return self.path.segments if self.path else ()

    @property
    def index(self) -> int:
        """The path's index; 0 where the wire had no path."""
        return self.path.index if self.path else 0

    @property
    def ip(self) -> IPContext:
        """The IP context; an empty one where the wire had none."""
        return (self.context and self.context.ip) or IPContext()


@dataclass(frozen=True, slots=True)
class Request:
    """A NetworkServiceRequest: a connection, and the mechanisms its sender could use."""

    connection: Connection
    preferences: tuple[Mechanism, ...] = ()
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Event:
    """One message of a monitor stream; connections by the sender's own id."""

    type: EventType | int
    connections: Mapping[str, Connection]
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Selector:
    """Which connections a monitor stream is about (`wire.md` §8.1)."""

    segments: tuple[Segment, ...] = ()
    services: tuple[str, ...] = ()
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Destination:
    """Endpoints by label, and how often to take them relative to others (0 reads as 1)."""

    selector: Mapping[str, str] = field(default_factory=dict)
    weight: int = 0
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Match:
    """A rule of a service: requests with these labels go to these destinations (`wire.md` §7.2).

    `metadata` is None where the wire had none: that differs from empty (§7.3).
    """

    source_selector: Mapping[str, str] = field(default_factory=dict)
    routes: tuple[Destination, ...] = ()
    fallthrough: bool = False
    metadata: Mapping[str, str] | None = None
    metadata_unknown: bytes = b""
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Service:
    """A NetworkService as the registry holds it."""

    name: str = ""
    payload: str = ""
    matches: tuple[Match, ...] = ()
    path_ids: tuple[str, ...] = ()
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A NetworkServiceEndpoint as the registry holds it; labels by service name."""

    name: str = ""
    services: tuple[str, ...] = ()
    labels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    url: str = ""
    expires: int | None = None
    registered: int | None = None  # initial_registration_time
    path_ids: tuple[str, ...] = ()
    labels_unknown: Mapping[str, bytes] = field(default_factory=dict)  # by service name
    unknown: bytes = b""


@dataclass(frozen=True, slots=True)
class Found(Generic[T]):
    """One response of a Find stream."""

    item: T
    deleted: bool = False

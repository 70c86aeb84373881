"""What the forwarder knows of one connection: what stands, who asks, and who is asked. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from nsm import path
from nsm.kernel.state import Interface, LocalWire, Namespace, Wire
from nsm.model import Connection, Context, IPContext, Mechanism

Ways = Mapping[Namespace, int | None]
"""Descriptors that lead into namespaces, borrowed; None where there is none."""


@dataclass(frozen=True, slots=True)
class Crossing:
    """What is remembered of a connection: where it goes, by what, and what stands in the kernel.

    wire is where its devices are and by what tunnel; what they are configured with is not read
    from here (`slim`). Of what an earlier life made it is None until it is asked for again, and
    seats are the namespaces its ends were in; url is then empty if it was a socket.

    leg tells the wires of one connection apart, "" is its first. left is the endpoint it has
    left last: who did not hear of that may still name it.
    """

    endpoint: str
    payload: str
    url: str
    outgoing: Mechanism
    wire: Wire | None
    chosen: bool = False  # by the service's rules, and not by who asks
    seats: tuple[Namespace, ...] = ()
    leg: str = ""
    left: str = ""

    @property
    def namespaces(self) -> tuple[Namespace, ...]:
        """Where the wire's ends are that are on this node."""
        if self.wire is None:
            return self.seats
        return tuple(interface.namespace for _, interface in self.wire.sides)

    def serves(self, endpoint: str) -> bool:
        """Whether a request that names that endpoint means this, as it is."""
        return endpoint in ("", self.endpoint) or (self.chosen and endpoint == self.left)


@dataclass(frozen=True, slots=True)
class Near:
    """The client's side as this request has it; namespace is None where it is another node's."""

    mechanism: Mechanism
    namespace: Namespace | None


@dataclass(frozen=True, slots=True)
class Target:
    """An endpoint to try: by name, at a URL.

    known is what this connection has there already; stands, that it has something
    there, be it from before a restart: what fails now must not close that. old is what it
    has at another endpoint, which carries packets until this one does (`forwarder.joining`).
    """

    endpoint: str
    payload: str
    url: str
    known: Crossing | None
    stands: bool
    chosen: bool = False
    leg: str = ""
    old: Crossing | None = None
    addresses: IPContext = IPContext()  # noqa: RUF009 - frozen
    """What the old endpoint said of addresses and routes."""


def anew(conn: Connection, before: IPContext) -> Connection:
    """The connection as another endpoint is asked for it: without the way to the old one, and
    what that one said of routes. The addresses stay if the new one can have them."""
    said = replace(before, src_ip_addrs=(), dst_ip_addrs=())
    return replace(
        path.end(conn),
        endpoint="",
        context=replace(conn.context or Context(), ip=conn.ip.without(said)),
    )


def with_context(conn: Connection) -> Connection:
    """The connection with both contexts there: some endpoints take that as given."""
    context = conn.context or Context()
    return replace(conn, context=replace(context, ip=context.ip or IPContext()))


def ways(entries: Ways) -> Mapping[Namespace, int]:
    """Those that are there."""
    return {space: fd for space, fd in entries.items() if fd is not None}


def slim(wire: Wire) -> Wire:
    """wire without its addresses, routes and neighbours: kilobytes, for as long as it stands."""

    def bare(side: Interface) -> Interface:
        return replace(side, addresses=(), routes=(), neighbours=(), policies=())

    if isinstance(wire, LocalWire):
        return replace(wire, src=bare(wire.src), dst=bare(wire.dst))
    return replace(wire, end=bare(wire.end))

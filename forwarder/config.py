"""The forwarder's settings: upstream's variables and defaults (`wire.md` §11.3)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from nsm.limits import Bounds
from nsm.process.config import Common, Count, Port, PositiveDuration, Url


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """forwarder: finds endpoints and joins them with workloads, in the kernel of its node."""

    name: str = "forwarder"
    """This forwarder's name on paths and in the registry. Unique in the domain."""

    labels: Mapping[str, str] = field(default_factory=lambda: {"p2p": "true"})
    """What this forwarder can do; a service's matches choose forwarders by it."""

    nsname: str = "forwarder"
    """The service for which forwarders register."""

    connect_to: Url = "unix:///connect.to.socket"
    """The node's manager."""

    listen_on: Url = "unix:///listen.on.socket"
    """Where the manager reaches this forwarder: a unix socket, or its name in a directory."""

    store: str = ""
    """A file that keeps, over a restart, what of its connections the kernel does not hold: with it
    a wire that dies, is closed or expires before anybody has refreshed it is told of as ever.
    Empty keeps it in memory only."""

    dial_timeout: PositiveDuration = 0.75
    """How long connecting to an endpoint or to another node's manager may take."""

    max_token_lifetime: PositiveDuration = 600.0
    """How long a token of ours holds at most."""

    tunnel_ip: str = ""
    """This node's end of tunnels; empty is the address of the device of the default route."""

    vxlan_port: Port = 0
    """The UDP port of VXLAN tunnels. 0 is 4789, or where another program has that, a free one
    of 4790 to 4805, which both nodes then use."""

    wireguard: Literal["auto", "kernel", "userspace"] = "auto"
    """Whose WireGuard carries payload IP between nodes: the kernel's, or the program
    wireguard-go's, a process for each wire. auto is the kernel's where it has it."""

    wireguard_port: Port = 0
    """The first UDP port of WireGuard tunnels, one for each wire from there upwards; 0 is 51820."""

    isolation: Literal["auto", "in-place", "hop"] = "auto"
    """Where tunnels stand: in-place is in the workload's namespace, hop is in this one, with a
    device on top of it in the workload's. auto is hop for whoever could misuse a tunnel: where a
    process with CAP_NET_ADMIN is in the namespace, as far as /proc shows, or a user namespace owns
    it. It looks when a wire is made, not who comes later: where an init container makes the wire
    before the application is there, say hop. What stands stays as it is, also where this is
    changed; only the kernel's own encrypted tunnel in a workload is placed anew after a restart."""

    probe: bool = True
    """Whether a wire is tried when it is made: with one round trip of ICMP echoes from the client's
    namespace to the endpoint's addresses, and between nodes also in packets of the agreed MTU. One
    that is seen to carry nothing is refused, and the next candidate tried; an endpoint that does
    not answer echoes takes up to a second, and is taken."""

    mechanism_priority: tuple[str, ...] = ()
    """Mechanisms to prefer where several are possible, best first. Each payload has one mechanism
    between nodes so far, so there is nothing to prefer yet."""

    max_requests: Count = Bounds().at_once
    """Requests worked on at once, at most a quarter of them of one client; more wait their turn."""

    max_requests_per_client: Count = Bounds().in_all
    """Requests of one client that are here at once, those that wait included; more are refused."""

    spiffe_endpoint_socket: Url = field(
        default="unix:///run/spire/sockets/agent.sock",
        metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"},
    )
    """The SPIFFE Workload API that this process has its certificate from."""

    @property
    def bounds(self) -> Bounds:
        """How many requests may be here."""
        return Bounds(self.max_requests, self.max_requests_per_client)

"""The manager's settings: upstream's variables and defaults (`wire.md` §11.3), and two of ours."""

from dataclasses import dataclass, field

from nsm.limits import Bounds
from nsm.process.config import Common, Count, PositiveDuration, Url


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """nsmgr: the node's door. Takes requests and passes each to one of the node's forwarders."""

    name: str = "nmgr"
    """This manager's name on paths. Unique in the domain: two neighbours of one name merge."""

    listen_on: tuple[Url, ...] = ("unix:///var/lib/networkservicemesh/nsm.io.sock",)
    """Where to listen. The first tcp:// is what the registry tells other nodes."""

    registry_url: str = "tcp://localhost:5001"
    """The domain's registry; empty keeps one in memory, for this node alone."""

    dial_timeout: PositiveDuration = 0.75
    """How long connecting to a forwarder may take."""

    forwarder_network_service_name: str = "forwarder"
    """The service for which forwarders register."""

    max_token_lifetime: PositiveDuration = 600.0
    """How long a token of ours holds at most."""

    store: str = ""
    """A file that keeps over a restart which wires there are, for clients that are restarted
    meanwhile, and who was registered: who died meanwhile is unregistered. Empty keeps it in
    memory only."""

    excluded_prefixes_path: str = "/var/lib/networkservicemesh/config/excluded_prefixes.yaml"
    """A YAML file `prefixes: [...]` of addresses no wire may use. Read again when it changes."""

    observers: tuple[str, ...] = ()
    """SPIFFE ids that may see every connection of this node, for `nsmctl connections`."""

    max_requests: Count = Bounds().at_once
    """Requests worked on at once, at most a quarter of them of one client; more wait their turn."""

    max_requests_per_client: Count = Bounds().in_all
    """Requests of one client that are here at once, those that wait included; more are refused."""

    spiffe_endpoint_socket: Url = field(
        default="unix:///run/spire/sockets/agent.sock",
        metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"},
    )
    """The SPIFFE Workload API that this process has its certificate from."""

    pod_name: str = field(default="", metadata={"variable": "POD_NAME"})
    """Becomes the label podName of requests and registrations that have none."""

    node_name: str = field(default="", metadata={"variable": "NODE_NAME"})
    """Becomes the label nodeName of requests and registrations that have none."""

    cluster_name: str = field(default="", metadata={"variable": "CLUSTER_NAME"})
    """Becomes the label clusterName of requests and registrations that have none."""

    @property
    def labels(self) -> dict[str, str]:
        """What this node adds to labels, where it was told (`wire.md` §3.5)."""
        told = {
            "podName": self.pod_name,
            "nodeName": self.node_name,
            "clusterName": self.cluster_name,
        }
        return {key: value for key, value in told.items() if value}

    @property
    def bounds(self) -> Bounds:
        """How many requests may be here."""
        return Bounds(self.max_requests, self.max_requests_per_client)

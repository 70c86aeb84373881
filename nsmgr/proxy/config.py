"""The proxy's settings: upstream's variables and defaults (`wire.md` §11.3), and three of ours."""

from dataclasses import dataclass, field

from nsm.limits import Bounds
from nsm.process.config import Common, Count, PositiveDuration, Url


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """nsmgr-proxy: a domain's door. Requests to other domains leave by it, theirs come in."""

    name: str = "nsmgr-proxy"
    """This proxy's name on paths. No two domains' should be the same: neighbours would merge."""

    listen_on: tuple[Url, ...] = ("unix:///listen.on.socket",)
    """Where to listen; in a cluster tcp://:5004. The first tcp:// is told to others."""

    registry_url: str = "tcp://registry:5002"
    """This domain's registry: who is asked for what other domains want here."""

    registry_proxy_url: str = "tcp://registry-proxy:5005"
    """Who knows where other domains are: every question for name@domain goes there."""

    dial_timeout: PositiveDuration = 0.75
    """How long connecting to another domain's proxy, or to a manager, may take."""

    max_token_lifetime: PositiveDuration = 600.0
    """How long a token of ours holds at most."""

    map_ip_file_path: str = "map-ip.yaml"
    """A YAML file `inner: outer` of addresses by which other domains reach this one's nodes.

    Read again when it changes. Where it does not exist, each address is its own.
    """

    cluster_info_path: str = "/etc/clusterinfo/config.yaml"
    """A YAML file `label: value` of what is added to labels here. Read again when it changes."""

    observers: tuple[str, ...] = ()
    """SPIFFE ids that may see every connection that passes, for `nsmctl connections`."""

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

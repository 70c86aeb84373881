"""The registry proxy's settings: upstream's variables (`wire.md` §11.3), and where domains are."""

from dataclasses import dataclass, field

from nsm.offers import Limits
from nsm.process.config import Common, Count, DnsServer, PositiveDuration, Url
from registry.config import POLICIES, named_policies


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """registry-proxy: knows where other domains are, and asks their registries."""

    name: str = "registry-proxy"
    """What this process calls itself in its log."""

    listen_on: tuple[Url, ...] = ("unix:///listen.on.socket",)
    """Where to listen; in a cluster tcp://:5005."""

    domains_path: str = ""
    """A YAML file of domains, `cluster2: {registry: [tcp://HOST:PORT], nsmgr-proxy: [...]}`.

    Read again when it changes. A domain that it lists is not looked for in DNS; one
    without nsmgr-proxy is floating: its endpoints' own URLs hold.
    """

    dns_servers: tuple[DnsServer, ...] = ()
    """Who is asked where other domains are; empty: the servers of /etc/resolv.conf."""

    dial_timeout: PositiveDuration = 0.75
    """How long one address of another domain's registry may take to answer a dial."""

    registry_server_policies: tuple[str, ...] = POLICIES
    """Which built-in policies Register and Unregister must pass, as the registry has it."""

    max_token_lifetime: PositiveDuration = 600.0
    """How long a token of ours holds at most."""

    max_watchers: Count = Limits().watchers
    """Watch streams open at once."""

    max_watchers_per_id: Count = Limits().watchers_per_id
    """Watch streams one SPIFFE id may have open."""

    max_record: Count = 64 * 1024
    """Bytes of one endpoint or network service as it travels."""

    max_answer: Count = 16 * 1024 * 1024
    """Bytes of all that another domain's registry may answer to one Find."""

    spiffe_endpoint_socket: Url = field(
        default="unix:///run/spire/sockets/agent.sock",
        metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"},
    )
    """The SPIFFE Workload API that this process has its certificate from."""

    @property
    def policies(self) -> frozenset[str]:
        """The built-in policies that the masks name."""
        return named_policies(self.registry_server_policies)

    def __post_init__(self) -> None:
        """Refuse masks that are no patterns, at the start rather than at the first call."""
        named_policies(self.registry_server_policies)

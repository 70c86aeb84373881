"""The registry's settings: upstream's variables (`wire.md` §11.3), and how much it may hold."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from nsm.errors import InvalidError
from nsm.limits import Bounds
from nsm.offers import Limits
from nsm.process.config import Common, Count, PositiveDuration, Url
from nsm.registration import SERVER_POLICIES

POLICIES = (
    "etc/nsm/opa/common/.*.rego",
    "etc/nsm/opa/registry/.*.rego",
    "etc/nsm/opa/server/.*.rego",
)


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """registry: who offers what in a domain; find, watch, expiry."""

    name: str = "registry"
    """What this process calls itself in its log."""

    listen_on: tuple[Url, ...] = ("unix:///listen.on.socket",)
    """Where to listen; in a cluster tcp://:5002."""

    store: str = ""
    """A file that keeps registrations over a restart; empty keeps them in memory only."""

    expire_period: PositiveDuration = 60.0
    """How long an endpoint holds without a refresh, at most; and the grace after a restart."""

    proxy_registry_url: Url = ""
    """Who is asked about names of other domains (name@domain): this domain's nsmgr-proxy.

    Not set: such names are refused.
    """

    register_strangers: bool = False
    """Whether identities of other trust domains may register here, though there is a proxy.

    A registry without one is a floating domain's, where they may.
    """

    registry_server_policies: tuple[str, ...] = POLICIES
    """Which built-in policies Register and Unregister must pass, as masks of upstream's file names.

    Files are not read. A mask that names no policy gives none: with it alone, anybody
    registers anything.
    """

    max_token_lifetime: PositiveDuration = 600.0
    """How long a token of ours holds at most."""

    max_writes: Count = Bounds().at_once
    """Registrations worked on at once, at most a quarter of them of one client; more wait."""

    max_writes_per_client: Count = Bounds().in_all
    """Registrations of one client that are here at once, those that wait included; more are
    refused."""

    max_per_owner: Count = Limits().per_owner
    """Names one SPIFFE id may hold."""

    max_names: Count = Limits().total
    """Names held altogether."""

    max_watchers: Count = Limits().watchers
    """Watch streams open at once."""

    max_watchers_per_id: Count = Limits().watchers_per_id
    """Watch streams one SPIFFE id may have open; a manager has one per endpoint of its node."""

    max_labels: Count = Limits().labels
    """Labels an endpoint may have for one service."""

    max_services: Count = Limits().services
    """Services an endpoint may offer."""

    max_record: Count = 64 * 1024
    """Bytes of one endpoint or network service as it travels."""

    max_behind: Count = 1024
    """Names a watcher may be behind before its stream ends, unless there is room for more."""

    spiffe_endpoint_socket: Url = field(
        default="unix:///run/spire/sockets/agent.sock",
        metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"},
    )
    """The SPIFFE Workload API that this process has its certificate from."""

    @property
    def limits(self) -> Limits:
        """How much may be offered."""
        return Limits(
            services=self.max_services,
            labels=self.max_labels,
            per_owner=self.max_per_owner,
            total=self.max_names,
            watchers=self.max_watchers,
            watchers_per_id=self.max_watchers_per_id,
        )

    @property
    def bounds(self) -> Bounds:
        """How many registrations may be under way."""
        return Bounds(self.max_writes, self.max_writes_per_client)

    @property
    def policies(self) -> frozenset[str]:
        """The built-in policies that the masks name."""
        return named_policies(self.registry_server_policies)

    def __post_init__(self) -> None:
        """Refuse masks that are no patterns, at the start rather than at the first call."""
        named_policies(self.registry_server_policies)


def named_policies(masks: Sequence[str]) -> frozenset[str]:
    """The built-in policies that masks name; raises InvalidError for one that is no pattern."""
    for mask in masks:
        try:
            re.compile(mask)
        except re.error as error:
            raise InvalidError(
                f"NSM_REGISTRY_SERVER_POLICIES has {mask!r}, which is no pattern: {error}"
            ) from error
    return frozenset(
        policy
        for policy in SERVER_POLICIES
        if any(re.fullmatch(mask, f"etc/nsm/opa/{policy}.rego") for mask in masks)
    )

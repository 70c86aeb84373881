"""The address plan's settings: upstream's variables (`wire.md` §11.3), and what is ours."""

from dataclasses import dataclass, field
from typing import Annotated

from endpoints.ipam.plan import DEFAULT, Pool, pool
from nsm.errors import InvalidError
from nsm.process.config import Common, Form, PositiveDuration, Url
from nsm.process.forms import integer

Length = Annotated[int, Form(integer(0, 128), "a prefix length; 0 chooses one")]


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """ipam: a vL3 domain's address plan. Lends prefixes to the domain's routers."""

    name: str = "ipam"
    """What this process calls itself in its log."""

    listen_on: tuple[Url, ...] = ("unix:///listen.on.socket",)
    """Where to listen; in a cluster tcp://:5006."""

    prefix: tuple[str, ...] = ()
    """Prefixes of the pool for routers that name none, as upstream's do. Empty: there is none."""

    client_prefix_len: Length = 0
    """Length of what that pool lends of IPv4; upstream's is 24."""

    client_prefix_len_ipv6: Length = 0
    """Length of what that pool lends of IPv6; upstream's labs have 112."""

    store: str = ""
    """A file that keeps pools and leases over a restart; empty keeps them in memory only."""

    lease: PositiveDuration = 600.0
    """How long a prefix stays its router's after the router's stream ended."""

    operators: tuple[str, ...] = ()
    """SPIFFE ids that may make, list and delete pools, for `nsmctl vl3`."""

    spiffe_endpoint_socket: Url = field(
        default="unix:///run/spire/sockets/agent.sock",
        metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"},
    )
    """The SPIFFE Workload API that this process has its certificate from."""

    @property
    def pool(self) -> Pool | None:
        """The pool of routers that name none."""
        if not self.prefix:
            return None
        return pool(
            DEFAULT, self.prefix, ipv4=self.client_prefix_len, ipv6=self.client_prefix_len_ipv6
        )

    def __post_init__(self) -> None:
        """Refuse what is no pool at the start rather than at the first router."""
        try:
            _ = self.pool
        except InvalidError as wrong:
            raise InvalidError(f"NSM_PREFIX: {wrong.message}", hint=wrong.hint) from None

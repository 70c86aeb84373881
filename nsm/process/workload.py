"""`nsm.connect` and `nsm.Endpoint`: clients and endpoints as their environment has them.

A pod, a unit or a lab tells its processes by variables who they are and where
the node's manager is. Whoever says it in the code instead needs no variable.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from nsm import client, endpoint
from nsm.errors import NsmError
from nsm.identity.source import Source
from nsm.identity.workload import workload_source
from nsm.liveness import Rhythm
from nsm.nsurl import NSURL
from nsm.process import losses
from nsm.process.config import Common, PositiveDuration, Url, parse

MANAGER = "unix:///var/lib/networkservicemesh/nsm.io.sock"
AGENT = "unix:///run/spire/sockets/agent.sock"


@dataclass(frozen=True, kw_only=True)
class Surroundings(Common):
    """What every client and endpoint can be told."""

    connect_to: Url = MANAGER
    """The manager of this node."""

    dial_timeout: PositiveDuration = client.DIAL_TIMEOUT
    """How long connecting to the manager may take."""

    request_timeout: PositiveDuration = client.REQUEST_TIMEOUT
    """How long one try to get or refresh a wire may take."""

    max_token_lifetime: PositiveDuration = 600.0
    """How long a token of ours holds at most; a wire ends that long after its last refresh."""

    spiffe_endpoint_socket: Url = field(
        default=AGENT, metadata={"variable": "SPIFFE_ENDPOINT_SOCKET"}
    )
    """The SPIFFE Workload API that this process has its certificate from."""

    pod_name: str = field(default="", metadata={"variable": "POD_NAME"})
    """Becomes the label podName, unless that is given."""

    node_name: str = field(default="", metadata={"variable": "NODE_NAME"})
    """Becomes the label nodeName, unless that is given."""

    cluster_name: str = field(default="", metadata={"variable": "CLUSTER_NAME"})
    """Becomes the label clusterName, unless that is given."""

    @property
    def told(self) -> dict[str, str]:
        """Labels that say where we are (`wire.md` §3.5)."""
        named = {
            "podName": self.pod_name,
            "nodeName": self.node_name,
            "clusterName": self.cluster_name,
        }
        return {key: value for key, value in named.items() if value}

    @property
    def lifetime(self) -> int:
        """Of tokens, in nanoseconds."""
        return round(self.max_token_lifetime * 1e9)

    def identity(self, patience: float = 5.0) -> AbstractAsyncContextManager[Source]:
        """Our certificate, from the Workload API, for as long as the block lasts.

        patience: how many seconds the first may take to come.
        """
        return workload_source(self.spiffe_endpoint_socket, patience=patience)


@dataclass(frozen=True, kw_only=True)
class Asking(Surroundings):
    """What everybody can be told who asks for wires."""

    liveness_check_enabled: bool = True
    """Whether pings go through each wire, to know that packets flow. Off: only the mesh says so."""

    liveness_check_interval: PositiveDuration = 0.2
    """How often each address of the far end is asked; four times as often where there is doubt."""

    liveness_check_timeout: PositiveDuration = 1.0
    """Within how long of its end a wire is known to be dead and led elsewhere; later where the
    interval is more than a fifth of it. An end that never answered is never called dead."""

    outage_log: str = ""
    """A file that gets a line of JSON for each loss of a wire, at its end. It is bounded: full, it
    becomes the one with .1 behind its name. Empty: none."""

    @property
    def liveness(self) -> Rhythm | None:
        """Of pings through wires; None: none are sent."""
        if not self.liveness_check_enabled:
            return None
        return Rhythm(self.liveness_check_interval, self.liveness_check_timeout)


@asynccontextmanager
async def connect(
    url: str | NSURL,
    *,
    name: str = "",
    manager: str = "",
    source: Source | None = None,
    labels: Mapping[str, str] | None = None,
    patience: float = 0.0,
    on_change: client.OnChange = lambda *_: None,
    outage_log: str | None = None,
) -> AsyncIterator[client.Wire]:
    """Hold a wire to a network service for as long as the block lasts.

        async with nsm.connect("kernel://icmp-responder/nsm-1") as wire:
            print(wire.interface, *wire.addresses)

    What is not given comes from NSM_NAME, NSM_CONNECT_TO, NSM_OUTAGE_LOG and
    SPIFFE_ENDPOINT_SOCKET. patience: for how many seconds a refusal that may
    pass is tried again. Raises NsmError. Several wires: `nsm.Client`.
    """
    around = parse(Asking)
    async with losses.noted(around.outage_log if outage_log is None else outage_log) as note:

        def changed(what: client.Change, wire: client.Wire, error: NsmError | None) -> None:
            note(what, wire)
            on_change(what, wire, error)

        settings = client.Settings(
            dial_timeout=around.dial_timeout,
            request_timeout=around.request_timeout,
            lifetime=around.lifetime,
            labels={**around.told, **(labels or {})},
            liveness=around.liveness,
            on_change=changed,
        )
        async with (
            client.Client(
                name or around.name or "nsc",
                source=nullcontext(source) if source else around.identity(),
                manager=manager or around.connect_to,
                settings=settings,
            ) as asking,
            asking.connect(url, patience=patience) as wire,
        ):
            yield wire


class Endpoint(endpoint.Endpoint):
    """Serve network services for as long as the block lasts.

        async with nsm.Endpoint("echo-1", ["echo"], prefixes=[["10.9.0.0/24"]]):
            await asyncio.Event().wait()

    The identity and the manager come from SPIFFE_ENDPOINT_SOCKET and
    NSM_CONNECT_TO where they are not given; all else is in
    `nsm.endpoint.Endpoint`.
    """

    def __init__(
        self,
        name: str,
        services: Sequence[str],
        *,
        source: Source | AbstractAsyncContextManager[Source] | None = None,
        manager: str | None = None,
        labels: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        around = parse(Surroundings)
        super().__init__(
            name,
            services,
            source=source or around.identity(),
            manager=around.connect_to if manager is None else manager,
            labels={**around.told, **(labels or {})},
            **options,
        )

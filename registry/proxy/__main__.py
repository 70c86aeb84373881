"""The registry proxy's process: `python -P -m registry.proxy`. It keeps nothing."""

import sys

import structlog

from nsm.domains import show_server
from nsm.identity.workload import workload_source
from nsm.model import SECOND
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.run import Process, run
from nsm.registrar import Watchers
from nsm.registration import SERVER_POLICIES
from nsm.resolve import open_domains
from nsm.rpc.health import Health
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.registry_services import HEALTHY, handlers
from nsm.rpc.server import serve
from registry.proxy.config import Config
from registry.proxy.forwarding import Forwarding

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate
log = structlog.get_logger(__name__)


def main() -> int:
    """Run the proxy until it is told to stop; its exit code."""
    return run("registry-proxy", read(Config), proxy)


async def proxy(config: Config, process: Process) -> None:
    """Find domains and ask their registries."""
    lifetime = int(config.max_token_lifetime * SECOND)
    if missing := SERVER_POLICIES - config.policies:
        log.warning("policies are off for Register and Unregister", policies=sorted(missing))
    async with (
        open_domains(config.domains_path, config.dns_servers) as domains,
        workload_source(config.spiffe_endpoint_socket, patience=IDENTITY_PATIENCE) as source,
        Peers(source, dial_timeout=config.dial_timeout) as peers,
    ):

        def registry_at(url: str) -> RegistryClient:
            return RegistryClient(
                peers,
                url,
                lifetime=lifetime,
                dial_timeout=config.dial_timeout,
                most_bytes=config.max_answer,
            )

        async def reach(url: str) -> None:
            async with peers.link(url):
                pass

        watchers = Watchers(config.max_watchers, config.max_watchers_per_id)
        services = handlers(
            Forwarding(domains, registry_at, reach, watchers),
            lifetime=lifetime,
            policies=config.policies,
            record_bytes=config.max_record,
        )
        async with serve(
            config.listen_on, [*services, Health(*HEALTHY)], source, on_call=log_call
        ) as server:
            process.ready(
                server.urls,
                id=str(source.identity.svid.id),
                domains=config.domains_path or "no file",
                dns=", ".join(map(show_server, config.dns_servers)) or "as in /etc/resolv.conf",
            )
            await process.stopped()


if __name__ == "__main__":
    sys.exit(main())

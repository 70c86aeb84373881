"""Start a responder: `python -P -m endpoints.responder`."""

import sys

from endpoints.responder import origin  # noqa: F401 - first, because what stands in for `nsm` would be run

# isort: split
import structlog

from endpoints.responder.config import Config
from endpoints.responder.policies import PolicyFile
from nsm.endpoint import Endpoint
from nsm.limits import Bounds
from nsm.process.calls import log_call
from nsm.process.config import read
from nsm.process.metrics import carried, figures
from nsm.process.run import Process, run
from nsm.race import unless

IDENTITY_PATIENCE = 30.0  # seconds for the first certificate

log = structlog.get_logger(__name__)


async def serve(config: Config, process: Process) -> None:
    """Be an endpoint until the process is asked to stop, or idle for too long."""
    policies = PolicyFile(config.pbr_config_path)
    await policies.load()
    async with Endpoint(
        config.name,
        config.service_names,
        source=config.identity(IDENTITY_PATIENCE),
        manager=config.connect_to,
        prefixes=config.cidr_prefix,
        strict=config.ipam_policy == "strict",
        labels={**config.told, **config.labels},
        payload=config.payload,
        dns=config.dns_configs,
        policies=policies,
        listen=config.listen_on,
        register_service=config.register_service,
        unregister=config.unregister_itself,
        lifetime=config.lifetime,
        bounds=Bounds(config.max_requests, config.max_requests_per_client),
        on_call=log_call,
    ) as endpoint:
        figures.shows("wires", lambda: carried(endpoint.connections))
        process.ready(
            endpoint.urls, services=", ".join(config.service_names), manager=config.connect_to
        )
        if not config.idle_timeout:
            await process.stopped()
            return
        await unless(process.stopped(), endpoint.idle(config.idle_timeout))
        if endpoint.route.expired:
            log.info("no wire for the idle time: the responder ends", idle=config.idle_timeout)


def main() -> int:
    """Read the settings, serve, and return the exit code."""
    return run("responder", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

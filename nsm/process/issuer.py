"""The built-in issuer as a program: `python -P -m nsm.process.issuer`.

Gives the processes of one machine their SPIFFE identities where there is no
SPIRE: for labs, for tests, and for small installations.
"""

import asyncio
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from nsm.errors import InvalidError
from nsm.identity import issuer
from nsm.identity.authority import open_authority
from nsm.identity.entries import LONGEST_TTL, SHORTEST_TTL
from nsm.identity.spiffe import check_trust_domain
from nsm.model import SECOND
from nsm.process.config import Common, PositiveDuration, Url, read
from nsm.process.run import Process, run


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """Settings of the issuer: a SPIFFE agent for the processes of this machine."""

    name: str = "issuer"
    """What the process calls itself in its log."""

    trust_domain: str
    """The trust domain whose identities it gives out, such as example.org."""

    entries: str
    """The registration file (YAML or JSON): which process gets which identity."""

    issuer_dir: str = "/var/lib/vwire/issuer"
    """Where the authority's key is kept; made, for its user alone, if it is not there."""

    listen_on: Url = "unix:///run/vwire/issuer.sock"
    """Where the Workload API is served; processes find it as SPIFFE_ENDPOINT_SOCKET."""

    federation_dir: str = ""
    """A directory of other trust domains' bundles, each named <trust domain>.pem."""

    bundle_file: str = ""
    """Where our own bundle is written for other trust domains; nowhere if empty."""

    svid_ttl: PositiveDuration = 3600.0
    """How long a certificate lives, unless its entry says otherwise; renewed at half."""

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        if not SHORTEST_TTL <= self.svid_ttl * SECOND <= LONGEST_TTL:
            raise InvalidError(
                f"NSM_SVID_TTL is {self.svid_ttl:g} s; expected {SHORTEST_TTL // SECOND} s "
                f"to {LONGEST_TTL // SECOND} s",
                hint="tokens live ten minutes and no longer than their certificate",
            )


async def serve(config: Config, process: Process) -> None:
    """Serve until the process is asked to stop."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two files for each connection
    authority = await asyncio.to_thread(
        open_authority, Path(config.issuer_dir), config.trust_domain
    )
    async with issuer.serve(
        config.listen_on,
        authority,
        entries=Path(config.entries),
        federation=Path(config.federation_dir) if config.federation_dir else None,
        bundle=Path(config.bundle_file) if config.bundle_file else None,
        ttl=round(config.svid_ttl * SECOND),
    ) as serving:
        process.ready(
            [serving.url],
            trust_domain=config.trust_domain,
            processes=f"need SPIFFE_ENDPOINT_SOCKET={serving.url}",  # SPIRE's is their default
        )
        await process.stopped()


def main() -> int:
    """Run the issuer; returns its exit code."""
    return run("issuer", read(Config), serve)


if __name__ == "__main__":
    sys.exit(main())

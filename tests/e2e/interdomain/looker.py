"""A workload that looks at its wire's path: who vouches for whom, as each token says.

    python -P -m tests.e2e.interdomain.looker

It tells by whose key each token is signed, of those in the PEM file LOOKER_LEAVES.
Holds one wire until it is told to stop. What it writes has no token in it.
"""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

from cryptography import x509

from nsm.client import Client, Settings, Wire
from nsm.identity import tokens
from nsm.identity.verify import leaf_id
from nsm.identity.workload import workload_source


def known(own: x509.Certificate) -> list[x509.Certificate]:
    """Certificates of those that may be on a path, as far as we are told them."""
    told = os.environ.get("LOOKER_LEAVES", "")
    return [own, *(x509.load_pem_x509_certificates(Path(told).read_bytes()) if told else ())]


def seen(wire: Wire, leaves: list[x509.Certificate]) -> list[dict[str, Any]]:
    assert wire.made is not None
    return [
        {
            "name": one.name,
            "expires": one.expires,
            "sub": tokens.claims(one.token).sub,
            "aud": list(tokens.claims(one.token).aud),
            "signers": sorted(
                {str(leaf_id(leaf)) for leaf in leaves if tokens.signed_by(one.token, leaf)}
            ),
            "metrics": dict(one.metrics),
        }
        for one in wire.made.segments
    ]


def write(line: dict[str, Any]) -> None:
    with open(os.environ["LOOKER_STATUS"], "a") as status:
        status.write(json.dumps(line) + "\n")


async def main() -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    settings = Settings(request_timeout=15.0)
    async with (
        workload_source(os.environ["SPIFFE_ENDPOINT_SOCKET"], patience=10) as source,
        Client(
            os.environ["NSM_NAME"],
            source=source,
            manager=os.environ["NSM_CONNECT_TO"],
            settings=settings,
        ) as client,
        client.connect(os.environ["LOOKER_URL"]) as wire,
    ):
        assert wire.made is not None
        leaves = await asyncio.to_thread(known, source.identity.svid.leaf)
        line = {
            "path": seen(wire, leaves),
            "labels": dict(wire.made.labels),
            "service": wire.made.service,
            "endpoint": wire.made.endpoint,
            "mechanism": wire.made.mechanism.type if wire.made.mechanism else "",
            "stages": dict(wire.stages),
        }
        await asyncio.to_thread(write, line)
        ready = int(os.environ["NSM_READY_FD"])
        os.write(ready, b"looking\n")
        os.close(ready)
        await stopped.wait()


if __name__ == "__main__":
    asyncio.run(main())

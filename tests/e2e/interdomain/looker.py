"""A workload that looks at its wire's path: who vouches for whom, as each token says.

    python -P -m tests.e2e.interdomain.looker

Holds one wire until it is told to stop. What it writes has no token in it.
"""

import asyncio
import json
import os
import signal
from typing import Any

from nsm.client import Client, Settings, Wire
from nsm.identity import tokens
from nsm.identity.workload import workload_source


def seen(wire: Wire) -> list[dict[str, Any]]:
    assert wire.made is not None
    return [
        {
            "name": one.name,
            "expires": one.expires,
            "sub": tokens.claims(one.token).sub,
            "aud": list(tokens.claims(one.token).aud),
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
        line = {
            "path": seen(wire),
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

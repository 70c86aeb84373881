"""Registers a domain's service with a choice: a member's label `at` names its router, `near`
the one it shall have as long as that is there.

python -P -m tests.e2e.vl3.teller
"""

import asyncio
import os
import signal

from nsm.identity.workload import workload_source
from nsm.model import Destination, Match, Service
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient


async def main() -> None:
    routers = os.environ["TELLER_ROUTERS"].split(",")
    choices = [Match({"at": one}, (Destination({"router": one}),)) for one in routers]
    choices += [
        Match({"near": one}, (Destination({"router": one}),), fallthrough=True) for one in routers
    ]
    matches = (*choices, Match({}, (Destination({}),)))
    service = Service(os.environ["TELLER_SERVICE"], "IP", matches=matches)
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with (
        workload_source(os.environ["SPIFFE_ENDPOINT_SOCKET"], patience=10) as source,
        Peers(source, dial_timeout=2.0) as peers,
    ):
        client = RegistryClient(peers, os.environ["NSM_CONNECT_TO"], dial_timeout=2.0)
        await client.register_service(service)
        os.write(int(os.environ["NSM_READY_FD"]), b"registered\n")
        await ended.wait()


if __name__ == "__main__":
    asyncio.run(main())

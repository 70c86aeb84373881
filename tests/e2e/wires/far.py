"""Another node's manager that answers as it is told, and makes nothing in any kernel.

    python -P -m tests.e2e.wires.far

Registers FAR_NAME as the endpoint of FAR_SERVICE (payload IP) at FAR_URL, and answers each
Request with a WireGuard tunnel in which FAR_SAYS (a JSON object) replaces what would be
right; OURS there means the public key of whoever asks. Each Request and Close becomes a
line of FAR_HEARD.
"""

import asyncio
import json
import os
import sys
import time
from dataclasses import replace
from ipaddress import ip_address
from urllib.parse import urlsplit

from forwarder.mechanisms import wireguard
from nsm.caller import Caller
from nsm.connections import Held
from nsm.hop import Established, Hop
from nsm.identity.background import background
from nsm.identity.workload import workload_source
from nsm.kernel.keys import Key
from nsm.kernel.state import Namespace
from nsm.model import Connection, Endpoint, Request, Service
from nsm.rpc import services
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from nsm.rpc.server import serve
from nsm.undo import Undo

LIFETIME = 600 * 10**9


class Far:
    """The route of its hop."""

    def __init__(self, listen: str) -> None:
        local = ip_address(str(urlsplit(listen).hostname))
        self._own = wireguard.Own("dst", Key.generate(), local, 51999, "kernel", Namespace(1, -1))
        self._says = json.loads(os.environ["FAR_SAYS"])

    async def establish(
        self, asked: Request, held: Held[str], caller: Caller, undo: Undo
    ) -> Established:
        (offer,) = asked.preferences
        ours = offer.get("src_public_key")
        says = {key: ours if said == "OURS" else said for key, said in self._says.items()}
        await self._hear(asked=dict(offer.parameters))
        agreed = wireguard.answer(offer, self._own, 1440).with_(**says)
        return Established(replace(asked.connection, mechanism=agreed))

    async def withdraw(self, conn: Connection, memory: str | None, caller: Caller | None) -> None:
        await self._hear(closed=conn.id)

    async def _hear(self, **what: object) -> None:
        def write() -> None:
            with open(os.environ["FAR_HEARD"], "a") as out:
                out.write(json.dumps(what) + "\n")

        await asyncio.to_thread(write)


async def main() -> None:
    url, name, service = (os.environ[f"FAR_{what}"] for what in ("URL", "NAME", "SERVICE"))
    until = time.time_ns() + 300 * 10**9
    async with (
        background() as tasks,
        workload_source(os.environ["SPIFFE_ENDPOINT_SOCKET"], patience=10) as source,
        Peers(source, dial_timeout=2.0) as peers,
    ):
        hop: Hop[str] = Hop(
            name,
            Far(url),
            lifetime=LIFETIME,
            spawn=lambda work, what: tasks.create_task(work, name=what),
        )
        registry = RegistryClient(peers, os.environ["FAR_REGISTRY"])
        endpoint = Endpoint(name=name, services=(service,), url=url, expires=until)
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(15, asked.set)
        async with serve([url], services.of(hop), source):
            await registry.register_service(Service(service, payload="IP"))
            await registry.register_endpoint(endpoint)
            os.write(int(os.environ["NSM_READY_FD"]), b"ready\n")
            await asked.wait()
            await registry.unregister_endpoint(endpoint)
            hop.stop()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)

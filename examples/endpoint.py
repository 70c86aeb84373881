"""A network service in a dozen lines: `python examples/endpoint.py echo 10.9.0.0/24`.

Serves UDP echo on port 7 to every client that asks for the service, and sees
by their source addresses who they are. NSM_CONNECT_TO and
SPIFFE_ENDPOINT_SOCKET say where the node's manager and the SPIFFE agent are.
"""

import asyncio
import sys

import nsm


class Echo(asyncio.DatagramProtocol):
    def connection_made(self, transport):
        self.transport = transport

    def datagram_received(self, data, address):
        self.transport.sendto(data, address)


async def main(service: str, prefix: str) -> None:
    loop = asyncio.get_running_loop()
    await loop.create_datagram_endpoint(Echo, local_addr=("0.0.0.0", 7))
    async with nsm.Endpoint(f"{service}-1", [service], prefixes=[[prefix]]):
        print(f"{service} is served; Ctrl-C ends it", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        pass
    except nsm.NsmError as refused:
        sys.exit(str(refused))

"""A wire in a dozen lines: `python examples/client.py kernel://icmp-responder/nsm-1`.

NSM_CONNECT_TO and SPIFFE_ENDPOINT_SOCKET say where the node's manager and the
SPIFFE agent are; `nsmctl lab exec` sets both.
"""

import asyncio
import sys

import nsm


async def main(url: str) -> None:
    async with nsm.connect(url, patience=10) as wire:
        own = ", ".join(str(address.ip) for address in wire.addresses)
        other = ", ".join(str(address.ip) for address in wire.peer_addresses)
        print(f"{wire.interface}: {own} to {wire.endpoint} at {other}; Ctrl-C ends it", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1]))
    except KeyboardInterrupt:
        pass
    except nsm.NsmError as refused:
        sys.exit(str(refused))

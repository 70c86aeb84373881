"""A workload's resolver as a process: `python -P -m tests.e2e.names.workload FILE [TOLD]`.

TOLD is JSON: connections, each with servers, domains and prefixes; another line of it on
stdin replaces them. Says READY when names are led to it, TOLD after each line.
"""

import asyncio
import json
import signal
import sys

from nsm.model import Context, DNSConfig, DNSContext, IPContext, Route
from nsm.names.resolver import Resolver, local_names


def tell(names: Resolver, known: set[str], text: str) -> set[str]:
    """The connections are those of the text from now on."""
    told = json.loads(text)
    for id_ in known - told.keys():
        names.forget(id_)
    for id_, (servers, domains, prefixes) in told.items():
        config = DNSConfig(tuple(servers), tuple(domains))
        routes = tuple(map(Route, prefixes))
        names.tell(id_, Context(ip=IPContext(src_routes=routes), dns=DNSContext((config,))))
    return set(told)


async def main(path: str, told: str = "{}") -> None:
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, ending.set)
    async with local_names(path) as names:
        known = tell(names, set(), told)

        def line() -> None:
            nonlocal known
            if text := sys.stdin.readline():
                known = tell(names, known, text)
                print("TOLD", flush=True)
            else:
                ending.set()

        print("READY", flush=True)
        loop.add_reader(sys.stdin, line)
        await ending.wait()
        loop.remove_reader(sys.stdin)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

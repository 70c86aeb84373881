"""A member that says a router's words: that more of the domain is behind it.

    python -P -m tests.e2e.vl3.pretender

Asks once, and writes what it is told. PRETENDER_BEHIND is the prefix.
"""

import asyncio
import json
import os
import sys
from dataclasses import replace

from nsm.client import Client, Wish
from nsm.errors import NsmError
from nsm.identity.workload import workload_source
from nsm.model import Context, IPContext, Route


def shaped(context: Context) -> Context:
    ways = (Route(os.environ["PRETENDER_BEHIND"]),)
    return replace(context, ip=replace(context.ip or IPContext(), dst_routes=ways))


async def main() -> int:
    async with (
        workload_source(os.environ["SPIFFE_ENDPOINT_SOCKET"], patience=10) as source,
        Client(os.environ["NSM_NAME"], source=source, manager=os.environ["NSM_CONNECT_TO"]) as own,
    ):
        try:
            async with own.connect(os.environ["PRETENDER_URL"], wish=Wish(shape=shaped)):
                told = ""
        except NsmError as refused:
            told = str(refused)
        sys.stderr.write(json.dumps({"level": "info", "told": told}) + "\n")
        return 0 if told else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))

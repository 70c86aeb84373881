"""The wire of `bench.raw` once more, as pyroute2's documentation makes one: for comparison only.

    ip netns exec HOST python -m bench.documented CLIENT SERVER ROUNDS

HOST, CLIENT and SERVER are names of network namespaces. The pair is made in the
host's, both ends are moved and renamed, then each is set up by a `NetNS` object of
its own, call by call. A process of its own, because each of those objects forks.
Prints the median in ms as JSON, or null where pyroute2 is not installed.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

try:
    from pyroute2 import IPRoute, NetNS
except ImportError:
    IPRoute = NetNS = None

NEAR, FAR = "10.0.0.1", "10.0.0.2"
MACS = {NEAR: "02:00:00:00:00:01", FAR: "02:00:00:00:00:02"}


def main(client: str, server: str, rounds: int) -> None:
    """Measure and print."""
    print(json.dumps(statistics.median(_times(client, server, rounds)) if NetNS else None))


def _times(client: str, server: str, rounds: int) -> Iterator[float]:
    for _ in range(rounds):
        start = time.perf_counter()
        with IPRoute() as host, NetNS(client) as near, NetNS(server) as far:
            host.link(
                "add", ifname="near", kind="veth", address=MACS[NEAR],
                peer={"ifname": "far", "address": MACS[FAR]},
            )  # fmt: skip
            _end(host, "near", client, near, NEAR, FAR)
            _end(host, "far", server, far, FAR, NEAR)
            yield (time.perf_counter() - start) * 1000
            near.link("del", index=near.link_lookup(ifname="wire")[0])


def _end(host: Any, name: str, place: str, there: Any, own: str, other: str) -> None:
    host.link("set", index=host.link_lookup(ifname=name)[0], net_ns_fd=place)
    index = there.link_lookup(ifname=name)[0]
    there.link("set", index=index, ifname="wire", state="up")
    there.addr("add", index=index, address=own, prefixlen=32)
    there.route("add", dst=f"{other}/32", oif=index, scope="link")
    there.neigh("add", dst=other, lladdr=MACS[other], ifindex=index, state="permanent")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))

"""How long WireGuard wires take to come up, one after the other: none may be much slower.

A careless bring-up costs seconds now and then: a handshake that is lost is tried again
after five, and an end that is told twice loses its session. So the slowest one counts.
"""

import time
from collections.abc import Callable

from bench.traffic import traffic
from bench.wires import Kind, Ours, Plan, stage
from nsm.kernel.node import Kernel


async def measure(kind: Kind, count: int, report: Callable[[str], None]) -> list[float]:
    """Seconds of each, from nothing to the first echo that is answered."""
    took = []
    with stage() as where, traffic(where.client, where.server) as sending:
        async with Kernel("bench") as kernel:
            ours = await Ours.on(kernel, where)
            for number in range(count):
                report(f"{kind}: bring-up {number + 1} of {count}")
                plan = Plan(kind, number)
                start = time.perf_counter()
                await ours.make(plan)
                sending.first(plan.addresses[1])
                took.append(time.perf_counter() - start)
                await ours.remove(plan)
    return took

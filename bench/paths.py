"""What a wire of ours carries, against the same wire made by hand: pair by pair.

Of each pair both wires are made anew, and both are measured by turns within a second, in an
order that changes: what the machine does besides, and where the kernel happens to put a
device in memory, then hits ours as often as the other.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.traffic import Traffic, traffic
from bench.wires import ByHand, Kind, Ours, Plan, stage
from nsm.kernel.node import Kernel

OCTETS: Final[dict[Kind, int]] = {  # of a transfer, which takes a millisecond or less
    "veth": 1 << 19, "vxlan": 1 << 19, "wireguard": 1 << 17, "wireguard-go": 1 << 17,
}  # fmt: skip
ECHOES: Final = 20  # of a row
MOST: Final = 200  # transfers, and rows of echoes, over each wire of a pair
FEWEST: Final = 10
LONGEST: Final = 0.4  # seconds that either takes over both wires, roughly


@dataclass(slots=True)
class Samples:
    """Of each pair, the medians of ours and of the wire by hand: bytes a second, seconds."""

    rates: list[tuple[float, float]] = field(default_factory=list)
    trips: list[tuple[float, float]] = field(default_factory=list)

    @property
    def throughput(self) -> list[float]:
        """Ours ÷ by hand; more is better."""
        return [ours / hand for ours, hand in self.rates]

    @property
    def quickness(self) -> list[float]:
        """Round trips by hand ÷ ours; more is better."""
        return [hand / ours for ours, hand in self.trips]


async def measure(kind: Kind, pairs: int, report: Callable[[str], None]) -> Samples:
    """Pairs of wires of that kind. RuntimeError where they cannot be made or do not answer."""
    samples = Samples()
    with (
        stage() as where,
        tempfile.TemporaryDirectory() as folder,
        traffic(where.client, where.server) as sending,
    ):
        async with Kernel("bench") as kernel:
            ours, by_hand = await Ours.on(kernel, where), ByHand(where, Path(folder))
            for number in range(pairs):
                report(f"{kind}: pair {number + 1} of {pairs}")
                mine, other = Plan(kind, 2 * number), Plan(kind, 2 * number + 1)
                if number % 2:
                    await ours.make(mine)
                    by_hand.make(other)
                else:
                    by_hand.make(other)
                    await ours.make(mine)
                _measure(sending, (mine, other), samples, first=number // 2 % 2)
                await ours.remove(mine)
                by_hand.remove(other)
    return samples


def _measure(sending: Traffic, pair: tuple[Plan, Plan], samples: Samples, *, first: int) -> None:
    octets = OCTETS[pair[0].kind]
    addresses = [plan.addresses[1] for plan in pair]
    for address in addresses:
        sending.first(address)
        sending.call(address)
        for _ in range(8):  # until TCP has opened its window
            sending.send(address, octets)
    seconds: tuple[list[float], list[float]] = [], []
    for which in _turns(first):
        seconds[which].append(sending.send(addresses[which], octets))
    trips: tuple[list[float], list[float]] = [], []
    for which in _turns(first):
        trips[which].append(sending.echo(addresses[which], ECHOES))
    sending.hang_up()
    ours, hand = (octets / statistics.median(some) for some in seconds)
    samples.rates.append((ours, hand))
    ours, hand = map(statistics.median, trips)
    samples.trips.append((ours, hand))


def _turns(first: int) -> Iterator[int]:
    """Ours (0) and by hand (1), the one as often as the other, for as long as it may take."""
    end = time.monotonic() + LONGEST
    order = itertools.cycle([(first, 1 - first), (1 - first, first)])
    for turn, both in zip(range(MOST), order, strict=False):
        if turn >= FEWEST and turn % 2 == 0 and time.monotonic() > end:
            return
        yield from both

"""What a request and a close cost through the whole mesh, against the sum of their floors.

The floors are taken in the same run: the same calls with nothing of ours in them, the tokens
they must have, and the netlink batches of the devices. Tokens and policies are on.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from bench.mesh import SERVICES, Mesh, must_be
from bench.wires import Kind

Shape = Literal["one node", "two nodes"]
STAGES: Final = ("calling", "manager", "find", "forwarder", "kernel", "endpoint", "handshake")
# Tokens that a first request must have: of the client and of each manager and forwarder for each
# of their calls, finds among them, and of each hop for the one before it. A close has one a call.
TOKENS: Final[Mapping[Shape, tuple[int, int]]] = {"one node": (9, 3), "two nodes": (14, 5)}


@dataclass(frozen=True, slots=True)
class Requests:
    """All samples of a kind, in ms."""

    shape: Shape
    told: Mapping[str, Any]

    def floor(self, batch: float) -> float:
        """Of a request, where the devices of one end take so many ms."""
        return statistics.median(self._floors("calls_ms", 0, self._ends * batch))

    def requests(self, batch: float) -> tuple[list[float], list[float]]:
        """Each in ms, and the sum of its floors of the same moment."""
        return self.told["request_ms"], self._floors("calls_ms", 0, self._ends * batch)

    def closes(self, delete: float) -> tuple[list[float], list[float]]:
        """The same, where the devices of one end are deleted in so many ms, and the other's
        meanwhile."""
        return self.told["close_ms"], self._floors("close_calls_ms", 1, delete)

    def _floors(self, calls: str, which: int, devices: float) -> list[float]:
        tokens = TOKENS[self.shape][which] * self.told["token_ms"]
        return [one + tokens + devices for one in self.told[calls]]

    @property
    def _ends(self) -> int:
        return 1 if self.shape == "one node" else 2  # a veth pair is made in one go

    @property
    def request(self) -> float:
        """Median ms."""
        return float(statistics.median(self.told["request_ms"]))

    @property
    def close(self) -> float:
        """Median ms."""
        return float(statistics.median(self.told["close_ms"]))

    @property
    def stages(self) -> dict[str, float]:
        """Median ms of each stage there is."""
        return {
            stage: statistics.median(one[stage] for one in self.told["stages"])
            for stage in STAGES
            if all(stage in one for one in self.told["stages"])
        }


def asked(mesh: Mesh, kinds: Sequence[Kind], rounds: int) -> dict[Kind, Requests]:
    """Ask for wires of these kinds, one after the other. RuntimeError if others were made."""
    shapes: dict[Shape, list[Kind]] = {}
    for kind in kinds:
        shapes.setdefault("one node" if kind == "veth" else "two nodes", []).append(kind)
    found: dict[Kind, Requests] = {}
    for shape, some in shapes.items():
        urls = [f"kernel://{SERVICES[kind]}/b-1" for kind in some]
        told = mesh.ask("bench.asking", shape, str(rounds), *urls)
        for kind, one in zip(some, told, strict=True):
            must_be(kind, one["device"])
            found[kind] = Requests(shape, one)
    return found

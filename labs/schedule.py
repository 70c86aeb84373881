"""What chaos breaks, whom, when and for how long: drawn from a number, and written down. Pure.

The same number draws the same schedule for the same lab, here and elsewhere, and so does a
file of one. Faults come one after the other, some of them two at once, because what is left
of one is looked at before the next.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from labs.lab import Lab
from labs.paths import Paths
from labs.processes import WORKLOADS, Process, Stage, plan
from nsm.errors import InvalidError

Do = Literal["kill", "restart", "freeze", "unplug", "partition", "rate", "reboot"]
ODDS: Final[Mapping[Do, int]] = {
    "kill": 35, "restart": 15, "freeze": 20, "unplug": 10, "partition": 10, "rate": 10,
    "reboot": 6,
}  # fmt: skip
LASTS: Final[Mapping[Do, tuple[float, float]]] = {  # seconds
    "kill": (0.0, 3.0), "restart": (0.0, 1.0), "freeze": (0.1, 5.0), "unplug": (0.2, 6.0),
    "partition": (0.2, 8.0), "rate": (1.0, 5.0), "reboot": (0.2, 4.0),
}  # fmt: skip
OF_NODES: Final = ("unplug", "partition", "rate", "reboot")
REST: Final = (0.2, 1.5)  # seconds of quiet after a fault
PAIRS: Final = 0.25  # of processes that end or stand still, two at once
BITS: Final = (100_000, 5_000_000)  # a second, of a node that is slowed down
COST: Final = 1.0  # seconds that looking at what is left takes, at least
_SPARED: Final = (Stage.NETWORK, Stage.NAMESERVER, Stage.PROGRAM)  # nothing of ours


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is broken: who for how many seconds, and the seconds of quiet after it.

    who are processes as people call them, or nodes; of a partition, one side of it.
    """

    do: Do
    who: tuple[str, ...]
    seconds: float
    rest: float
    bits: int = 0

    def __str__(self) -> str:
        how = {"rate": f" to {self.bits / 1000:.0f} kbit/s", "partition": " from the others"}
        return f"{self.do} {', '.join(self.who)}{how.get(self.do, '')} for {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Site:
    """Whom chaos may break in a lab, in the order of its file."""

    processes: tuple[str, ...]
    nodes: tuple[str, ...]
    routers: tuple[str, ...] = ()  # of the processes, those that are not told to end

    def whom(self, do: Do) -> tuple[str, ...]:
        """Whom that may befall."""
        if do in OF_NODES:
            return self.nodes
        if do == "restart":  # a router that ends in order is left for another, for good
            return tuple(one for one in self.processes if one not in self.routers)
        return self.processes


def site(lab: Lab, paths: Paths) -> Site:
    """All of a lab's own processes, and its nodes."""
    all_ = [p for p in plan(lab, paths).processes if p.stage not in _SPARED]
    return Site(
        tuple(called(p) for p in all_),
        tuple(name for name, node in lab.nodes.items() if node.kind == "node"),
        tuple(called(p) for p in all_ if p.stage == Stage.ROUTER),
    )


def called(process: Process) -> str:
    """How people call a process: `nsmgr@east-1`, `client:app`."""
    node, _, own = process.name.partition("/")
    kind = WORKLOADS.get(process.stage)
    return f"{kind}:{own}" if kind else f"{own}@{node}"


def drawn(seed: int, minutes: float, where: Site) -> tuple[Fault, ...]:
    """The schedule of that number: as many faults as fit into so many minutes at most."""
    chance = random.Random(seed)  # noqa: S311 - to be drawn the same again
    possible = [do for do in ODDS if where.whom(do) and (do not in OF_NODES or _apart(where))]
    faults: list[Fault] = []
    left = minutes * 60.0
    while True:
        fault = _fault(chance, chance.choices(possible, [ODDS[do] for do in possible])[0], where)
        left -= fault.seconds + fault.rest + COST
        if left < 0:
            return tuple(faults)
        faults.append(fault)


def _apart(where: Site) -> bool:
    return len(where.nodes) > 1


def _fault(chance: random.Random, do: Do, where: Site) -> Fault:
    seconds, rest = (round(chance.uniform(*span), 2) for span in (LASTS[do], REST))
    if do in ("unplug", "rate", "reboot"):
        bits = round(chance.uniform(*BITS)) if do == "rate" else 0
        return Fault(do, (chance.choice(where.nodes),), seconds, rest, bits)
    if do == "partition":
        count = chance.randint(1, len(where.nodes) - 1)
        some = chance.sample(range(len(where.nodes)), count)
        return Fault(do, tuple(where.nodes[n] for n in sorted(some)), seconds, rest)
    whom = where.whom(do)
    count = 2 if chance.random() < PAIRS and len(whom) > 1 else 1
    some = chance.sample(range(len(whom)), count)
    return Fault(do, tuple(whom[n] for n in sorted(some)), seconds, rest)


def written(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """As a file has them."""
    return [
        {"do": f.do, "who": list(f.who), "seconds": f.seconds, "rest": f.rest}
        | ({"bits": f.bits} if f.bits else {})
        for f in faults
    ]


def read(said: object, where: Site, file: str) -> tuple[Fault, ...]:
    """What a file has, checked against whom there is. Raises InvalidError."""
    if not isinstance(said, list) or not said:
        raise InvalidError(f"{file}: `faults` is no list of faults")
    return tuple(_read(one, where, f"{file}: fault {n}") for n, one in enumerate(said, 1))


def _read(said: object, where: Site, whose: str) -> Fault:
    if not isinstance(said, dict) or said.keys() - {"do", "who", "seconds", "rest", "bits"}:
        raise InvalidError(f"{whose} has not just `do`, `who`, `seconds`, `rest` and `bits`")
    who = said.get("who")
    do: Do | None = next((one for one in ODDS if one == said.get("do")), None)
    if do is None:
        raise InvalidError(f"{whose}: `do` is {said.get('do')!r}", hint=f"one of {', '.join(ODDS)}")
    there = where.whom(do)
    if not isinstance(who, list) or not who or any(one not in there for one in who):
        raise InvalidError(f"{whose}: `who` is {who!r}", hint=f"some of {', '.join(there)}")
    if len({*who}) < len(who) or (do in ("unplug", "rate", "reboot") and len(who) > 1):
        raise InvalidError(
            f"{whose}: `who` is {who!r}",
            hint="nobody twice, and one node to unplug, slow down or start anew",
        )
    if do == "partition" and len(set(who)) >= len(there):
        raise InvalidError(f"{whose}: `who` is everybody", hint="name one side of the partition")
    numbers = {key: said.get(key, 0) for key in ("seconds", "rest", "bits")}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise InvalidError(f"{whose}: `{key}` is {value!r}, no number from 0 up")
    if do == "rate" and not numbers["bits"]:
        raise InvalidError(f"{whose}: `bits` is missing", hint="what the node may send in a second")
    return Fault(
        do, tuple(who), float(numbers["seconds"]), float(numbers["rest"]), int(numbers["bits"])
    )  # fmt: skip

"""Whether a wire of ours and one made by hand are the same objects, as `ip` and `wg` show them.

Both are made of the same plan, each on a stage of its own; so they have the same names,
addresses, MACs, keys and ports, and whatever else is different, or there and not here, is a
difference. `MAY_DIFFER` says which are allowed.
"""

import asyncio
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench.offloads import offloads
from bench.traffic import traffic
from bench.wires import ByHand, Kind, Ours, Plan, Stage, stage
from nsm.kernel import owner
from nsm.kernel.node import Kernel

Objects = Mapping[str, Sequence[Mapping[str, Any]]]
"""What was asked, with what was answered."""


@dataclass(frozen=True, slots=True)
class MayDiffer:
    """A field that may differ: ours has to be so, and then counts as by_hand (None: absent)."""

    asked: str  # of which question, a pattern
    field: str
    ours: Callable[[Any], bool]
    by_hand: Any
    because: str


MAY_DIFFER: Final = (
    MayDiffer(
        ".* (link|addr)", "ifalias", lambda alias: owner.Mark.parse(alias) is not None, None,
        "the owner's mark: after a restart a wire is found by it",
    ),
    MayDiffer(
        ".* (link|addr)", "group", lambda group: group.isdigit() and owner.is_ours(int(group)),
        "default",
        "the owner's mark that is there from the first moment",
    ),
    MayDiffer(
        ".* route", "protocol", lambda number: number == str(owner.PROTOCOL), "boot",
        "the owner's mark of a route",
    ),
    MayDiffer(
        ".* neigh", "protocol", lambda number: number == str(owner.PROTOCOL), None,
        "the owner's mark of a neighbour",
    ),
    MayDiffer(
        ".* sysctl", "net.ipv4.ping_group_range", lambda groups: groups == "0\t2147483647", "1\t0",
        "upstream's liveness check pings without rights",
    ),
)  # fmt: skip

NUMBERS: Final = frozenset({"ifindex", "link_index"})
"""Drawn, by us or by the kernel: they differ from run to run whoever makes a device."""

NAMES: Final = ("ifname", "type", "dst", "table", "priority", "public-key", "mac", "dev")
"""By what objects are told apart, as far as they have it."""

EVENTS: Final = frozenset({"latest-handshake", "received", "sent"})
"""What happened since, not what was made."""

QUESTIONS: Final = {  # by options of `ip`
    "": ("link", "addr", "neigh", "route show table all", "rule"),
    "-6": ("route show table all", "rule"),
}

MORE: Final = {
    "fdb": "bridge -n {space} -d -j fdb show",
    "qdisc": "tc -n {space} -j qdisc show",
}


async def differences(kind: Kind) -> list[str]:
    """Make both, and name each difference that is not allowed."""
    plan = Plan(kind, 1)
    with stage() as one, stage() as other, tempfile.TemporaryDirectory() as folder:
        async with Kernel("bench") as kernel:
            ours, by_hand = await Ours.on(kernel, one), ByHand(other, Path(folder))
            await ours.make(plan)
            by_hand.make(plan)
            for where in (one, other):
                with traffic(where.client, where.server) as sending:
                    sending.first(plan.addresses[1])
                await asyncio.to_thread(_rest, where)
            found = compared(objects(one, plan, _ours), objects(other, plan, by_hand.device))
            await ours.remove(plan)
            by_hand.remove(plan)
    return found


def _rest(where: Stage) -> None:
    """Wait until the kernel says of all devices that they are up: it does up to a second late."""
    for space in (where.near, where.far, where.client, where.server):
        while "NO-CARRIER" in _output(["ip", "-n", space, "link"]):
            time.sleep(0.05)


def _ours(plan: Plan, side: int) -> str:
    return owner.tunnel_name(plan.connection, "dst" if side else "src")


def compared(ours: Objects, by_hand: Objects) -> list[str]:
    """What differs, in words; nothing if they are the same."""
    found = []
    for asked in ours:
        here = _named(_settled(asked, entry) for entry in ours[asked])
        there = _named(_without_numbers(entry) for entry in by_hand[asked])
        for name in (*here, *(there.keys() - here.keys())):
            if name not in there:
                found.append(f"{asked}: only ours: {here[name]}")
            elif name not in here:
                found.append(f"{asked}: only by hand: {there[name]}")
            else:
                found += _fields(f"{asked} {name[0]}".rstrip(), here[name], there[name])
    return found


def _named(entries: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """By what an object is called or about; the second of a name is another."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for entry in entries:
        words = (str(entry[key]) for key in NAMES if key in entry)
        name = " ".join(words)
        number = next(n for n in itertools.count() if (name, n) not in found)
        found[name, number] = entry
    return found


def _fields(what: str, ours: dict[str, Any], by_hand: dict[str, Any]) -> Iterator[str]:
    for field in sorted(ours.keys() | by_hand.keys()):
        one, other = (said.get(field, "absent") for said in (ours, by_hand))
        if one != other:
            yield f"{what}: {field} is {one}, by hand {other}"


def _settled(asked: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """With what may differ as it is by hand."""
    result = _without_numbers(entry)
    for rule in MAY_DIFFER:
        if (
            re.fullmatch(rule.asked, asked)
            and rule.field in result
            and rule.ours(result[rule.field])
        ):
            result[rule.field] = rule.by_hand
            if rule.by_hand is None:
                del result[rule.field]
    return result


def _without_numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in NUMBERS | EVENTS}


def objects(where: Stage, plan: Plan, tun: Callable[[Plan, int], str]) -> Objects:
    """All there is on a stage. tun names the device by which a wireguard-go is asked."""
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for role in ("client", "server", "near", "far"):
        space = getattr(where, role)
        for options, questions in QUESTIONS.items():
            for question, answer in zip(questions, _ip(space, options, questions), strict=True):
                what = f"{role} {question.partition(' ')[0]}"
                found[what] = [*found.get(what, ()), *answer]
        found[f"{role} sysctl"] = [_sysctl(space)]
        found[f"{role} offloads"] = offloads(space)
        for what, asking in MORE.items():
            found[f"{role} {what}"] = json.loads(_output(asking.format(space=space).split()))
    for node in ("near neigh", "far neigh"):
        del found[node]  # of the cable between them; how fresh they are changes by itself
    if plan.kind.startswith("wireguard"):
        for side, role in enumerate(("client", "server")):
            space = getattr(where, role)
            inside = ["ip", "netns", "exec", space]
            command = [*inside, "wg", "show", plan.name, "dump"]
            if plan.kind == "wireguard-go":
                command = ["wg", "show", tun(plan, side), "dump"]
            found[f"{role} wg"] = _wg(_output(command))
    return found


def _ip(space: str, options: str, questions: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    command = ["ip", "-n", space, "-d", "-j", *options.split(), "-batch", "-"]
    told = _output(command, "\n".join(questions))
    for _ in questions:  # an array for each, one after the other
        answer, end = json.JSONDecoder().raw_decode(told)
        told = told[end:].lstrip()
        yield [entry for entry in answer if entry]


def _sysctl(space: str) -> dict[str, Any]:
    command = ["ip", "netns", "exec", space, "sysctl", "-a", "-r", "^net.ipv[46]"]
    pairs = (line.partition(" = ") for line in _output(command).splitlines())
    return {key: value for key, _, value in pairs if not key.endswith(".stable_secret")}


def _wg(dump: str) -> list[dict[str, str]]:
    device, *peers = (line.split("\t") for line in dump.splitlines())
    names = ("public-key", "preshared-key", "endpoint", "allowed-ips", "latest-handshake",
             "received", "sent", "keepalive")  # fmt: skip
    return [
        dict(zip(("private-key", "public-key", "port", "fwmark"), device, strict=True)),
        *(dict(zip(names, peer, strict=True)) for peer in peers),
    ]


def _output(command: list[str], said: str = "") -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, input=said)
    if done.returncode and "sysctl" not in command:  # some settings may only be written
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout

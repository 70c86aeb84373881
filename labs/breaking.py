"""One fault from its beginning to its end, as a lab file or a person asks for it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from labs.faults import Faults, standing
from labs.lab import Broken
from nsm.errors import InvalidError

_DONE = {
    "kill": "killed", "stop": "stopped", "freeze": "froze", "end": "ended", "reboot": "took down",
    "link-down": "unplugged", "link-up": "plugged in", "partition": "set apart",
    "mend": "mended", "start": "started", "thaw": "thawed", "rate": "slowed down",
    "fill": "filled the disk of",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """What was done to one: whose old and new pids, and after how long it was back."""

    what: str
    who: str
    pid: int = 0
    back: int = 0
    seconds: float | None = None  # from the fault until it was taken back; None: it stands

    def __str__(self) -> str:
        text = f"{_DONE[self.what]} {self.who}".strip()
        if self.pid:
            text += f" (pid {self.pid})"
        if self.seconds is None:
            return text
        return f"{text}; back{f' as {self.back}' if self.back else ''} after {self.seconds:.2f} s"


def check(faults: Faults, asked: Broken) -> None:
    """Raises NotFoundError or InvalidError for whom there is not, before anything is broken."""
    for who in asked.who:
        if asked.what in ("reboot", "rate"):
            faults.node(who)
        elif asked.what in ("link-down", "link-up"):
            _cable(faults, who)
        elif asked.what == "end":
            faults.place(who)
        elif asked.what == "fill":
            faults.disk(who)
        elif asked.what != "start" or not _is_ended(faults, who):
            faults.process(who)
    for group in asked.groups:
        for node in group:
            faults.node(node)


def carry_out(faults: Faults, asked: Broken) -> list[Fault]:
    """Break all that is asked for, wait, and take it back, unless it stays.

    Raises what Faults raises.
    """
    check(faults, asked)
    start = time.monotonic()
    whom = asked.who or ("",)
    pids = [_BREAKS[asked.what](faults, asked, who) for who in whom]
    back: Sequence[int | None] = [None] * len(whom)
    took = None
    if asked.seconds is not None and asked.what in _MENDS:
        time.sleep(max(start + asked.seconds - time.monotonic(), 0))
        if asked.what in ("kill", "stop"):
            back = faults.start_together(asked.who)
        else:
            back = [_MENDS[asked.what](faults, asked, who) for who in whom]
        took = time.monotonic() - start
    groups = " | ".join(", ".join(group) for group in asked.groups)
    return [
        Fault(asked.what, who or groups, pid or 0, new or 0, took)
        for who, pid, new in zip(whom, pids, back, strict=True)
    ]


def touched(faults: Faults, asked: Broken) -> set[str]:
    """The places that end with it: what flows there has no end any more."""
    if asked.what == "end":
        return set(asked.who)
    if asked.what == "reboot":
        lab = faults.lab
        return {place for place in lab.places if lab.node_of(place).name in asked.who}
    return set()


def _is_ended(faults: Faults, who: str) -> bool:
    return who in standing(faults.paths).ended


def _cable(faults: Faults, who: str) -> tuple[str, str]:
    """A node and nothing, or a workload's place and its interface."""
    place, colon, interface = who.partition(":")
    if not colon:
        return faults.node(who), ""
    if not interface:
        raise InvalidError(f"{who}: no interface", hint="NODE, or PLACE:INTERFACE")
    return faults.place(place), interface


def _switch(faults: Faults, who: str, *, up: bool) -> None:
    place, interface = _cable(faults, who)
    if interface:
        faults.interface(place, interface, up=up)
    else:
        faults.link(place, up=up)


def _start(faults: Faults, _: Broken, who: str) -> int | None:
    if not _is_ended(faults, who):
        return faults.start(who)
    if who in faults.lab.nodes:
        faults.start_node(who)
    else:
        faults.renew(who)
    return None


_Does = Callable[[Faults, Broken, str], int | None]
_BREAKS: Final[Mapping[str, _Does]] = {
    "kill": lambda faults, _, who: faults.kill(who),
    "stop": lambda faults, _, who: faults.stop(who),
    "start": _start,
    "freeze": lambda faults, _, who: faults.freeze(who),
    "thaw": lambda faults, _, who: faults.thaw(who),
    "end": lambda faults, _, who: faults.end_namespace(who),
    "reboot": lambda faults, _, who: faults.end_node(who),
    "link-down": lambda faults, _, who: _switch(faults, who, up=False),
    "link-up": lambda faults, _, who: _switch(faults, who, up=True),
    "rate": lambda faults, asked, who: faults.rate(who, asked.rate or None),
    "partition": lambda faults, asked, _: faults.partition(*asked.groups),
    "fill": lambda faults, _, who: faults.fill(who),
    "mend": lambda faults, _, __: faults.mend(),
}
_MENDS: Final[Mapping[str, _Does]] = {
    "kill": lambda faults, _, who: faults.start(who),
    "stop": lambda faults, _, who: faults.start(who),
    "freeze": lambda faults, _, who: faults.thaw(who),
    "end": lambda faults, _, who: faults.renew(who),
    "reboot": lambda faults, _, who: faults.start_node(who),
    "link-down": lambda faults, _, who: _switch(faults, who, up=True),
    "rate": lambda faults, _, who: faults.rate(who, None),
    "partition": lambda faults, _, __: faults.mend(),
    "fill": lambda faults, _, who: faults.empty(who),
}

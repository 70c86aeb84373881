"""What stock dig hears."""

import asyncio
import re
from dataclasses import dataclass, field

from tests.support.spaces import Space


@dataclass
class Heard:
    """An answer; records are `NAME KIND DATA`, in their order by name."""

    status: str = ""
    flags: set[str] = field(default_factory=set)
    answer: list[str] = field(default_factory=list)
    authority: list[str] = field(default_factory=list)
    ttls: set[int] = field(default_factory=set)
    text: str = ""

    @property
    def data(self) -> list[str]:
        """The data of the answer's records, without their names."""
        return [one.split(" ", 2)[2] for one in self.answer]


async def dig(space: Space, server: str, *words: str) -> Heard:
    """What the server answers; an empty Heard where it does not."""
    command = ("dig", "+tries=1", "+timeout=9", f"@{server}", *words)
    done = await asyncio.to_thread(space.run, *command)
    heard = Heard(text=done.stdout)
    if match := re.search(r"status: (\w+).*\n;; flags: ([a-z ]*);", done.stdout):
        heard.status, heard.flags = match[1], set(match[2].split())
    section = ""
    for line in done.stdout.splitlines():
        if match := re.match(r";; (\w+) SECTION:", line):
            section = match[1]
        elif line and not line.startswith(";") and section in ("ANSWER", "AUTHORITY"):
            name, ttl, _, kind, data = line.split(None, 4)
            where = heard.answer if section == "ANSWER" else heard.authority
            where.append(f"{name} {kind} {data}")
            heard.ttls.add(int(ttl))
    heard.answer.sort()
    return heard

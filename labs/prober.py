"""Asks for wires and closes them again, all the time, and notes what each answer was.

    python -P -m labs.prober NAMESPACE

One order a line (JSON) on standard input, one answer a line on standard output. It asks
as the workload whose namespace it is in: whatever else happens, every request has to be
answered in time, with a wire or with one of the mesh's own refusals. Closing its input
ends it.
"""

import asyncio
import json
import os
import random
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from labs import become
from nsm.client import CLOSE_WITHIN, Client, Settings
from nsm.errors import Code, NsmError
from nsm.identity.background import background
from nsm.identity.workload import workload_source
from nsm.kernel.topology import enter_named
from nsm.model import SECOND, Endpoint
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient

DIAL: Final = 1.0  # seconds a dial of the manager may take
HELD: Final = (0.05, 0.3)  # seconds a wire is held
PAUSE: Final = (0.1, 0.4)  # seconds between two requests for the same
SLACK: Final = 2.0  # seconds by which a busy machine may be late
ANSWERS: Final = 3  # the descriptor that answers go to
KEPT: Final = 20  # of what is not as it should be


@dataclass(slots=True)
class Asked:
    """What became of the requests for one service."""

    made: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by status
    why: dict[str, str] = field(default_factory=dict)  # the newest of each, in the mesh's words
    unclosed: int = 0  # nobody took the Close: its lease ends the wire
    slowest: float = 0.0  # seconds
    late: list[str] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)


class Prober:
    """One workload that wants a wire of each service again and again."""

    def __init__(self, seat: dict[str, Any]) -> None:
        self._seat = seat
        self._asked = {url: Asked() for url in seat["urls"]}
        # that long a request takes that is late, and as long again a Close
        self._patience = 2 * (seat["within"] + DIAL + CLOSE_WITHIN + SLACK)
        self._go = asyncio.Event()
        self._idle = {url: asyncio.Event() for url in seat["urls"]}

    async def obey(self) -> None:
        """Ask, and answer orders, until there are none any more."""
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        settings = Settings(
            dial_timeout=DIAL,
            request_timeout=self._seat["within"],
            lifetime=round(self._seat["lifetime"] * SECOND),
        )
        async with (
            workload_source(self._seat["agent"], patience=10.0) as source,
            Peers(source, dial_timeout=DIAL) as self._peers,
            Client(
                self._seat["name"], source=source, manager=self._seat["manager"], settings=settings
            ) as client,
            background() as tasks,
        ):
            for url in self._asked:
                tasks.create_task(self._ask(client, url), name=f"asking for {url}")
            _answer(True)
            while line := await reader.readline():
                order = json.loads(line)
                try:
                    _answer(await getattr(self, order.pop("do"))(**order))
                except NsmError as error:
                    _say({"failure": str(error)})

    async def ask(self) -> bool:
        """Go on asking."""
        for idle in self._idle.values():
            idle.clear()
        self._go.set()
        return True

    async def pause(self) -> bool:
        """Ask no more, and return when every wire is closed."""
        self._go.clear()
        for idle in self._idle.values():
            await idle.wait()
        return True

    async def tell(self) -> dict[str, Any]:
        """What every request came to so far."""
        return {url: asdict(asked) for url, asked in self._asked.items()}

    async def registered(self) -> list[str]:
        """The names of all endpoints that the domain knows."""
        registry = RegistryClient(self._peers, self._seat["manager"])
        return sorted({one.name for one in await registry.find_endpoints(Endpoint())})

    async def _ask(self, client: Client, url: str) -> None:
        while True:
            if not self._go.is_set():
                self._idle[url].set()
                await self._go.wait()
            try:
                async with asyncio.timeout(self._patience):
                    await self._once(client, url)
            except TimeoutError:
                now = time.strftime("%H:%M:%S")
                _note(self._asked[url].late, f"{self._patience:g} s, and given up at {now}")
            except Exception as defect:  # noqa: BLE001 - it is what we look for
                _note(self._asked[url].defects, f"{type(defect).__name__}: {defect}")
            await asyncio.sleep(random.uniform(*PAUSE))  # noqa: S311 - so that nothing is in step

    async def _once(self, client: Client, url: str) -> None:
        asked = self._asked[url]
        began = time.monotonic()
        made = False
        try:
            async with client.connect(url):
                self._answered(asked, began)
                made = True
                asked.made += 1
                await asyncio.sleep(random.uniform(*HELD))  # noqa: S311
        except NsmError as error:
            if made:
                asked.unclosed += 1
                return
            self._answered(asked, began)
            code = Code(error.code).name
            asked.refused[code] = asked.refused.get(code, 0) + 1
            asked.why[code] = str(error)
            if error.code in (Code.INTERNAL, Code.UNKNOWN):
                _note(asked.defects, f"{code}: {error}")

    def _answered(self, asked: Asked, began: float) -> None:
        took = time.monotonic() - began
        asked.slowest = max(asked.slowest, took)
        if took > self._seat["within"] + DIAL + CLOSE_WITHIN + SLACK:
            _note(asked.late, f"{took:.1f} s at {time.strftime('%H:%M:%S')}")


def _note(into: list[str], what: str) -> None:
    if len(into) < KEPT:
        into.append(what)


def _answer(value: object) -> None:
    _say({"answer": value})


def _say(told: dict[str, object]) -> None:
    data = json.dumps(told).encode() + b"\n"
    while data:
        data = data[os.write(ANSWERS, data) :]


def _logging_to(path: str) -> None:
    """What is printed goes there; answers alone go where the orders come from."""
    os.dup2(1, ANSWERS)
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def main() -> None:
    """Be what the first order says, in the namespace that the command line names."""
    enter_named(sys.argv[1])
    with suppress(KeyboardInterrupt):
        line = b""
        while not line.endswith(b"\n") and (byte := os.read(0, 1)):  # and nothing ahead of it
            line += byte
        if line:
            seat = json.loads(line)
            _logging_to(seat["log"])
            become.group(seat["gid"])
            become.powerless()  # as workloads are
            asyncio.run(Prober(seat).obey())


if __name__ == "__main__":
    main()

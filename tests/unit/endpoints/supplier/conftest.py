"""A place for routers that are small programs, and a registry that knows what it is told."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from endpoints.supplier import house as at_work
from endpoints.supplier.house import House
from endpoints.supplier.keeper import Keeper
from endpoints.supplier.recipes import Recipe
from nsm.errors import UnavailableError
from nsm.model import Endpoint, Found

STAYS = "echo here; echo serving >$NSM_HEALTH_FILE; exec sleep 600"
INHERITED = {"PATH": os.environ["PATH"], "FROM": "supplier", "NSM_POOL": "default"}


def recipe(code: str = STAYS, **more: object) -> Recipe:
    """A router that is a line of shell."""
    told: dict[str, object] = {"service": "net", "name": "r", "where": "routers.yaml:1", **more}
    return Recipe(argv=("/bin/sh", "-c", code), **told)  # type: ignore[arg-type]


class Registry:
    """Knows which endpoints are registered, as the test says."""

    def __init__(self) -> None:
        self.there = {"r"}
        self.silent = False
        self.watched = 0
        self._changed = asyncio.Event()

    def say(self, *names: str) -> None:
        self.there = set(names)
        self._changed.set()
        self._changed = asyncio.Event()

    async def find_endpoints(self, query: Endpoint) -> list[Endpoint]:
        if self.silent:
            raise UnavailableError("the registry is away")
        return [Endpoint(name=name) for name in self.there & {query.name}]

    async def watch_endpoints(self, query: Endpoint) -> AsyncGenerator[Found[Endpoint], None]:
        self.watched += 1
        while True:
            changed = self._changed
            for one in await self.find_endpoints(query):
                yield Found(one)
            await changed.wait()


@pytest.fixture
def registry() -> Registry:
    return Registry()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """What runs of it at the end is ended."""
    with ExitStack() as stack:
        made = stack.enter_context(House(str(tmp_path / "state"), INHERITED))
        stack.callback(end_all, tmp_path / "state")
        yield made


def end_all(folder: Path) -> None:
    for pid in running(folder):
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def running(folder: Path) -> list[int]:
    """The numbers in the state files."""
    return [json.loads(file.read_text())["pid"] for file in folder.glob("*.json")]


@pytest.fixture
async def keep(
    house: House, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Callable[..., Keeper]]:
    """Keepers at work. Their routers are modules, which say whether they serve."""
    tasks = []

    def command(one: Recipe) -> tuple[str, ...]:
        return one.argv or ("/bin/sh", "-c", one.environment["CODE"])

    monkeypatch.setattr(at_work, "_command", command)

    def keeping(code: str = STAYS, **more: object) -> Keeper:
        asked = replace(recipe(**more), argv=(), environment={"CODE": code})
        made = Keeper(asked, house, registry)  # type: ignore[arg-type]
        tasks.append(asyncio.create_task(made.run()))
        return made

    yield keeping
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

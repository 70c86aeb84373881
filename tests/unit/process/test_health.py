"""A process serves when every part of it does, and says so to who looks at its file."""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from nsm.errors import PreconditionError
from nsm.process import health as health_file
from nsm.process.health import Health, publish
from tests.support.wait import until


def test_it_serves_when_nothing_is_missing() -> None:
    health = Health(listen="not listening yet", registry="not connected yet")
    health.ready("listen")
    assert not health.serving
    assert health.missing == {"registry": "not connected yet"}
    health.ready("registry")
    assert health.serving
    health.lost("registry", "refused")
    assert health.missing == {"registry": "refused"}


async def test_who_waits_hears_of_changes_and_of_nothing_else() -> None:
    health = Health(listen="not listening yet")
    async with asyncio.timeout(1), asyncio.TaskGroup() as group:
        waiting = group.create_task(health.changed())
        await asyncio.sleep(0)
        health.lost("listen", "not listening yet")
        await asyncio.sleep(0)
        assert not waiting.done()
        health.ready("listen")


@asynccontextmanager
async def published(health: Health, path: Path, beat: float) -> AsyncIterator[None]:
    task = asyncio.create_task(publish(health, str(path), beat))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def said(path: Path) -> str:
    return path.read_text() if path.exists() else "(no file)"


async def test_the_health_file_says_what_is_missing_until_nothing_is(tmp_path: Path) -> None:
    path = tmp_path / "health"
    health = Health(process="starting", registry="not connected yet")
    async with published(health, path, beat=3600):
        await until(
            lambda: said(path) == "process: starting\nregistry: not connected yet\n",
            "it is written",
        )
        health.ready("process")
        health.ready("registry")
        await until(lambda: said(path) == "serving\n", "it serves")
        health.lost("process", "stopping")
        await until(lambda: said(path) == "process: stopping\n", "it stops")
    assert list(tmp_path.iterdir()) == []


async def test_the_health_file_stays_young_while_the_loop_turns(tmp_path: Path) -> None:
    path = tmp_path / "health"
    async with published(Health(), path, beat=0.01):
        await until(path.exists, "it is written")
        os.utime(path, (0, 0))
        await until(lambda: path.stat().st_mtime > 0, "it is written again")


async def test_a_health_file_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "health"
    with pytest.raises(PreconditionError, match=r"^NSM_HEALTH_FILE is ") as caught:
        async with asyncio.timeout(5):
            await publish(Health(), str(path))
    assert str(path) in str(caught.value)


async def test_a_health_file_that_can_be_written_no_more_ends_nothing(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    path = room / "health"
    health = Health(process="starting")
    async with published(health, path, beat=0.01):
        await until(path.exists, "it is written")
        with capture_logs() as lines:
            room.rename(tmp_path / "elsewhere")
            await until(lambda: lines, "a writing fails")
        (tmp_path / "elsewhere").rename(room)
        health.ready("process")
        await until(lambda: said(path) == "serving\n", "it is written again")


async def test_a_health_file_is_gone_even_if_it_was_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "health"
    begun, go_on, written = threading.Event(), threading.Event(), threading.Event()
    write = health_file._write

    def slow(path: str, text: str) -> None:
        begun.set()
        go_on.wait(10)
        write(path, text)
        written.set()

    monkeypatch.setattr(health_file, "_write", slow)
    async with published(Health(), path, beat=3600):
        await until(begun.is_set, "a writing begins")
        asyncio.get_running_loop().call_later(0.02, go_on.set)
    await until(written.is_set, "the writing ends")
    assert not path.exists()

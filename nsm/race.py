"""Waiting for whichever of two things comes first."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def unless(wanted: Coroutine[Any, Any, T], other: Coroutine[Any, Any, object]) -> T | None:
    """The result of wanted, or None if other ends before it; the loser is cancelled and gone."""
    tasks = [asyncio.create_task(wanted), asyncio.create_task(other)]  # noqa: TID251 - both awaited
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None  # type: ignore[return-value]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

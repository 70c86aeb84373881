"""Waiting for two things at once: for the first of them, for both, for one until the other."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
U = TypeVar("U")


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


async def up_to(
    changes: AsyncGenerator[T, None], other: Coroutine[Any, Any, object]
) -> AsyncGenerator[T, None]:
    """What changes yields, until it or other ends; what other raises is raised.

    Nothing is lost between two of them, as it would be if each raced other by itself.
    """
    ending = asyncio.create_task(other)  # noqa: TID251 - awaited below
    step: asyncio.Task[tuple[T, ...]] | None = None
    try:
        while not ending.done():  # to be asked: what comes fast would win every race
            step = asyncio.create_task(_next(changes))  # noqa: TID251
            await asyncio.wait({step, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                break
            if not (one := step.result()):
                return
            yield one[0]
        ending.result()
    finally:
        tasks = (ending, step) if step else (ending,)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await changes.aclose()


async def _next(changes: AsyncGenerator[T, None]) -> tuple[T, ...]:
    """The next of them, or nothing where they end."""
    async for one in changes:
        return (one,)
    return ()


async def both(one: Coroutine[Any, Any, T], other: Coroutine[Any, Any, U]) -> tuple[T, U]:
    """Both results; a failure of either cancels the other, waits for its end, and is raised."""
    first = asyncio.create_task(one)  # noqa: TID251 - both awaited
    second = asyncio.create_task(other)  # noqa: TID251
    try:
        await asyncio.wait({first, second}, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((t for t in (first, second) if t.done() and t.exception()), None)
        if failed is not None:
            await failed
        return await first, await second
    finally:
        for task in (first, second):
            task.cancel()
        await asyncio.gather(first, second, return_exceptions=True)

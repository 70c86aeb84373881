"""Tasks that live exactly as long as what they serve.

What follows a stream or a file must end with whoever wanted it, and an error of
the block must leave it as it is, not inside a group of errors.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager


@asynccontextmanager
async def background() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose tasks end with the block.

    What leaves the block leaves as it is: a bare task group would wrap the
    caller's own exception into a group. A task that fails ends the block.
    """
    failure: BaseException | None = None
    started: list[asyncio.Task[object]] = []
    async with _Listed(started) as group:
        try:
            yield group
        except BaseException as error:  # noqa: BLE001 - raised again below, unwrapped
            failure = error
        for task in started:
            task.cancel()
    if failure is not None:
        raise failure


@asynccontextmanager
async def beside(work: Coroutine[None, None, None], name: str) -> AsyncIterator[None]:
    """Run work, named for people, until the block ends; its failure ends the block."""
    async with background() as group:
        group.create_task(work, name=name)
        yield


class _Listed(asyncio.TaskGroup):
    """A task group that can name its tasks, so that they can be ended with it."""

    def __init__(self, started: list[asyncio.Task[object]]) -> None:
        super().__init__()
        self._started = started

    def create_task(self, coro, *, name=None, context=None):  # type: ignore[no-untyped-def]
        """As in the base class."""
        task = super().create_task(coro, name=name, context=context)
        self._started.append(task)
        task.add_done_callback(self._started.remove)
        return task

"""A coroutine that runs for as long as a block is open.

What follows a stream or a file must end with whoever wanted it, and an error of
the block must leave it as it is, not inside a group of errors.
"""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager


@asynccontextmanager
async def beside(work: Coroutine[None, None, None], name: str) -> AsyncIterator[None]:
    """Run work, named for people, until the block ends; its failure ends the block."""
    left: BaseException | None = None
    async with asyncio.TaskGroup() as group:
        running = group.create_task(work, name=name)
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - raised again below, outside the group
            left = error
        finally:
            running.cancel()
    if left is not None:
        raise left

"""Tasks that live beside the main one, each with a name for people.

The only place that spawns. A task that dies unexpectedly is logged and counted,
and takes nothing down with it: one wire's trouble is not another's. A task the
process cannot do without is `vital`, and then its death ends the group.
"""

import asyncio
import re
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)
T = TypeVar("T")


class EndedError(RuntimeError):
    """A task that was to run as long as its group came to an end."""


class Tasks:
    """The tasks of one `tasks()` block."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.deaths = 0  # tasks that ended and should not have
        self._running: set[asyncio.Task[Any]] = set()
        self._open = True
        self._owner: asyncio.Task[Any] | None = None
        self._fatal: BaseException | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What is running now."""
        return tuple(sorted(task.get_name() for task in self._running))

    def spawn(
        self,
        work: Coroutine[Any, Any, T],
        name: str,
        *,
        forever: bool = False,
        vital: bool = False,
    ) -> asyncio.Task[T]:
        """Run work beside the caller, until it ends or the group does.

        name completes "the task …" in the log. forever: a normal end is a death
        too. vital: a death also ends the group, whose block then raises it.
        Raises RuntimeError once the group is ending: what comes too late is
        closed unrun, so that nothing outlives the group.
        """
        if not self._open:
            work.close()
            raise RuntimeError(f"no task {name!r} any more: {self.name} is ending")
        task = asyncio.create_task(work, name=name)  # noqa: TID251 - the place that may
        self._running.add(task)
        task.add_done_callback(lambda done: self._ended(done, forever=forever, vital=vital))
        return task

    def _ended(self, task: asyncio.Task[Any], *, forever: bool, vital: bool) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            if not forever or not self._open:
                return
            error = EndedError(f"the task {task.get_name()!r} ended and was to run for ever")
        self.deaths += 1
        log.error("a task died", task=task.get_name(), group=self.name, exc_info=error)
        if vital and self._open and self._fatal is None and self._owner is not None:
            self._fatal = error
            self._owner.cancel()

    async def _end(self) -> None:
        self._open = False
        interrupted = False
        while self._running:  # cancelled again meanwhile: finish, then obey
            for task in self._running:
                task.cancel()
            try:
                await asyncio.wait(set(self._running))
            except asyncio.CancelledError:
                interrupted = True
        if interrupted:
            raise asyncio.CancelledError


def running() -> dict[str, dict[str, int]]:
    """All tasks of the running loop and all threads, by name: how many of each there are.

    Whoever asks is one of them. A task that nobody named goes by what it runs.
    """
    at_work = (task for task in asyncio.all_tasks() if not task.done())
    return {
        "tasks": dict(sorted(Counter(map(_called, at_work)).items())),
        "threads": dict(sorted(Counter(one.name for one in threading.enumerate()).items())),
    }


def _called(task: asyncio.Task[Any]) -> str:
    name = task.get_name()
    if not re.fullmatch(r"Task-\d+", name):
        return name
    return str(getattr(task.get_coro(), "__qualname__", name))


@asynccontextmanager
async def tasks(name: str) -> AsyncIterator[Tasks]:
    """A group of tasks: when the block ends they are cancelled and waited for.

    Raises the error of a vital task that died, in place of the cancellation it caused.
    """
    group = Tasks(name)
    group._owner = asyncio.current_task()  # noqa: SLF001 - the group's own other half
    try:
        try:
            yield group
        finally:
            await group._end()  # noqa: SLF001
    except asyncio.CancelledError:
        owner = group._owner  # noqa: SLF001
        if group._fatal is None or owner is None or owner.uncancel() > 0:  # noqa: SLF001
            raise
        raise group._fatal from None  # noqa: SLF001

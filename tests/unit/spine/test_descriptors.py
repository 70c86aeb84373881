"""Descriptors on their way: none outlives whoever wanted it."""

import asyncio
import os
import threading

import pytest

from nsm.descriptors import opened
from tests.support.wait import until


async def test_what_a_thread_opens_for_a_cancelled_caller_is_closed():
    go, made = threading.Event(), []

    def slowly() -> int:
        go.wait(10)
        made.append(os.open("/dev/null", os.O_RDONLY))
        return made[0]

    opening = asyncio.create_task(opened(slowly))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    go.set()
    await until(lambda: made and not open_now(made[0]), "the descriptor to be closed", bar=0.1)


async def test_what_a_thread_opens_belongs_to_the_caller():
    fd = await opened(os.open, "/dev/null", os.O_RDONLY)
    assert open_now(fd)
    os.close(fd)


def open_now(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True

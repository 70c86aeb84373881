"""Noticing that somebody has set the wall clock.

Certificates and tokens are dated by it, timers are not: after a step of an hour what was renewed
in time holds no more, or not yet, and no timer knows. Linux tells at once whoever has a timer of
that clock that is to be cancelled by a step (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET); so it
does after a machine has slept.
"""

import asyncio
import contextlib
import ctypes
import os
import time
from collections.abc import AsyncGenerator

LEAST = 1.0  # seconds; a step that is shorter is the clock's being kept right

_ABSTIME, _CANCEL_ON_SET = 1, 2
_NEVER = 2**62  # seconds since 1970
_libc = ctypes.CDLL(None, use_errno=True)  # here: to load it may block, and loops are running later


async def steps(least: float = LEAST) -> AsyncGenerator[float, None]:
    """By how many seconds the clock was set, whenever it was; never ends.

    Raises OSError where the kernel, or a filter of system calls, has no such timer.
    """
    loop, woken = asyncio.get_running_loop(), asyncio.Event()
    timer = _timer()
    try:
        before = _ahead()
        loop.add_reader(timer, woken.set)
        while True:
            await woken.wait()
            woken.clear()
            with contextlib.suppress(OSError):  # ECANCELED, which is what was waited for
                os.read(timer, 8)
            now = _ahead()
            if abs(now - before) >= least:
                before, by = now, now - before
                yield by
    finally:
        loop.remove_reader(timer)
        os.close(timer)


def _ahead() -> float:
    return time.time() - time.monotonic()


def _timer() -> int:
    timer: int = _libc.timerfd_create(time.CLOCK_REALTIME, os.O_CLOEXEC | os.O_NONBLOCK)
    if timer < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    end = (ctypes.c_long * 4)(0, 0, _NEVER, 0)  # struct itimerspec: no interval, and when
    if _libc.timerfd_settime(timer, _ABSTIME | _CANCEL_ON_SET, end, None) < 0:
        failure = OSError(ctypes.get_errno(), "timerfd_settime")
        os.close(timer)
        raise failure
    return timer

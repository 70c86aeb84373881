"""The one place of the tests that waits, and so the one that sleeps.

A test waits for a state, never for a time: `until` looks again and again, and
gives up after ten times the bar. How long it took is written to
`out/times.json`, which `make bars` judges, so that a slow machine makes a slow
figure and not a red test.
"""

import asyncio
import inspect
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TIMES = Path(__file__).parents[2] / "out" / "times.json"
PATIENCE = 10  # bars


async def until(
    condition: Callable[[], T | Awaitable[T]], what: str, *, bar: float = 1.0, record: bool = True
) -> T:
    """Wait until condition() is true and return its value.

    what completes "waited for …"; bar is in seconds: the time it should take.
    Raises AssertionError after PATIENCE bars, with the last value seen.
    """
    start = time.monotonic()
    while True:
        value = condition()
        if inspect.isawaitable(value):
            value = await value
        if value:
            if record:
                write(what, time.monotonic() - start, bar)
            return value
        if time.monotonic() - start > PATIENCE * bar:
            raise AssertionError(f"waited {PATIENCE * bar:.1f} s for {what}; last seen: {value!r}")
        await asyncio.sleep(min(0.02, bar / 10))


def write(what: str, seconds: float, bar: float) -> None:
    """Append one measured time to out/times.json (one JSON object a line)."""
    TIMES.parent.mkdir(exist_ok=True)
    test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
    line = {"test": test, "what": what, "seconds": round(seconds, 4), "bar": bar}
    with TIMES.open("a") as out:
        out.write(json.dumps(line) + "\n")

import asyncio
import contextlib

import pytest

from nsm.race import both, unless, up_to


async def result(value, turns=1):
    for _ in range(turns):
        await asyncio.sleep(0)
    return value


class Waiting:
    """Something that never comes, and remembers that it was told to stop."""

    stopped = False

    async def wait(self):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            self.stopped = True


async def fail():
    await asyncio.sleep(0)
    raise KeyError("failed")


async def test_the_first_of_two_is_taken_and_the_other_is_gone():
    waiting = Waiting()
    assert await unless(result("wanted"), waiting.wait()) == "wanted"
    assert waiting.stopped
    waiting = Waiting()
    assert await unless(waiting.wait(), result("other")) is None
    assert waiting.stopped


async def test_a_failure_of_what_was_wanted_is_raised():
    waiting = Waiting()
    with pytest.raises(KeyError):
        await unless(fail(), waiting.wait())
    assert waiting.stopped


async def test_both_are_waited_for():
    assert await both(result(1, 5), result("two")) == (1, "two")


@pytest.mark.parametrize("failing_first", [True, False])
async def test_a_failure_of_either_ends_the_other_before_it_is_raised(failing_first):
    waiting = Waiting()
    pair = (fail(), waiting.wait()) if failing_first else (waiting.wait(), fail())
    with pytest.raises(KeyError):
        await both(*pair)
    assert waiting.stopped


async def test_cancelling_the_wait_ends_both():
    one, other = Waiting(), Waiting()
    task = asyncio.create_task(both(one.wait(), other.wait()))
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert one.stopped
    assert other.stopped


class Changes:
    """Numbers, each when it is asked for; it knows whether it was closed."""

    def __init__(self, most: int = 1000, turns: int = 1) -> None:
        self.most = most
        self.turns = turns
        self.told = 0
        self.closed = False

    async def all(self):
        try:
            while self.told < self.most:
                await result(None, self.turns)
                self.told += 1
                yield self.told
        finally:
            await asyncio.sleep(0)
            self.closed = True


async def test_what_comes_is_passed_on_until_it_ends():
    waiting, changes = Waiting(), Changes(most=5)
    assert [one async for one in up_to(changes.all(), waiting.wait())] == [1, 2, 3, 4, 5]
    assert waiting.stopped
    assert changes.closed


async def test_what_comes_is_passed_on_until_the_other_ends_or_fails():
    changes = Changes()
    seen = [one async for one in up_to(changes.all(), result(None, 20))]
    assert seen == list(range(1, len(seen) + 1))
    assert 1 <= len(seen) < 20
    assert changes.closed
    changes = Changes(turns=10_000)
    with pytest.raises(KeyError, match="failed"):
        [one async for one in up_to(changes.all(), fail())]
    assert changes.closed


async def test_who_stops_looking_leaves_nothing():
    waiting, changes = Waiting(), Changes()
    async with contextlib.aclosing(up_to(changes.all(), waiting.wait())) as some:
        assert await anext(some) == 1
        assert await anext(some) == 2
    assert waiting.stopped
    assert changes.closed


async def test_a_failure_of_what_comes_is_raised():
    waiting = Waiting()

    async def changes():
        yield 1
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        [one async for one in up_to(changes(), waiting.wait())]
    assert waiting.stopped

import asyncio

import pytest

from nsm.race import both, unless


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

"""A task's death is told and counted, and takes nothing else down unless it is vital."""

import asyncio
import threading

import pytest
from structlog.testing import capture_logs

from nsm.process.tasks import EndedError, running, tasks


async def fail() -> None:
    raise OSError("the disk is full")


async def test_the_end_of_the_block_cancels_what_runs_and_waits_for_it() -> None:
    seen = []

    async def runs() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    async with tasks("test") as group:
        group.spawn(runs(), "watcher of nothing")
        await asyncio.sleep(0)
        assert group.names == ("watcher of nothing",)
    assert seen == ["cleaned up"]
    assert not group.names


async def test_what_runs_is_told_by_name_and_number() -> None:
    before = running()
    ending = threading.Event()
    async with tasks("test") as group:
        for _ in range(2):
            group.spawn(asyncio.Event().wait(), "lease")
        unnamed = asyncio.ensure_future(asyncio.Event().wait())  # as our dependencies make them
        thread = threading.Thread(target=ending.wait, name="store")
        thread.start()
        during = running()
        ending.set()
        await asyncio.to_thread(thread.join)
        unnamed.cancel()
    assert during["tasks"] == before["tasks"] | {"lease": 2, "Event.wait": 1}
    assert during["threads"] == before["threads"] | {"store": 1}
    await asyncio.sleep(0)
    assert running()["tasks"] == before["tasks"]


async def test_a_death_is_logged_with_its_name_and_counted_and_the_rest_lives() -> None:
    with capture_logs() as logged:
        async with tasks("test") as group:
            other = group.spawn(asyncio.Event().wait(), "other")
            await asyncio.wait({group.spawn(fail(), "lease of wire 7")})
            await asyncio.sleep(0)
            assert group.deaths == 1
            assert not other.done()
    assert [(line["event"], line["task"], str(line["exc_info"])) for line in logged] == [
        ("a task died", "lease of wire 7", "the disk is full")
    ]


async def test_a_task_that_was_to_run_for_ever_may_not_end() -> None:
    with capture_logs() as logged:
        async with tasks("test") as group:
            await group.spawn(asyncio.sleep(0), "follower", forever=True)
            await group.spawn(asyncio.sleep(0), "errand")
            await asyncio.sleep(0)
            assert group.deaths == 1
    assert isinstance(logged[0]["exc_info"], EndedError)


async def test_a_vital_tasks_death_ends_the_block_with_its_error() -> None:
    async def block() -> None:
        async with tasks("test") as group:
            group.spawn(fail(), "server", vital=True)
            await asyncio.Event().wait()

    with capture_logs(), pytest.raises(OSError, match="the disk is full"):
        await block()
    me = asyncio.current_task()
    assert me is not None
    assert me.cancelling() == 0


async def test_a_vital_tasks_death_while_ending_changes_nothing() -> None:
    async def dies_of_cancellation() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("too late")

    with capture_logs() as logged:
        async with tasks("test") as group:
            group.spawn(dies_of_cancellation(), "server", vital=True)
            await asyncio.sleep(0)
    assert len(logged) == 1


async def test_the_blocks_own_error_is_the_one_that_leaves_it() -> None:
    async def block() -> None:
        async with tasks("test") as group:
            group.spawn(asyncio.Event().wait(), "other")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await block()


async def test_cancelled_twice_it_still_waits_for_all_to_clean_up() -> None:
    release = asyncio.Event()
    cleaned = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            while not release.is_set():
                try:
                    await release.wait()
                except asyncio.CancelledError:
                    continue
            cleaned.append(True)

    async def body() -> None:
        async with tasks("test") as group:
            group.spawn(slow(), "slow")
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as outer:
        task = outer.create_task(body())
        for _ in range(3):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
        assert not task.done()
        release.set()
    assert task.cancelled()
    assert cleaned == [True]


async def test_nothing_is_spawned_in_a_group_that_has_ended() -> None:
    async with tasks("manager east-1") as group:
        pass
    with pytest.raises(RuntimeError, match="no task 'late' any more: manager east-1 is ending"):
        group.spawn(asyncio.sleep(0), "late")

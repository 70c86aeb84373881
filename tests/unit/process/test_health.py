"""A process serves when every part of it does."""

import asyncio

from nsm.process.health import Health


def test_it_serves_when_nothing_is_missing() -> None:
    health = Health(listen="not listening yet", registry="not connected yet")
    health.ready("listen")
    assert not health.serving
    assert health.missing == {"registry": "not connected yet"}
    health.ready("registry")
    assert health.serving
    health.lost("registry", "refused")
    assert health.missing == {"registry": "refused"}


async def test_who_waits_hears_of_changes_and_of_nothing_else() -> None:
    health = Health(listen="not listening yet")
    async with asyncio.timeout(1), asyncio.TaskGroup() as group:
        waiting = group.create_task(health.changed())
        await asyncio.sleep(0)
        health.lost("listen", "not listening yet")
        await asyncio.sleep(0)
        assert not waiting.done()
        health.ready("listen")

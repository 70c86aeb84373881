import asyncio

from nsm.errors import UnavailableError
from nsm.model import Connection, Event, EventType, Path, Segment
from nsm.watches import Watches
from tests.support.wait import until


def conn(own: str, **more) -> Connection:
    """A connection as the next hop tells it: at its own segment, behind ours."""
    segments = (Segment("nsc", "n"), Segment("me", own), Segment("next", f"next-{own}"))
    return Connection(id=f"next-{own}", path=Path(segments, 2), **more)


class NextHop:
    """Answers monitor streams from a queue a URL; None in the queue breaks the stream."""

    def __init__(self):
        self.opened = []
        self.queues = {}

    async def monitor(self, url, selector):
        self.opened.append((url, selector))
        queue = self.queues.setdefault(url, asyncio.Queue())
        while (event := await queue.get()) is not None:
            yield event
        raise UnavailableError(f"{url} went away")


class World:
    def __init__(self):
        self.next = NextHop()
        self.changes = []
        self.ended = set()
        self.tasks = []
        self.watches = Watches("me", self.next.monitor, self.spawn, self.changed)

    def spawn(self, coro, name):
        self.tasks.append(asyncio.create_task(coro, name=name))
        return self.tasks[-1]

    def changed(self, id_, conn, *, ended=False):
        self.changes.append((id_, conn and conn.id))
        self.ended |= {id_} if ended else set()

    async def tell(self, url, kind, *conns):
        await until(lambda: url in self.next.queues, "the stream to open", record=False)
        await self.next.queues[url].put(Event(kind, {c.id: c for c in conns}))

    async def end(self):
        self.watches.stop()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert all(task.done() for task in self.tasks)


async def test_one_stream_serves_all_connections_through_the_same_next_hop():
    world = World()
    for own in ("a", "b", "c"):
        world.watches.follow(own, "unix:next")
    await world.tell("unix:next", EventType.INITIAL_STATE_TRANSFER, conn("a"), conn("b"), conn("c"))
    await world.tell("unix:next", EventType.DELETE, conn("b"))
    await until(lambda: ("b", None) in world.changes, "the deletion to be reported")
    assert world.ended == {"b"}
    assert len(world.next.opened) == 1
    assert world.next.opened[0][1].segments[0].name == "me"
    await world.end()


async def test_what_a_restarted_next_hop_no_longer_knows_is_reported_lost():
    world = World()
    world.watches.follow("a", "unix:next")
    await world.tell("unix:next", EventType.INITIAL_STATE_TRANSFER)
    await until(lambda: world.changes == [("a", None)], "the loss to be reported")
    assert world.ended == {"a"}
    await world.end()


async def test_a_broken_stream_is_reported_and_opened_again():
    world = World()
    world.watches.follow("a", "unix:next")
    await world.tell("unix:next", EventType.INITIAL_STATE_TRANSFER, conn("a"))
    await world.next.queues["unix:next"].put(None)
    await until(lambda: ("a", None) in world.changes, "the loss to be reported")
    await until(lambda: len(world.next.opened) == 2, "the stream to be opened again", bar=0.2)
    assert not world.ended, "it is only silent"
    await world.tell("unix:next", EventType.INITIAL_STATE_TRANSFER, conn("a"))
    await until(lambda: world.changes[-1] == ("a", "next-a"), "the connection to be seen again")
    await world.end()


async def test_other_peoples_connections_are_not_ours():
    world = World()
    world.watches.follow("a", "unix:next")
    stranger = Connection(id="x", path=Path((Segment("you", "a"), Segment("next", "x")), 1))
    await world.tell("unix:next", EventType.UPDATE, stranger, Connection(id="no path"))
    await world.tell("unix:next", EventType.UPDATE, conn("a"))
    await until(lambda: world.changes, "our own to be reported")
    assert world.changes == [("a", "next-a")]
    await world.end()


async def test_the_stream_ends_with_its_last_connection():
    world = World()
    world.watches.follow("a", "unix:next")
    world.watches.follow("b", "unix:next")
    world.watches.release("a")
    assert not world.tasks[0].cancelling()
    world.watches.release("b")
    await until(lambda: world.tasks[0].done(), "the stream to end")
    assert not world.watches.follows("b")


async def test_a_connection_that_moves_is_followed_at_its_new_next_hop_only():
    world = World()
    world.watches.follow("a", "unix:old")
    world.watches.follow("a", "unix:new")
    await world.tell("unix:new", EventType.UPDATE, conn("a"))
    await until(lambda: world.changes == [("a", "next-a")], "the new next hop to be heard")
    await until(lambda: world.tasks[0].done(), "the old stream to end")
    await world.end()

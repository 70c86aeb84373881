"""What a client's wires suffered, as they tell it: into its figures, and into a file."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from nsm.client import Change, Wire
from nsm.outages import Outage, journal
from nsm.process.metrics import figures


@asynccontextmanager
async def noted(path: str) -> AsyncIterator[Callable[[Change, Wire], None]]:
    """Whom to tell of wires' changes during the block; path as `nsm.outages.journal` has it."""
    async with journal(path) as kept:

        def note(what: Change, wire: Wire) -> None:
            trouble = wire.trouble
            if trouble is None:
                return
            if what is Change.UP and trouble.healed:
                figures.healed(trouble.cause, trouble.seconds)
                kept.add(Outage.of(trouble, wire.id, wire.service, wire.endpoint))
            elif what is Change.CLOSED and not trouble.healed:
                kept.add(Outage.of(trouble, wire.id, wire.service))

        yield note

"""Answers of a stream that never ends by itself: a monitor, a watch."""

import asyncio
from typing import Any

from grpclib.server import Stream

from nsm.errors import ExhaustedError

PATIENCE = 5.0  # seconds one message may wait for its watcher to read


async def send(stream: "Stream[Any, Any]", message: Any) -> None:
    """Send one message; a watcher that does not read loses its stream, nobody else's."""
    try:
        async with asyncio.timeout(PATIENCE):
            await stream.send_message(message)
    except TimeoutError:
        raise ExhaustedError(
            f"watcher too slow: it read nothing for {PATIENCE:g} s", hint="watch again"
        ) from None

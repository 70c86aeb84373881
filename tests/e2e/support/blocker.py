"""A program of a lab that is ready, and then looks at a folder on its event loop's thread."""

import os
import sys
from dataclasses import dataclass

from nsm.process.config import Common, read
from nsm.process.run import Process, run


@dataclass(frozen=True, kw_only=True)
class Config(Common):
    """blocker: breaks the rule of the loop once."""


async def serve(_: Config, process: Process) -> None:
    process.ready()
    os.listdir("/proc/self/fd")
    await process.stopped()


if __name__ == "__main__":
    sys.exit(run("blocker", read(Config), serve))

"""Real processes for the tests of identity: the issuer, and workloads that ask it."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CALLER = str(Path(__file__).with_name("caller.py"))
AGENT = str(Path(__file__).with_name("agent.py"))


@dataclass
class Running:
    """A process, and each line of JSON that it has written so far."""

    process: asyncio.subprocess.Process
    said: list[dict[str, Any]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    async def follow(self) -> None:
        async def read(stream: Any, take: Callable[[bytes], None]) -> None:
            async for line in stream:
                take(line)

        async with asyncio.TaskGroup() as group:
            group.create_task(
                read(self.process.stdout, lambda line: self.said.append(json.loads(line)))
            )
            group.create_task(
                read(self.process.stderr, lambda line: self.log.append(line.decode()))
            )

    def tell(self, **what: Any) -> None:
        """Write a line of JSON to its stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")


@asynccontextmanager
async def running(
    *command: str, environ: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
) -> AsyncIterator[Running]:
    """Start command; end it, if it still runs, with the block."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
        pass_fds=pass_fds,
        limit=2**24,
    )
    made = Running(process)
    following = asyncio.create_task(made.follow())
    try:
        yield made
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()
        await following
        if process.stdin:
            process.stdin.close()


class Place:
    """A directory with everything an issuer needs, and the issuer's socket."""

    def __init__(self, directory: Path, domain: str = "td.example") -> None:
        self.directory = directory
        self.domain = domain
        self.entries = directory / "entries.yaml"
        self.federation = directory / "federation"
        self.bundle = directory / "bundle.pem"
        self.socket = directory / "agent.sock"
        self.url = f"unix://{self.socket}"
        directory.mkdir(exist_ok=True)
        self.federation.mkdir(exist_ok=True)
        for path in (*reversed(directory.parents), directory):
            if path.is_relative_to("/tmp") and path != Path("/tmp"):
                path.chmod(0o755)  # callers of other users must reach the socket

    def register(self, *entries: Mapping[str, Any]) -> None:
        """Write the registration file."""
        whole = [{**entry, "id": f"spiffe://{self.domain}/{entry['id']}"} for entry in entries]
        beside = self.directory / ".entries"
        beside.write_text(json.dumps(whole))
        beside.replace(self.entries)

    @property
    def environ(self) -> dict[str, str]:
        return {
            "NSM_TRUST_DOMAIN": self.domain,
            "NSM_ISSUER_DIR": str(self.directory / "issuer"),
            "NSM_LISTEN_ON": self.url,
            "NSM_ENTRIES": str(self.entries),
            "NSM_FEDERATION_DIR": str(self.federation),
            "NSM_BUNDLE_FILE": str(self.bundle),
        }

    @asynccontextmanager
    async def issuer(self, under: Sequence[str] = (), **more: str) -> AsyncIterator[Running]:
        """The issuer, ready; under is a command that starts it, more are variables."""
        read_end, write_end = os.pipe()
        try:
            async with running(
                *(*under, sys.executable, "-P", "-m", "nsm.process.issuer"),
                environ={**self.environ, "NSM_READY_FD": str(write_end), **more},
                pass_fds=[write_end],
            ) as process:
                os.close(write_end)
                write_end = -1
                line = await asyncio.wait_for(asyncio.to_thread(os.read, read_end, 4096), 20)
                assert line, f"the issuer did not become ready: {process.log}"
                yield process
        finally:
            os.close(read_end)
            if write_end >= 0:
                os.close(write_end)

    async def ask(
        self, what: str = "fetch", *arguments: str, program: str = sys.executable, **environ: str
    ) -> list[dict[str, Any]]:
        """All that a workload says that asks once."""
        async with self.asking(what, *arguments, program=program, **environ) as caller:
            assert caller.process.stdin is not None
            caller.process.stdin.close()
            await asyncio.wait_for(caller.process.wait(), 60)
        assert caller.said, caller.log
        return caller.said

    def asking(
        self, what: str, *arguments: str, program: str = sys.executable, **environ: str
    ) -> Any:
        """A workload that asks, as a context."""
        return running(program, CALLER, what, self.url, *arguments, environ=environ)

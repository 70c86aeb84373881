"""One node's mesh of real processes under identities of their own, for tests of its users."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.support.secrets import told_in
from tests.support.spaces import Space, space

ROOT = Path(__file__).parents[3]
DOMAIN = "td.test"
GIDS = {
    "nsmgr": 61001,
    "forwarder": 61002,
    "responder": 61003,
    "client": 61004,
    "other": 61005,
    "registry": 61006,
}
REGISTRY = "tcp://127.0.0.1:5002"  # of the node's namespace


class Program:
    """A running process and what it said."""

    def __init__(self, process: asyncio.subprocess.Process, ready: "asyncio.Task[bytes]") -> None:
        self.process = process
        self.log: list[str] = []
        self._ready = ready
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(line.decode().rstrip())

    async def ready(self) -> str:
        """What it says when it is up; empty if it ended before."""
        return (await asyncio.wait_for(self._ready, 30)).decode().rstrip()

    async def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit code, once it obeyed the signal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        code = await asyncio.wait_for(self.process.wait(), 30)
        await self._reading
        with contextlib.suppress(asyncio.CancelledError):
            await self._ready
        return code

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.ended()


class Mesh:
    """Where everything is, and how programs are started."""

    def __init__(self, directory: Path, node: Space) -> None:
        self.directory = directory
        self.node = node
        self.agent = f"unix://{directory}/agent.sock"
        self.manager = f"unix://{directory}/nsm.io.sock"
        self.excluded = directory / "excluded_prefixes.yaml"  # nobody wrote it yet
        self.registry: Program
        self.nsmgr: Program
        self.forwarder: Program
        self._programs: list[Program] = []

    async def start(
        self, *command: str, kind: str = "", where: Space | None = None, **variables: str
    ) -> Program:
        """Start a program as kind (that is who it is to the issuer), in a namespace."""
        read_end, write_end = os.pipe()
        environ = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "TMPDIR": str(self.directory),
            "SPIFFE_ENDPOINT_SOCKET": self.agent,
            "NSM_CONNECT_TO": self.manager,
            "NSM_READY_FD": str(write_end),
            "NSM_LOG_LEVEL": "TRACE",  # what must not be in a log must not be in all they ever log
            **({"NSM_LOOP_GUARD": guard} if (guard := os.environ.get("NSM_LOOP_GUARD")) else {}),
            **variables,
        }
        inside = ("ip", "netns", "exec", (where or self.node).name)
        process = await asyncio.create_subprocess_exec(
            *inside,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environ,
            pass_fds=[write_end],
            cwd=self.directory,
            **({"group": GIDS[kind], "extra_groups": []} if kind else {}),
        )
        os.close(write_end)
        program = Program(process, asyncio.create_task(asyncio.to_thread(_line, read_end)))
        self._programs.append(program)
        return program

    async def module(self, name: str, **options: Any) -> Program:
        """Start one of our modules."""
        return await self.start(sys.executable, "-P", "-m", name, **options)

    async def up(self, name: str, **options: Any) -> Program:
        """Start one of our modules and wait until it is ready."""
        program = await self.module(name, **options)
        assert await program.ready(), "\n".join(program.log)
        return program

    async def start_manager(self) -> Program:
        variables = {
            "NSM_LISTEN_ON": self.manager,
            "NSM_REGISTRY_URL": REGISTRY,
            "NSM_EXCLUDED_PREFIXES_PATH": str(self.excluded),
            "NODE_NAME": "node-1",
            "POD_NAME": "nsmgr-pod",
        }
        return await self.up("nsmgr", kind="nsmgr", NSM_NAME="nsmgr-1", **variables)

    async def start_registry(self, **variables: str) -> Program:
        return await self.up("registry", kind="registry", NSM_LISTEN_ON=REGISTRY, **variables)

    async def start_forwarder(self) -> Program:
        variables = {"NSM_LISTEN_ON": f"unix://{self.directory}/forwarder.sock"}
        return await self.up("forwarder", kind="forwarder", NSM_NAME="forwarder-1", **variables)

    async def responder(self, where: Space, **variables: str) -> Program:
        variables = {"NSM_NAME": "nse-1", "NSM_SERVICE_NAMES": "echo,ping"} | variables
        return await self.up("endpoints.responder", kind="responder", where=where, **variables)

    async def client(self, where: Space, services: str, **variables: str) -> Program:
        variables = {"NSM_NAME": "app", "NSM_NETWORK_SERVICES": services} | variables
        return await self.module("nsm.process.client", kind="client", where=where, **variables)

    async def stop(self) -> None:
        for program in reversed(self._programs):
            if program.process.returncode is None:
                await program.end()
        told = [line for program in self._programs for line in told_in("\n".join(program.log))]
        assert not told, f"a token or a key is in a log: {told[0][:400]}"


def status(path: Path) -> list[dict[str, Any]]:
    """The lines of a status file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@asynccontextmanager
async def mesh(
    directory: Path, dns: Mapping[str, Sequence[str]], **registry: str
) -> AsyncIterator[Mesh]:
    """Issuer, registry, manager and forwarder, up: four processes under four SPIFFE ids."""
    for path in (directory, *directory.parents):
        if path.is_relative_to("/tmp") and path != Path("/tmp"):
            path.chmod(0o755)
    entries = [
        {"id": f"spiffe://{DOMAIN}/{kind}", "gid": gid, "dns": list(dns.get(kind, ()))}
        for kind, gid in GIDS.items()
    ]
    (directory / "entries.json").write_text(json.dumps(entries))
    with space("node") as node:
        made = Mesh(directory, node)
        try:
            await made.up(
                "nsm.process.issuer",
                NSM_TRUST_DOMAIN=DOMAIN,
                NSM_ISSUER_DIR=str(directory / "issuer"),
                NSM_ENTRIES=str(directory / "entries.json"),
                NSM_LISTEN_ON=made.agent,
            )
            starts = made.start_registry(**registry), made.start_manager(), made.start_forwarder()
            made.registry, made.nsmgr, made.forwarder = await asyncio.gather(*starts)
            yield made
        finally:
            await made.stop()


def _line(file: int) -> bytes:
    try:
        return os.read(file, 4096)
    finally:
        os.close(file)

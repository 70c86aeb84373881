"""Trust domains that may know each other, with their programs as processes of their own."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.serialization import Encoding

from nsm.identity import issuer
from nsm.identity.authority import Authority
from nsm.identity.source import HeldIdentity, Identity, Svid
from nsm.identity.spiffe import SpiffeId
from nsm.rpc.peers import Peers
from nsm.rpc.registry import RegistryClient
from tests.e2e.registry.lab import ROOT, Stock

FIRST_GID = 61_950
PROGRAMS = {
    "registry": "registry",
    "registry-proxy": "registry.proxy",
    "nsmgr": "nsmgr",
    "ipam": "endpoints.ipam",
}


class Program:
    """A program of ours; url is where it listens, from its first start on."""

    def __init__(self, realm: "Realm", name: str, kind: str, host: str) -> None:
        self.realm = realm
        self.name = name
        self.id = f"spiffe://{realm.name}/{name}"
        self.url = f"tcp://{host}:0"
        self.said = ""
        self._kind = kind
        self._folder = realm.folder / name
        self._folder.mkdir()
        self._gid = realm.gids[name]
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, **settings: str) -> None:
        """Start where it listened before; return when it answers."""
        read, write = os.pipe()
        try:
            await self.spawn(NSM_READY_FD=str(write), **settings)
            os.close(write)
            self.said = await asyncio.to_thread(lambda: os.read(read, 65536).decode())
        finally:
            os.close(read)
        assert self.said, f"{self.id} did not start: {self.log()}"
        found = re.search(r"tcp://(\[[^]]*\]|[^:,; ]*):\d+", self.said)
        assert found, self.said
        self.url = found[0]

    async def spawn(self, **settings: str) -> asyncio.subprocess.Process:
        """Start, and leave the rest to the caller."""
        told = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "NSM_LISTEN_ON": self.url,
            "NSM_LOOP_GUARD": str(self._folder / "guard"),
            "SPIFFE_ENDPOINT_SOCKET": f"unix://{self.realm.folder}/agent.sock",
        }
        with (self._folder / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", PROGRAMS[self._kind]),
                cwd=ROOT,
                env=told | settings,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                group=self._gid,
                extra_groups=(),
                pass_fds=tuple(int(v) for k, v in settings.items() if k == "NSM_READY_FD"),
            )
        return self._process

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop, if it runs; its exit code."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            self._process.send_signal(number)
        code = await asyncio.wait_for(self._process.wait(), 20)
        self._process = None
        return code

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It stands still for the block: the kernel goes on taking what is sent to it."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def log(self) -> str:
        """All it ever said."""
        return (self._folder / "log").read_text()

    def guarded(self) -> list[str]:
        """Calls that may have blocked its loop."""
        told = self._folder / "guard"
        return told.read_text().splitlines() if told.exists() else []


class Realm:
    """A trust domain: its authority, whom it knows, and its programs."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.authority = Authority.create(name)
        self.known = {name: self.authority.certificates}
        self.gids: dict[str, int] = {}
        self.programs: list[Program] = []

    def svid(self, name: str) -> Svid:
        """A workload's certificate."""
        return self.authority.issue(SpiffeId(self.name, f"/{name}"))

    async def start(
        self, name: str, kind: str = "registry", host: str = "127.0.0.1", **settings: str
    ) -> Program:
        """A program of ours under that name."""
        made = self.place(name, kind, host)
        await made.start(**settings)
        return made

    def place(self, name: str, kind: str = "registry", host: str = "127.0.0.1") -> Program:
        """A program that does not run yet."""
        made = Program(self, name, kind, host)
        self.programs.append(made)
        return made

    @asynccontextmanager
    async def client(self, name: str, program: Program) -> AsyncIterator[RegistryClient]:
        """A workload's registry client, ours."""
        source = HeldIdentity(Identity(self.svid(name), self.known))
        async with Peers(source) as peers:
            yield RegistryClient(peers, program.url, dial_timeout=5)

    @asynccontextmanager
    async def stock(self, name: str, program: Program) -> AsyncIterator[Stock]:
        """A workload's registry client, stock grpcio."""
        svid = self.svid(name)
        trusted = [one for bundle in self.known.values() for one in bundle]
        roots = b"".join(one.public_bytes(Encoding.PEM) for one in trusted)
        credentials = grpc.ssl_channel_credentials(roots, svid.key_pem(), svid.chain_pem())
        options = [
            ("grpc.ssl_target_name_override", program.name),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        target = program.url.removeprefix("tcp://")
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            yield Stock(svid, channel)


class Realms:
    """All of a test's trust domains."""

    def __init__(self, folder: Path, stack: AsyncExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.all: list[Realm] = []

    async def make(self, *names: str, programs: tuple[str, ...]) -> list[Realm]:
        """Trust domains with programs of these names, each knowing all of these domains."""
        made = []
        for name in names:
            folder = self._folder / name
            (folder / "federation").mkdir(parents=True)
            folder.chmod(0o711)
            made.append(Realm(name, folder))
        for realm in made:
            realm.gids = {one: FIRST_GID + place for place, one in enumerate(programs)}
            for other in made:
                realm.known |= {other.name: other.authority.certificates}
                (realm.folder / "federation" / f"{other.name}.pem").write_bytes(
                    other.authority.bundle_pem()
                )
            entries = realm.folder / "entries.yaml"
            entries.write_text(
                "".join(
                    f"- {{id: 'spiffe://{realm.name}/{one}', gid: {gid}, dns: [{one}]}}\n"
                    for one, gid in realm.gids.items()
                )
            )
            await self._stack.enter_async_context(
                issuer.serve(
                    f"unix://{realm.folder}/agent.sock",
                    realm.authority,
                    entries=entries,
                    federation=realm.folder / "federation",
                )
            )
        self.all += made
        return made


@asynccontextmanager
async def realms(folder: Path) -> AsyncIterator[Realms]:
    """Trust domains to make; whatever still runs ends with the block, and none blocked its loop."""
    folder.chmod(0o711)
    async with AsyncExitStack() as stack:
        made = Realms(folder, stack)
        try:
            yield made
        finally:
            programs = [program for realm in made.all for program in realm.programs]
            for program in programs:
                await program.stop(signal.SIGKILL)
        blocked = [line for program in programs for line in program.guarded()]
        assert not blocked, f"{len(blocked)} calls that may block ran on an event loop: {blocked}"

"""A registry as a process of its own, and callers of it that are not ours: grpcio and PyJWT."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import jwt
from cryptography.hazmat.primitives import serialization

from nsm.identity import issuer
from nsm.identity.authority import Authority
from nsm.identity.source import HeldIdentity, Identity, Svid
from nsm.identity.spiffe import SpiffeId
from nsm.proto import registry_pb2, registry_pb2_grpc

GID = 61999  # by which the issuer knows the registry
REGISTRY = "spiffe://td/registry"
EMPTY = '{"Index":0,"PathSegments":null}'
ROOT = Path(__file__).parents[3]

Endpoint = registry_pb2.NetworkServiceEndpoint
EndpointQuery = registry_pb2.NetworkServiceEndpointQuery
Service = registry_pb2.NetworkService
ServiceQuery = registry_pb2.NetworkServiceQuery


class Lab:
    """A trust domain, its issuer, and registries to start, kill and start again."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.folder = folder
        self.authority = authority
        self.url = f"unix://{folder}/registry.sock"
        self.tcp = ""
        self.process: asyncio.subprocess.Process | None = None
        self.line = ""

    def svid(self, name: str) -> Svid:
        return self.authority.issue(SpiffeId("td", f"/{name}"))

    def source(self, name: str) -> HeldIdentity:
        return HeldIdentity(Identity(self.svid(name), {"td": self.authority.certificates}))

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "NSM_LISTEN_ON": f"{self.url},{self.tcp or 'tcp://127.0.0.1:0'}",
            "SPIFFE_ENDPOINT_SOCKET": f"unix://{self.folder}/agent.sock",
            **settings,
        }

    async def spawn(self, **settings: str) -> asyncio.subprocess.Process:
        with (self.folder / "registry.log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "registry"),
                cwd=ROOT,
                env=self.environment(**settings) | {"PYTHONPATH": str(ROOT)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                group=GID,
                extra_groups=(),
                pass_fds=tuple(int(v) for k, v in settings.items() if k == "NSM_READY_FD"),
            )

    async def start(self, **settings: str) -> None:
        """Start, and return when it answers."""
        read, write = os.pipe()
        try:
            self.process = await self.spawn(NSM_READY_FD=str(write), **settings)
            os.close(write)
            self.line = await asyncio.to_thread(lambda: os.read(read, 65536).decode())
        finally:
            os.close(read)
        assert self.line, f"the registry did not start: {self.log()}"
        self.tcp = next(
            part.strip()
            for part in self.line.replace(";", ",").replace(": ", ",").split(",")
            if part.strip().startswith("tcp://")
        )

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        code = await asyncio.wait_for(self.process.wait(), 20)
        self.process = None
        return code

    def log(self) -> str:
        return (self.folder / "registry.log").read_text()

    @asynccontextmanager
    async def stock(self, name: str, *, tcp: bool = False) -> AsyncIterator["Stock"]:
        svid = self.svid(name)
        credentials = grpc.ssl_channel_credentials(
            self.authority.bundle_pem(), svid.key_pem(), svid.chain_pem()
        )
        target = self.tcp.removeprefix("tcp://") if tcp else self.url
        options = [
            ("grpc.ssl_target_name_override", "registry"),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        async with grpc.aio.secure_channel(target, credentials, options) as channel:
            yield Stock(svid, channel)


@asynccontextmanager
async def lab(folder: Path) -> AsyncIterator[Lab]:
    """A trust domain with a running issuer; the registry, if it still runs, ends with the block."""
    authority = Authority.create("td")
    entries = folder / "entries.yaml"
    entries.write_text(f"- id: {REGISTRY}\n  gid: {GID}\n")
    folder.chmod(0o711)
    made = Lab(folder, authority)
    async with issuer.serve(f"unix://{folder}/agent.sock", authority, entries=entries):
        try:
            yield made
        finally:
            if made.process is not None:
                await made.stop(signal.SIGKILL)


def token(svid: Svid, *audience: str, life: float = 60, sub: str = "", **more: Any) -> str:
    """A token as wire.md §4.2 has it, made by PyJWT."""
    claims = {"sub": sub or str(svid.id), "aud": list(audience), "exp": int(time.time() + life)}
    return jwt.encode(claims | more, svid.key, algorithm="ES256")


class Stock:
    """Stock grpcio with stubs, and tokens of PyJWT's."""

    def __init__(self, svid: Svid, channel: grpc.aio.Channel) -> None:
        self.svid = svid
        self.endpoints = registry_pb2_grpc.NetworkServiceEndpointRegistryStub(channel)
        self.services = registry_pb2_grpc.NetworkServiceRegistryStub(channel)
        self.channel = channel

    def metadata(self, path: str | None = EMPTY, own: str | None = None, life: float = 60) -> Any:
        own = token(self.svid, REGISTRY, life=life) if own is None else own
        expires = time.strftime("%Y-%m-%dT%H:%M:%S.5+00:00", time.gmtime(time.time() + life))
        return [
            *([("nsm-client-token", own), ("nsm-client-token-expires", expires)] if own else []),
            *([("path", path)] if path is not None else []),
        ]

    async def register(self, asked: Any, **about: Any) -> tuple[Any, dict[str, Any]]:
        """The answer and the path in its header."""
        stub = self.services if isinstance(asked, Service) else self.endpoints
        call = stub.Register(asked, metadata=self.metadata(**about), timeout=10)
        header = dict(await call.initial_metadata())
        answer = await call
        return answer, json.loads(header["path"])

    async def unregister(self, asked: Any, **about: Any) -> None:
        stub = self.services if isinstance(asked, Service) else self.endpoints
        await stub.Unregister(asked, metadata=self.metadata(**about), timeout=10)

    async def find(self, **query: Any) -> list[Any]:
        """All endpoints that answer."""
        call = self.endpoints.Find(
            EndpointQuery(network_service_endpoint=Endpoint(**query)), timeout=20
        )
        return [answer async for answer in call]

    async def find_services(self, **query: Any) -> list[Any]:
        call = self.services.Find(ServiceQuery(network_service=Service(**query)), timeout=20)
        return [answer async for answer in call]

    def watch(self, **query: Any) -> Any:
        return self.endpoints.Find(
            EndpointQuery(network_service_endpoint=Endpoint(**query), watch=True)
        )

    async def refused(self, asked: Any, **about: Any) -> grpc.aio.AioRpcError:
        try:
            await self.register(asked, **about)
        except grpc.aio.AioRpcError as error:
            return error
        raise AssertionError(f"{asked} was taken")


def verified(text: str, svid_or_certificate: Any, audience: str) -> dict[str, Any]:
    """The claims of a token, after PyJWT has checked its signature, audience and end."""
    public = svid_or_certificate.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims: dict[str, Any] = jwt.decode(text, public, algorithms=["ES256"], audience=audience)
    return claims

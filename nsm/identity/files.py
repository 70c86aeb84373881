"""An identity kept in files: certificate, key, and a bundle per trust domain (PEM).

For places where something else renews them. They are read again when they
change; while they do not belong together (a renewal in the middle) or cannot be
read, the last good identity stays.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import structlog
from cryptography import x509

from nsm.errors import NsmError
from nsm.identity import material
from nsm.identity.background import beside
from nsm.identity.changes import LOOK_EVERY, read, seen
from nsm.identity.source import HeldIdentity, Identity, Source
from nsm.identity.spiffe import check_trust_domain
from nsm.identity.verify import MAX_CHAIN

MAX_PEM = 4 * 1024 * 1024  # bytes of one file

log = structlog.get_logger(__name__)


@asynccontextmanager
async def file_source(
    cert: Path, key: Path, bundles: Mapping[str, Path], *, every: float = LOOK_EVERY
) -> AsyncIterator[Source]:
    """The identity in these files, looked at every so many seconds.

    Raises InvalidError or PreconditionError, naming the file, if there is no good
    identity to begin with.
    """
    for domain in bundles:
        check_trust_domain(domain)
    paths = (cert, key, *bundles.values())
    before = await asyncio.to_thread(seen, paths)
    held = HeldIdentity(await asyncio.to_thread(_identity, cert, key, bundles))

    async def follow() -> None:
        looked, complained = before, ""
        while True:
            await asyncio.sleep(every)
            now = await asyncio.to_thread(seen, paths)
            if now == looked:
                continue
            try:
                identity = await asyncio.to_thread(_identity, cert, key, bundles)
            except NsmError as why:  # looked stays: try again until it is whole
                if str(why) != complained:
                    log.warning("identity files are not good; the last good stays", why=str(why))
                complained = str(why)
                continue
            looked, complained = now, ""
            if held.replace(identity):
                log.info("identity renewed", id=str(identity.svid.id), source=str(cert))

    async with beside(follow(), f"follower of {cert}"):
        yield held


def _identity(cert: Path, key: Path, bundles: Mapping[str, Path]) -> Identity:
    chain = material.certificates_pem(
        read(cert, MAX_PEM, "the certificate"), str(cert), most=MAX_CHAIN
    )
    private = material.key_pem(read(key, material.MAX_KEY, "the key"), str(key))
    return Identity(
        material.svid(chain, private, str(cert)),
        {domain: bundle(path) for domain, path in bundles.items()},
    )


def bundle(path: Path) -> tuple[x509.Certificate, ...]:
    """The authorities in a PEM file. Blocks. Raises InvalidError or PreconditionError."""
    pem = read(path, MAX_PEM, "the bundle")
    found = material.certificates_pem(pem, str(path), most=material.MAX_BUNDLE)
    return material.authorities(found, str(path))

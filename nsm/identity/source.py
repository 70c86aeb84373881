"""What a process is called, and whom it trusts: values of one moment.

An `Identity` is replaced as a whole when a certificate or a bundle changes, so
nobody ever sees a new key beside an old bundle. Where it comes from (the
Workload API, files) is hidden behind `Source`; what one TLS handshake showed
and was shown stays in its `Handshake`, because a token belongs to the
handshake of the connection it travels on and not to the newest certificate.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND

Bundles = Mapping[str, tuple[x509.Certificate, ...]]
"""Trust domain name -> its authorities' certificates."""


@dataclass(frozen=True)
class Svid:
    """A certificate that carries our SPIFFE id, and its key. Leaf first; root not included."""

    id: SpiffeId
    chain: tuple[x509.Certificate, ...]
    key: ec.EllipticCurvePrivateKey = field(repr=False, compare=False)
    hint: str = ""

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate that carries the id."""
        return self.chain[0]

    @cached_property
    def not_before(self) -> int:
        """When the leaf begins to hold, in nanoseconds since 1970."""
        return int(self.leaf.not_valid_before_utc.timestamp()) * SECOND

    @cached_property
    def not_after(self) -> int:
        """When the leaf ceases to hold, in nanoseconds since 1970."""
        return not_after(self.leaf)

    def chain_pem(self) -> bytes:
        """The chain as PEM, leaf first, as `ssl.SSLContext.load_cert_chain` wants it."""
        return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in self.chain)

    def key_pem(self) -> bytes:
        """The key as unencrypted PKCS#8 PEM: a secret, for a TLS library and nobody else."""
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


@dataclass(frozen=True)
class Identity:
    """Our certificate and all bundles, as they were at one moment."""

    svid: Svid
    bundles: Bundles

    @property
    def authorities(self) -> tuple[x509.Certificate, ...]:
        """All authorities of all trust domains: for a TLS library's first look, which
        `verify.peer_id` must follow, because only that knows who may speak for whom."""
        return tuple({c: None for some in self.bundles.values() for c in some})


class Source(Protocol):
    """Where a process has its identity from."""

    @property
    def identity(self) -> Identity:
        """The newest; never blocks."""
        ...

    async def changed(self, seen: Identity) -> Identity:
        """Wait until the identity is another one than seen, and return it."""
        ...


@dataclass(frozen=True)
class Handshake:
    """One TLS handshake: what we showed, and who was at the other end."""

    own: Svid
    peer_id: SpiffeId
    peer_leaf: x509.Certificate
    peer_not_after: int  # ns since 1970
    chain: tuple[x509.Certificate, ...] = field(default=(), repr=False)  # the peer's, leaf first


class HeldIdentity:
    """A `Source` that is told what is new: by a stream, a file watcher or a test."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._replaced = asyncio.Event()

    @property
    def identity(self) -> Identity:
        """The newest; never blocks."""
        return self._identity

    async def changed(self, seen: Identity) -> Identity:
        """Wait until the identity is another one than seen, and return it."""
        while self._identity is seen:
            await self._replaced.wait()
        return self._identity

    def replace(self, identity: Identity) -> bool:
        """Hold identity from now on; False, and nothing happens, if it is the same as before.

        To be called on the loop's thread.
        """
        if identity == self._identity:
            return False
        self._identity = identity
        self._replaced.set()
        self._replaced = asyncio.Event()
        return True


def not_after(certificate: x509.Certificate) -> int:
    """When certificate ceases to hold, in nanoseconds since 1970."""
    return int(certificate.not_valid_after_utc.timestamp()) * SECOND

"""The token that accompanies every call of the mesh (`wire.md` §4.2, §4.3)."""

from dataclasses import dataclass, field

from cryptography import x509

from nsm.identity.source import Svid
from nsm.identity.spiffe import SpiffeId


@dataclass(frozen=True, slots=True)
class Token:
    """A JWT, and until when it is worth anything, in nanoseconds since 1970."""

    text: str = field(repr=False)  # never in a log
    expires: int


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says; proves nothing until `signed_by`."""

    sub: str
    aud: tuple[str, ...]
    exp: int


def issue(
    svid: Svid, audience: SpiffeId | None, lifetime: int, *, peer_not_after: int | None, now: int
) -> Token:
    raise NotImplementedError


def claims(text: str) -> Claims:
    raise NotImplementedError


def signed_by(text: str, leaf: x509.Certificate) -> bool:
    raise NotImplementedError


def format_instant(instant: int) -> str:
    raise NotImplementedError


def parse_instant(text: str) -> int:
    raise NotImplementedError

"""The token that accompanies every call of the mesh (`wire.md` §4.2, §4.3).

A JWT signed with the key of the certificate that the TLS handshake showed. The
peer's policies are upstream's, so the form is exact: header, claims and their
types as in §4.2, nothing more. A token is a bearer secret for its audience: it
stands in no repr, no message and no log line.
"""

import base64
import binascii
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from nsm.errors import DeniedError, InvalidError
from nsm.identity.source import Svid
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND

MAX_TOKEN = 8 * 1024  # characters; a token of two long ids has about 6 KiB
MAX_EXPIRY = 253402300799  # seconds: the last second of the year 9999
_REMEMBERED = 128  # verified tokens; a hop of ours sends a fresh one with every call
_INTEGER = 32  # bytes of r and of s in an ES256 signature
_ES256 = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Token:
    """A JWT, and until when it is worth anything, in nanoseconds since 1970."""

    text: str = field(repr=False)  # never in a log
    expires: int


@dataclass(frozen=True, slots=True)
class Claims:
    """What a token says; proves nothing until `signed_by`. exp is in ns since 1970."""

    sub: str
    aud: tuple[str, ...]
    exp: int


def issue(
    svid: Svid, audience: SpiffeId | None, lifetime: int, *, peer_not_after: int | None, now: int
) -> Token:
    """Say to audience, the TLS peer, that we are svid's id (`wire.md` §4.2).

    lifetime is in nanoseconds, peer_not_after and now in nanoseconds since 1970.
    The claim `exp` is capped by our own certificate's end; what is returned as
    `expires` by the peer's too, because the peer's next hop measures it by that.
    Raises InvalidError if svid's key is no P-256 key.
    """
    if not isinstance(svid.key.curve, ec.SECP256R1):
        raise InvalidError(
            f"the key of {svid.id} is on the curve {svid.key.curve.name}; tokens need P-256",
            hint="have the issuer make EC P-256 certificates (SPIRE: workload_x509_svid_key_type)",
        )
    expires = min(now + lifetime, svid.not_after)
    said: dict[str, Any] = {"sub": str(svid.id)}
    if audience is not None:
        said["aud"] = [str(audience)]  # an array: upstream's chained policy iterates it
    said["exp"] = expires // SECOND
    signed = f"{_HEADER}.{_encoded(json.dumps(said, separators=(',', ':')).encode())}"
    r, s = decode_dss_signature(svid.key.sign(signed.encode(), _ES256))
    signature = r.to_bytes(_INTEGER, "big") + s.to_bytes(_INTEGER, "big")
    if peer_not_after is not None:
        expires = min(expires, peer_not_after)
    return Token(f"{signed}.{_encoded(signature)}", expires)


def claims(text: str) -> Claims:
    """What a token says, unverified. Raises DeniedError, without the token's text.

    An `aud` that is a bare string is read as none: upstream's policies iterate an
    array, and a token that passes here must pass there.
    """
    said = decoded(text)
    sub, exp = said.get("sub"), expiry(said)
    if not isinstance(sub, str):
        raise DeniedError("the token has no subject (claim 'sub')", hint=_NEW_TOKEN)
    if exp is None:
        raise DeniedError(
            "the token has no usable end (claim 'exp', seconds since 1970)", hint=_NEW_TOKEN
        )
    return Claims(sub, audience(said), exp)


def decoded(text: str) -> Mapping[str, Any]:
    """All claims of a token as JSON says them, unverified.

    Raises DeniedError, without the token's text, for what is no JWT.
    """
    header, payload, _signature = _parts(text)
    if header != _HEADER:
        _object(header, "header")
    return _object(payload, "payload")


def audience(said: Mapping[str, Any]) -> tuple[str, ...]:
    """For whom the token is meant; nobody if `aud` is no array of strings."""
    aud = said.get("aud")
    return tuple(a for a in aud if isinstance(a, str)) if isinstance(aud, list) else ()


def expiry(said: Mapping[str, Any]) -> int | None:
    """The claim `exp` in nanoseconds since 1970; None if it is absent or no such number."""
    exp = said.get("exp")
    if not isinstance(exp, int | float) or isinstance(exp, bool) or not 0 <= exp <= MAX_EXPIRY:
        return None
    return exp * SECOND if isinstance(exp, int) else int(exp * SECOND)


def signed_by(text: str, leaf: x509.Certificate) -> bool:
    """Whether text is an ES256 token signed with leaf's key. Says nothing about its end.

    Another algorithm in the header (`none`, `HS256`) is False whatever the
    signature says. A token found good is remembered by its digest.
    """
    if len(text) > MAX_TOKEN or not text.isascii():
        return False
    key = (sha256(text.encode()).digest(), leaf)
    if _verified.has(key):
        return True
    try:
        header, payload, signature = _parts(text)
        if header != _HEADER:
            said = _object(header, "header")
            if said.get("alg") != "ES256" or "crit" in said:
                return False
        proof = _decoded_bytes(signature)
    except (DeniedError, ValueError):
        return False
    public = leaf.public_key()
    if (
        not isinstance(public, ec.EllipticCurvePublicKey)
        or not isinstance(public.curve, ec.SECP256R1)
        or len(proof) != 2 * _INTEGER
    ):
        return False
    der = encode_dss_signature(
        int.from_bytes(proof[:_INTEGER], "big"), int.from_bytes(proof[_INTEGER:], "big")
    )
    try:
        public.verify(der, f"{header}.{payload}".encode(), _ES256)
    except InvalidSignature:
        return False
    _verified.add(key)
    return True


def format_instant(instant: int) -> str:
    """RFC 3339 in UTC of nanoseconds since 1970, with as many of nine digits as it needs."""
    seconds, nanos = divmod(instant, SECOND)
    try:
        day = _EPOCH + timedelta(seconds=seconds)
    except OverflowError as far:
        raise InvalidError(f"{instant} ns since 1970 is in no year from 1 to 9999") from far
    fraction = f".{nanos:09d}".rstrip("0") if nanos else ""
    return f"{day.replace(tzinfo=None).isoformat()}{fraction}Z"


def parse_instant(text: str) -> int:
    """Nanoseconds since 1970 of an RFC 3339 instant: up to nine digits, `Z` or `±hh:mm`.

    Raises InvalidError.
    """
    found = _RFC3339.fullmatch(text) if len(text) <= _MAX_INSTANT else None
    if found is None:
        raise InvalidError(
            f"{text[:_MAX_INSTANT]!r} is no RFC 3339 instant",
            hint="it has the form 2026-04-07T10:14:14.123456789+02:00",
        )
    year, month, day, hour, minute, second, digits, zone, sign, zone_h, zone_m = found.groups()
    try:
        local = datetime(
            int(year), int(month), int(day), int(hour), int(minute), int(second), tzinfo=UTC
        )
    except ValueError as impossible:
        raise InvalidError(f"{text!r} is no instant: {impossible}") from impossible
    seconds = (local - _EPOCH) // timedelta(seconds=1)
    if zone not in ("Z", "z"):
        if int(zone_h) > 23 or int(zone_m) > 59:
            raise InvalidError(f"{text!r} has a zone that no clock has")
        ahead = int(zone_h) * 3600 + int(zone_m) * 60
        seconds += -ahead if sign == "+" else ahead
    return seconds * SECOND + int((digits or "").ljust(9, "0"))


_NEW_TOKEN = "the peer must send a JWT of its own with every call"  # noqa: S105 - says what to do
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_INSTANT = 40
_RFC3339 = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?([Zz]|([+-])(\d\d):(\d\d))",
    re.ASCII,
)
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*", re.ASCII)


def _parts(text: str) -> tuple[str, str, str]:
    if len(text) > MAX_TOKEN:
        raise DeniedError(
            f"the token has {len(text)} characters; at most {MAX_TOKEN} are read", hint=_NEW_TOKEN
        )
    header, _, rest = text.partition(".")
    payload, dot, signature = rest.partition(".")
    # An empty signature decodes, as it does upstream: that is `signed_by`'s to refuse.
    if not (header and payload and dot and _BASE64URL.fullmatch(signature)):
        raise DeniedError(
            "the token is no JWT: it has not three parts with dots between", hint=_NEW_TOKEN
        )
    return header, payload, signature


def _object(part: str, which: str) -> Mapping[str, Any]:
    try:
        said = json.loads(_decoded_bytes(part), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise DeniedError(
            f"the token's {which} is no JSON in base64url", hint=_NEW_TOKEN
        ) from None  # the cause would quote the token
    if not isinstance(said, dict):
        raise DeniedError(f"the token's {which} is no JSON object", hint=_NEW_TOKEN)
    return said


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)  # JSON has no NaN and no Infinity


def _decoded_bytes(part: str) -> bytes:
    if not _BASE64URL.fullmatch(part):
        raise ValueError("not base64url")
    padded = part.replace("-", "+").replace("_", "/") + "=" * (-len(part) % 4)
    return binascii.a2b_base64(padded, strict_mode=True)


def _encoded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


_HEADER = _encoded(b'{"alg":"ES256","typ":"JWT"}')


class _Verified:
    """Digests of tokens whose signature held, the least used forgotten first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[bytes, x509.Certificate], None] = OrderedDict()

    def has(self, key: tuple[bytes, x509.Certificate]) -> bool:
        with self._lock:
            if key not in self._held:
                return False
            self._held.move_to_end(key)
            return True

    def add(self, key: tuple[bytes, x509.Certificate]) -> None:
        with self._lock:
            self._held[key] = None
            while len(self._held) > _REMEMBERED:
                self._held.popitem(last=False)


_verified = _Verified()

"""WireGuard's keys: 32 bytes of Curve25519 each, and nothing that would show a private one.

A wire's private key is in the memory of this process, in the kernel's or in
wireguard-go's, and nowhere else: not in a file, a log, a command line, an error or a repr.
"""

import base64
import binascii
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from nsm.errors import InvalidError

_LENGTH = 32  # bytes


class Key:
    """A private key. Two of the same bytes are equal; none shows them unasked."""

    __slots__ = ("_public", "_secret")

    def __init__(self, secret: bytes) -> None:
        """Raises InvalidError unless secret is 32 bytes, not all of them zero."""
        if len(secret) != _LENGTH or not any(secret):
            raise InvalidError("a WireGuard private key is 32 bytes, not all of them zero")
        # clamped, as whoever stores it does (RFC 7748, 5): what is read back is then equal
        middle = secret[1:-1]
        self._secret = bytes([secret[0] & 248, *middle, secret[-1] & 127 | 64])
        self._public = ""

    @classmethod
    def generate(cls) -> "Key":
        """A new key, from the system's random numbers."""
        return cls(X25519PrivateKey.generate().private_bytes_raw())

    @property
    def secret(self) -> bytes:
        """The private bytes, for the one who configures a device with them."""
        return self._secret

    @property
    def public(self) -> str:
        """The public key as WireGuard writes it: standard base64, 44 characters."""
        if not self._public:
            point = X25519PrivateKey.from_private_bytes(self._secret).public_key()
            raw = point.public_bytes(Encoding.Raw, PublicFormat.Raw)
            self._public = base64.b64encode(raw).decode()
        return self._public

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and self._secret == other._secret

    def __hash__(self) -> int:
        return hash(self._secret)

    def __repr__(self) -> str:
        return "Key(…)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not written down")


def check_public(text: str, whose: str) -> str:
    """The public key as it is always written, or InvalidError saying whose is none."""
    try:
        raw = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _LENGTH or not any(raw):
        raise InvalidError(
            f"{whose} {text[:64]!r} is not a WireGuard public key",
            hint="32 bytes in base64: 44 characters, as wg pubkey prints them",
        )
    return base64.b64encode(raw).decode()

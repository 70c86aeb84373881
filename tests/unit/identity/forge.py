"""Certificates that break one rule each, made with cryptography alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

DER = Encoding.DER


@dataclass(frozen=True)
class Made:
    """A certificate and its key."""

    cert: x509.Certificate
    key: Any


def forge(
    *uris: str,
    by: Made | None = None,
    key: Any = None,
    ca: bool | None = False,
    sign: tuple[bool, bool] | None = (False, False),
    days: tuple[float, float] = (-1, 1),
    name: str = "",
    dns: Sequence[str] = (),
    more: Sequence[x509.ExtensionType] = (),
) -> Made:
    """A certificate with these URI names; sign is (keyCertSign, cRLSign), None leaves it out."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)] if name else [])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.cert.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
    )
    extensions: list[x509.ExtensionType] = list(more)
    names = [x509.UniformResourceIdentifier(u) for u in uris] + [x509.DNSName(d) for d in dns]
    if names:
        extensions.append(x509.SubjectAlternativeName(names))
    if ca is not None:
        extensions.append(x509.BasicConstraints(ca=ca, path_length=None))
    if sign is not None:
        extensions.append(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=sign[0],
                crl_sign=sign[1],
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                encipher_only=False,
                decipher_only=False,
            )
        )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return Made(builder.sign(by.key if by else key, hashes.SHA256()), key)


def root(domain: str = "td.example", **more: Any) -> Made:
    """A trust domain's authority."""
    return forge(
        f"spiffe://{domain}", **{"ca": True, "sign": (True, True), "name": f"root {domain}", **more}
    )


def unreadable(how: str) -> bytes:
    """A certificate (DER) in which OpenSSL sees nothing wrong and other readers do.

    how: `version`, one that nobody defined; `date`, one that ends in the year 0.
    """
    der = bytearray(forge("spiffe://x.example/x", days=(-1, 40 * 365)).cert.public_bytes(DER))
    if how == "version":
        der[der.index(b"\xa0\x03\x02\x01\x02") + 4] = 5
    else:
        at = der.index(b"\x18\x0f") + 2  # a date after 2049 has four digits for its year
        der[at : at + 4] = b"0000"
    return bytes(der)

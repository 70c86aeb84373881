"""Certificates and keys out of bytes from outside, within bounds.

Agents and files hand over concatenated DER or PEM. What is read here is either
an identity that can be used as it is, or an error that says whose and why.
"""

from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from nsm.errors import InvalidError, UnauthenticatedError
from nsm.identity.source import Svid
from nsm.identity.verify import MAX_CERTIFICATE, MAX_CHAIN, leaf_id

MAX_BUNDLE = 256  # authorities of one trust domain
MAX_KEY = 16 * 1024  # bytes


def certificates(der: bytes, whose: str, *, most: int) -> tuple[x509.Certificate, ...]:
    """The certificates in concatenated DER; whose completes "the certificates of …".

    Raises InvalidError for what is not DER, is none, or is more than most.
    """
    found: list[x509.Certificate] = []
    rest = memoryview(der)
    while rest:
        if len(found) == most:
            raise InvalidError(f"the certificates of {whose} are more than {most}")
        size = _size(rest, whose)
        found.append(_certificate(bytes(rest[:size]), whose))
        rest = rest[size:]
    if not found:
        raise InvalidError(f"{whose} has no certificate")
    return tuple(found)


def certificates_pem(pem: bytes, whose: str, *, most: int) -> tuple[x509.Certificate, ...]:
    """The certificates in a PEM file's content. Raises InvalidError as `certificates` does."""
    if len(pem) > 2 * most * MAX_CERTIFICATE:
        raise InvalidError(f"{whose} has {len(pem)} bytes, too many for {most} certificates")
    try:
        found = x509.load_pem_x509_certificates(pem)
    except Exception as unreadable:  # a version nobody defined is no ValueError
        raise InvalidError(
            f"{whose} holds no readable PEM certificates: {unreadable}"
        ) from unreadable
    if len(found) > most:
        raise InvalidError(f"the certificates of {whose} are more than {most}")
    return tuple(found)


def authorities(found: Sequence[x509.Certificate], whose: str) -> tuple[x509.Certificate, ...]:
    """The same certificates, if each is an authority's (CA); raises InvalidError otherwise."""
    for certificate in found:
        try:
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        except x509.ExtensionNotFound:
            constraints = None
        except Exception as unreadable:  # all extensions are read to find one
            raise InvalidError(
                f"{whose} holds the certificate with serial number "
                f"{certificate.serial_number:x}, whose extensions cannot be read: {unreadable}"
            ) from unreadable
        if constraints is None or not constraints.value.ca:
            raise InvalidError(
                f"{whose} holds the certificate with serial number "
                f"{certificate.serial_number:x}, which is no authority's (CA)",
                hint="a bundle holds a trust domain's authorities, not its workloads",
            )
    return tuple(found)


def key_der(der: bytes, whose: str) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in PKCS#8 DER. Raises InvalidError, which never quotes it."""
    return _p256(der, whose, pem=False)


def key_pem(pem: bytes, whose: str) -> ec.EllipticCurvePrivateKey:
    """The P-256 key in unencrypted PEM. Raises InvalidError, which never quotes it."""
    return _p256(pem, whose, pem=True)


def svid(
    chain: Sequence[x509.Certificate],
    key: ec.EllipticCurvePrivateKey,
    whose: str,
    *,
    hint: str = "",
) -> Svid:
    """Chain and key as one identity, if they belong together. Raises InvalidError."""
    if len(chain) > MAX_CHAIN:
        raise InvalidError(f"the chain of {whose} has {len(chain)} certificates, over {MAX_CHAIN}")
    try:
        own = leaf_id(chain[0])
        belongs = chain[0].public_key() == key.public_key()
    except UnauthenticatedError as broken:
        raise InvalidError(f"{whose}: {broken.message}", hint=broken.hint) from broken
    except Exception as unreadable:
        raise InvalidError(
            f"the certificate of {whose} cannot be read: {unreadable}"
        ) from unreadable
    if not belongs:
        raise InvalidError(
            f"{whose}: the key is not that of the certificate of {own}",
            hint="write both files of one renewal, the key first",
        )
    return Svid(own, tuple(chain), key, hint)


def _p256(raw: bytes, whose: str, *, pem: bool) -> ec.EllipticCurvePrivateKey:
    load = serialization.load_pem_private_key if pem else serialization.load_der_private_key
    if len(raw) > MAX_KEY:
        raise InvalidError(f"the key of {whose} has {len(raw)} bytes, over {MAX_KEY}")
    try:
        key = load(raw, password=None)
    except (ValueError, TypeError):
        key = None  # the cause could quote what it read
    if key is None:
        raise InvalidError(f"the key of {whose} is no unencrypted private key")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidError(
            f"the key of {whose} is not on the curve P-256, which tokens (ES256) need",
            hint="have the issuer make EC P-256 certificates (SPIRE: workload_x509_svid_key_type)",
        )
    return key


def _certificate(der: bytes, whose: str) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except Exception as unreadable:
        raise InvalidError(f"a certificate of {whose} cannot be read: {unreadable}") from unreadable


def _size(der: memoryview, whose: str) -> int:
    """How many bytes the first DER SEQUENCE takes: the library reads one certificate only."""
    broken = InvalidError(f"the certificates of {whose} are no concatenated DER")
    if len(der) < 2 or der[0] != 0x30:
        raise broken
    if der[1] < 0x80:
        size = 2 + der[1]
    else:
        digits = der[1] & 0x7F
        if not 1 <= digits <= 3 or len(der) < 2 + digits:
            raise broken
        size = 2 + digits + int.from_bytes(der[2 : 2 + digits], "big")
    if size > len(der) or size > MAX_CERTIFICATE:
        raise broken
    return size

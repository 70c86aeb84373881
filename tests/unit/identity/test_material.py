"""Certificates and keys from outside: bounded, and refused in sentences without secrets."""

import os
import ssl
import traceback

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from nsm.errors import InvalidError
from nsm.identity import material
from nsm.identity.authority import Authority
from nsm.identity.spiffe import SpiffeId
from tests.unit.identity.forge import forge, root, unreadable

DOMAIN = Authority.create("td.example")
SVID = DOMAIN.issue(SpiffeId.parse("spiffe://td.example/a"))
DER = SVID.leaf.public_bytes(serialization.Encoding.DER)


def test_concatenated_certificates_come_apart() -> None:
    assert material.certificates(DER * 3, "x", most=3) == (SVID.leaf,) * 3


@pytest.mark.parametrize(
    "der",
    [
        b"",
        b"\x00",
        b"\x30",
        b"\x30\x80",
        b"\x30\x84\xff\xff\xff\xff",
        b"\x30\x83\xff\xff\xff" + b"\0" * 100,
        b"\x30\x00",
        b"\x30\x03\x02\x01\x05",
        DER[:-1],
        DER + b"\0",
        DER + b"\x30\x82",
        DER * 5,
        b"\x30\x83\x10\x00\x00" + b"\0" * 0x100000,
        b"-----BEGIN CERTIFICATE-----",
    ],
)
def test_what_is_no_certificate_is_refused(der: bytes) -> None:
    with pytest.raises(InvalidError):
        material.certificates(der, "x", most=4)


@pytest.mark.parametrize("how", ["version", "date"])
def test_a_certificate_nobody_can_read_is_refused_in_a_sentence(how: str) -> None:
    der = unreadable(how)
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    for read in (
        lambda: material.authorities(material.certificates(der, "x", most=4), "x"),
        lambda: material.authorities(material.certificates_pem(pem, "x", most=4), "x"),
        lambda: material.svid(material.certificates(der, "x", most=4), SVID.key, "x"),
    ):
        with pytest.raises(InvalidError):
            read()


def test_an_authority_with_a_name_of_an_unheard_of_kind_is_refused() -> None:
    x400 = bytes([0x30, 0x04, 0xA3, 0x02, 0x30, 0x00])
    names = x509.UnrecognizedExtension(x509.SubjectAlternativeName.oid, x400)
    made = forge(ca=True, sign=(True, True), more=[names], name="x").cert
    read = x509.load_der_x509_certificate(made.public_bytes(serialization.Encoding.DER))
    with pytest.raises(InvalidError, match="extensions cannot be read"):
        material.authorities([read], "x")


def test_a_certificate_without_end_is_not_even_parsed() -> None:
    with pytest.raises(InvalidError, match="no concatenated DER"):
        material.certificates(b"\x30\x83\x10\x00\x00" + b"\0" * 0x100000, "x", most=4)
    with pytest.raises(InvalidError, match="no concatenated DER"):
        material.certificates(DER[:-1], "x", most=4)


def test_random_bytes_never_fall_over() -> None:
    for size in range(0, 200, 7):
        with pytest.raises(InvalidError):
            material.certificates(b"\x30" + os.urandom(size), "x", most=4)
        with pytest.raises(InvalidError):
            material.key_der(os.urandom(size), "x")


def test_a_bundle_holds_authorities_only() -> None:
    assert material.authorities(DOMAIN.certificates, "x") == DOMAIN.certificates
    with pytest.raises(InvalidError, match="no authority's"):
        material.authorities((SVID.leaf,), "x")
    with pytest.raises(InvalidError, match="no authority's"):
        material.authorities((forge("spiffe://td.example", ca=None).cert,), "x")


def test_a_pem_file_with_too_many_certificates_is_refused() -> None:
    with pytest.raises(InvalidError, match="more than 2"):
        material.certificates_pem(SVID.chain_pem() * 3, "x", most=2)
    with pytest.raises(InvalidError, match="no readable PEM"):
        material.certificates_pem(b"hello", "x", most=2)
    with pytest.raises(InvalidError, match="too many"):
        material.certificates_pem(b"x" * (2 * material.MAX_CERTIFICATE + 1), "x", most=1)


def test_only_unencrypted_p256_keys_are_taken() -> None:
    for key in (ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)):
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        with pytest.raises(InvalidError, match="P-256"):
            material.key_pem(pem, "x")
    locked = SVID.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(InvalidError, match="no unencrypted"):
        material.key_pem(locked, "x")
    with pytest.raises(InvalidError, match="over"):
        material.key_pem(SVID.key_pem() * 100, "x")
    assert material.key_pem(SVID.key_pem(), "x").public_key() == SVID.key.public_key()


def test_an_error_about_a_key_does_not_quote_it() -> None:
    middle = SVID.key_pem().splitlines()[1].decode()
    broken = SVID.key_pem()[:-40]
    with pytest.raises(InvalidError) as refused:
        material.key_pem(broken, "x")
    assert middle not in "".join(traceback.format_exception(refused.value))


def test_key_and_certificate_must_belong_together() -> None:
    other = DOMAIN.issue(SVID.id)
    with pytest.raises(InvalidError, match="not that of the certificate"):
        material.svid(SVID.chain, other.key, "x")
    assert material.svid(SVID.chain, SVID.key, "x", hint="h").hint == "h"


def test_a_certificate_that_no_peer_would_take_is_no_identity() -> None:
    made = forge("https://x", by=root())
    with pytest.raises(InvalidError, match="no SPIFFE id"):
        material.svid((made.cert,), made.key, "x")
    with pytest.raises(InvalidError, match="over 8"):
        material.svid(SVID.chain * 9, SVID.key, "x")

"""Certificates for tests: trust domains, SVIDs of every good and bad kind, static sources."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nsm.identity.source import HeldIdentity, Identity, Svid
from nsm.identity.spiffe import SpiffeId


class Authority:
    """A trust domain's certificate authority, P-256."""

    def __init__(self, trust_domain: str) -> None:
        self.trust_domain = trust_domain
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain)])
        now = datetime.now(UTC)
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(sign=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), critical=False
            )
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]
                ),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )

    def svid(
        self,
        path: str,
        *,
        trust_domain: str = "",
        dns: Sequence[str] = (),
        life: timedelta = timedelta(hours=1),
        age: timedelta = timedelta(minutes=1),
    ) -> Svid:
        """An SVID for path; of another trust_domain than ours it is a forgery."""
        key = ec.generate_private_key(ec.SECP256R1())
        own = SpiffeId(trust_domain or self.trust_domain, path)
        now = datetime.now(UTC)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(own))]
        names += [x509.DNSName(name) for name in dns]
        leaf = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "test")]))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - age)
            .not_valid_after(now - age + life)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign=False), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        return Svid(own, (leaf,), key)

    def source(self, path: str, *trusted: "Authority", dns: Sequence[str] = ()) -> HeldIdentity:
        """A source that holds an SVID for path and trusts us and trusted."""
        return source(self.svid(path, dns=dns), self, *trusted)


def source(svid: Svid, *trusted: Authority) -> HeldIdentity:
    """A source that holds svid and trusts trusted."""
    return HeldIdentity(Identity(svid, {a.trust_domain: (a.certificate,) for a in trusted}))


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign,
        key_cert_sign=sign,
        crl_sign=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )

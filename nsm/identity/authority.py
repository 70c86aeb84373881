"""A trust domain's authority: a key that says who is who in it.

One self-signed P-256 certificate, kept with its key in one file, so that no
moment exists at which the two do not belong together. It signs short-lived
certificates whose only meaning is their SPIFFE id; a DNS name stands beside it
so that clients that insist on one (stock grpcio) can be told which to expect.
"""

import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nsm.errors import InvalidError, PreconditionError
from nsm.identity import material
from nsm.identity.source import Svid, not_after
from nsm.identity.spiffe import SpiffeId, check_trust_domain
from nsm.model import SECOND

HOUR = 3600 * SECOND
DAY = 24 * HOUR
SVID_LIFE = HOUR
AUTHORITY_LIFE = 3650 * DAY
RENEW_BEFORE = 60 * DAY  # a new authority is made when the newest has no longer than this
BACKDATED = 60 * SECOND  # clocks of one domain differ
AUTHORITY_BACKDATED = DAY  # and one that was ahead at the first start is set back
FILE = "authority.pem"

_MAX_AUTHORITIES = 8
_DNS = re.compile(
    r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)


class Authority:
    """Signs for one trust domain. Its key is in no repr and leaves it through `save` only."""

    def __init__(
        self,
        trust_domain: str,
        keys: Sequence[tuple[ec.EllipticCurvePrivateKey, x509.Certificate]],
    ) -> None:
        """keys: newest first; the first signs, all are believed."""
        self.trust_domain = check_trust_domain(trust_domain)
        self._keys = tuple(keys)
        self.certificates = tuple(certificate for _, certificate in keys)

    def __repr__(self) -> str:
        return f"Authority({self.trust_domain!r}, {len(self._keys)} keys)"

    @classmethod
    def create(
        cls, trust_domain: str, *, life: int = AUTHORITY_LIFE, now: int | None = None
    ) -> "Authority":
        """A new authority, in memory only; life and now are in nanoseconds."""
        check_trust_domain(trust_domain)
        return cls(trust_domain, [_self_signed(trust_domain, life, _now(now))])

    def issue(
        self,
        whose: SpiffeId,
        *,
        dns: Iterable[str] = (),
        ttl: int = SVID_LIFE,
        now: int | None = None,
    ) -> Svid:
        """A fresh key and certificate for whose, which hold for ttl (ns) from now (ns) on.

        dns are further DNS names; one made of the id's last path element is
        always there if it can be one. Raises InvalidError for an id that is not
        this trust domain's, or that is no workload's.
        """
        if whose.trust_domain != self.trust_domain or not whose.path:
            raise InvalidError(
                f"the authority of {self.trust_domain!r} cannot speak for {whose}",
                hint=f"it issues ids of the form spiffe://{self.trust_domain}/<path>",
            )
        now = _now(now)
        ca_key, ca = self._keys[0]
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(whose))]
        names += [x509.DNSName(n) for n in dict.fromkeys((*dns_names(whose), *map(check_dns, dns)))]
        leaf = (
            _certificate(
                _name("workload"), ca.subject, key, now - BACKDATED, min(now + ttl, not_after(ca))
            )
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(leaf=True), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()),
                critical=False,
            )
            .sign(ca_key, hashes.SHA256())
        )
        return Svid(whose, (leaf,), key)

    def bundle_pem(self) -> bytes:
        """The authorities' certificates, newest first, for whoever is to trust this domain."""
        return b"".join(c.public_bytes(serialization.Encoding.PEM) for c in self.certificates)

    def save(self, path: Path) -> None:
        """Write keys and certificates to path, readable by the owner only. Blocks."""
        pem = b"".join(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
            for key, certificate in self._keys
        )
        write_atomically(path, pem, mode=0o600)

    def renewed(self, now: int | None = None) -> "Authority":
        """With a new authority in front if the newest has not long to live; self if it has."""
        now = _now(now)
        if not_after(self.certificates[0]) - now > RENEW_BEFORE:
            return self
        alive = [pair for pair in self._keys if not_after(pair[1]) > now]
        fresh = _self_signed(self.trust_domain, AUTHORITY_LIFE, now)
        return Authority(self.trust_domain, [fresh, *alive][:_MAX_AUTHORITIES])


def open_authority(directory: Path, trust_domain: str) -> Authority:
    """The authority kept in directory, made there if there is none yet. Blocks.

    Raises PreconditionError if somebody else could have changed or read it, and
    InvalidError if what is there is not this trust domain's.
    """
    check_trust_domain(trust_domain)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as why:
        raise PreconditionError(
            f"the issuer's directory {directory} cannot be used: {why.strerror}",
            hint="it must be a directory of the user the issuer runs as",
        ) from why
    _owned(status, f"the issuer's directory {directory}")
    if status.st_mode & 0o022:
        raise PreconditionError(
            f"the issuer's directory {directory} has mode {stat.S_IMODE(status.st_mode):04o}: "
            "others could put their own authority there",
            hint=f"chmod 700 {directory}",
        )
    path = directory / FILE
    if not path.exists():
        _first(path, Authority.create(trust_domain))
    held = _loaded(path, trust_domain)
    renewed = held.renewed()
    if renewed is not held:
        renewed.save(path)
    return renewed


def write_atomically(path: Path, content: bytes, *, mode: int) -> None:
    """Make path hold content: all of it or, whatever happens, what it held before. Blocks."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(beside, content, mode)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def dns_names(whose: SpiffeId) -> tuple[str, ...]:
    """The DNS name that stands for an id: its last path element, if it can be made one."""
    name = whose.path.rpartition("/")[2].lower().replace("_", "-").strip("-.")
    return (name,) if _DNS.fullmatch(name) else ()


def check_dns(name: str) -> str:
    """The name if a certificate can carry it as a DNS name; raises InvalidError otherwise."""
    if not _DNS.fullmatch(name):
        raise InvalidError(
            f"{name[:253]!r} is no DNS name", hint="lower-case letters, digits, dashes and dots"
        )
    return name


def _first(path: Path, made: Authority) -> None:
    """Put made at path unless another issuer was quicker: two would not believe each other."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        made.save(beside)
        os.link(beside, path)
    except FileExistsError:
        return
    finally:
        beside.unlink(missing_ok=True)


def _owned(status: os.stat_result, what: str) -> None:
    """Raise PreconditionError if what is another user's, who can do with it what he likes."""
    if status.st_uid not in (0, os.geteuid()):
        raise PreconditionError(
            f"{what} belongs to user {status.st_uid}, and the issuer runs as {os.geteuid()}",
            hint="it must be the issuer's own user's, or root's",
        )


def _loaded(path: Path, trust_domain: str) -> Authority:
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        _owned(status, f"the authority's key in {path}")
        if status.st_mode & 0o077:
            raise PreconditionError(
                f"the authority's key in {path} has mode {stat.S_IMODE(status.st_mode):04o}: "
                "others may have read it",
                hint=f"if nobody has, chmod 600 {path}; else remove it and start anew",
            )
        pem = file.read(_MAX_AUTHORITIES * 64 * 1024)
    certificates = material.certificates_pem(pem, str(path), most=_MAX_AUTHORITIES)
    keys = [material.key_pem(block + _END, str(path)) for block in pem.split(_END)[:-1]]
    if len(keys) != len(certificates):
        raise InvalidError(f"{path} holds {len(keys)} keys and {len(certificates)} certificates")
    for key, certificate in zip(keys, certificates, strict=True):
        if key.public_key() != certificate.public_key():
            raise InvalidError(f"{path} holds a key that is not its certificate's")
        if _domain_of(certificate) != trust_domain:
            raise InvalidError(
                f"{path} holds the authority of {_domain_of(certificate)!r}, "
                f"not of {trust_domain!r}",
                hint="NSM_TRUST_DOMAIN and NSM_ISSUER_DIR must belong together",
            )
    if not_after(certificates[0]) < time.time_ns():
        raise PreconditionError(
            f"the authority in {path} expired at {certificates[0].not_valid_after_utc}",
            hint="remove the file: a new authority is made, which every peer must be told of",
        )
    return Authority(trust_domain, list(zip(keys, certificates, strict=True)))


_END = b"-----END PRIVATE KEY-----\n"


def _write(path: Path, content: bytes, mode: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, mode)  # the umask may have taken bits away
        file.write(content)
        file.flush()
        os.fsync(fd)


def _self_signed(
    trust_domain: str, life: int, now: int
) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("authority", secrets.token_hex(8))  # two of one domain differ in name
    certificate = (
        _certificate(name, name, key, now - AUTHORITY_BACKDATED, now + life)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(leaf=False), critical=True)
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.UniformResourceIdentifier(str(SpiffeId(trust_domain)))]
            ),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begin: int, end: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.fromtimestamp(begin // SECOND, UTC))
        .not_valid_after(datetime.fromtimestamp(end // SECOND, UTC))
    )


def _usage(*, leaf: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=leaf,
        key_cert_sign=not leaf,
        crl_sign=not leaf,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(unit: str, serial: str = "") -> x509.Name:
    parts = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "vwire"),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
    ]
    if serial:
        parts.append(x509.NameAttribute(NameOID.SERIAL_NUMBER, serial))
    return x509.Name(parts)


def _domain_of(certificate: x509.Certificate) -> str:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return SpiffeId.parse(uris[0]).trust_domain if uris else ""


def _now(now: int | None) -> int:
    return time.time_ns() if now is None else now

"""Who a peer is, proven by the certificate of its TLS handshake (`wire.md` §4.1).

A TLS library only sees that *some* authority we know signed the chain. That an
authority may speak for its own trust domain and for no other, that the leaf
carries exactly one SPIFFE id and is nobody's authority: that is decided here, and
nothing else about a certificate (DNS names, usages, subject) decides anything.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from datetime import UTC, datetime

from cryptography import x509
from cryptography.x509 import verification

from nsm.errors import InvalidError, UnauthenticatedError
from nsm.identity.source import Bundles, not_after
from nsm.identity.spiffe import SpiffeId
from nsm.model import SECOND

MAX_CHAIN = 8  # certificates a peer may show
MAX_CERTIFICATE = 32 * 1024  # bytes of one certificate's DER
_MAX_INTERMEDIATES = MAX_CHAIN - 1
_REMEMBERED = 2048  # verified chains; a node has some hundred peers


def peer_id(
    chain: Sequence[x509.Certificate], bundles: Bundles, *, now: int | None = None
) -> SpiffeId:
    """Whose certificate chain (leaf first) this is.

    now is in nanoseconds since 1970. A chain once verified under the same
    authorities is only compared until one of its certificates expires, so this
    may be called on every handshake. Raises UnauthenticatedError that says which
    rule whose certificate breaks.
    """
    if not chain:
        raise UnauthenticatedError(
            "the peer showed no certificate", hint="every connection of the mesh has mutual TLS"
        )
    if len(chain) > MAX_CHAIN:
        raise UnauthenticatedError(
            f"the peer showed a chain of {len(chain)} certificates; at most {MAX_CHAIN} are read"
        )
    now = time.time_ns() if now is None else now
    own = leaf_id(chain[0])
    authorities = bundles.get(own.trust_domain, ())
    if not authorities:
        known = ", ".join(sorted(bundles)) or "none"
        raise UnauthenticatedError(
            f"no bundle of the trust domain {own.trust_domain!r} to check the certificate "
            f"of {own} with; bundles here: {known}",
            hint=f"federate with {own.trust_domain!r}, or give the peer an identity of a known one",
        )
    key = (tuple(chain), authorities)
    held = _verified.get(key)
    if held and held[0] <= now <= held[1]:
        return own
    _check_dates(chain, own, now)
    path = _built(chain, authorities, own, now)
    _verified.put(key, (max(map(_not_before, path)), min(map(not_after, path))))
    return own


def leaf_id(leaf: x509.Certificate) -> SpiffeId:
    """The id a certificate claims, if it keeps every rule that one can see on it alone.

    Raises UnauthenticatedError. Proves nothing: anybody can write a certificate.
    """
    who = f"the certificate {_short(leaf)}"
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as unreadable:
        raise UnauthenticatedError(
            f"{who} has extensions that cannot be read: {unreadable}", hint=_ISSUE_ANEW
        ) from unreadable
    if len(uris) != 1:
        raise UnauthenticatedError(
            f"{who} has {len(uris) or 'no'} URI names; an X.509-SVID has exactly one",
            hint=_ISSUE_ANEW,
        )
    try:
        claimed = SpiffeId.parse(uris[0])
    except InvalidError as broken:
        raise UnauthenticatedError(
            f"{who} has a URI name that is no SPIFFE id: {broken.message}", hint=_ISSUE_ANEW
        ) from broken
    if not claimed.path:
        raise UnauthenticatedError(
            f"{who} names the trust domain {claimed} itself and not a workload in it",
            hint="a workload's id has a path",
        )
    _check_usage(leaf, claimed)
    return claimed


_ISSUE_ANEW = "the peer needs an X.509-SVID from its trust domain's issuer"


def _check_usage(leaf: x509.Certificate, whose: SpiffeId) -> None:
    constraints = usage = None
    for extension in leaf.extensions:
        if isinstance(extension.value, x509.BasicConstraints):
            constraints = extension.value
        elif isinstance(extension.value, x509.KeyUsage):
            usage = extension.value
    if constraints is not None and constraints.ca:
        raise UnauthenticatedError(
            f"the certificate of {whose} is an authority's (CA), not a workload's", hint=_ISSUE_ANEW
        )
    if usage is not None and usage.key_cert_sign:
        raise UnauthenticatedError(
            f"the certificate of {whose} may sign certificates (keyCertSign); "
            "a workload's must not",
            hint=_ISSUE_ANEW,
        )
    if usage is not None and usage.crl_sign:
        raise UnauthenticatedError(
            f"the certificate of {whose} may sign revocation lists (cRLSign); "
            "a workload's must not",
            hint=_ISSUE_ANEW,
        )


def _check_dates(chain: Sequence[x509.Certificate], whose: SpiffeId, now: int) -> None:
    for place, certificate in enumerate(chain):
        which = (
            f"the certificate of {whose}"
            if place == 0
            else f"the intermediate certificate {_short(certificate)} that {whose} showed"
        )
        if now > not_after(certificate):
            raise UnauthenticatedError(
                f"{which} expired at {_instant(not_after(certificate))}; here it is "
                f"{_instant(now)}",
                hint="the peer must renew it, and both clocks must be right",
            )
        if now < _not_before(certificate):
            raise UnauthenticatedError(
                f"{which} does not hold before {_instant(_not_before(certificate))}; here it is "
                f"{_instant(now)}",
                hint="both clocks must be right",
            )


def _built(
    chain: Sequence[x509.Certificate],
    authorities: tuple[x509.Certificate, ...],
    whose: SpiffeId,
    now: int,
) -> Sequence[x509.Certificate]:
    """The path from the leaf to one of authorities, both included."""
    try:
        verifier = (
            verification.PolicyBuilder()
            .store(verification.Store(list(authorities)))
            .time(datetime.fromtimestamp(now // SECOND, UTC))
            .max_chain_depth(_MAX_INTERMEDIATES)
            .extension_policies(ca_policy=_OF_AUTHORITIES, ee_policy=_OF_LEAVES)
            .build_client_verifier()
        )
        path = verifier.verify(chain[0], list(chain[1:])).chain
    except (verification.VerificationError, ValueError) as why:
        if _expired_everywhere(authorities, now):
            raise UnauthenticatedError(
                f"every authority in the bundle of {whose.trust_domain!r}, which the certificate "
                f"of {whose} needs, is expired or not yet valid",
                hint="bring a fresh bundle of that trust domain",
            ) from why
        raise UnauthenticatedError(
            f"the certificate of {whose} does not chain to the bundle of its own trust domain "
            f"{whose.trust_domain!r} ({len(authorities)} authorities): {why}",
            hint="another trust domain's authority cannot vouch for it; "
            "if that domain changed its authority, bring its new bundle",
        ) from why
    return path


def _is_authority(
    _policy: verification.Policy, _certificate: x509.Certificate, held: x509.ExtensionType | None
) -> None:
    if not (isinstance(held, x509.BasicConstraints) and held.ca):
        raise ValueError("one of the certificates above the leaf is no authority (CA)")


def _may_sign(
    _policy: verification.Policy, _certificate: x509.Certificate, held: x509.ExtensionType | None
) -> None:
    if isinstance(held, x509.KeyUsage) and not held.key_cert_sign:
        raise ValueError("one of the certificates above the leaf may not sign (keyCertSign)")


# The library's own defaults are the web's: they would demand a DNS name and one
# extended usage. SPIFFE says that any usage will do, and what a leaf must not be
# is checked above in sentences of its own.
_OF_LEAVES = verification.ExtensionPolicy.permit_all()
_OF_AUTHORITIES = (
    verification.ExtensionPolicy.permit_all()
    .require_present(x509.BasicConstraints, verification.Criticality.AGNOSTIC, _is_authority)
    .may_be_present(x509.KeyUsage, verification.Criticality.AGNOSTIC, _may_sign)
)


class _Verified:
    """Chains that held under these authorities, and from when until when they do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: OrderedDict[object, tuple[int, int]] = OrderedDict()

    def get(self, key: object) -> tuple[int, int] | None:
        with self._lock:
            span = self._held.get(key)
            if span is not None:
                self._held.move_to_end(key)
            return span

    def put(self, key: object, span: tuple[int, int]) -> None:
        with self._lock:
            self._held[key] = span
            self._held.move_to_end(key)
            while len(self._held) > _REMEMBERED:
                self._held.popitem(last=False)


_verified = _Verified()


def _expired_everywhere(authorities: tuple[x509.Certificate, ...], now: int) -> bool:
    return all(not _not_before(a) <= now <= not_after(a) for a in authorities)


def _not_before(certificate: x509.Certificate) -> int:
    return int(certificate.not_valid_before_utc.timestamp()) * SECOND


def _instant(ns: int) -> str:
    return datetime.fromtimestamp(ns // SECOND, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _short(certificate: x509.Certificate) -> str:
    """A certificate nobody vouches for is named by its serial number only: its names may lie."""
    return f"with serial number {certificate.serial_number:x}"

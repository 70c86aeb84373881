"""Who a peer is, proven by the certificate of its TLS handshake (`wire.md` §4.1)."""

from collections.abc import Sequence

from cryptography import x509

from nsm.identity.source import Bundles
from nsm.identity.spiffe import SpiffeId


def peer_id(
    chain: Sequence[x509.Certificate], bundles: Bundles, *, now: int | None = None
) -> SpiffeId:
    """Whose chain this is; raises UnauthenticatedError saying which rule it breaks."""
    raise NotImplementedError

"""The rules on the tokens of a path, natively: upstream's five (`wire.md` §4.4), two of ours.

Pure functions over the token texts of a path's segments, first segment first.
Each gives None if it holds, else why not: which segment, which rule, never a
token's text. Which rules are asked of which part of a path is the caller's
matter: a server asks the first three and `prev_token_signed` of the left part,
a client asks them and `next_token_signed` of the whole returned path.

Where the upstream policies compare whatever JSON holds, these want what the
protocol says: strings in `sub` and `aud`, a number in `exp`, ES256 in the header.

Two more rules are ours, and every honest upstream peer keeps them. A signature
proves a key, not a name: what the caller's token says must be what its
certificate says. And at a trust domain's border, whoever calls may vouch for its
own domain only. Inside one domain each identity vouches for those to its left,
as upstream's policies have it: their signatures cannot be checked here, so a
domain's authority should give certificates to nobody it would not believe.
"""

from collections.abc import Sequence

from cryptography import x509

from nsm.errors import DeniedError
from nsm.identity.source import Handshake
from nsm.identity.tokens import audience, decoded, expiry, format_instant, signed_by


def tokens_valid(tokens: Sequence[str]) -> str | None:
    """Every token decodes as a JWT; so it is where there is none."""
    for place, token in enumerate(tokens):
        try:
            decoded(token)
        except DeniedError as broken:
            return f"{_segment(place, tokens)}: {_why(token, broken)}"
    return None


def tokens_expired(tokens: Sequence[str], now: int) -> str | None:
    """Every token ends later than now (nanoseconds since 1970), without any leeway."""
    for place, token in enumerate(tokens):
        try:
            end = expiry(decoded(token))
        except DeniedError as broken:
            return f"{_segment(place, tokens)}: {_why(token, broken)}"
        if end is None:
            return f"{_segment(place, tokens)}: its token says no end (claim 'exp')"
        if end <= now:
            return (
                f"{_segment(place, tokens)}: its token expired at {format_instant(end)}; "
                f"here it is {format_instant(now)}"
            )
    return None


def tokens_chained(tokens: Sequence[str]) -> str | None:
    """Every token is meant for whoever wrote the next one."""
    if len(tokens) < 2:
        return None
    meant: tuple[str, ...] = ()
    for place, token in enumerate(tokens):
        try:
            said = decoded(token)
        except DeniedError as broken:
            return f"{_segment(place, tokens)}: {_why(token, broken)}"
        writer = said.get("sub")
        if place and (not isinstance(writer, str) or writer not in meant):
            return (
                f"{_segment(place - 1, tokens)}: its token is meant for "
                f"{_names(meant)}, and the next segment's is of {_names([writer])}"
            )
        meant = audience(said)
    return None


def prev_token_signed(
    tokens: Sequence[str], index: int, leaf: x509.Certificate | None
) -> str | None:
    """The segment before index carries a token signed with the TLS peer's key."""
    if index < 1:
        return "the path has no segment before this one, so nobody vouches for the caller"
    return _signed(tokens, index - 1, leaf)


def next_token_signed(
    tokens: Sequence[str], index: int, leaf: x509.Certificate | None
) -> str | None:
    """The segment after index carries a token signed with the TLS peer's key."""
    return _signed(tokens, index + 1, leaf)


def proven_by_caller(tokens: Sequence[str], index: int, shown: Handshake) -> str | None:
    """The segment before index carries the TLS peer's own token, in its own name."""
    if reason := prev_token_signed(tokens, index, shown.peer_leaf):
        return reason
    said = _subject(tokens[index - 1])
    if said != str(shown.peer_id):
        return f"its token says it is {_names([said])}, and its certificate {shown.peer_id}"
    return None


def inside_border(tokens: Sequence[str], index: int, shown: Handshake) -> str | None:
    """All segments before index are of the TLS peer's trust domain, if that is not ours."""
    domain = shown.peer_id.trust_domain
    if domain == shown.own.id.trust_domain:
        return None
    for place, token in enumerate(tokens[:index]):
        said = _subject(token)
        if said is None or not said.startswith(f"spiffe://{domain}/"):
            return (
                f"{_segment(place, tokens)}: its token is of {_names([said])}, for whom"
                f" nobody of the trust domain {domain} may speak"
            )
    return None


def _subject(token: str) -> str | None:
    try:
        said = decoded(token).get("sub")
    except DeniedError:
        return None
    return said if isinstance(said, str) else None


def _signed(tokens: Sequence[str], place: int, leaf: x509.Certificate | None) -> str | None:
    if not 0 <= place < len(tokens):
        return f"the path has {len(tokens)} segments and no segment {place} that vouches for it"
    if leaf is None:
        return f"{_segment(place, tokens)}: there is no TLS peer whose signature it could be"
    if not signed_by(tokens[place], leaf):
        return (
            f"{_segment(place, tokens)}: its token is not signed (ES256) "
            "with the key of the TLS peer's certificate"
        )
    return None


def _segment(place: int, tokens: Sequence[str]) -> str:
    return f"path segment {place} of {len(tokens)}"


def _why(token: str, broken: DeniedError) -> str:
    return broken.message if token else "it has no token"


def _names(names: Sequence[object]) -> str:
    """At most three of the ids that a token names, cut short: they come from outside."""
    shown = ", ".join(str(n)[:256] for n in names[:3] if isinstance(n, str))
    return shown or "nobody"

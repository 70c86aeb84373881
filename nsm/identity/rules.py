"""The five rules on the tokens of a path (`wire.md` §4.4), natively.

Pure functions over the token texts of a path's segments, first segment first.
Each gives None if it holds, else why not: which segment, which rule, never a
token's text. Which rules are asked of which part of a path is the caller's
matter: a server asks the first three and `prev_token_signed` of the left part,
a client asks them and `next_token_signed` of the whole returned path.

Where the upstream policies compare whatever JSON holds, these want what the
protocol says: strings in `sub` and `aud`, a number in `exp`, ES256 in the header.
"""

from collections.abc import Sequence

from cryptography import x509

from nsm.errors import DeniedError
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

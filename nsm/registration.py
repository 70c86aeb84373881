"""Over which hops a registration came, and what that proves (`wire.md` §6.1, §6.2).

A registration carries a path of tokens in the metadata key `path`, in the
request and in the reply's header: each hop puts its caller's token on the
segment before its own, mints one for its own, and hands the longer path on.
Here are the pure steps of that, and the judgement of it: who owns the name
(`path_ids[0]`), which rules a path must pass, until when its tokens vouch.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nsm.caller import Caller
from nsm.errors import REFUSED, DeniedError, InvalidError
from nsm.identity import rules, tokens
from nsm.identity.source import Handshake
from nsm.identity.spiffe import SpiffeId

PATH = "path"  # the metadata key, of requests and of replies
MAX_SEGMENTS = 32  # hops; interdomain's longest has five
MAX_TEXT = 48 * 1024  # characters; HTTP/2 peers bound all headers of a call at 64 KiB

TOKENS_VALID = "common/tokens_valid"
TOKENS_EXPIRED = "common/tokens_expired"
TOKENS_CHAINED = "common/tokens_chained"
PREV_SIGNED = "server/prev_token_signed"
NEXT_SIGNED = "client/next_token_signed"
CLIENT_ALLOWED = "registry/client_allowed"
SERVER_POLICIES = frozenset(
    {TOKENS_VALID, TOKENS_EXPIRED, TOKENS_CHAINED, PREV_SIGNED, CLIENT_ALLOWED}
)


@dataclass(frozen=True, slots=True)
class RegistrationPath:
    """The tokens of the hops a registration crosses, and which of them is speaking."""

    tokens: tuple[str, ...] = field(default=(), repr=False)  # never in a log
    index: int = 0


@dataclass(frozen=True, slots=True)
class Registration:
    """One Register or Unregister as it stands at this hop, entered and admitted.

    path is at this hop's own index: what a manager sends on. ids are the SPIFFE
    ids of its left part, owner first and our own last. expires is when the
    caller's and our own token have both ended, ns since 1970.
    """

    caller: Caller
    path: RegistrationPath
    ids: tuple[str, ...]
    expires: int
    policies: frozenset[str] = SERVER_POLICIES

    @property
    def owner(self) -> str:
        """The SPIFFE id the name belongs to: whoever asked first."""
        return self.ids[0]


def parse(text: str) -> RegistrationPath:
    """Read the metadata value `{"Index":n,"PathSegments":[{"token":"…"}, …]}`.

    Raises InvalidError for anything else, and for more than a path can be.
    """
    if len(text) > MAX_TEXT:
        raise InvalidError(
            f"the registration's path metadata has {len(text)} characters;"
            f" at most {MAX_TEXT} are read"
        )
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        raise _malformed("it is no JSON") from None  # the cause would quote tokens
    if not isinstance(said, dict):
        raise _malformed("it is no JSON object")
    index = said.get("Index", 0)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < 2**32:
        raise _malformed("its Index is no number of a segment")
    segments = said.get("PathSegments")
    if segments is None:  # how Go writes an empty list
        segments = []
    if not isinstance(segments, list):
        raise _malformed("its PathSegments are no list")
    if len(segments) > MAX_SEGMENTS:
        raise _malformed(f"it has {len(segments)} segments, more than {MAX_SEGMENTS}")
    return RegistrationPath(tuple(map(_token, segments)), index)


def write(path: RegistrationPath) -> str:
    """The metadata value of path, as upstream writes it."""
    segments = [{"token": token} for token in path.tokens] or None
    return json.dumps({"Index": path.index, "PathSegments": segments}, separators=(",", ":"))


def enter(path: RegistrationPath, caller_token: str, own_token: str) -> RegistrationPath:
    """Step onto this hop: the caller's token on the segment before, our own on ours.

    Segments beyond ours stay, as on every refresh. Raises InvalidError for an
    index past the end.
    """
    if not path.tokens:
        return RegistrationPath((caller_token, own_token), 1)
    here = path.index + 1
    if here > len(path.tokens):
        raise InvalidError(
            f"Path.Index+1=={here} should be less or equal"
            f" len(Path.PathSegments)=={len(path.tokens)}"
        )
    if here >= MAX_SEGMENTS:
        raise InvalidError(f"the registration crossed {here} hops; at most {MAX_SEGMENTS} may be")
    left = path.tokens[: here - 1]
    return RegistrationPath((*left, caller_token, own_token, *path.tokens[here + 1 :]), here)


def leave(path: RegistrationPath) -> RegistrationPath:
    """Step back to the caller: the same tokens at its index."""
    return replace(path, index=max(path.index - 1, 0))


def trim(path: RegistrationPath) -> RegistrationPath:
    """The part up to path's own index: where a path ends, nothing stale hangs on."""
    return replace(path, tokens=path.tokens[: path.index + 1])


def path_ids(given: Sequence[str], left: Sequence[str]) -> tuple[str, ...]:
    """The resource's path_ids at this hop: left is proven, what is beyond stays as given."""
    return (*left, *given[len(left) :])


def left_ids(path: RegistrationPath, shown: Handshake) -> tuple[str, ...]:
    """The SPIFFE ids of path's left part: ours and the caller's as the TLS handshake proved them.

    Those further left are what their tokens say, vouched for by the hops between,
    who can say so of their own trust domain (`nsm.identity.rules`): there, whoever
    has a certificate can register in anybody's name, as at upstream (`wire.md` §6.2).
    Raises DeniedError if one of those is no token.
    """
    further = (tokens.claims(token).sub for token in path.tokens[: max(path.index - 1, 0)])
    return (*further, str(shown.peer_id), str(shown.own.id))


def refusal(
    path: RegistrationPath, shown: Handshake, now: int, policies: Collection[str]
) -> str | None:
    """Why a server must not take a registration that came over path; None if it may.

    path is entered; only its left part is judged. now is in ns since 1970.
    """
    left = path.tokens[: path.index + 1]
    return (
        (TOKENS_VALID in policies and rules.tokens_valid(left))
        or (TOKENS_EXPIRED in policies and rules.tokens_expired(left, now))
        or (TOKENS_CHAINED in policies and rules.tokens_chained(left))
        or (PREV_SIGNED in policies and rules.proven_by_caller(left, path.index, shown))
        or (PREV_SIGNED in policies and rules.inside_border(left, path.index, shown))
        or None
    )


def admit_reply(path: RegistrationPath, shown: Handshake, now: int, what: str) -> None:
    """The client's side of the rules, on the whole returned path at the client's own index.

    Raises DeniedError; what names what was registered.
    """
    reason = (
        rules.tokens_valid(path.tokens)
        or rules.tokens_expired(path.tokens, now)
        or rules.tokens_chained(path.tokens)
        or rules.next_token_signed(path.tokens, path.index, shown.peer_leaf)
    )
    if reason:
        raise denied(f"the answer of {shown.peer_id} for {what}", reason)


def answered(path: RegistrationPath, shown: Handshake, lifetime: int, now: int) -> RegistrationPath:
    """The answer, at our own index, as the caller can prove it: as `nsm.policy.Tokens.answered`.

    The next hop has put on our segment what we showed it, by our newest certificate. The caller
    may have met us under the one before.
    """
    if not path.index < len(path.tokens):
        return path
    own = path.tokens[path.index]
    if tokens.signed_by(own, shown.own.leaf):
        return path
    try:
        said = tokens.claims(own)
        audience = SpiffeId.parse(said.aud[0])
    except (DeniedError, InvalidError, IndexError):
        return path  # nothing of ours
    if said.sub != str(shown.own.id):
        return path
    anew = tokens.issue(shown.own, audience, lifetime, peer_not_after=said.exp, now=now)
    here = path.index
    return replace(path, tokens=(*path.tokens[:here], anew.text, *path.tokens[here + 1 :]))


def denied(what: str, reason: str) -> DeniedError:
    """A refusal in upstream's words: its clients look for how it ends."""
    return DeniedError(f"{what}: {reason}: {REFUSED}")


def _token(segment: Any) -> str:
    token = segment.get("token", "") if isinstance(segment, dict) else None
    if not isinstance(token, str):
        raise _malformed("a segment is no object with a token")
    return token


def _malformed(why: str) -> InvalidError:
    return InvalidError(
        f"the registration's path metadata cannot be read: {why}",
        hint='it has the form {"Index":0,"PathSegments":[{"token":"…"}]}',
    )

"""SPIFFE ids: the only names that identities have in the mesh.

Parsed strictly by the SPIFFE-ID specification and never normalised: two ids are
the same exactly if their texts are, so a policy, a cache and a token compare
strings and cannot be led astray by a second spelling.
"""

import re
from dataclasses import dataclass

from nsm.errors import InvalidError

MAX_ID = 2048  # bytes, the specification's bound for the whole URI
MAX_TRUST_DOMAIN = 255  # bytes

_SCHEME = "spiffe://"
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+", re.ASCII)
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class SpiffeId:
    """`spiffe://<trust domain><path>`; the path is empty or starts with a slash."""

    trust_domain: str
    path: str = ""

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        _check_path(self.path, self)
        if len(self.trust_domain) + len(self.path) + len(_SCHEME) > MAX_ID:
            raise InvalidError(f"a SPIFFE id has at most {MAX_ID} bytes; this one has more")

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}{self.path}"

    @classmethod
    def parse(cls, text: str) -> "SpiffeId":
        """The id that text spells; raises InvalidError naming the rule that it breaks."""
        if len(text) > MAX_ID:
            raise InvalidError(
                f"a SPIFFE id has at most {MAX_ID} bytes; this one has {len(text)} characters"
            )
        if not text.startswith(_SCHEME):
            raise InvalidError(
                f"{text!r} is no SPIFFE id", hint="it has the form spiffe://<trust domain>/<path>"
            )
        trust_domain, slash, path = text[len(_SCHEME) :].partition("/")
        return cls(trust_domain, slash + path)


def check_trust_domain(name: str) -> str:
    """The name if it is a trust domain's; raises InvalidError otherwise."""
    if len(name) > MAX_TRUST_DOMAIN:
        raise InvalidError(
            f"a trust domain's name has at most {MAX_TRUST_DOMAIN} bytes; "
            f"this one has {len(name)} characters"
        )
    if not _TRUST_DOMAIN.fullmatch(name):
        raise InvalidError(
            f"{name!r} is no trust domain's name",
            hint="lower-case letters, digits, dots, dashes and underscores only: "
            "no user, no port, no escapes",
        )
    return name


def _check_path(path: str, whose: SpiffeId) -> None:
    if not path:
        return
    first, *segments = path.split("/")
    for segment in segments or [first]:
        if first or segment in (".", "..") or not _SEGMENT.fullmatch(segment):
            raise InvalidError(
                f"the path of {str(whose)[:MAX_ID]!r} has a segment {segment[:64]!r} "
                "that no SPIFFE id may have",
                hint="letters, digits, dots, dashes and underscores between single slashes, "
                "none at the end; no query, no fragment, no escapes, no '.' or '..'",
            )

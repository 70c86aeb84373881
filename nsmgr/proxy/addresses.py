"""Tunnels' addresses at a domain's border (`wire.md` §9.5). Pure.

A node may have one address inside its domain and another by which it is reached
from outside. Each side's proxy writes the outer one over its own node's, and leaves
the inner one beside it (`orig_…`): the source's proxy on the requester's side,
the target's on the responder's. A request with `orig_src_ip` has crossed a border.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from urllib.parse import urlsplit, urlunsplit

import yaml

from nsm.errors import PreconditionError
from nsm.mechanisms import DST_IP, ORIG_DST_IP, ORIG_SRC_IP, SRC_IP
from nsm.model import Mechanism


class Crossing(Enum):
    """How a request crosses a domain's border at this proxy."""

    LEAVING = "out of this domain"
    ENTERING = "into this domain"
    NONE = "inside this domain"


@dataclass(frozen=True, slots=True)
class AddressMap:
    """Outer addresses by inner ones, in their shortest forms; None: each is its own."""

    outer: Mapping[str, str] | None = field(default=None)
    path: str = ""

    def outside(self, inner: str) -> str:
        """By what inner is reached from other domains. Raises PreconditionError if unknown."""
        if self.outer is None:
            return inner
        if found := self.outer.get(_shortest(inner)):
            return found
        raise PreconditionError(
            f"address {inner[:64]!r} has none here by which other domains reach it:"
            f" {self.path} does not list it",
            hint=f"add the line  {inner[:64]}: THE-ADDRESS-OUTSIDE  there, the same twice where it"
            " is reached by that one",
        )

    def outside_url(self, url: str) -> str:
        """The URL with its host as it is reached from other domains; a name stays."""
        parts = urlsplit(url)
        try:
            inner = str(ip_address(parts.hostname or ""))
        except ValueError:
            return url
        outer = self.outside(inner)
        host = f"[{outer}]" if ":" in outer else outer
        port = f":{parts.port}" if parts.port else ""
        return urlunsplit(parts._replace(netloc=f"{host}{port}"))


def parse(text: str, path: str) -> AddressMap:
    """The map in a file's text, `inner: outer` on each line; ValueError says what is wrong."""
    # because YAML would take some IPv6 addresses for numbers to the base of 60
    read = yaml.load(text, Loader=yaml.BaseLoader) or {}  # noqa: S506 - it makes texts only
    if not isinstance(read, dict):
        raise ValueError(  # noqa: TRY004 - the file's value is wrong, not our types
            f"lines of the form INNER: OUTER are expected, not a {type(read).__name__}"
        )
    return AddressMap(
        {str(ip_address(str(k))): str(ip_address(str(v))) for k, v in read.items()}, path
    )


def has_left(mechanisms: Sequence[Mechanism]) -> bool:
    """Whether a request that offers these has left the domain it began in."""
    return any(one.get(ORIG_SRC_IP) for one in mechanisms)


def onward(mechanism: Mechanism, crossing: Crossing, known: AddressMap) -> Mechanism:
    """What the next hop is told of the requester's side; the responder speaks for its own."""
    src = mechanism.get(SRC_IP)
    if crossing is Crossing.ENTERING:
        _check_known(src, mechanism.get(ORIG_SRC_IP))
    if not src or crossing is Crossing.NONE:
        return mechanism
    if crossing is Crossing.ENTERING:
        return mechanism.without(DST_IP, ORIG_DST_IP)
    return mechanism.with_(**{SRC_IP: known.outside(src), ORIG_SRC_IP: src})


def back(
    answered: Mechanism, crossing: Crossing, asked: Sequence[Mechanism], known: AddressMap
) -> Mechanism:
    """What who asked is told of the answer: its own side as it said it, the responder's ours."""
    if crossing is Crossing.LEAVING:
        _check_known(answered.get(DST_IP), answered.get(ORIG_DST_IP))
        own = (one.get(SRC_IP) for one in asked if one.type == answered.type)
        if src := next(own, "") or answered.get(ORIG_SRC_IP):
            # Absent and not empty: what is empty reads as an address in who draws a VNI (§2.2).
            return answered.with_(**{SRC_IP: src}).without(ORIG_SRC_IP)
    elif crossing is Crossing.ENTERING and (dst := answered.get(DST_IP)):
        return answered.with_(**{DST_IP: known.outside(dst), ORIG_DST_IP: dst})
    return answered


def _check_known(outer: str, inner: str) -> None:
    """Upstream's proxies tell an address that their map lacks as an empty one."""
    if inner and not outer:
        raise PreconditionError(
            f"address {inner[:64]!r} of the other domain has none by which it is reached from"
            " here: that domain's nsmgr-proxy tells none",
            hint=f"its NSM_MAP_IP_FILE_PATH lacks {inner[:64]}",
        )


def _shortest(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        return text

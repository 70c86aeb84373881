"""One line that says what a client wants: `kernel://icmp-responder/nsm-1?app=x`.

    mechanism://service[@domain][/interface][?label=value&…]        `wire.md` §11.3

The line comes from annotations, variables and command lines, so every mistake
in it has a sentence of its own.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, unquote_to_bytes, urlencode

from nsm.errors import InvalidError
from nsm.mechanisms import INODE_URL, KERNEL, LOCAL, NAME, check_name
from nsm.model import Mechanism

LONGEST = 4096  # bytes of one URL; a pod's annotations share 256 KiB
EXAMPLE = "write it as kernel://SERVICE[@DOMAIN][/INTERFACE][?LABEL=VALUE&…]"
HEX = frozenset(string.hexdigits)


@dataclass(frozen=True, slots=True)
class NSURL:
    """What a client wants: a service, by which mechanism, as which interface, with which labels.

    interface is None where the URL had no path and "" where it ended in a slash;
    in both cases a name is generated, but the wire tells them apart.
    """

    mechanism: str  # the type, upper case
    service: str
    interface: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def preference(self, inode_url: str = "") -> Mechanism:
        """The mechanism preference this asks for; inode_url names the client's namespace."""
        parameters = {}
        if self.interface is not None:
            parameters[NAME] = self.interface
        if inode_url:
            parameters[INODE_URL] = inode_url
        return Mechanism(LOCAL, self.mechanism, parameters)

    def __str__(self) -> str:
        user, at, domain = self.service.partition("@")
        path = "" if self.interface is None else "/" + quote(self.interface, safe="")
        query = "?" + urlencode(self.labels) if self.labels else ""
        return f"{self.mechanism.lower()}://{quote(user, safe='')}{at}{domain}{path}{query}"


def parse(text: str) -> NSURL:
    """Read one NSURL. Raises InvalidError with the URL, what is wrong in it and the right form."""
    text = text.strip()
    if len(text.encode("utf-8", "surrogateescape")) > LONGEST:
        raise _wrong(text, f"has over {LONGEST} bytes")
    if bad := next((c for c in text if c <= " " or c == "\x7f"), None):
        raise _wrong(text, f"holds {bad!r}")
    if not text:
        raise _wrong(text, "is empty")
    scheme, colon, rest = text.partition(":")
    if not colon or not rest.startswith("//"):
        raise _wrong(text, "names no mechanism")
    if not _is_scheme(scheme):
        raise _wrong(text, f"names no mechanism: {scheme!r} is not a word")
    rest, _, fragment = rest[2:].partition("#")
    if fragment:
        raise _wrong(text, f"has a fragment, {('#' + fragment)!r}, which means nothing here")
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    service = _service(text, authority)
    interface = None
    if slash:
        interface = _decoded(text, path.rpartition("/")[2], "interface name")
        if interface and scheme.upper() == KERNEL:
            interface = check_name(interface, whose=f"NSURL {_shown(text)!r}")
    return NSURL(scheme.upper(), service, interface, _labels(text, query))


def groups(text: str) -> tuple[tuple[str, ...], ...]:
    """Read `[a,b],c` as the groups (a, b) and (c): the form of lists of lists in variables.

    Used for awareness groups and for prefixes (`wire.md` §10.1, §11.3). Raises
    InvalidError where brackets do not pair.
    """
    found: list[tuple[str, ...]] = []
    rest = text.strip()
    while rest:
        if rest.startswith("["):
            inner, closed, rest = rest[1:].partition("]")
            if not closed or "[" in inner:
                raise InvalidError(
                    f"{text[:200]!r} opens a bracket that it does not close",
                    hint="write groups as [a,b],c",
                )
            rest = rest.strip()
            if rest and not rest.startswith(","):
                raise InvalidError(
                    f"{text[:200]!r} has {rest[:20]!r} behind a bracket",
                    hint="write groups as [a,b],c",
                )
            rest = rest[1:]
        else:
            inner, _, rest = rest.partition(",")
            if "]" in inner:
                raise InvalidError(
                    f"{text[:200]!r} closes a bracket that it did not open",
                    hint="write groups as [a,b],c",
                )
        members = tuple(one.strip() for one in inner.split(",") if one.strip())
        if members:
            found.append(members)
        rest = rest.strip()
    return tuple(found)


def awareness_groups(text: str) -> tuple[tuple[NSURL, ...], ...]:
    """Read NSM_AWARENESS_GROUPS: services whose wires should not share addresses."""
    return tuple(tuple(parse(one) for one in group) for group in groups(text))


def connection_ids(name: str, urls: Sequence[NSURL]) -> tuple[str, ...]:
    """The id of each URL's connection, `<name>-<place>`: how a restarted client finds them."""
    return tuple(f"{name}-{place}" for place in range(len(urls)))


def _is_scheme(text: str) -> bool:
    letters = string.ascii_letters
    return bool(text) and text[0] in letters and not set(text) - set(letters + "0123456789+-.")


def _service(text: str, authority: str) -> str:
    userinfo, at, host = authority.rpartition("@")
    if "@" in userinfo:
        raise _wrong(text, "has two '@': a service has one domain")
    user, colon, _ = userinfo.partition(":")
    if colon:
        raise _wrong(text, "has a ':' before its '@': a service's name holds none")
    host = _without_port(text, host)
    if at:
        user = _decoded(text, user, "service")
        if not user:
            raise _wrong(text, "names no service before its '@'")
        if not host:
            raise _wrong(text, "names no domain behind its '@'")
        return f"{user}@{host}"
    if not host:
        raise _wrong(text, "names no service")
    return host


def _without_port(text: str, host: str) -> str:
    """The host alone: a port means nothing here, and upstream's parser drops it too."""
    if host.startswith("["):
        inner, closed, rest = host[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise _wrong(text, f"has a broken address {host!r}")
        return inner
    name, colon, port = host.partition(":")
    if colon and (not port.isascii() or (port and not port.isdecimal())):
        raise _wrong(text, f"has {port!r} where a port would stand")
    if "%" in name:
        raise _wrong(text, f"has an escape in {name!r}: service and domain are written plainly")
    return name


def _labels(text: str, query: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for pair in query.split("&"):
        if not pair:
            continue
        key, _, value = pair.partition("=")
        key = _decoded(text, key.replace("+", " "), "label")
        value = _decoded(text, value.replace("+", " "), f"label {key!r}")
        if not key:
            raise _wrong(text, f"has a label without a name, {pair!r}")
        labels[key] = f"{labels[key]},{value}" if key in labels else value
    return labels


def _decoded(text: str, part: str, what: str) -> str:
    pieces = part.split("%")
    if not all(len(p) >= 2 and p[0] in HEX and p[1] in HEX for p in pieces[1:]):
        raise _wrong(text, f"has a broken %-escape in its {what}")
    try:
        return unquote_to_bytes(part).decode()
    except UnicodeError:
        raise _wrong(text, f"is not UTF-8 in its {what}") from None


def _shown(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"


def _wrong(text: str, problem: str) -> InvalidError:
    return InvalidError(f"NSURL {_shown(text)!r} {problem}", hint=EXAMPLE)

"""What a member of a vL3 is called: templates over its connection (`wire.md` §10.4). Pure.

Two ways to write the same: upstream's `{{ index .Labels "podName" }}.{{ .NetworkService }}.`
(of Go's templates what names need: fields, `index`, `target`, `domain`, pipes, brackets),
and `{client}.orders-db`. A template that cannot be understood is refused before anybody
is named by it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from nsm import domains
from nsm.errors import InvalidError
from nsm.model import Connection

DEFAULT = '{{ index .Labels "podName" }}.{{ target .NetworkService }}.'
"""Upstream's, but for `target`: what is behind the @ of an interdomain service is no DNS name."""
LONGEST = 1024  # characters of a template
MOST = 16  # templates of a router
DEEPEST = 8  # brackets in brackets

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:[^"\\]|\\["\\])*"|`[^`]*`)|(?P<field>(?:\.[A-Za-z_][A-Za-z0-9_]*)+)"""
    r"""|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<mark>[()|]))""",
    re.ASCII,
)
_OPEN = re.compile(r"\{\{-?|\{(?P<word>[A-Za-z]*)\}|[{}]")
_PIECE = re.compile(r"""\{\{(?:"(?:[^"\\]|\\.)*"|`[^`]*`|(?!\}\})[^"`])*\}\}|.""", re.DOTALL)
_CLOSE = re.compile(r"\s-\}\}|\}\}")
_HINT = (
    '{{ index .Labels "KEY" }}, {{ .NetworkService }}, {{ target .NetworkService }},'
    " {{ domain .NetworkService }}, or {client}, {service}, {domain}"
)

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Value:
    """Part of a template: what it is of a connection. One of labels and text is there."""

    text: Callable[[Connection], str] | None = None
    labels: Callable[[Connection], Labels] | None = None


def _text(of: Callable[[Connection], str]) -> _Value:
    return _Value(text=of)


def _client(conn: Connection) -> str:
    return conn.segments[0].name if conn.segments else ""


_FIELDS: Mapping[str, _Value] = {
    "Id": _text(lambda conn: conn.id),
    "NetworkService": _text(lambda conn: conn.service),
    "NetworkServiceEndpointName": _text(lambda conn: conn.endpoint),
    "Payload": _text(lambda conn: conn.payload),
    "Labels": _Value(labels=lambda conn: conn.labels),
}
_WORDS: Mapping[str, Callable[[Connection], str]] = {
    "client": _client,
    "service": lambda conn: domains.split(conn.service)[0],
    "domain": lambda conn: domains.split(conn.service)[1],
}


@dataclass(frozen=True, slots=True)
class Template:
    """A template that was understood."""

    written: str
    parts: tuple[Callable[[Connection], str], ...]

    def __str__(self) -> str:
        return self.written

    def name(self, conn: Connection) -> str:
        """What the connection's client is called by it: lower case, without a last dot.

        Where nothing is known that the first part needs, it begins with a dot: nobody is
        called so, and its domain is one all the same. Raises InvalidError for what DNS
        cannot name.
        """
        text = "".join(part(conn) for part in self.parts).lower()
        text = re.sub(r"\.{2,}", ".", text).removesuffix(".")
        for label in text.removeprefix(".").split("."):
            if text and not _LABEL.fullmatch(label):
                raise InvalidError(
                    f"connection {conn.id[:64]!r} of service {conn.service[:64]!r} would be called"
                    f" {text[:256]!r} by the template {self.written!r}, and {label[:64]!r} cannot"
                    " be part of a DNS name",
                    hint="parts have up to 63 letters, digits, - and _, from the client's labels"
                    " and the service; an interdomain service is named by its target and domain",
                )
        if len(text) > 253:
            raise InvalidError(
                f"connection {conn.id[:64]!r} would be called by {len(text)} characters by the"
                f" template {self.written!r}; a DNS name has up to 253"
            )
        return text


def listed(text: str) -> tuple[str, ...]:
    """The templates of a list whose commas are between them, not in their braces."""
    found = [""]
    for piece in _PIECE.findall(text):
        if piece == ",":
            found.append("")
        else:
            found[-1] += piece
    return tuple(one.strip() for one in found)


def parse(text: str) -> Template:
    """The template as it is written in NSM_DNS_TEMPLATES. Raises InvalidError."""
    if not text.strip():
        raise _wrong(text, "is empty")
    if len(text) > LONGEST:
        raise _wrong(text, f"has more than {LONGEST} characters")
    parts: list[Callable[[Connection], str]] = []
    place = 0
    while place < len(text):
        opens = _OPEN.search(text, place)
        literal = text[place : opens.start() if opens else len(text)]
        parts.append(_literal(text, literal.rstrip() if opens and opens[0] == "{{-" else literal))
        if opens is None:
            break
        part, place = _part(text, opens)
        parts.append(part)
    return Template(text, tuple(parts))


def _literal(text: str, literal: str) -> Callable[[Connection], str]:
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", literal, re.ASCII):
        raise _wrong(text, f"has {literal!r}, which cannot be part of a DNS name")
    return _constant(literal)


def _part(text: str, opens: re.Match[str]) -> tuple[Callable[[Connection], str], int]:
    """What stands in braces, and where it ends."""
    if opens[0].startswith("{{"):
        reader = _Reader(text, opens.end())
        return reader.whole(), reader.place
    if opens["word"] is None:
        raise _wrong(text, f"has a single {opens[0]}")
    if opens["word"] not in _WORDS:
        raise _wrong(text, f"asks for {opens[0]}, which there is not")
    return _WORDS[opens["word"]], opens.end()


def parse_all(texts: Iterable[str]) -> tuple[Template, ...]:
    """Templates of a router, at least one. Raises InvalidError."""
    found = tuple(dict.fromkeys(map(parse, dict.fromkeys(texts))))
    if not 0 < len(found) <= MOST:
        raise InvalidError(
            f"NSM_DNS_TEMPLATES has {len(found)} templates; a router takes 1 to {MOST}"
        )
    return found


def called(templates: Sequence[Template], conn: Connection) -> tuple[str, ...]:
    """Everything that the connection's client is called. Raises InvalidError."""
    return tuple(dict.fromkeys(template.name(conn) for template in templates))


def search_domains(names: Iterable[str]) -> tuple[str, ...]:
    """Every suffix after the first label of each name, longest first of each."""
    found: dict[str, None] = {}
    for name in names:
        rest = name.partition(".")[2]
        while rest:
            found[rest] = None
            rest = rest.partition(".")[2]
    return tuple(found)


def _constant(text: str) -> Callable[[Connection], str]:
    return lambda _: text


def _wrong(text: str, why: str) -> InvalidError:
    return InvalidError(f"the template {text[:256]!r} of NSM_DNS_TEMPLATES {why}", hint=_HINT)


class _Reader:
    """Reads what is between `{{` and `}}`."""

    def __init__(self, text: str, place: int) -> None:
        self.text = text
        self.place = place
        closes = self._closing()
        self._inner = text[place:closes]
        self._at = 0
        self._depth = 0
        self._group: str | None = ""
        self._value = ""
        end = _CLOSE.match(text, closes)
        assert end
        self.place = end.end()
        if end[0].startswith((" ", "\t", "\n")):  # `-}}` takes the space behind it
            self.place += len(text[self.place :]) - len(text[self.place :].lstrip())

    def _closing(self) -> int:
        at = self.place
        while at < len(self.text):
            if _CLOSE.match(self.text, at):
                return at
            quoted = re.compile(r'"(?:[^"\\]|\\.)*"|`[^`]*`').match(self.text, at)
            at = quoted.end() if quoted else at + 1
        raise _wrong(self.text, "has {{ without }}")

    def whole(self) -> Callable[[Connection], str]:
        self._next()
        value = self._pipeline()
        if self._group is not None:
            raise self._unexpected()
        if value.text is None:
            raise _wrong(self.text, 'has all labels where a text is wanted: index .Labels "KEY"')
        return value.text

    def _next(self) -> None:
        rest = self._inner[self._at :]
        if not rest.strip():
            self._group, self._value = None, ""
            return
        match = _TOKEN.match(rest)
        if match is None:
            raise _wrong(self.text, f"cannot be read from {rest.strip()[:40]!r} on")
        self._at += match.end()
        self._group = match.lastgroup
        self._value = match[match.lastgroup or 0]

    def _unexpected(self) -> InvalidError:
        return _wrong(self.text, f"has {self._value[:40]!r} where it cannot be")

    def _pipeline(self) -> _Value:
        value = self._command(None)
        while self._value == "|" and self._group == "mark":
            self._next()
            value = self._command(value)
        return value

    def _command(self, piped: _Value | None) -> _Value:
        name = ""
        if self._group == "word":
            name = self._value
            self._next()
        operands = []
        while self._group in ("string", "field") or (self._group, self._value) == ("mark", "("):
            operands.append(self._operand())
        if piped is not None:
            operands.append(piped)
        if name:
            return self._call(name, operands)
        if piped is not None or len(operands) != 1:
            if self._group is None and not operands:
                raise _wrong(self.text, "has nothing between {{ and }}")
            raise _wrong(self.text, "has values side by side without a function")
        return operands[0]

    def _operand(self) -> _Value:
        group, value = self._group, self._value
        if group == "mark":
            self._depth += 1
            if self._depth > DEEPEST:
                raise _wrong(self.text, f"has more than {DEEPEST} brackets in brackets")
            self._next()
            found = self._pipeline()
            if (self._group, self._value) != ("mark", ")"):
                raise _wrong(self.text, "has ( without )")
            self._depth -= 1
            self._next()
            return found
        self._next()
        if group == "string":
            text = value[1:-1] if value[0] == "`" else re.sub(r"\\(.)", r"\1", value[1:-1])
            return _Value(text=_constant(text))
        first, *keys = value[1:].split(".")
        known = _FIELDS.get(first)
        if known is None or len(keys) > 1 or (keys and known.labels is None):
            raise _wrong(self.text, f"asks for {value}, which a connection has not, or not here")
        return _of_labels(known, keys[0]) if keys else known

    def _call(self, name: str, operands: list[_Value]) -> _Value:
        if name == "index":
            if len(operands) != 2 or operands[0].labels is None or operands[1].text is None:
                raise _wrong(self.text, 'has index without labels and a key: index .Labels "KEY"')
            labels, key = operands[0].labels, operands[1].text
            return _text(lambda conn: labels(conn).get(key(conn), ""))
        if name not in ("target", "domain"):
            raise _wrong(self.text, f"calls {name!r}, which there is not")
        if len(operands) != 1 or operands[0].text is None:
            raise _wrong(self.text, f"has {name} without the one text that it is of")
        of, part = operands[0].text, 0 if name == "target" else 1
        return _text(lambda conn: domains.split(of(conn))[part])


def _of_labels(known: _Value, key: str) -> _Value:
    labels = known.labels
    assert labels
    return _text(lambda conn: labels(conn).get(key, ""))

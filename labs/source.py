"""YAML as people wrote it: plain values, and the line each of them stands on.

A message without a line number makes its reader search. YAML 1.1's guesses
(`on` is true, `12:30` is 750) would bite in a file with a key called `on`, so
the values follow YAML 1.2's core: true and false, numbers, null, text.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from nsm.errors import InvalidError
from nsm.written import composed

LARGEST: Final = 1 << 20  # bytes of a lab file
MOST: Final = 50_000  # values in one, aliases counted as often as they are used
DEEPEST: Final = 30

Where = tuple[str | int, ...]
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"[-+]?([0-9]*\.[0-9]+|[0-9]+\.)([eE][-+]?[0-9]+)?$")


@dataclass(frozen=True, slots=True)
class Source:
    """A file's values and the line (from 1) of each key and list item."""

    name: str
    data: Any
    lines: dict[Where, int] = field(repr=False)

    def at(self, where: Where) -> str:
        """`FILE:LINE` of a value, or of the nearest one around it that is there."""
        while where not in self.lines and where:
            where = where[:-1]
        return f"{self.name}:{self.lines.get(where, 1)}"


def spell(where: Where) -> str:
    """A place as people write it: `checks[2].ping.count`."""
    text = ""
    for step in where:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def load(text: str, name: str) -> Source:
    """Read YAML text; name is what messages call it.

    Raises InvalidError with file, line, and what was found and expected.
    """
    if len(text.encode()) > LARGEST:
        raise InvalidError(f"{name}:1: the file is larger than {LARGEST >> 10} KiB")
    root = composed(text, name, deepest=DEEPEST)
    if root is None:
        raise InvalidError(f"{name}:1: the file is empty", hint="see `nsmctl lab schema`")
    lines: dict[Where, int] = {}
    return Source(name, _value(root, (), name, lines), lines)


def _value(node: yaml.Node, where: Where, name: str, lines: dict[Where, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(where, line)
    if len(lines) > MOST or len(where) > DEEPEST:
        raise InvalidError(
            f"{name}:{line}: more than {MOST} values or {DEEPEST} levels",
            hint="is an alias looping?",
        )
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*where, i), name, lines) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, where, name, lines)
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node)


def _mapping(
    node: yaml.MappingNode, where: Where, name: str, lines: dict[Where, int]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, item in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidError(f"{name}:{line}: {spell(where)}: a key must be plain text")
        here = (*where, key.value)
        if key.value in values:
            raise InvalidError(
                f"{name}:{line}: {spell(here)}: is there twice, first in line {lines[here]}"
            )
        lines[here] = line
        values[key.value] = _value(item, here, name, lines)
    return values


def _scalar(node: yaml.ScalarNode) -> str | int | float | bool | None:
    text: str = node.value
    if node.style in ("'", '"', "|", ">"):
        return text
    if text in ("true", "false"):
        return text == "true"
    if text in ("", "null", "~"):
        return None
    if _INT.match(text) and len(text) < 20:
        return int(text)
    return float(text) if _FLOAT.match(text) else text

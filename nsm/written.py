"""Files that people write, in YAML: each value and each refusal with its line. Pure."""

import re
from collections.abc import Iterable
from typing import Any, Final

import yaml

from nsm.errors import InvalidError

DEEPEST: Final = 8  # levels of a file that has two or three
HIGHEST_ID: Final = 2**32 - 2


def composed(text: str, where: str, *, deepest: int = DEEPEST) -> yaml.Node | None:
    """The nodes of a file, never objects: no tag in it can call anything. None: it is empty.

    where is its path. Raises InvalidError with that, the line and what is wrong there.
    """
    try:
        loader = _Loader(text)
        loader.where, loader.deepest = where, deepest
        try:
            node: yaml.Node | None = loader.get_single_node()
            return node
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as broken:
        at = broken.problem_mark.line + 1 if broken.problem_mark else 1
        raise InvalidError(f"{where}:{at}: no YAML: {broken.problem}") from None
    except (yaml.YAMLError, ValueError) as broken:
        raise InvalidError(f"{where}:1: no YAML: {str(broken)[:200]}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML calls itself for each level: a file must not have it do so until Python ends it."""

    where = ""
    deepest = DEEPEST
    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._level += 1
        if self._level > self.deepest:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise InvalidError(f"{self.where}:{mark.line + 1}: more than {self.deepest} levels")
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


def line(node: yaml.Node) -> int:
    """The line, from 1, that a value begins on."""
    found: int = node.start_mark.line + 1
    return found


def pairs(node: yaml.Node, file: str, what: str) -> Iterable[tuple[str, yaml.Node, str]]:
    """Keys and values of a mapping, each with its place, `FILE:LINE`; what names it."""
    if not isinstance(node, yaml.MappingNode):
        raise InvalidError(f"{file}:{line(node)}: {what} is no mapping, KEY: VALUE")
    seen: set[str] = set()
    for key_node, value in node.value:
        at = f"{file}:{line(key_node)}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise InvalidError(f"{at}: a key of {what} is no text")
        key = str(key_node.value)
        if key in seen:
            raise InvalidError(f"{at}: {key[:64]!r} is there twice in {what}")
        seen.add(key)
        yield key, value, at


def scalar(node: yaml.Node) -> str:
    """A single value, as it is written."""
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        raise InvalidError("one value is expected")
    return str(node.value)


def account(node: yaml.Node) -> int:
    """A user's or group's number."""
    text = scalar(node)
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) > HIGHEST_ID:
        raise InvalidError(f"{text[:64]!r} is no user's or group's number")
    return int(text)


def known(said: Any, keys: set[str], where: str) -> dict[str, Any]:
    """What a mapping of a file says, if it says nothing but keys."""
    if not isinstance(said, dict):
        raise InvalidError(f"{where}: it is no mapping of {', '.join(sorted(keys))}")
    for key in said:
        if key not in keys:
            raise InvalidError(
                f"{where}: unknown key {str(key)[:64]!r}", hint=f"known: {', '.join(sorted(keys))}"
            )
    return said

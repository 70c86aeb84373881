"""The file of domains that are known beforehand: `cluster2: {registry: [tcp://…]}`.

People write it, so whatever is wrong with it is said with the line it stands on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import yaml

from nsm.domains import MOST_URLS, canonical, is_name
from nsm.errors import InvalidError

ROLES = ("registry", "nsmgr-proxy")
MOST_DOMAINS = 10_000  # in a file
DEEPEST = 8  # levels of a file: it has three
EXAMPLE = "a domain has the form  cluster2: {registry: [tcp://HOST:PORT], nsmgr-proxy: [...]}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a domain's two doors are, as URLs to be tried in turn; empty: it has none."""

    registry: tuple[str, ...] = ()
    manager_proxy: tuple[str, ...] = ()


def parse_map(text: str, where: str, check: Callable[[str], object]) -> Mapping[str, Place]:
    """The domains of a file, `domain: {registry: [tcp://…], nsmgr-proxy: [tcp://…]}`.

    where is the file's path; check raises InvalidError for what is no URL. Raises
    InvalidError with file, line and what is expected there.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as broken:
        line = broken.problem_mark.line + 1 if broken.problem_mark else 1
        raise InvalidError(f"{where}:{line}: {broken.problem}", hint=EXAMPLE) from broken
    except yaml.YAMLError as broken:
        raise InvalidError(f"{where}: {broken}", hint=EXAMPLE) from broken
    if root is None:
        return {}
    found: dict[str, Place] = {}
    for key, node in _pairs(root, where, "the file", MOST_DOMAINS):
        name = canonical(key.value)
        if not is_name(key.value):
            raise _wrong(where, key, f"{key.value[:256]!r} is no domain's name")
        if name in found:
            raise _wrong(where, key, f"domain {name!r} is there twice")
        urls: dict[str, tuple[str, ...]] = {}
        for role, listed in _pairs(node, where, f"domain {name!r}", len(ROLES)):
            if role.value not in ROLES:
                raise _wrong(where, role, f"domain {name!r} has no {role.value[:64]!r}")
            urls[role.value] = tuple(_urls(listed, where, check))
        found[name] = Place(urls.get("registry", ()), urls.get("nsmgr-proxy", ()))
    return found


class _Loader(yaml.SafeLoader):
    """PyYAML calls itself for each level: a file must not have it do so until Python ends it."""

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._level += 1
        if self._level > DEEPEST:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels", problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


def _pairs(
    node: yaml.Node, where: str, what: str, most: int
) -> Iterable[tuple[yaml.ScalarNode, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise _wrong(where, node, f"{what} is no mapping")
    if len(node.value) > most:
        raise _wrong(where, node, f"{what} has {len(node.value)} entries, more than {most}")
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _wrong(where, key, f"a key of {what} is no text")
        if key.value in seen:
            raise _wrong(where, key, f"{what} has {key.value[:64]!r} twice")
        seen.add(key.value)
        yield key, value


def _urls(node: yaml.Node, where: str, check: Callable[[str], object]) -> Iterable[str]:
    listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if len(listed) > MOST_URLS:
        raise _wrong(where, node, f"{len(listed)} URLs, more than {MOST_URLS}")
    for one in listed:
        if not isinstance(one, yaml.ScalarNode):
            raise _wrong(where, one, "a URL, or a list of URLs, is expected")
        try:
            check(one.value)
        except InvalidError as wrong:
            raise _wrong(where, one, wrong.message) from wrong
        yield one.value


def _wrong(where: str, node: yaml.Node, why: str) -> InvalidError:
    return InvalidError(f"{where}:{node.start_mark.line + 1}: {why}", hint=EXAMPLE)
